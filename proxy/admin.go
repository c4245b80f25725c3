package proxy

import (
	"encoding/json"
	"net/http"
	"sort"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/policydb"
)

// AdminHandler serves /metrics, /healthz and /readyz: what every local program may
// see. ready tells whether connections are served as they should be; if not, why.
func AdminHandler(reg *prometheus.Registry, ready func() error) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ok\n"))
	})
	return mux
}

// Debug is what the debug pages show beyond what the proxy itself knows: values for
// encoding/json, without secrets.
type Debug struct {
	Identities, Rules, Status func() any
}

// DebugHandler serves /debug/{connections,policies,explain,identities,rules,status}, and
// everything else by public. It tells who talks to whom: for root only.
func (p *Proxy) DebugHandler(public http.Handler, d Debug) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", public)
	show := func(name string, get func() any) {
		mux.HandleFunc("GET /debug/"+name, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			e := json.NewEncoder(w)
			e.SetIndent("", "  ")
			_ = e.Encode(get()) // the reader went away
		})
	}
	show("connections", func() any { return p.connections() })
	show("policies", func() any { return p.policies() })
	mux.HandleFunc("GET /debug/explain", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		x, err := p.explain(q.Get("from"), q.Get("to"), q.Get("port"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		_ = e.Encode(x)
	})
	show("identities", d.Identities)
	show("rules", d.Rules)
	show("status", d.Status)
	return mux
}

// connections are the live ones, oldest first.
func (p *Proxy) connections() []*flow.Line {
	lines := []*flow.Line{}
	for _, l := range p.table.snapshot() {
		lines = append(lines, flow.NewLine(l.record()))
	}
	sort.Slice(lines, func(i, j int) bool { return lines[i].Start.Before(lines[j].Start) })
	return lines
}

// shownPolicies is the policy in force, as text that `policy apply` takes.
type shownPolicies struct {
	Generation uint64   `json:"generation"`
	Since      string   `json:"since,omitempty"`
	Resources  []string `json:"resources"`
	// Names are what the names of Externals and Services resolve to.
	Names any `json:"names,omitempty"`
}

func (p *Proxy) policies() shownPolicies {
	out := shownPolicies{Generation: p.Generation(), Resources: []string{}}
	if p.names != nil {
		out.Names = p.names.Snapshot()
	}
	set := p.applied.Load()
	if set == nil {
		return out
	}
	out.Since = set.at.Format(time.RFC3339)
	for _, r := range set.resources {
		out.Resources = append(out.Resources, string(policydb.FormatYAML(r)))
	}
	return out
}
