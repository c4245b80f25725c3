package controller

import (
	"strconv"
	"strings"
	"testing"

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
		r.add(numbered(i*5000, 5000, ""), 0)
	}
	records, next, gone, more := r.since(start)
	if len(records) != flowRecords || records[0].GetFlowId() != "5000" || records[len(records)-1].GetFlowId() != "24999" {
		t.Errorf("%d records from %s", len(records), records[0].GetFlowId())
	}
	if gone != 5000 || r.start() != 5000 || r.lostCount() != 0 {
		t.Errorf("%d gone, the oldest is %d, %d lost", gone, r.start(), r.lostCount())
	}
	select {
	case <-more:
		t.Error("more, but there is none")
	default:
	}
	r.add(numbered(25000, 1, ""), 7)
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
		r.add(numbered(i*100, 100, detail), 0)
	}
	records, _, _, _ := r.since(0)
	if r.bytes > flowBytes || len(records) < flowBytes/maxRecordSize || records[len(records)-1].GetFlowId() != "9999" {
		t.Errorf("%d bytes in %d records", r.bytes, len(records))
	}
	r.add(numbered(0, 1, strings.Repeat("x", maxRecordSize)), 0)
	if r.lostCount() != 1 {
		t.Errorf("%d lost, want the one that is too large", r.lostCount())
	}
}
