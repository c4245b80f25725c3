package controller_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// end is workload w of a namespace; "" is an end without identity.
func end(namespace string) *symbolonv1.FlowEndpoint {
	if namespace == "" {
		return &symbolonv1.FlowEndpoint{Address: "203.0.113.1:40000"}
	}
	return &symbolonv1.FlowEndpoint{
		SpiffeId: "spiffe://acme.example" + strings.TrimSuffix(namespace, "/") + "/w", Namespace: namespace, Workload: "w",
	}
}

func record(id, from, to string, outcome symbolonv1.Outcome) *symbolonv1.FlowRecord {
	return &symbolonv1.FlowRecord{
		FlowId: id, Reporter: symbolonv1.Reporter_REPORTER_CLIENT, Host: "somebody else", Outcome: outcome,
		Source: end(from), Destination: end(to),
	}
}

func (h *host) report(t *testing.T, lost uint64, records ...*symbolonv1.FlowRecord) {
	t.Helper()
	if _, err := h.ReportFlows(t.Context(), connect.NewRequest(&symbolonv1.ReportFlowsRequest{Records: records, Lost: lost})); err != nil {
		t.Fatal(err)
	}
}

// watch collects n records, or all there are.
func (w *world) watch(req *symbolonv1.WatchFlowsRequest, n int) []string {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 20*time.Second)
	defer cancel()
	stream, err := w.admin().WatchFlows(ctx, connect.NewRequest(req))
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = stream.Close() }()
	var ids []string
	for len(ids) < n && stream.Receive() {
		ids = append(ids, stream.Msg().GetRecord().GetFlowId())
	}
	if len(ids) < n && req.GetFollow() {
		w.t.Fatalf("%v, then %v", ids, stream.Err())
	}
	return ids
}

func TestFlows(t *testing.T) {
	w := newWorld(t)
	h := w.enrol("/", nil)
	const allow, deny = symbolonv1.Outcome_OUTCOME_ALLOW, symbolonv1.Outcome_OUTCOME_DENY
	h.report(t, 5, record("1", "/a", "/b", allow), record("2", "/a/x", "/c", deny), record("3", "", "/ab", allow), record("4", "/b", "", deny))

	for want, req := range map[string]*symbolonv1.WatchFlowsRequest{
		"1 2 3 4": {},
		"3 4":     {Last: 2},
		"2 4":     {Outcome: deny},
		"4":       {Outcome: deny, Last: 1},
		"1 2":     {Namespace: "/a"},
		"1 4":     {Namespace: "/b"},
		"":        {Namespace: "/none"},
	} {
		if got := strings.Join(w.watch(req, 100), " "); got != want {
			t.Errorf("%v: got %q, want %q", req, got, want)
		}
	}

	// A follower gets what is there, then what comes.
	done := make(chan []string, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	stream, err := w.admin().WatchFlows(ctx, connect.NewRequest(&symbolonv1.WatchFlowsRequest{Follow: true, Outcome: deny, Last: 1}))
	if err != nil {
		t.Fatal(err)
	}
	first := make(chan *symbolonv1.FlowRecord, 1)
	go func() {
		var ids []string
		for len(ids) < 3 && stream.Receive() {
			ids = append(ids, stream.Msg().GetRecord().GetFlowId())
			if len(ids) == 1 {
				first <- stream.Msg().GetRecord()
			}
		}
		done <- ids
	}()
	if r := <-first; r.GetHost() != h.HostID {
		t.Errorf("host %q, want the reporter's own ID", r.GetHost())
	}
	h.report(t, 0, record("5", "/a", "/b", allow), record("6", "/a", "/b", deny))
	h.report(t, 0, record("7", "/a", "/b", deny))
	if got := strings.Join(<-done, " "); got != "4 6 7" {
		t.Errorf("followed %q, want 4 6 7", got)
	}
	_ = stream.Close()

	status, err := w.admin().GetStatus(t.Context(), connect.NewRequest(&symbolonv1.GetStatusRequest{}))
	if err != nil || status.Msg.GetFlowsLost() != 5 {
		t.Errorf("flows lost: %v, %v", status, err)
	}
}

// TestHugeFlowRecordIsLost, and counted.
func TestHugeFlowRecordIsLost(t *testing.T) {
	w := newWorld(t)
	h := w.enrol("/", nil)
	huge := record("huge", "/", "/", symbolonv1.Outcome_OUTCOME_ALLOW)
	huge.Source.Attributes = map[string]*symbolonv1.LabelValues{"app": {Values: slices.Repeat([]string{strings.Repeat("x", 2000)}, 20)}}
	h.report(t, 0, huge, record("small", "/", "/", symbolonv1.Outcome_OUTCOME_ALLOW))
	if got := strings.Join(w.watch(&symbolonv1.WatchFlowsRequest{}, 10), " "); got != "small" {
		t.Errorf("kept %q", got)
	}
	status, err := w.admin().GetStatus(t.Context(), connect.NewRequest(&symbolonv1.GetStatusRequest{}))
	if err != nil || status.Msg.GetFlowsLost() != 1 {
		t.Errorf("flows lost: %v, %v; want the huge one", status, err)
	}
}

// TestFlowWatchersEndWithTheController, and do not hold it up.
func TestFlowWatchersEndWithTheController(t *testing.T) {
	w := newWorld(t)
	h := w.enrol("/", nil)
	h.report(t, 0, record("1", "/", "/", symbolonv1.Outcome_OUTCOME_ALLOW))
	stream, err := w.admin().WatchFlows(t.Context(), connect.NewRequest(&symbolonv1.WatchFlowsRequest{Follow: true}))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stream.Close() }()
	if !stream.Receive() {
		t.Fatal(stream.Err())
	}
	began := time.Now()
	w.halt()
	if stream.Receive() {
		t.Error("another record")
	}
	wantCode(t, stream.Err(), connect.CodeUnavailable, "shutting down")
	if took := time.Since(began); took > 8*time.Second {
		t.Errorf("the shutdown waited %v for a watcher", took)
	}
}
