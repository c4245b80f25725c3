package proxy

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/flow"
)

// edgesSeen is the controller's place: it has what the proxy would report by now.
type edgesSeen struct {
	*flow.Reporter
	sets []*symbolonv1.EdgeSet
}

func newEdgesSeen() *edgesSeen {
	s := &edgesSeen{}
	s.Reporter = flow.NewReporter(func(_ context.Context, r *symbolonv1.ReportFlowsRequest) error {
		s.sets = append(s.sets, r.GetEdges())
		return nil
	})
	return s
}

// take returns what is new, one line an edge, without the port.
func (s *edgesSeen) take() []string {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	s.Run(ctx, time.Minute) // a proxy that ends reports what is left
	name := func(e *symbolonv1.EdgeEnd, address string) string {
		switch {
		case e.GetSpiffeId() != "":
			return e.GetNamespace() + "/" + e.GetWorkload() + " " + fmt.Sprint(e.GetAttributes()["proc.exe"].GetValues())
		case e.GetExternal() != "":
			return e.GetExternal() + " at " + address + " " + fmt.Sprint(e.GetAttributes()["ext"].GetValues())
		}
		return e.GetAddress()
	}
	var out []string
	for _, set := range s.sets {
		for _, e := range set.GetEdges() {
			out = append(out, fmt.Sprintf("%s to %s: %s %s by %s %s, address only %t, %d connections, %d/%d bytes",
				name(set.GetEnds()[e.GetFrom()], e.GetExternalAddress()), name(set.GetEnds()[e.GetTo()], e.GetExternalAddress()),
				flow.ReasonName(e.GetReason()), e.GetOutcome(), e.GetServerPolicy(), flow.ProtectionName(e.GetProtection()),
				e.GetAddressOnly(), e.GetConnections(), e.GetBytesSent(), e.GetBytesReceived()))
		}
	}
	s.sets = nil
	return out
}

func (s *edgesSeen) want(t *testing.T, what string, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, s.take()); diff != "" {
		t.Errorf("%s:\n%s", what, diff)
	}
}

// TestEdges: a connection is on its edge as soon as it is open, with all attributes
// that policy goes by; its bytes follow, and its end, if it is cut.
func TestEdges(t *testing.T) {
	seen := newEdgesSeen()
	w := newWorld(t, func(o *Options) { o.Edges = seen })
	w.policy(baseline)
	cred := w.ca.workload("/prod/web", map[string][]string{"app": {"web"}, "proc.exe": {"/bin/web"}})
	open, saw := w.openEcho(cred)
	const web = "/prod/web [/bin/web] to /prod/db []: policy "
	seen.want(t, "open", web+"OUTCOME_ALLOW by /prod/web-calls-db encrypted, address only false, 1 connections, 0/0 bytes")
	w.policy(denied)
	w.wasCut(open, saw, "policy-changed")
	got := seen.take()
	if len(got) != 2 {
		t.Fatalf("after the cut: %q", got)
	}
	if diff := cmp.Diff("/prod/web [/bin/web] to /prod/db []: policy-changed OUTCOME_DENY by /prod/web-calls-db encrypted, address only false, 1 connections, 0/0 bytes", got[0]); diff != "" {
		t.Error(diff)
	}

	w.policy(office)
	c := w.call(netip.AddrPortFrom(netip.MustParseAddr(protected4), appPort))
	speaks(t, c)
	_ = c.CloseWrite()
	_, _ = ended(t, c)
	w.records.next()
	seen.want(t, "an External", "/prod/office at "+other4+" [office] to /prod/db []: policy OUTCOME_ALLOW by /prod/office-calls-db none, address only true, 1 connections, 14/14 bytes")

	c = w.callFrom(netip.MustParseAddr(otherB), w.app.addr)
	_, _ = io.WriteString(c, "secret")
	_, _ = ended(t, c)
	w.records.next()
	seen.want(t, "nobody", otherB+" to /prod/db []: peer-unprotected OUTCOME_DENY by  none, address only true, 1 connections, 0/0 bytes")
}

// TestAddressEnd: whoever has a whole /64 is one client.
func TestAddressEnd(t *testing.T) {
	s := newEdgesSeen()
	to := flow.NewEnd(&symbolonv1.EdgeEnd{SpiffeId: "spiffe://acme.example/a/b"})
	for _, address := range []string{"[2001:db8::1]:1", "[2001:db8::2]:2", "192.0.2.1:3", "192.0.2.2:3"} {
		from := addressEnd(&symbolonv1.FlowEndpoint{Address: address}, true)
		s.Observe(flow.Observation{From: from, To: to, Record: &symbolonv1.FlowRecord{}, Amount: flow.Amount{Connections: 1}, At: time.Now()})
	}
	if got := s.take(); len(got) != 3 {
		t.Errorf("%d edges, want 3: %q", len(got), got)
	}
}
