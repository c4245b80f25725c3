package flow

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func workload(name string) *End {
	return NewEnd(&symbolonv1.EdgeEnd{
		SpiffeId: "spiffe://acme.example/acme/" + name, Namespace: "/acme", Workload: name,
		Attributes: map[string]*symbolonv1.LabelValues{"app": {Values: []string{name}}, "proc.exe": {Values: []string{"/bin/" + name}}},
	})
}

func stranger(n int) *End {
	return NewEnd(&symbolonv1.EdgeEnd{Address: fmt.Sprintf("10.%d.%d.%d", n>>16, n>>8&255, n&255)})
}

func observation(from, to *End, outcome symbolonv1.Outcome, at time.Time) Observation {
	return Observation{
		From: from, To: to, Protocol: "tcp", Port: 443, Amount: Amount{Connections: 1, Sent: 10, Received: 20}, At: at,
		Record: &symbolonv1.FlowRecord{Outcome: outcome, Reporter: symbolonv1.Reporter_REPORTER_CLIENT, ClientPolicy: "/acme/p"},
	}
}

const (
	allow  = symbolonv1.Outcome_OUTCOME_ALLOW
	denied = symbolonv1.Outcome_OUTCOME_DENY
)

// counted are the connections that arrived in edges, and the edges' sets.
func (c *controller) edges() (sets []*symbolonv1.EdgeSet, connections, lost uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, b := range c.batches {
		lost += b.GetEdgesLost()
		if len(b.GetEdges().GetEdges()) == 0 {
			continue
		}
		sets = append(sets, b.GetEdges())
		for _, e := range b.GetEdges().GetEdges() {
			connections += e.GetConnections()
		}
	}
	return sets, connections, lost
}

// TestEdgesGather: a new edge after ten seconds, a known one after a minute, a denial
// after ten seconds always; whatever comes meanwhile is in it, and each end is there
// once.
func TestEdgesGather(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &controller{}
		r := NewReporter(c.send)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { r.Run(ctx, time.Second); close(done) }()
		web, api := workload("web"), workload("api")
		var sent int
		see := func(after time.Duration, want int) {
			t.Helper()
			time.Sleep(after)
			synctest.Wait()
			if sets, _, _ := c.edges(); len(sets) != want {
				t.Fatalf("%d reports, want %d", len(sets), want)
			}
		}
		observe := func(outcome symbolonv1.Outcome) {
			sent++
			r.Observe(observation(web, api, outcome, time.Now()))
		}
		first := time.Now()
		observe(allow)
		observe(allow)
		see(5*time.Second, 0)
		// Another copy of the same end is the same end.
		r.Observe(observation(workload("web"), api, allow, time.Now()))
		sent++
		see(6*time.Second, 1)
		sets, _, _ := c.edges()
		e := sets[0].GetEdges()[0]
		if len(sets[0].GetEnds()) != 2 || e.GetConnections() != 3 || e.GetBytesSent() != 30 || e.GetBytesReceived() != 60 ||
			!e.GetFirst().AsTime().Equal(first) || !e.GetLast().AsTime().Equal(first.Add(5*time.Second)) || e.GetAddressOnly() {
			t.Errorf("got %v", sets[0])
		}
		observe(allow)
		see(50*time.Second, 1) // known by now
		see(12*time.Second, 2)
		observe(denied)
		see(11*time.Second, 3)
		observe(denied)
		see(11*time.Second, 4)
		observe(allow)
		r.Observe(observation(stranger(1), api, allow, time.Now()))
		sent++
		cancel()
		<-done
		sets, connections, lost := c.edges()
		if connections != uint64(sent) || lost != 0 || len(sets) != 5 {
			t.Errorf("%d connections of %d, %d lost, %d reports", connections, sent, lost, len(sets))
		}
		last := sets[4]
		addressOnly := 0
		for _, e := range last.GetEdges() {
			if e.GetAddressOnly() {
				addressOnly++
			}
		}
		if len(last.GetEdges()) != 2 || len(last.GetEnds()) != 3 || addressOnly != 1 {
			t.Errorf("the last report is %v", last)
		}
	})
}

// TestEdgesApart: what differs in any field of the key is another edge.
func TestEdgesApart(t *testing.T) {
	now := time.Unix(1000, 0)
	base := func() Observation { return observation(workload("web"), workload("api"), allow, now) }
	s := newEdges()
	s.observe(base())
	n := 1
	for name, change := range map[string]func(*Observation){
		"from":          func(o *Observation) { o.From = workload("dev") },
		"to":            func(o *Observation) { o.To = workload("db") },
		"port":          func(o *Observation) { o.Port = 80 },
		"protocol":      func(o *Observation) { o.Protocol = "udp" },
		"outcome":       func(o *Observation) { o.Record.Outcome = denied },
		"reason":        func(o *Observation) { o.Record.Reason = symbolonv1.Reason_REASON_POLICY },
		"peer reason":   func(o *Observation) { o.Record.PeerReason = symbolonv1.Reason_REASON_POLICY },
		"client policy": func(o *Observation) { o.Record.ClientPolicy = "/other" },
		"server policy": func(o *Observation) { o.Record.ServerPolicy = "/other" },
		"would verdict": func(o *Observation) { o.Record.WouldVerdict = "deny" },
		"would policy":  func(o *Observation) { o.Record.WouldPolicy = "/other" },
		"protection":    func(o *Observation) { o.Record.Protection = symbolonv1.Protection_PROTECTION_ENCRYPTED },
		"local":         func(o *Observation) { o.Record.Local = true },
		"reporter":      func(o *Observation) { o.Record.Reporter = symbolonv1.Reporter_REPORTER_SERVER },
	} {
		o := base()
		change(&o)
		s.observe(o)
		if n++; len(s.byKey) != n {
			t.Errorf("another %s is no other edge", name)
		}
	}
	// What is not in the key.
	o := base()
	o.Record.FlowId, o.Record.Detail, o.Record.Generation, o.Record.Resumed = "x", "y", 7, true
	if s.observe(o); len(s.byKey) != n {
		t.Error("flow id, detail, generation or resumption make another edge")
	}
}

// TestEdgesFlood: whoever has no identity fills his own share of the room and no
// more; what found none is counted, and told.
func TestEdgesFlood(t *testing.T) {
	c := &controller{}
	r := NewReporter(c.send)
	now := time.Now()
	api := workload("api")
	const n = maxAddressEdges + 500
	for i := range n {
		r.Observe(observation(stranger(i), api, denied, now))
	}
	r.Observe(observation(workload("web"), api, allow, now))
	if len(r.edges.byKey) != maxAddressEdges+1 || r.EdgesLost() != 500 {
		t.Fatalf("%d edges, %d lost", len(r.edges.byKey), r.EdgesLost())
	}
	for r.flushEdges(t.Context(), true) {
	}
	sets, connections, lost := c.edges()
	if connections != maxAddressEdges+1 || lost != 500 {
		t.Errorf("%d connections arrived, %d lost", connections, lost)
	}
	for _, set := range sets {
		if size := proto.Size(set); len(set.GetEdges()) > edgeBatch || size > edgeBytes {
			t.Errorf("a report of %d edges, %d bytes", len(set.GetEdges()), size)
		}
	}
	// Those that were reported give way to others.
	for i := range 300 {
		r.Observe(observation(stranger(n+i), api, denied, now))
	}
	if len(r.edges.byKey) != maxAddressEdges+1 || r.EdgesLost() != 500 {
		t.Errorf("%d edges, %d lost", len(r.edges.byKey), r.EdgesLost())
	}
}

// TestEdgesBoundedInBytes: ends with many claims travel in several reports.
func TestEdgesBoundedInBytes(t *testing.T) {
	c := &controller{}
	r := NewReporter(c.send)
	big := make([]byte, 4000)
	for i := range big {
		big[i] = 'x'
	}
	const n = 600
	for i := range n {
		to := NewEnd(&symbolonv1.EdgeEnd{
			SpiffeId:   fmt.Sprintf("spiffe://acme.example/acme/w%d", i),
			Attributes: map[string]*symbolonv1.LabelValues{"a": {Values: []string{string(big)}}},
		})
		r.Observe(observation(workload("web"), to, allow, time.Now()))
	}
	for r.flushEdges(t.Context(), true) {
	}
	sets, connections, _ := c.edges()
	if connections != n || len(sets) < 2 {
		t.Errorf("%d connections in %d reports", connections, len(sets))
	}
	for _, set := range sets {
		if size := proto.Size(set); size > edgeBytes+edgeBytes/4 {
			t.Errorf("a report of %d bytes", size)
		}
	}
}

// TestEdgesWaitForTheController: what could not be sent is sent later, with what came
// meanwhile; what the controller refuses is lost, counted, and tried no more.
func TestEdgesWaitForTheController(t *testing.T) {
	var fail error
	c := &controller{answer: func(*symbolonv1.ReportFlowsRequest) error { return fail }}
	r := NewReporter(c.send)
	web, api := workload("web"), workload("api")
	now := time.Now()
	r.Observe(observation(web, api, allow, now))
	fail = errAway
	if r.flushEdges(t.Context(), true) || c.called() != 1 {
		t.Error("tried again at once")
	}
	r.Observe(observation(web, api, allow, now.Add(time.Minute)))
	fail = nil
	for r.flushEdges(t.Context(), true) {
	}
	sets, connections, _ := c.edges()
	if connections != 2 || len(sets) != 1 {
		t.Fatalf("%d connections in %d reports", connections, len(sets))
	}
	e := sets[0].GetEdges()[0]
	if diff := cmp.Diff(time.Minute, e.GetLast().AsTime().Sub(e.GetFirst().AsTime())); diff != "" {
		t.Error(diff)
	}

	r.Observe(observation(web, api, allow, now))
	fail = ErrUnacceptable
	if r.flushEdges(t.Context(), true) {
		t.Error("more to send after a refusal")
	}
	fail = nil
	r.flushEdges(t.Context(), true)
	if _, connections, lost := c.edges(); connections != 2 || lost != 1 || r.EdgesLost() != 1 {
		t.Errorf("%d connections, %d and %d lost", connections, lost, r.EdgesLost())
	}
}

// TestEndThatCannotBeSent does not spoil the report that it is in.
func TestEndThatCannotBeSent(t *testing.T) {
	c := &controller{}
	r := NewReporter(c.send)
	r.Observe(observation(NewEnd(&symbolonv1.EdgeEnd{SpiffeId: "spiffe://\xff"}), workload("api"), allow, time.Now()))
	r.flushEdges(t.Context(), true)
	sets, _, _ := c.edges()
	if _, err := proto.Marshal(sets[0]); err != nil {
		t.Error(err)
	}
}

func BenchmarkObserve(b *testing.B) {
	s := newEdges()
	o := observation(workload("web"), workload("api"), allow, time.Now())
	b.ReportAllocs()
	for b.Loop() {
		s.observe(o)
	}
}
