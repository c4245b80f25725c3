package controller_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

const (
	outcomeAllow = symbolonv1.Outcome_OUTCOME_ALLOW
	outcomeDeny  = symbolonv1.Outcome_OUTCOME_DENY
)

func edgeEnd(namespace, workload string, pairs ...string) *symbolonv1.EdgeEnd {
	return &symbolonv1.EdgeEnd{
		SpiffeId:  "spiffe://acme.example" + strings.TrimSuffix(namespace, "/") + "/" + workload,
		Namespace: namespace, Workload: workload, Attributes: attributes(pairs...),
	}
}

// edgeSet has one edge, by default of one connection just now.
func edgeSet(r symbolonv1.Reporter, from, to *symbolonv1.EdgeEnd, change ...func(*symbolonv1.Edge)) *symbolonv1.EdgeSet {
	e := &symbolonv1.Edge{
		From: 0, To: 1, Protocol: "tcp", Port: 5432, Outcome: outcomeAllow, Reporter: r,
		Reason: symbolonv1.Reason_REASON_POLICY, Protection: symbolonv1.Protection_PROTECTION_ENCRYPTED,
		Connections: 1, BytesSent: 10, BytesReceived: 20, First: timestamppb.Now(), Last: timestamppb.Now(),
	}
	for _, f := range change {
		f(e)
	}
	return &symbolonv1.EdgeSet{Ends: []*symbolonv1.EdgeEnd{from, to}, Edges: []*symbolonv1.Edge{e}}
}

func (h *host) edges(t *testing.T, sets ...*symbolonv1.EdgeSet) {
	t.Helper()
	for _, set := range sets {
		if _, err := h.ReportFlows(t.Context(), connect.NewRequest(&symbolonv1.ReportFlowsRequest{Edges: set})); err != nil {
			t.Fatal(err)
		}
	}
}

func (w *world) edges(req *symbolonv1.ListEdgesRequest) *symbolonv1.ListEdgesResponse {
	w.t.Helper()
	res, err := w.admin().ListEdges(w.t.Context(), connect.NewRequest(req))
	if err != nil {
		w.t.Fatal(err)
	}
	return res.Msg
}

// lines are edges as text, sorted.
func lines(set *symbolonv1.EdgeSet) (out []string) {
	name := func(e *symbolonv1.EdgeEnd) string {
		return e.GetNamespace() + "/" + e.GetWorkload() + e.GetExternal() + e.GetAddress()
	}
	for _, e := range set.GetEdges() {
		out = append(out, fmt.Sprintf("%s>%s %d %v %d", name(set.GetEnds()[e.GetFrom()]), name(set.GetEnds()[e.GetTo()]), e.GetPort(), e.GetOutcome(), e.GetConnections()))
	}
	slices.Sort(out)
	return out
}

func (w *world) hits() map[string]uint64 {
	w.t.Helper()
	res, err := w.admin().ListPolicyHits(w.t.Context(), connect.NewRequest(&symbolonv1.ListPolicyHitsRequest{}))
	if err != nil {
		w.t.Fatal(err)
	}
	out := make(map[string]uint64)
	for _, h := range res.Msg.GetHits() {
		out[h.GetPolicy()] = h.GetConnections()
	}
	return out
}

// TestEdgesAreKept: merged by what they have in common, filtered, counted for the
// policies that decided, and still there after a restart.
func TestEdgesAreKept(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	prod, dev := w.enrol("/acme/prod", nil), w.enrol("/acme/dev", nil)
	web, db, dbx := edgeEnd("/acme/prod", "web", "app", "web"), edgeEnd("/acme/prod", "db", "app", "db"), edgeEnd("/acme/dev", "x", "app", "x")
	decided := func(e *symbolonv1.Edge) { e.ClientPolicy, e.ServerPolicy = "/acme/web-to-db", "/acme/web-to-db" }
	denied := func(e *symbolonv1.Edge) {
		e.Outcome, e.Reason, e.Port = outcomeDeny, symbolonv1.Reason_REASON_DEFAULT, 80
	}
	prod.edges(t,
		edgeSet(client, web, db, decided), edgeSet(client, web, db, decided),
		edgeSet(server, web, db, decided, func(e *symbolonv1.Edge) { e.ClientPolicy = "" }),
		edgeSet(client, web, dbx, denied),
	)
	dev.edges(t, edgeSet(server, web, dbx, denied))
	first := w.edges(&symbolonv1.ListEdgesRequest{})
	want := []string{
		"/acme/prod/web>/acme/dev/x 80 OUTCOME_DENY 1", "/acme/prod/web>/acme/dev/x 80 OUTCOME_DENY 1",
		"/acme/prod/web>/acme/prod/db 5432 OUTCOME_ALLOW 1", "/acme/prod/web>/acme/prod/db 5432 OUTCOME_ALLOW 2",
	}
	if diff := cmp.Diff(want, lines(first.GetEdges())); diff != "" {
		t.Error(diff)
	}
	if n := len(first.GetEdges().GetEnds()); n != 3 {
		t.Errorf("%d ends, each is to be there once", n)
	}
	if got := first.GetEdges().GetEnds(); !slices.ContainsFunc(got, func(e *symbolonv1.EdgeEnd) bool {
		return e.GetWorkload() == "web" && e.GetAttributes()["app"].GetValues()[0] == "web" &&
			e.GetAttributes()["spiffe.id"].GetValues()[0] == e.GetSpiffeId()
	}) {
		t.Errorf("no attributes in %v", got)
	}
	for name, test := range map[string]struct {
		req  *symbolonv1.ListEdgesRequest
		want int
	}{
		"below dev": {&symbolonv1.ListEdgesRequest{Namespace: "/acme/dev"}, 2},
		"denied":    {&symbolonv1.ListEdgesRequest{Outcome: outcomeDeny}, 2},
		"recent":    {&symbolonv1.ListEdgesRequest{Since: durationpb.New(time.Hour)}, 4},
		"the last":  {&symbolonv1.ListEdgesRequest{Last: 3}, 3},
	} {
		if got := w.edges(test.req); len(got.GetEdges().GetEdges()) != test.want {
			t.Errorf("%s: %d edges, want %d", name, len(got.GetEdges().GetEdges()), test.want)
		}
	}
	// The client's side decided 2, the server's 1.
	hits := map[string]uint64{"/acme/web-to-db": 3}
	if diff := cmp.Diff(hits, w.hits()); diff != "" {
		t.Error(diff)
	}

	w.halt()
	w.start()
	again := w.edges(&symbolonv1.ListEdgesRequest{})
	if diff := cmp.Diff(lines(first.GetEdges()), lines(again.GetEdges())); diff != "" {
		t.Errorf("after a restart:\n%s", diff)
	}
	if diff := cmp.Diff(hits, w.hits()); diff != "" {
		t.Errorf("after a restart:\n%s", diff)
	}
	prod.ProxyServiceClient = w.proxy(prod.TLS())
	prod.edges(t, edgeSet(client, web, db, decided))
	if got := lines(w.edges(&symbolonv1.ListEdgesRequest{}).GetEdges()); !slices.Contains(got, "/acme/prod/web>/acme/prod/db 5432 OUTCOME_ALLOW 3") {
		t.Errorf("not merged with what was stored: %q", got)
	}
}

// TestEdgesAHostMayReport: its own ends in its own namespace, in a form that can be
// kept and shown; and no hits of policies that never judge there.
func TestEdgesAHostMayReport(t *testing.T) {
	w := newWorld(t)
	w.apply(tree + `
---
kind: Policy
namespace: /acme/dev
name: theirs
subject: {app: x}
verb: allow
object: {app: x}
`)
	h := w.enrol("/acme/prod", nil)
	prod, dev := edgeEnd("/acme/prod", "web", "app", "web"), edgeEnd("/acme/dev", "x", "app", "x")
	address := &symbolonv1.EdgeEnd{Address: "192.0.2.1"}
	external := &symbolonv1.EdgeEnd{External: "/acme/cards", Attributes: attributes("ext", "cards")}
	for name, set := range map[string]*symbolonv1.EdgeSet{
		"another's end as client": edgeSet(client, dev, prod),
		"another's end as server": edgeSet(server, prod, dev),
		"another's end, local":    edgeSet(local, prod, dev),
		"an External as its own":  edgeSet(client, external, prod),
		"a namespace that is not": edgeSet(client, edgeEnd("/acme/prod/none", "w"), dev),
		"its ID in another place": edgeSet(client, &symbolonv1.EdgeEnd{SpiffeId: "spiffe://acme.example/acme/dev/x", Namespace: "/acme/prod", Workload: "x"}, dev),
		"a peer without an ID":    edgeSet(client, prod, &symbolonv1.EdgeEnd{Namespace: "/acme/dev", Workload: "x"}),
		"a peer that is nothing":  edgeSet(client, prod, &symbolonv1.EdgeEnd{}),
		"no reporter":             edgeSet(symbolonv1.Reporter_REPORTER_UNSPECIFIED, prod, dev),
		"no outcome":              edgeSet(client, prod, dev, func(e *symbolonv1.Edge) { e.Outcome = 0 }),
		"no port":                 edgeSet(client, prod, dev, func(e *symbolonv1.Edge) { e.Port = 0 }),
		"a port too large":        edgeSet(client, prod, dev, func(e *symbolonv1.Edge) { e.Port = 65536 }),
		"no protocol":             edgeSet(client, prod, dev, func(e *symbolonv1.Edge) { e.Protocol = "x" }),
		"no time":                 edgeSet(client, prod, dev, func(e *symbolonv1.Edge) { e.Last = nil; e.First = &timestamppb.Timestamp{Nanos: -1} }),
		"long ago":                edgeSet(client, prod, dev, func(e *symbolonv1.Edge) { e.Last = timestamppb.New(time.Unix(0, 0)) }),
		"an end that is not":      edgeSet(client, prod, dev, func(e *symbolonv1.Edge) { e.To = 7 }),
		"an end as large as no":   edgeSet(client, prod, edgeEnd("/acme/dev", "x", "a", strings.Repeat("x", 2000), "b", strings.Repeat("x", 2000), "c", strings.Repeat("x", 2000), "d", strings.Repeat("x", 2000), "e", strings.Repeat("x", 2000), "f", strings.Repeat("x", 2000), "g", strings.Repeat("x", 2000), "h", strings.Repeat("x", 2000), "i", strings.Repeat("x", 2000))),
	} {
		before := w.edges(&symbolonv1.ListEdgesRequest{}).GetLost()
		h.edges(t, set)
		got := w.edges(&symbolonv1.ListEdgesRequest{})
		if len(got.GetEdges().GetEdges()) != 0 || got.GetLost() != before+1 {
			t.Fatalf("%s: kept %v, %d lost", name, got.GetEdges(), got.GetLost()-before)
		}
	}
	// An ID of SPIRE's is the host's, wherever its path would lead.
	spire := &symbolonv1.EdgeEnd{SpiffeId: "spiffe://spire.example/acme/dev/x", Namespace: "/acme/dev", Workload: "x"}
	foreign := &symbolonv1.EdgeEnd{SpiffeId: "spiffe://partner.example/acme/prod/web", Namespace: "/acme/prod", Workload: "web"}
	liar := edgeEnd("/acme/dev", "liar", "spiffe.id", "spiffe://acme.example/acme/prod/db")
	future := func(e *symbolonv1.Edge) {
		e.First, e.Last, e.Connections = timestamppb.New(time.Now().Add(time.Hour)), timestamppb.New(time.Now().Add(24*time.Hour)), 1<<64-1
	}
	h.edges(t,
		edgeSet(server, foreign, prod), edgeSet(client, spire, prod), edgeSet(server, address, prod), edgeSet(client, prod, external),
		edgeSet(client, prod, dev, future), edgeSet(client, prod, dev, future), edgeSet(client, address, dev), edgeSet(client, prod, liar),
		// Policies of others, and of nobody.
		edgeSet(client, prod, dev, func(e *symbolonv1.Edge) { e.ClientPolicy = "/acme/none" }),
		edgeSet(server, dev, prod, func(e *symbolonv1.Edge) { e.ServerPolicy = "/acme/dev/theirs" }),
		edgeSet(local, prod, spire, func(e *symbolonv1.Edge) { e.ServerPolicy = "/acme/dev/theirs" }),
	)
	got := w.edges(&symbolonv1.ListEdgesRequest{})
	if n := len(got.GetEdges().GetEdges()); n != 10 {
		t.Errorf("%d edges: %q", n, lines(got.GetEdges()))
	}
	for _, e := range got.GetEdges().GetEdges() {
		if e.GetLast().AsTime().After(time.Now().Add(time.Minute)) || e.GetFirst().AsTime().After(e.GetLast().AsTime()) {
			t.Errorf("seen in the future: %v", e)
		}
	}
	for _, e := range got.GetEdges().GetEnds() {
		if id := e.GetAttributes()["spiffe.id"].GetValues(); e.GetWorkload() == "liar" && (len(id) != 1 || id[0] != e.GetSpiffeId()) {
			t.Errorf("a claim speaks for the ID: %v", id)
		}
	}
	if !slices.Contains(lines(got.GetEdges()), "/acme/prod/web>/acme/dev/x 5432 OUTCOME_ALLOW 18446744073709551615") {
		t.Errorf("the count wrapped around: %q", lines(got.GetEdges()))
	}
	if hits := w.hits(); len(hits) != 0 {
		t.Errorf("hits %v", hits)
	}
}

// The attack: a host makes edges up until its namespace's room is full. It pushes out its
// own, and those of others that have fewer stay; also after a restart.
func TestAHostsEdgesPushOutItsOwn(t *testing.T) {
	w := newWorld(t, func(w *world) { w.cfg.Edges.PerNamespace = 100 })
	w.apply(tree)
	honest, flood := w.enrol("/acme/prod", nil), w.enrol("/acme/prod", nil)
	web := edgeEnd("/acme/prod", "web", "app", "web")
	report := func(h *host, name string, from, to int) {
		t.Helper()
		set := &symbolonv1.EdgeSet{Ends: []*symbolonv1.EdgeEnd{web}}
		for i := from; i < to; i++ {
			for _, e := range []*symbolonv1.EdgeEnd{edgeEnd("/acme/dev", fmt.Sprintf("%s%d", name, i)), {Address: fmt.Sprintf("%s::%x", map[string]string{"own": "2001:db8:1", "made-up": "2001:db8:2"}[name], i)}} {
				one := edgeSet(server, e, web).GetEdges()[0]
				one.From, one.To = uint32(len(set.Ends)), 0
				set.Ends, set.Edges = append(set.Ends, e), append(set.Edges, one)
			}
		}
		h.edges(t, set)
	}
	holds := func(when string) {
		t.Helper()
		all := strings.Join(lines(w.edges(&symbolonv1.ListEdgesRequest{}).GetEdges()), "\n")
		if n := strings.Count(all, "/own"); n != 12 {
			t.Errorf("%s: %d of 12 workloads of the honest host are left", when, n)
		}
		if n := strings.Count(all, "2001:db8:1::"); n != 12 {
			t.Errorf("%s: %d of 12 addresses of the honest host are left", when, n)
		}
		if n := strings.Count(all, "/made-up"); n != 100-12 {
			t.Errorf("%s: %d edges that were made up", when, n)
		}
	}
	report(honest, "own", 0, 12)
	report(flood, "made-up", 0, 500)
	holds("after the flood")
	w.halt()
	w.start()
	flood.ProxyServiceClient = w.proxy(flood.TLS())
	report(flood, "made-up", 500, 900)
	holds("after a restart and another flood")
}

// TestEdgesAreBounded for each namespace; who has no identity takes a quarter at most,
// and the longest unseen goes first.
func TestEdgesAreBounded(t *testing.T) {
	w := newWorld(t, func(w *world) { w.cfg.Edges.PerNamespace = 100 })
	w.apply(tree)
	h := w.enrol("/acme/prod", nil)
	web := edgeEnd("/acme/prod", "web", "app", "web")
	set := &symbolonv1.EdgeSet{Ends: []*symbolonv1.EdgeEnd{web}}
	add := func(e *symbolonv1.EdgeEnd) {
		one := edgeSet(server, e, web).GetEdges()[0]
		one.From, one.To = uint32(len(set.Ends)), 0
		set.Ends = append(set.Ends, e)
		set.Edges = append(set.Edges, one)
	}
	for i := range 120 {
		add(edgeEnd("/acme/dev", fmt.Sprintf("w%d", i)))
	}
	for i := range 200 {
		add(&symbolonv1.EdgeEnd{Address: fmt.Sprintf("192.0.2.%d", i)})
	}
	h.edges(t, set)
	got := w.edges(&symbolonv1.ListEdgesRequest{})
	if n := len(got.GetEdges().GetEdges()); n != 125 || got.GetEvicted() != 20+175 {
		t.Errorf("%d edges, %d evicted", n, got.GetEvicted())
	}
	all := strings.Join(lines(got.GetEdges()), "\n")
	if strings.Contains(all, "/w19>") || !strings.Contains(all, "/w20>") || !strings.Contains(all, "192.0.2.199") || strings.Contains(all, "192.0.2.174>") {
		t.Errorf("not the oldest went:\n%s", all)
	}
	w.halt()
	w.start()
	if again := strings.Join(lines(w.edges(&symbolonv1.ListEdgesRequest{}).GetEdges()), "\n"); again != all {
		t.Errorf("after a restart:\n%s", cmp.Diff(all, again))
	}
}

func (w *world) simulate(yaml string) *symbolonv1.SimulateResponse {
	w.t.Helper()
	res, err := w.admin().Simulate(w.t.Context(), connect.NewRequest(&symbolonv1.SimulateRequest{
		Files: []*symbolonv1.SourceFile{{Name: "draft.yaml", Content: []byte(yaml)}}, Since: durationpb.New(time.Hour),
	}))
	if err != nil {
		w.t.Fatal(err)
	}
	return res.Msg
}

// TestSimulateService: a draft is decided on what was recorded, whoever recorded it,
// and changes nothing.
func TestSimulateService(t *testing.T) {
	w := newWorld(t)
	generation := w.apply(tree).GetGeneration()
	h := w.enrol("/acme/prod", nil)
	web, db := edgeEnd("/acme/prod", "web", "app", "web", "env", "prod"), edgeEnd("/acme/prod", "db", "app", "db", "env", "prod")
	cards := &symbolonv1.EdgeEnd{External: "/acme/cards", Attributes: attributes("ext", "cards")}
	toCards := func(e *symbolonv1.Edge) { e.Port, e.ExternalAddress = 443, "203.0.113.9" }
	h.edges(t,
		edgeSet(client, web, db, func(e *symbolonv1.Edge) { e.Connections = 5 }),
		edgeSet(server, web, db, func(e *symbolonv1.Edge) { e.Connections = 4 }),
		edgeSet(client, web, cards, toCards),
		edgeSet(client, db, web, func(e *symbolonv1.Edge) { e.Outcome, e.Reason = outcomeDeny, symbolonv1.Reason_REASON_DEFAULT }),
		// Of this one only the server's side is ours to decide on.
		edgeSet(server, &symbolonv1.EdgeEnd{SpiffeId: "spiffe://partner.example/acme/prod/web", Namespace: "/acme/prod", Workload: "web", Attributes: attributes("app", "web")}, db),
	)
	got := w.simulate("kind: Policy\nnamespace: /acme/prod\nname: no-db\nsubject: {app: web}\nverb: deny\nobject: {app: db}\n")
	allowed := &symbolonv1.SimulatedVerdict{
		Allow: true, Reason: symbolonv1.Reason_REASON_POLICY, Protection: symbolonv1.Protection_PROTECTION_ENCRYPTED,
		ClientPolicy: "/acme/web-to-db", ServerPolicy: "/acme/web-to-db",
	}
	// A parent's allow overrules what a child denies.
	if len(got.GetEdges()) != 0 || got.GetUnchanged() != 4 || got.GetUnchangedConnections() != 8 || len(got.GetChanges()) != 1 {
		t.Errorf("a deny below an allow: %v", got)
	}
	const draft = `
kind: Policy
namespace: /
name: no-db
subject: {app: web}
verb: deny
object: {app: db}
propagate: true
---
kind: Policy
namespace: /acme/prod
name: db-to-web
subject: {app: db}
verb: allow
object: {app: web}
---
kind: External
namespace: /acme
name: cards
labels: {ext: cards}
addresses: {cidrs: [203.0.113.0/28], ports: [tcp/8443]}
`
	got = w.simulate(draft)
	if len(got.GetEdges()) != 4 || got.GetUnchanged() != 0 || got.GetGeneration() != generation {
		t.Fatalf("got %v", got)
	}
	e := got.GetEdges()[0]
	noDB := &symbolonv1.SimulatedVerdict{Reason: symbolonv1.Reason_REASON_POLICY, ClientPolicy: "/no-db", ServerPolicy: "/no-db"}
	if e.GetType() != symbolonv1.SimulatedType_SIMULATED_TYPE_NEWLY_DENIED || e.GetConnections() != 5 || e.GetPort() != 5432 ||
		e.GetFrom().GetSpiffeId() != web.GetSpiffeId() || !proto.Equal(e.GetBefore(), allowed) || !proto.Equal(e.GetAfter(), noDB) {
		t.Errorf("got %v", e)
	}
	if e := got.GetEdges()[1]; e.GetTo().GetExternal() != "/acme/cards" || e.GetType() != symbolonv1.SimulatedType_SIMULATED_TYPE_NEWLY_DENIED || !e.GetAddressOnly() {
		t.Errorf("an External without its port: %v", e)
	}
	if e := got.GetEdges()[2]; e.GetFrom().GetSpiffeId() != "spiffe://partner.example/acme/prod/web" || e.GetBefore().GetClientPolicy() != "" || e.GetAfter().GetServerPolicy() != "/no-db" {
		t.Errorf("a partner's: %v", e)
	}
	if e := got.GetEdges()[3]; e.GetFrom().GetWorkload() != "db" || e.GetType() != symbolonv1.SimulatedType_SIMULATED_TYPE_NEWLY_ALLOWED {
		t.Errorf("got %v", e)
	}
	counts := got.GetCounts()
	if len(counts) != 2 || counts[0].GetEdges() != 3 || counts[0].GetConnections() != 7 || counts[1].GetEdges() != 1 {
		t.Errorf("counts %v", counts)
	}
	if again := w.simulate(draft); again.GetGeneration() != generation || len(again.GetEdges()) != 4 {
		t.Error("the draft is in force")
	}
	w.offset.Store(int64(2 * time.Hour))
	if got := w.simulate(draft); len(got.GetEdges()) != 0 || got.GetUnchanged() != 0 {
		t.Errorf("edges of two hours ago count: %v", got)
	}
	_, err := w.admin().Simulate(t.Context(), connect.NewRequest(&symbolonv1.SimulateRequest{
		Files: []*symbolonv1.SourceFile{{Name: "draft.yaml", Content: []byte("kind: Polcy\n")}},
	}))
	wantCode(t, err, connect.CodeInvalidArgument, "draft.yaml:1", "Policy")
	_, err = w.admin().Simulate(t.Context(), connect.NewRequest(&symbolonv1.SimulateRequest{Since: durationpb.New(-time.Hour)}))
	wantCode(t, err, connect.CodeInvalidArgument, "since")
}

// TestEdgesGrowOld and are forgotten; so are the hits of a policy that is deleted.
func TestEdgesGrowOld(t *testing.T) {
	w := newWorld(t, func(w *world) {
		w.offset.Store(-int64(2 * time.Hour)) // the clients' clock is the real one
		w.cfg.Edges.Retention = time.Hour
	})
	w.apply(tree)
	h := w.enrol("/acme/prod", nil)
	web, db := edgeEnd("/acme/prod", "web", "app", "web"), edgeEnd("/acme/prod", "db", "app", "db")
	h.edges(t, edgeSet(client, web, db, func(e *symbolonv1.Edge) { e.ClientPolicy = "/acme/web-to-db" }))
	if len(w.hits()) != 1 {
		t.Fatal("no hit")
	}
	if _, err := w.admin().Delete(t.Context(), connect.NewRequest(&symbolonv1.DeleteRequest{Keys: []*symbolonv1.ResourceKey{{Kind: "Policy", Namespace: "/acme", Name: "web-to-db"}}})); err != nil {
		t.Fatal(err)
	}
	if len(w.hits()) != 0 {
		t.Error("hits of a policy that is no more")
	}
	w.halt() // the janitor's first round is at the start
	w.offset.Store(0)
	w.start()
	for end := time.Now().Add(30 * time.Second); len(w.edges(&symbolonv1.ListEdgesRequest{}).GetEdges().GetEdges()) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("an edge of two hours ago is still there")
		}
	}
}
