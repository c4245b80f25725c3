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

// Debug is what the admin page can show beyond what the proxy itself knows. Each
// answers with something that encoding/json can write.
type Debug struct {
	Identities func() any
	Rules      func() any
	Status     func() any
	// Ready tells whether connections are being served as they should; if not, why.
	Ready func() error
}

// AdminHandler serves /metrics, /healthz, /readyz and /debug/{connections,
// policies,identities,rules,status}. Only local programs may reach it: debugging
// tells who talks to whom.
func (p *Proxy) AdminHandler(reg *prometheus.Registry, d Debug) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := d.Ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ok\n"))
	})
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
}

func (p *Proxy) policies() shownPolicies {
	out := shownPolicies{Generation: p.Generation(), Resources: []string{}}
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
