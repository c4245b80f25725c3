package controller

import (
	"container/heap"
	"math"
	"slices"
	"sort"
	"sync"

	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// Bounds of the flow records kept in memory, and of one record, bytes. A record
// counts for minFlowCharge at least, so that one bound is for number and size alike.
const (
	flowRecords   = 20_000
	minFlowCharge = 3 << 10
	flowBytes     = flowRecords * minFlowCharge
	maxRecordSize = 16 << 10
)

// flowRing holds the newest flow records. Hosts share it fairly: what is too much
// goes at the cost of the host that has the most, its oldest first, so that nobody
// can flush the records of others out. Writers never wait for readers: a reader that
// is slow finds records gone, and how many.
type flowRing struct {
	mu      sync.Mutex
	records []keptFlow // by sequence number
	evicted int        // how many of them are empty
	next    uint64     // the sequence number of the next record
	charge  int
	hosts   map[string]*flowReporter
	largest reporterHeap
	more    chan struct{} // closed and replaced when records are added
	lost    uint64        // reported lost by proxies, or refused here
}

// keptFlow is a record, or what is left of it: its number.
type keptFlow struct {
	seq    uint64
	record *symbolonv1.FlowRecord
	charge int
}

// flowReporter is a host with records in the ring.
type flowReporter struct {
	host   string
	seqs   []uint64 // of its records, the oldest first
	charge int
	place  int // in the heap
}

func newFlowRing() *flowRing {
	return &flowRing{hosts: make(map[string]*flowReporter), more: make(chan struct{})}
}

// add takes a host's batch; records are the ring's from now on. lost are those that
// the reporter could not send, and that were refused.
func (r *flowRing) add(host string, records []*symbolonv1.FlowRecord, lost ...uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, n := range lost {
		r.lose(n)
	}
	for _, record := range records {
		size := proto.Size(record)
		if size > maxRecordSize {
			r.lose(1)
			continue
		}
		r.append(host, keptFlow{r.next, record, max(size, minFlowCharge)})
		for r.charge > flowBytes {
			r.evict(r.largest[0])
		}
	}
	if r.evicted > len(r.records)/2 {
		r.records = slices.DeleteFunc(r.records, func(f keptFlow) bool { return f.record == nil })
		r.evicted = 0
	}
	close(r.more)
	r.more = make(chan struct{})
}

// lose counts; the number may be a host's word, and must not wrap around.
func (r *flowRing) lose(n uint64) { r.lost += min(n, math.MaxUint64-r.lost) }

func (r *flowRing) append(host string, f keptFlow) {
	r.next++
	r.records = append(r.records, f)
	r.charge += f.charge
	h := r.hosts[host]
	if h == nil {
		h = &flowReporter{host: host}
		r.hosts[host] = h
		heap.Push(&r.largest, h)
	}
	h.seqs = append(h.seqs, f.seq)
	h.charge += f.charge
	heap.Fix(&r.largest, h.place)
}

// evict takes the oldest record of a host.
func (r *flowRing) evict(h *flowReporter) {
	f := &r.records[r.find(h.seqs[0])]
	h.seqs = h.seqs[1:]
	h.charge -= f.charge
	r.charge -= f.charge
	f.record = nil
	r.evicted++
	if len(h.seqs) == 0 {
		heap.Remove(&r.largest, h.place)
		delete(r.hosts, h.host)
		return
	}
	heap.Fix(&r.largest, h.place)
}

// find is the place of the first record with this number or a later one.
func (r *flowRing) find(seq uint64) int {
	return sort.Search(len(r.records), func(i int) bool { return r.records[i].seq >= seq })
}

// since returns the records from a sequence number on, the number that follows
// them, how many in between are gone, and a channel that closes when there are more.
// 0 is before all of them.
func (r *flowRing) since(seq uint64) (records []*symbolonv1.FlowRecord, next, gone uint64, more <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	seq = min(seq, r.next)
	for _, f := range r.records[r.find(seq):] {
		if f.record != nil {
			records = append(records, f.record)
		}
	}
	return records, r.next, r.next - seq - uint64(len(records)), r.more
}

func (r *flowRing) lostCount() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.lost
}

// reporterHeap has the host with the most on top; container/heap says how.
type reporterHeap []*flowReporter

func (h reporterHeap) Len() int           { return len(h) }
func (h reporterHeap) Less(i, j int) bool { return h[i].charge > h[j].charge }

func (h reporterHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].place, h[j].place = i, j
}

// Push implements heap.Interface.
func (h *reporterHeap) Push(x any) {
	r := x.(*flowReporter)
	r.place = len(*h)
	*h = append(*h, r)
}

// Pop implements heap.Interface.
func (h *reporterHeap) Pop() any {
	old := *h
	last := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return last
}
