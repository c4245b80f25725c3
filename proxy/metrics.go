package proxy

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/flow"
)

// metrics are the proxy's Prometheus series: base units, and no label that names a
// workload, since those are many and somebody's secret.
type metrics struct {
	connections *prometheus.CounterVec
	bytes       *prometheus.CounterVec
	overloaded  *prometheus.CounterVec
	owners      *prometheus.CounterVec
	renewals    *prometheus.CounterVec
	// acceptErrors counts accept(2)'s failures.
	acceptErrors prometheus.Counter
	open, ready  prometheus.GaugeFunc
	live         prometheus.GaugeFunc
	judged       prometheus.CounterFunc
	generation   prometheus.GaugeFunc

	mu       sync.Mutex
	counters map[counterKey]*counters
}

// counterKey is all of a record that counters go by: a few dozen.
type counterKey struct {
	reporter   symbolonv1.Reporter
	outcome    symbolonv1.Outcome
	reason     symbolonv1.Reason
	protection symbolonv1.Protection
}

// counters are the series of records that are counted alike, found once.
type counters struct{ connections, sent, received prometheus.Counter }

func newMetrics(p *Proxy) *metrics {
	return &metrics{
		counters: make(map[counterKey]*counters),
		connections: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "symbolon_connections_total", Help: "Connections that have ended, by reporter, outcome and reason.",
		}, []string{"reporter", "outcome", "reason", "protection"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "symbolon_bytes_total", Help: "Application bytes of ended connections, by reporter and direction.",
		}, []string{"reporter", "direction"}),
		overloaded: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "symbolon_connections_overload_total", Help: "Connections refused because a limit was hit, by limit.",
		}, []string{"direction", "limit"}),
		owners: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "symbolon_client_lookups_total",
			Help: "How the client of an outbound connection was found: by the kernel's connect_record, or by sock_diag.",
		}, []string{"by"}),
		renewals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "symbolon_certificate_renewals_total",
			Help: "Peers' newer certificates that open connections have been shown, by result.",
		}, []string{"result"}),
		acceptErrors: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "symbolon_accept_errors_total", Help: "Times that connections could not be accepted.",
		}),
		open: prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "symbolon_connections_open", Help: "Accepted connections, those not yet authorized and tunnels that wait for another included.",
		}, func() float64 { return float64(p.open.Load()) }),
		ready: prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "symbolon_ready", Help: "1 if the proxy is far enough from its limits, else 0.",
		}, func() float64 {
			if p.Ready() != nil {
				return 0
			}
			return 1
		}),
		live: prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "symbolon_connections_live", Help: "Connections open now.",
		}, func() float64 { return float64(p.table.size()) }),
		judged: prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "symbolon_live_decisions_total",
			Help: "Decisions made on open connections: each when it opens, later one for all that policy cannot tell apart.",
		}, func() float64 { return float64(p.table.judged.Load()) }),
		generation: prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "symbolon_policy_generation", Help: "Generation of the policy in force; 0: none.",
		}, func() float64 { return float64(p.Generation()) }),
	}
}

// Describe and Collect implement prometheus.Collector.
func (p *Proxy) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range p.collectors() {
		c.Describe(ch)
	}
}

// Collect implements prometheus.Collector.
func (p *Proxy) Collect(ch chan<- prometheus.Metric) {
	for _, c := range p.collectors() {
		c.Collect(ch)
	}
}

func (p *Proxy) collectors() []prometheus.Collector {
	m := p.metrics
	return []prometheus.Collector{m.connections, m.bytes, m.overloaded, m.owners, m.renewals, m.acceptErrors, m.open, m.ready, m.live, m.judged, m.generation}
}

func (m *metrics) counted(k counterKey) *counters {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.counters[k]
	if c == nil {
		reporter := flow.ReporterName(k.reporter)
		c = &counters{
			connections: m.connections.WithLabelValues(reporter, flow.OutcomeName(k.outcome), flow.ReasonName(k.reason), flow.ProtectionName(k.protection)),
			sent:        m.bytes.WithLabelValues(reporter, "sent"),
			received:    m.bytes.WithLabelValues(reporter, "received"),
		}
		m.counters[k] = c
	}
	return c
}

func (p *Proxy) count(r *symbolonv1.FlowRecord) {
	c := p.metrics.counted(counterKey{r.GetReporter(), r.GetOutcome(), r.GetReason(), r.GetProtection()})
	c.connections.Inc()
	c.sent.Add(float64(r.GetBytesSent()))
	c.received.Add(float64(r.GetBytesReceived()))
}
