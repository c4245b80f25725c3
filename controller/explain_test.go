package controller_test

import (
	"strings"
	"testing"

	"connectrpc.com/connect"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/enrol"
)

func enrolWith(t *testing.T, w *world, text string) (*enrol.HostCredential, error) {
	t.Helper()
	token, err := enrol.ParseToken(text)
	if err != nil {
		return nil, err
	}
	return enrol.Enrol(t.Context(), w.address(), token, nil, nil)
}

func described(namespace string, pairs ...string) *symbolonv1.ExplainEndpoint {
	return &symbolonv1.ExplainEndpoint{Namespace: namespace, Attributes: attributes(pairs...)}
}

func at(address string) *symbolonv1.ExplainEndpoint {
	return &symbolonv1.ExplainEndpoint{Address: address}
}

func known(id string) *symbolonv1.ExplainEndpoint {
	return &symbolonv1.ExplainEndpoint{SpiffeId: id}
}

func TestExplain(t *testing.T) {
	w := newWorld(t)
	w.apply(tree + "---\nkind: External\nnamespace: /acme\nname: cards-by-name\nlabels: {ext: cards}\naddresses: {fqdns: [\"*.cards.example.com\"], ports: [tcp/443]}\n")
	h := w.enrol("/acme/prod", map[string]string{"role": "db"})
	for _, exe := range []string{"/usr/sbin/nginx", "/usr/bin/postgres"} {
		if _, err := h.issue(t.Context(), t, "proc.exe", exe); err != nil {
			t.Fatal(err)
		}
	}
	web, db := known("spiffe://acme.example/acme/prod/web"), known("spiffe://acme.example/acme/prod/payments-db")
	for name, test := range map[string]struct {
		from, to *symbolonv1.ExplainEndpoint
		port     uint32
		allow    bool
		sides    string
		policy   string
	}{
		"known workloads":            {web, db, 5432, true, "client server", "/acme/web-to-db"},
		"another port":               {web, db, 22, false, "client server", ""},
		"backwards":                  {db, web, 5432, false, "client server", ""},
		"described":                  {described("/acme/prod", "app", "web"), described("/acme/dev", "app", "db"), 5432, true, "client server", "/acme/web-to-db"},
		"to an External":             {web, at("203.0.113.9"), 443, true, "client", "/acme/prod/web-to-cards"},
		"to an External, not by web": {db, at("203.0.113.9"), 443, false, "client", ""},
		"to an External by name":     {web, at("eu.cards.example.com"), 443, true, "client", "/acme/prod/web-to-cards"},
		"from an External":           {at("203.0.113.9"), web, 443, false, "server", ""},
	} {
		t.Run(name, func(t *testing.T) {
			res, err := w.admin().Explain(t.Context(), connect.NewRequest(&symbolonv1.ExplainRequest{From: test.from, To: test.to, Protocol: "tcp", Port: test.port}))
			if err != nil {
				t.Fatal(err)
			}
			var sides []string
			for _, s := range res.Msg.GetSides() {
				sides = append(sides, s.GetSide())
				if s.GetPolicy() != test.policy || len(s.GetChain()) != 3 || len(s.GetCandidates()) == 0 {
					t.Errorf("%v, want policy %q, a chain of 3 and candidates", s, test.policy)
				}
				for _, c := range s.GetCandidates() {
					if c.GetMatches() == (c.GetFailed() != "") {
						t.Errorf("candidate %v", c)
					}
				}
			}
			if res.Msg.GetAllow() != test.allow || strings.Join(sides, " ") != test.sides || res.Msg.GetGeneration() != 2 {
				t.Errorf("%v, want allow %v by %s", res.Msg, test.allow, test.sides)
			}
			if protected := res.Msg.GetProtection() == symbolonv1.Protection_PROTECTION_ENCRYPTED; test.allow && protected == (test.sides == "client") {
				t.Errorf("protection %v", res.Msg.GetProtection())
			}
		})
	}
}

func TestExplainRefuses(t *testing.T) {
	w := newWorld(t)
	w.apply(tree + "---\nkind: Service\nnamespace: /acme\nname: lb\naddresses: {cidrs: [198.51.100.7/32], ports: [tcp/443]}\n")
	web := described("/acme/prod", "app", "web")
	for name, test := range map[string]struct {
		req   *symbolonv1.ExplainRequest
		code  connect.Code
		words []string
	}{
		"no ends":        {&symbolonv1.ExplainRequest{Port: 1}, connect.CodeInvalidArgument, []string{"from:", "SPIFFE ID"}},
		"no port":        {&symbolonv1.ExplainRequest{From: web, To: web}, connect.CodeInvalidArgument, []string{"port"}},
		"port":           {&symbolonv1.ExplainRequest{From: web, To: web, Port: 70000}, connect.CodeInvalidArgument, []string{"70000"}},
		"protocol":       {&symbolonv1.ExplainRequest{From: web, To: web, Port: 1, Protocol: "sctp"}, connect.CodeInvalidArgument, []string{"sctp"}},
		"two addresses":  {&symbolonv1.ExplainRequest{From: at("10.0.0.1"), To: at("10.0.0.2"), Port: 1}, connect.CodeInvalidArgument, []string{"both"}},
		"no address":     {&symbolonv1.ExplainRequest{From: web, To: at("example.com:443"), Port: 1}, connect.CodeInvalidArgument, []string{"to:", "example.com"}},
		"nobody's name":  {&symbolonv1.ExplainRequest{From: web, To: at("example.com"), Port: 1}, connect.CodeNotFound, []string{"to:", "no External", "example.com"}},
		"a client's":     {&symbolonv1.ExplainRequest{From: at("example.com"), To: web, Port: 1}, connect.CodeInvalidArgument, []string{"from:", "example.com"}},
		"unknown":        {&symbolonv1.ExplainRequest{From: web, To: known("spiffe://acme.example/acme/prod/x"), Port: 1}, connect.CodeNotFound, []string{"to:"}},
		"not an ID":      {&symbolonv1.ExplainRequest{From: known("web"), To: web, Port: 1}, connect.CodeInvalidArgument, []string{"from:"}},
		"no namespace":   {&symbolonv1.ExplainRequest{From: described("/none"), To: web, Port: 1}, connect.CodeNotFound, []string{"/none"}},
		"no External":    {&symbolonv1.ExplainRequest{From: web, To: at("10.1.1.1"), Port: 443}, connect.CodeNotFound, []string{"no External"}},
		"External, port": {&symbolonv1.ExplainRequest{From: web, To: at("203.0.113.1"), Port: 80}, connect.CodeNotFound, []string{"no External"}},
		"a Service":      {&symbolonv1.ExplainRequest{From: web, To: at("198.51.100.7"), Port: 443}, connect.CodeFailedPrecondition, []string{"/acme/lb"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := w.admin().Explain(t.Context(), connect.NewRequest(test.req))
			wantCode(t, err, test.code, test.words...)
		})
	}
}
