package controller

import (
	"math"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func numbered(from, n int, detail string) []*symbolonv1.FlowRecord {
	var out []*symbolonv1.FlowRecord
	for i := range n {
		out = append(out, &symbolonv1.FlowRecord{FlowId: strconv.Itoa(from + i), Detail: detail})
	}
	return out
}

// TestFlowRingKeepsTheNewest, and tells a slow reader how many it missed.
func TestFlowRingKeepsTheNewest(t *testing.T) {
	r := newFlowRing()
	_, start, _, _ := r.since(0)
	for i := range 5 {
		r.add("h", numbered(i*5000, 5000, ""), 0)
	}
	records, next, gone, more := r.since(start)
	if len(records) != flowRecords || records[0].GetFlowId() != "5000" || records[len(records)-1].GetFlowId() != "24999" {
		t.Errorf("%d records from %s", len(records), records[0].GetFlowId())
	}
	if gone != 5000 || r.lostCount() != 0 {
		t.Errorf("%d gone, %d lost", gone, r.lostCount())
	}
	select {
	case <-more:
		t.Error("more, but there is none")
	default:
	}
	r.add("h", numbered(25000, 1, ""), 7)
	<-more
	if records, _, gone, _ := r.since(next); len(records) != 1 || gone != 0 || records[0].GetFlowId() != "25000" || r.lostCount() != 7 {
		t.Errorf("then %v, %d gone, %d lost", records, gone, r.lostCount())
	}
	if records, _, gone, _ := r.since(1 << 40); len(records) != 0 || gone != 0 {
		t.Errorf("from the future: %d records, %d gone", len(records), gone)
	}
}

// TestFlowRingIsBoundedInBytes, not only in records.
func TestFlowRingIsBoundedInBytes(t *testing.T) {
	r := newFlowRing()
	detail := strings.Repeat("x", maxRecordSize-100)
	for i := range 100 {
		r.add("h", numbered(i*100, 100, detail), 0)
	}
	records, _, _, _ := r.since(0)
	if r.charge > flowBytes || len(records) < flowBytes/maxRecordSize || records[len(records)-1].GetFlowId() != "9999" {
		t.Errorf("%d bytes in %d records", r.charge, len(records))
	}
	r.add("h", numbered(0, 1, strings.Repeat("x", maxRecordSize)), 0)
	if r.lostCount() != 1 {
		t.Errorf("%d lost, want the one that is too large", r.lostCount())
	}
}

// TestFlowRingIsShared: a host that floods pushes out its own records, never those of
// one that has fewer, and nothing grows behind the quiet one's old record.
func TestFlowRingIsShared(t *testing.T) {
	r := newFlowRing()
	r.add("quiet", numbered(0, 100, ""))
	_, next, _, _ := r.since(0)
	for i := range 50 {
		r.add("flood", numbered(1000+i*1000, 1000, ""))
	}
	count := func() map[string]int {
		out := make(map[string]int)
		for host, h := range r.hosts {
			out[host] = len(h.seqs)
		}
		return out
	}
	records, _, gone, _ := r.since(0)
	if diff := cmp.Diff(map[string]int{"quiet": 100, "flood": flowRecords - 100}, count()); diff != "" {
		t.Error(diff)
	}
	if len(records) != flowRecords || records[0].GetFlowId() != "0" || records[100].GetFlowId() != strconv.Itoa(51000-(flowRecords-100)) {
		t.Errorf("%d records, from %s and %s", len(records), records[0].GetFlowId(), records[100].GetFlowId())
	}
	if gone != 50_100-flowRecords {
		t.Errorf("%d gone", gone)
	}
	// A follower misses some of the flood, and is told.
	if records, _, gone, _ := r.since(next); len(records) != flowRecords-100 || gone != 50_000-(flowRecords-100) {
		t.Errorf("a follower: %d records, %d gone", len(records), gone)
	}
	if n := cap(r.records); n > 4*flowRecords {
		t.Errorf("room for %d", n)
	}
	// Big records count for what they are: ten hosts have a tenth each.
	big := strings.Repeat("x", maxRecordSize-100)
	for i := range 10 {
		for range 20 {
			r.add(strconv.Itoa(i), numbered(0, 100, big))
		}
	}
	for host, h := range r.hosts {
		if host != "quiet" && (h.charge > flowBytes/10 || h.charge < flowBytes/12) {
			t.Errorf("host %s has %d bytes of %d", host, h.charge, flowBytes)
		}
	}
	if count()["quiet"] != 100 || r.charge > flowBytes {
		t.Errorf("%v, %d bytes", count(), r.charge)
	}
	// One that lost everything is forgotten.
	small := newFlowRing()
	small.add("a", numbered(0, 1, ""))
	small.evict(small.hosts["a"])
	if len(small.hosts) != 0 || len(small.largest) != 0 || small.charge != 0 {
		t.Errorf("left: %v, %d bytes", small.hosts, small.charge)
	}
}

// TestLostRecordsDoNotWrapAround: the number is the host's.
func TestLostRecordsDoNotWrapAround(t *testing.T) {
	r := newFlowRing()
	r.add("h", nil, 10, math.MaxUint64, 3)
	if n := r.lostCount(); n != math.MaxUint64 {
		t.Errorf("%d lost", n)
	}
}
