package controller

import (
	"sync"

	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// Bounds of the flow records kept in memory, and of one record.
const (
	flowRecords   = 20_000
	flowBytes     = 64 << 20
	maxRecordSize = 16 << 10
)

// flowRing holds the newest flow records. Writers never wait for readers: a reader
// that is slow finds the oldest gone, and how many.
type flowRing struct {
	mu      sync.Mutex
	records []*symbolonv1.FlowRecord // the oldest first
	sizes   []int
	bytes   int
	first   uint64        // sequence number of records[0]
	more    chan struct{} // closed and replaced when records are added
	lost    uint64        // reported lost by proxies, or refused here
}

func newFlowRing() *flowRing { return &flowRing{more: make(chan struct{})} }

// add takes a batch; records are the ring's from now on. lost is what the reporter
// could not send.
func (r *flowRing) add(records []*symbolonv1.FlowRecord, lost uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lost += lost
	for _, record := range records {
		size := proto.Size(record)
		if size > maxRecordSize {
			r.lost++
			continue
		}
		r.records, r.sizes = append(r.records, record), append(r.sizes, size)
		r.bytes += size
	}
	drop := 0
	for len(r.records)-drop > flowRecords || r.bytes > flowBytes {
		r.bytes -= r.sizes[drop]
		drop++
	}
	// The slices move forward over their arrays; append copies what is left into new
	// ones now and then, and so lets go of what was dropped.
	clear(r.records[:drop])
	r.records, r.sizes = r.records[drop:], r.sizes[drop:]
	r.first += uint64(drop)
	close(r.more)
	r.more = make(chan struct{})
}

// since returns the records from a sequence number on, the number that follows
// them, how many in between are gone, and a channel that closes when there are more.
func (r *flowRing) since(seq uint64) (records []*symbolonv1.FlowRecord, next, gone uint64, more <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	next = r.first + uint64(len(r.records))
	switch {
	case seq < r.first:
		gone, seq = r.first-seq, r.first
	case seq > next:
		seq = next
	}
	return append(records, r.records[seq-r.first:]...), next, gone, r.more
}

// start is the sequence number of the oldest record kept.
func (r *flowRing) start() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.first
}

func (r *flowRing) lostCount() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.lost
}
