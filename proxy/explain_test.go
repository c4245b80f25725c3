package proxy

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

// The proxy explains what is in force on its host with nobody else's help.
func TestExplainOffline(t *testing.T) {
	w := newWorld(t)
	ask := func(from, to, port string) (*explanation, int, string) {
		t.Helper()
		h := w.p.DebugHandler(http.NotFoundHandler(), Debug{})
		res := httptest.NewRecorder()
		query := url.Values{"from": {from}, "to": {to}, "port": {port}}
		h.ServeHTTP(res, httptest.NewRequest(http.MethodGet, "/debug/explain?"+query.Encode(), nil))
		x := &explanation{}
		if res.Code == http.StatusOK {
			if err := json.Unmarshal(res.Body.Bytes(), x); err != nil {
				t.Fatal(err)
			}
		}
		return x, res.Code, res.Body.String()
	}
	w.policy(office + "---\nkind: External\nnamespace: /prod\nname: api\nlabels: {ext: office}\naddresses: {fqdns: [api.example.com, \"*.api.example.com\"], private: true}\n" +
		"---\nkind: Service\nnamespace: /prod\nname: lb\naddresses: {cidrs: [198.51.100.7/32]}\n")
	w.good() // this host's workload is known from here on
	const web, db = "app=web@/prod", "app=db@/prod"
	for _, x := range []struct {
		from, to, port string
		allow          bool
		sides          string // the policy of each, or what failed last
		note           string
	}{
		{web, db, "5432", true, "client /prod/web-calls-db server /prod/web-calls-db", ""},
		{web, "spiffe://acme.example/prod/db", "tcp/1", true, "client /prod/web-calls-db server /prod/web-calls-db", ""},
		{db, web, "1", false, "client default server default", ""},
		{db, other4, "1", true, "client /prod/db-calls-office", ""},
		{web, other4, "1", false, "client default", "denied by default"},
		{db, "api.example.com", "443", true, "client /prod/db-calls-office", ""},
		{other4, db, "1", true, "server /prod/office-calls-db", ""},
		{otherB, db, "1", false, "", "must come through a proxy"},
		{db, otherB, "1", false, "", "by a name that the client asks for"},
		{db, "www.example.com", "1", false, "", "must answer as a protected workload"},
		{db, "198.51.100.7", "1", false, "", "Service /prod/lb"},
	} {
		got, code, body := ask(x.from, x.to, x.port)
		var sides []string
		for _, s := range got.Sides {
			by := s.Policy
			if by == "" {
				by = s.Reason
			}
			sides = append(sides, s.Side, by)
			if len(s.Chain) != 2 || len(s.Candidates) < 3 {
				t.Errorf("%s to %s: %+v", x.from, x.to, s)
			}
		}
		if code != http.StatusOK || got.Allow != x.allow || strings.Join(sides, " ") != x.sides || !strings.Contains(got.Note, x.note) || got.Generation != w.gen {
			t.Errorf("%s to %s: %d %s", x.from, x.to, code, body)
		}
	}
	for _, x := range []struct{ from, to, port, want string }{
		{web, db, "0", "port"}, {web, db, "sctp/1", "port"}, {web, db, "", "port"},
		{other4, otherB, "1", "both ends"}, {other4, "api.example.com", "1", "both ends"},
		{"web", db, "1", "from: "}, {web, "app@/prod", "1", "key=value"}, {"spiffe://acme.example/prod/x", db, "1", "lately"},
	} {
		if _, code, body := ask(x.from, x.to, x.port); code != http.StatusBadRequest || !strings.Contains(body, x.want) {
			t.Errorf("%+v: %d %s", x, code, body)
		}
	}
}
