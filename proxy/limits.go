package proxy

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/redirect"
)

// Limits bound what the proxy takes on at once. What is beyond is reset with the
// reason OVERLOADED and the limit's name: what was let in shall go on undisturbed.
type Limits struct {
	// Connections is how many may be open in all, tunnels that wait for their next
	// connection included.
	Connections int `yaml:"connections"`
	// Handshakes is how many may wait for their authorization, in each direction.
	Handshakes int `yaml:"handshakes"`
	// HandshakesPerSource is how many of those inbound may be of one IPv4 address or
	// IPv6 /64; a balancer or a NAT is one source.
	HandshakesPerSource int `yaml:"handshakes_per_source"`
	// HandshakesPerUser is how many of those outbound may be of one user.
	HandshakesPerUser int `yaml:"handshakes_per_user"`
	// WorkloadShare is how much of Connections, in per cent, one workload of this host
	// may have while no other has any. See seats.
	WorkloadShare int `yaml:"workload_share"`
}

// DefaultLimits are what the configuration starts from.
var DefaultLimits = Limits{
	Connections: 100_000, Handshakes: 8192, HandshakesPerSource: 2048, HandshakesPerUser: 4096, WorkloadShare: 80,
}

// The limits' names, in records, metrics and the configuration.
const (
	limitConnections = "connections"
	limitHandshakes  = "handshakes"
	limitPerSource   = "handshakes_per_source"
	limitPerUser     = "handshakes_per_user"
	limitShare       = "workload_share"
	limitDescriptors = "descriptors" // the process's, not the configuration's
)

// overload is a limit that was hit.
type overload struct {
	limit string
	why   string
}

func (o *overload) Error() string { return "limits." + o.limit + ": " + o.why }

// overloaded counts a refusal, and gives it its reason.
func (p *Proxy) overloaded(direction string, o *overload) error {
	p.metrics.overloaded.WithLabelValues(direction, o.limit).Inc()
	return deny(symbolonv1.Reason_REASON_OVERLOADED, o)
}

// adminReserve is how many connections to the proxy's own page go beyond the limit:
// somebody must be able to see that it was hit.
const adminReserve = 16

// admit gives a connection that was just accepted its place among all; nil: it has
// one, which its conn's slot gives back.
func (p *Proxy) admit(c *socket) *overload {
	if n := p.open.Add(1); n > int64(p.limits.Connections) {
		if n <= int64(p.limits.Connections+adminReserve) && p.admin.IsValid() {
			if dst, err := redirect.OriginalDst(c); err == nil && dst == p.admin {
				return nil
			}
		}
		p.open.Add(-1)
		return &overload{limitConnections, fmt.Sprintf("%d are open", p.limits.Connections)}
	}
	if used, full := p.descriptors.full(); full {
		p.open.Add(-1)
		return &overload{limitDescriptors, fmt.Sprintf("%d of %d are open", used, p.descriptors.limit)}
	}
	return nil
}

// slot is the place of an accepted connection among all.
type slot struct {
	p    *Proxy
	left atomic.Bool
}

// leave gives the place back, once.
func (s *slot) leave() {
	if s.left.CompareAndSwap(false, true) {
		s.p.open.Add(-1)
	}
}

// quotas are the limits that a flood of strangers can hit; a record of each refusal
// would be a flood of records.
type quotas struct {
	mu   sync.Mutex
	last map[string]time.Time // record, by direction and limit
	more map[string]int       // refusals since
}

// quotaRecords is how often one limit is recorded.
const quotaRecords = time.Second

// due tells whether a refusal is to be recorded, and how many were not since the
// last one that was.
func (q *quotas) due(key string, now time.Time) (more int, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if last, known := q.last[key]; known && now.Sub(last) < quotaRecords && !now.Before(last) {
		q.more[key]++
		return 0, false
	}
	if q.last == nil {
		q.last, q.more = make(map[string]time.Time), make(map[string]int)
	}
	more = q.more[key]
	q.last[key], q.more[key] = now, 0
	return more, true
}

// refuse resets a connection of which nothing is known yet.
func (p *Proxy) refuse(c *socket, reporter symbolonv1.Reporter, o *overload) {
	direction := directionOf(reporter)
	err := p.overloaded(direction, o)
	now := p.now()
	more, due := p.quotas.due(direction+o.limit, now)
	if !due {
		c.reset()
		return
	}
	if more > 0 {
		err = fmt.Errorf("%w; so were %d more since the last such record", err, more)
	}
	rec := &symbolonv1.FlowRecord{
		FlowId: mtls.NewFlowID().String(), Reporter: reporter, Host: p.host,
		Source: &symbolonv1.FlowEndpoint{Address: c.RemoteAddr().String()}, Destination: &symbolonv1.FlowEndpoint{},
		Start: timestamppb.New(now), End: timestamppb.New(now),
		Outcome: symbolonv1.Outcome_OUTCOME_DENY, Reason: symbolonv1.Reason_REASON_OVERLOADED, Detail: err.Error(),
	}
	if dst, err := redirect.OriginalDst(c); err == nil {
		rec.Destination.Address = dst.String()
	}
	c.reset()
	p.log.Warn("connections are refused", zap.String("direction", direction), zap.Error(o))
	p.count(rec)
	p.records.Record(rec)
}

func directionOf(r symbolonv1.Reporter) string {
	if r == symbolonv1.Reporter_REPORTER_SERVER {
		return "inbound"
	}
	return "outbound"
}

// seats counts the connections of each workload of this host, from its
// identification to its end.
//
// A workload may have as many as are free, times a factor: share / (100 - share). So
// alone it gets its share of all and no more; of several that want all they can get
// each gets the same, and some places are always free for one that comes later.
// (It is how switches share a buffer among queues: dynamic thresholds.) Safe for
// concurrent use.
type seats struct {
	mu    sync.Mutex
	taken map[identity.Key]int
}

// take gives k one more, and tells whether that is within its share. Either way leave
// gives it back.
func (s *seats) take(k identity.Key, l Limits, open int64) (taken int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken == nil {
		s.taken = make(map[identity.Key]int)
	}
	k = k.Program() // or a program that forks had a share for every child
	s.taken[k]++
	taken = s.taken[k]
	free := max(0, int64(l.Connections)-open)
	ok = l.WorkloadShare >= 100 || int64(taken)*int64(100-l.WorkloadShare) <= free*int64(l.WorkloadShare)
	return taken, ok
}

func (s *seats) leave(k identity.Key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k = k.Program()
	if s.taken[k]--; s.taken[k] == 0 {
		delete(s.taken, k)
	}
}

// seat counts the connection for a workload until its record is written. An error
// says that the workload has its share.
func (x *conn) seat(w *party) error {
	taken, ok := x.p.seats.take(w.key, x.p.limits, x.p.open.Load())
	if x.seats[0] == nil {
		x.seats[0] = w
	} else {
		x.seats[1] = w // the other end of a local one
	}
	if ok {
		return nil
	}
	return x.p.overloaded(directionOf(x.rec.GetReporter()), &overload{limitShare,
		fmt.Sprintf("the workload has %d connections, of %d in all only %d are free", taken-1, x.p.limits.Connections, max(0, int64(x.p.limits.Connections)-x.p.open.Load()))})
}

func (x *conn) unseat() {
	for i, w := range x.seats {
		if w != nil {
			x.p.seats.leave(w.key)
		}
		x.seats[i] = nil
	}
}
