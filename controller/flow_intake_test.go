package controller_test

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

const (
	client = symbolonv1.Reporter_REPORTER_CLIENT
	server = symbolonv1.Reporter_REPORTER_SERVER
	local  = symbolonv1.Reporter_REPORTER_LOCAL
)

// TestAHostReportsItsOwnEndsOnly: what a host could make operators believe of others.
func TestAHostReportsItsOwnEndsOnly(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	h := w.enrol("/acme/prod", nil)
	by := func(r symbolonv1.Reporter, from, to *symbolonv1.FlowEndpoint) *symbolonv1.FlowRecord {
		return &symbolonv1.FlowRecord{Reporter: r, Source: from, Destination: to, Outcome: symbolonv1.Outcome_OUTCOME_ALLOW}
	}
	prod, below, dev, nobody := end("/acme/prod"), end("/acme/prod/eu"), end("/acme/dev"), end("")
	id := func(id, namespace, workload string) *symbolonv1.FlowEndpoint {
		return &symbolonv1.FlowEndpoint{SpiffeId: id, Namespace: namespace, Workload: workload}
	}
	type test struct {
		name string
		*symbolonv1.FlowRecord
	}
	good := []test{
		{"client", by(client, prod, dev)},
		{"client below", by(client, below, dev)},
		{"client to nobody", by(client, prod, nobody)},
		{"client unknown", by(client, nobody, dev)},
		{"client without ends", by(client, nil, nil)},
		{"server", by(server, dev, prod)},
		{"server unknown", by(server, dev, nobody)},
		{"server of a stranger", by(server, id("spiffe://partner.example/a/b", "/a", "b"), prod)},
		{"server of a host", by(server, id("spiffe://acme.example/symbolon/host/1", "", ""), prod)},
		{"client with an ID of SPIRE's", by(client, id("spiffe://spire.example/acme/prod/w", "/acme/prod", "w"), dev)},
		{"server with one of another path", by(server, dev, id("spiffe://spire.example/ns/shop/sa/w", "/ns/shop/sa", "w"))},
		{"client with one of another's path", by(client, id("spiffe://spire.example/acme/dev/w", "/acme/dev", "w"), prod)},
		{"local", by(local, prod, below)},
		{"local unknown", by(local, prod, nobody)},
	}
	bad := []test{
		{"client of another namespace", by(client, dev, prod)},
		{"client above", by(client, end("/acme"), prod)},
		{"client beside", by(client, end("/acme/production"), prod)},
		{"server of another namespace", by(server, prod, dev)},
		{"local from another", by(local, dev, prod)},
		{"local to another", by(local, prod, dev)},
		{"no reporter", by(symbolonv1.Reporter_REPORTER_UNSPECIFIED, prod, prod)},
		{"unknown reporter", by(77, prod, prod)},
		{"another's ID in its own namespace", by(client, id("spiffe://acme.example/acme/dev/w", "/acme/prod", "w"), dev)},
		{"another's ID without a namespace", by(client, id("spiffe://acme.example/acme/dev/w", "", ""), prod)},
		{"another's namespace without an ID", by(client, id("", "/acme/dev", "w"), prod)},
		{"its peer in a namespace without an ID", by(client, prod, id("", "/acme/dev", "w"))},
		{"its peer in another namespace than its ID", by(client, prod, id("spiffe://acme.example/acme/prod/w", "/acme/dev", "w"))},
		{"not an ID", by(client, id("root", "/acme/prod", "w"), dev)},
		{"a time that is none", &symbolonv1.FlowRecord{Reporter: client, Source: prod, Destination: dev, Start: &timestamppb.Timestamp{Seconds: math.MaxInt64}}},
		{"an end that is none", &symbolonv1.FlowRecord{Reporter: client, Source: prod, Destination: dev, End: &timestamppb.Timestamp{Nanos: -1}}},
	}
	var want []string
	for _, test := range good {
		want = append(want, test.name)
	}
	for _, test := range append(good, bad...) {
		test.FlowId = test.name
		h.report(t, 0, test.FlowRecord)
	}
	if got := w.watch(&symbolonv1.WatchFlowsRequest{}, 100); strings.Join(got, "; ") != strings.Join(want, "; ") {
		t.Errorf("kept %q\nwant %q", got, want)
	}
	// It stands with the host, wherever its path would lead.
	for _, ns := range []string{"/ns", "/acme/dev"} {
		got := strings.Join(w.watch(&symbolonv1.WatchFlowsRequest{Namespace: ns}, 100), "; ")
		if ns == "/ns" && strings.Contains(got, "another path") || ns == "/acme/dev" && strings.Contains(got, "another's path") {
			t.Errorf("in %s, of which it only has the path: %q", ns, got)
		}
	}
	if got := strings.Join(w.watch(&symbolonv1.WatchFlowsRequest{Namespace: "/acme/prod"}, 100), "; "); !strings.Contains(got, "server with one of another path") || !strings.Contains(got, "client with one of another's path") {
		t.Errorf("in the host's namespace: %q", got)
	}
	status, err := w.admin().GetStatus(t.Context(), connect.NewRequest(&symbolonv1.GetStatusRequest{}))
	if err != nil || status.Msg.GetFlowsLost() != uint64(len(bad)) {
		t.Errorf("flows lost: %v, %v; want %d", status, err, len(bad))
	}
}

// TestFlowTextsAreClean, however long and whatever is in them.
func TestFlowTextsAreClean(t *testing.T) {
	w := newWorld(t)
	h := w.enrol("/", nil)
	const evil = "\x1b[2J\u202e\nfake line\x00"
	long := strings.Repeat("ä", 2000)
	r := record("id"+evil, "/acme", "/acme", symbolonv1.Outcome_OUTCOME_DENY)
	r.Detail = "x" + long
	r.ClientPolicy, r.ServerPolicy, r.CipherSuite, r.WouldPolicy = evil, long, evil, evil
	r.Source.Address, r.Source.External = evil, long
	r.Source.Attributes = map[string]*symbolonv1.LabelValues{
		"app": {Values: []string{"web", evil, strings.Repeat("v", 3000)}}, "key" + evil: {Values: []string{"x"}},
	}
	h.report(t, 0, r)

	stream, err := w.admin().WatchFlows(t.Context(), connect.NewRequest(&symbolonv1.WatchFlowsRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stream.Close() }()
	if !stream.Receive() {
		t.Fatalf("it was refused: %v", stream.Err())
	}
	got := stream.Msg().GetRecord()
	if n := len(got.GetDetail()); n > 512 || n < 500 || !utf8.ValidString(got.GetDetail()) || !strings.HasPrefix(got.GetDetail(), "xäää") {
		t.Errorf("detail has %d bytes: %q", n, got.GetDetail())
	}
	if len(got.GetServerPolicy()) > 2048 || len(got.GetSource().GetExternal()) > 2048 {
		t.Errorf("texts of %d and %d bytes", len(got.GetServerPolicy()), len(got.GetSource().GetExternal()))
	}
	app := got.GetSource().GetAttributes()["app"].GetValues()
	if len(got.GetSource().GetAttributes()) != 1 || len(app) != 3 || app[0] != "web" || len(app[2]) > 2048 {
		t.Errorf("attributes %v", got.GetSource().GetAttributes())
	}
	text := fmt.Sprint(got.GetFlowId(), got.GetClientPolicy(), got.GetCipherSuite(), got.GetWouldPolicy(), got.GetSource().GetAddress(), app)
	if strings.IndexFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) >= 0 || !strings.Contains(text, "fake line") {
		t.Errorf("not clean: %q", text)
	}
	if _, err := protojson.Marshal(got); err != nil {
		t.Error(err)
	}
}
