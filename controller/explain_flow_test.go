package controller_test

import (
	"strings"
	"testing"

	"connectrpc.com/connect"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// A connection that was recorded is judged by what both proxies said of it, by the
// policy of now.
func TestExplainFlow(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	h := w.enrol("/acme/prod", nil)
	const id = "5f0c2a91b3d4e5f60718293a4b5c6d7e"
	workload := func(name, app, address string) *symbolonv1.FlowEndpoint {
		return &symbolonv1.FlowEndpoint{
			SpiffeId: "spiffe://acme.example/acme/prod/" + name, Namespace: "/acme/prod", Workload: name,
			Attributes: attributes("app", app, "env", "prod"), Address: address,
		}
	}
	web := workload("web", "web", "10.0.0.5:41234")
	client := &symbolonv1.FlowRecord{
		FlowId: id, Reporter: symbolonv1.Reporter_REPORTER_CLIENT, Outcome: symbolonv1.Outcome_OUTCOME_DENY,
		Reason: symbolonv1.Reason_REASON_PEER_REFUSED, Source: web, Destination: &symbolonv1.FlowEndpoint{Address: "198.51.100.7:443"},
	}
	server := &symbolonv1.FlowRecord{
		FlowId: id, Reporter: symbolonv1.Reporter_REPORTER_SERVER, Outcome: symbolonv1.Outcome_OUTCOME_DENY,
		Source: web, Destination: workload("db", "db", "10.0.0.9:5432"),
	}
	outside := &symbolonv1.FlowRecord{
		FlowId: "5f0c2a91ffffffffffffffffffffffff", Reporter: symbolonv1.Reporter_REPORTER_CLIENT, Outcome: symbolonv1.Outcome_OUTCOME_ALLOW,
		Source: web, Destination: &symbolonv1.FlowEndpoint{Address: "203.0.113.9:443", External: "/acme/cards"},
	}
	h.report(t, 0, client, server, outside)
	explain := func(req *symbolonv1.ExplainRequest) (*symbolonv1.ExplainResponse, error) {
		res, err := w.admin().Explain(t.Context(), connect.NewRequest(req))
		if err != nil {
			return nil, err
		}
		return res.Msg, nil
	}
	res, err := explain(&symbolonv1.ExplainRequest{Flow: id[:12]})
	if err != nil {
		t.Fatal(err)
	}
	// The balancer's address gave way to what answered behind it, and its port to that
	// which the server's proxy saw.
	if !res.GetAllow() || len(res.GetSides()) != 2 || res.GetPort() != 5432 || len(res.GetRecords()) != 2 ||
		res.GetSides()[1].GetPolicy() != "/acme/web-to-db" || res.GetTo().GetAddress() != "" {
		t.Errorf("%v", res)
	}
	if res, err = explain(&symbolonv1.ExplainRequest{Flow: outside.GetFlowId()}); err != nil || len(res.GetSides()) != 1 || res.GetTo().GetAddress() != "203.0.113.9" {
		t.Errorf("to an External: %v, %v", res, err)
	}
	for name, test := range map[string]struct {
		req  *symbolonv1.ExplainRequest
		code connect.Code
		want string
	}{
		"two flows":        {&symbolonv1.ExplainRequest{Flow: "5f0c2a91"}, connect.CodeInvalidArgument, "several flows begin with 5f0c2a91"},
		"too short":        {&symbolonv1.ExplainRequest{Flow: "5f0c"}, connect.CodeInvalidArgument, "8 or more"},
		"no id":            {&symbolonv1.ExplainRequest{Flow: "everything"}, connect.CodeInvalidArgument, "hexadecimal"},
		"unknown":          {&symbolonv1.ExplainRequest{Flow: "00000000"}, connect.CodeNotFound, "no record of flow"},
		"flow and address": {&symbolonv1.ExplainRequest{Flow: id, Port: 80}, connect.CodeInvalidArgument, "give either"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := explain(test.req)
			wantCode(t, err, test.code, test.want)
		})
	}
}

// Records have labels only; what else a policy goes by stands in the SVID. Of an end of
// another trust domain only the other side is judged, but for one that a host of ours
// answers for; and its path is no namespace.
func TestExplainFlowKnowsClaimsAndForeigners(t *testing.T) {
	w := newWorld(t)
	w.apply(tree + `---
kind: Policy
namespace: /acme/prod
name: by-program
subject: {proc.exe: /usr/sbin/nginx}
verb: allow
object: {spiffe.trust_domain: [acme.example, spire.example]}
---
kind: Policy
namespace: /acme/prod
name: partners
subject: {spiffe.trust_domain: partner.example}
verb: allow
object: {app: db}
---
kind: Profile
namespace: /acme/prod
name: partners-web
match: {spiffe.id: "spiffe://partner.example/acme/dev/web"}
labels: {app: batch}
`)
	h := w.enrol("/acme/prod", nil)
	if _, err := h.issue(t.Context(), t, "proc.exe", "/usr/sbin/nginx"); err != nil {
		t.Fatal(err)
	}
	end := func(id, workload, address string, pairs ...string) *symbolonv1.FlowEndpoint {
		if id == "" {
			return &symbolonv1.FlowEndpoint{Address: address}
		}
		e := foreignEnd(id, workload, pairs...)
		return &symbolonv1.FlowEndpoint{SpiffeId: id, Namespace: e.GetNamespace(), Workload: workload, Attributes: e.GetAttributes(), Address: address}
	}
	web := end("spiffe://acme.example/acme/prod/web", "web", "10.0.0.5:4000", "app", "web", "env", "prod")
	db := end("spiffe://acme.example/acme/prod/db", "db", "10.0.0.9:9000", "app", "db")
	partner := end("spiffe://partner.example/acme/dev/web", "web", "192.0.2.1:4000", "app", "web")
	spire := end("spiffe://spire.example/elsewhere/job", "job", "10.0.0.6:9000", "app", "job")
	record := func(id string, by symbolonv1.Reporter, from, to *symbolonv1.FlowEndpoint) *symbolonv1.FlowRecord {
		return &symbolonv1.FlowRecord{FlowId: id, Reporter: by, Outcome: symbolonv1.Outcome_OUTCOME_DENY, Reason: symbolonv1.Reason_REASON_DEFAULT, Source: from, Destination: to}
	}
	const first, second, third = "11111111111111111111111111111111", "22222222222222222222222222222222", "33333333333333333333333333333333"
	h.report(t, 0, record(first, client, web, db), record(second, server, partner, db), record(third, client, web, spire), record(third, server, web, spire))
	for id, want := range map[string]string{
		first:  "client /acme/prod/by-program server /acme/prod/by-program",
		second: "server /acme/prod/partners",
		third:  "client /acme/prod/by-program server /acme/prod/by-program",
	} {
		res, err := w.admin().Explain(t.Context(), connect.NewRequest(&symbolonv1.ExplainRequest{Flow: id}))
		if err != nil {
			t.Fatal(err)
		}
		if got := saidBy(res.Msg); got != want || !res.Msg.GetAllow() {
			t.Errorf("%s: %q, want %q: %v", id, got, want, res.Msg)
		}
	}
	// A partner's workload by its ID has what Profiles say of that.
	res, err := w.admin().Explain(t.Context(), connect.NewRequest(&symbolonv1.ExplainRequest{
		From: known(partner.GetSpiffeId()), To: described("/acme/prod", "app", "db"), Port: 5432,
	}))
	if err != nil || saidBy(res.Msg) != "server /acme/prod/partners" {
		t.Errorf("%v, %v", res, err)
	}
	_, err = w.admin().Explain(t.Context(), connect.NewRequest(&symbolonv1.ExplainRequest{From: known(partner.GetSpiffeId()), To: known(partner.GetSpiffeId()), Port: 1}))
	wantCode(t, err, connect.CodeInvalidArgument, "other trust domains")
}

// saidBy is which sides judged, and by which policies.
func saidBy(res *symbolonv1.ExplainResponse) string {
	var out []string
	for _, s := range res.GetSides() {
		out = append(out, s.GetSide(), s.GetPolicy())
	}
	return strings.Join(out, " ")
}
