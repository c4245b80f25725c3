package flow

import (
	"container/list"
	"crypto/sha256"
	"net/netip"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

const (
	// edgeWindow is how long connections are gathered before they are reported.
	edgeWindow = time.Minute
	// edgeSoon is the same for new edges and for denials, which somebody may wait for.
	edgeSoon = 10 * time.Second
	// maxEdges bounds the edges whose ends all have an identity, maxAddressEdges the
	// others: who has none can come from as many addresses as he likes, and must not
	// push out the rest.
	maxEdges        = 8192
	maxAddressEdges = 2048
	// edgeBatch and edgeBytes bound one report, in edges and in bytes of protobuf.
	edgeBatch = 1024
	edgeBytes = 1 << 20
)

// End is one end of connections. Make it once and share it. Immutable.
type End struct {
	id      [sha256.Size]byte
	message *symbolonv1.EdgeEnd
	size    int
}

// NewEnd takes e, which is not changed afterwards.
func NewEnd(e *symbolonv1.EdgeEnd) *End {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(e)
	if err != nil { // not UTF-8: what cannot be sent must not spoil a whole report
		e = &symbolonv1.EdgeEnd{Address: "?"}
		b = []byte(e.GetAddress())
	}
	return &End{id: sha256.Sum256(b), message: e, size: len(b)}
}

// proven: the end has an identity, and is not known by its address alone.
func (e *End) proven() bool { return e.message.GetSpiffeId() != "" }

// Observation is what one connection adds to an edge.
type Observation struct {
	From, To *End
	// Record says what became of it: verdict, reason, policies, protection, reporter.
	// It is read during the call only.
	Record   *symbolonv1.FlowRecord
	Protocol string // "tcp"
	Port     uint16 // the server's
	// ExternalAddress is that of the end that is an External, if one is.
	ExternalAddress netip.Addr
	Amount          Amount
	At              time.Time
}

// Amount is how much went over an edge. A connection is counted when it opens, its
// bytes when it ends.
type Amount struct {
	Connections    uint64
	Sent, Received uint64 // bytes from the client, from the server
}

func (a *Amount) add(b Amount) {
	a.Connections += b.Connections
	a.Sent += b.Sent
	a.Received += b.Received
}

// EdgeSink takes what connections add to edges. Observe never blocks.
type EdgeSink interface {
	Observe(Observation)
}

// edgeKey is what the connections of an edge have in common.
type edgeKey struct {
	from, to                   [sha256.Size]byte
	protocol                   string
	port                       uint16
	outcome                    symbolonv1.Outcome
	reason, peerReason         symbolonv1.Reason
	clientPolicy, serverPolicy string
	wouldVerdict, wouldPolicy  string
	protection                 symbolonv1.Protection
	local                      bool
	reporter                   symbolonv1.Reporter
}

// edge is an edge with what has not been reported of it. It stands in one list.
type edge struct {
	key         edgeKey
	from, to    *End
	amount      Amount
	first, last time.Time
	address     netip.Addr // of the External
	due         time.Time
	in          *list.List
	element     *list.Element
}

// class is 1 where an end is known by its address alone.
func (e *edge) class() int {
	if e.from.proven() && e.to.proven() {
		return 0
	}
	return 1
}

// edges gathers connections into edges. Edges that were reported are remembered
// while there is room, so that they are not new when they come again. Safe for
// concurrent use.
type edges struct {
	mu    sync.Mutex
	byKey map[edgeKey]*edge
	count [2]int // by class
	// soon and later are those with something to report, the first due first; idle
	// those without, the one idle for the longest first, by class.
	soon, later *list.List
	idle        [2]*list.List
	lost, total uint64 // connections: since the last report, and ever
}

func newEdges() *edges {
	return &edges{
		byKey: make(map[edgeKey]*edge), soon: list.New(), later: list.New(),
		idle: [2]*list.List{list.New(), list.New()},
	}
}

func (s *edges) observe(o Observation) {
	r := o.Record
	key := edgeKey{
		from: o.From.id, to: o.To.id, protocol: o.Protocol, port: o.Port,
		outcome: r.GetOutcome(), reason: r.GetReason(), peerReason: r.GetPeerReason(),
		clientPolicy: r.GetClientPolicy(), serverPolicy: r.GetServerPolicy(),
		wouldVerdict: r.GetWouldVerdict(), wouldPolicy: r.GetWouldPolicy(),
		protection: r.GetProtection(), local: r.GetLocal(), reporter: r.GetReporter(),
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.add(&edge{
		key: key, from: o.From, to: o.To, amount: o.Amount, first: o.At, last: o.At, address: o.ExternalAddress,
	}, o.At)
}

// add merges x into the edge of its key, or makes x that edge.
func (s *edges) add(x *edge, now time.Time) {
	e := s.byKey[x.key]
	if e == nil {
		if !s.room(x.class()) {
			s.lost += x.amount.Connections
			s.total += x.amount.Connections
			return
		}
		s.byKey[x.key] = x
		s.count[x.class()]++
		s.wait(x, s.soon, now.Add(edgeSoon))
		return
	}
	if e.in == s.idle[e.class()] {
		e.amount, e.first, e.last = Amount{}, x.first, x.last
		if e.key.outcome == symbolonv1.Outcome_OUTCOME_DENY {
			s.wait(e, s.soon, now.Add(edgeSoon))
		} else {
			s.wait(e, s.later, now.Add(edgeWindow))
		}
	}
	e.amount.add(x.amount)
	if x.first.Before(e.first) {
		e.first = x.first
	}
	if x.last.After(e.last) {
		e.last = x.last
	}
	if x.address.IsValid() {
		e.address = x.address
	}
}

// room makes room for one more edge of a class, if any can go.
func (s *edges) room(class int) bool {
	if s.count[class] < [2]int{maxEdges, maxAddressEdges}[class] {
		return true
	}
	oldest := s.idle[class].Front()
	if oldest == nil {
		return false
	}
	e := oldest.Value.(*edge)
	s.idle[class].Remove(oldest)
	delete(s.byKey, e.key)
	s.count[class]--
	return true
}

// wait moves an edge to the end of a list.
func (s *edges) wait(e *edge, to *list.List, due time.Time) {
	if e.in != nil {
		e.in.Remove(e.element)
	}
	e.in, e.element, e.due = to, to.PushBack(e), due
}

// next takes what is due, or all of it, bounded; nil: nothing is.
func (s *edges) next(now time.Time, all bool) *edgeReport {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := &edgeReport{lost: s.lost, places: make(map[[sha256.Size]byte]uint32)}
	for _, l := range []*list.List{s.soon, s.later} {
		for front := l.Front(); front != nil; front = l.Front() {
			e := front.Value.(*edge)
			if !all && now.Before(e.due) || !r.take(e) {
				break
			}
			s.wait(e, s.idle[e.class()], time.Time{})
		}
	}
	if len(r.edges) == 0 && r.lost == 0 {
		return nil
	}
	s.lost = 0
	return r
}

// putBack is for a report that did not arrive.
func (s *edges) putBack(r *edgeReport, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lost += r.lost
	for _, e := range r.edges {
		s.add(e, now)
	}
}

// drop is for a report that the controller will never take.
func (s *edges) drop(r *edgeReport) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lost += r.lost
	for _, e := range r.edges {
		s.lost += e.amount.Connections
		s.total += e.amount.Connections
	}
}

// edgeReport is a batch of edges on its way; they are copies.
type edgeReport struct {
	edges  []*edge
	lost   uint64
	set    symbolonv1.EdgeSet
	places map[[sha256.Size]byte]uint32
	size   int
}

// take adds an edge, unless the report is full.
func (r *edgeReport) take(e *edge) bool {
	const most = 2 * maxText // of an edge's own fields, about
	size := most
	for _, end := range []*End{e.from, e.to} {
		if _, known := r.places[end.id]; !known {
			size += end.size
		}
	}
	if len(r.edges) >= edgeBatch || len(r.edges) > 0 && r.size+size > edgeBytes {
		return false
	}
	r.size += size
	c := *e
	c.in, c.element = nil, nil
	r.edges = append(r.edges, &c)
	address := ""
	if e.address.IsValid() {
		address = e.address.String()
	}
	r.set.Edges = append(r.set.Edges, &symbolonv1.Edge{
		From: r.place(e.from), To: r.place(e.to), Protocol: e.key.protocol, Port: uint32(e.key.port),
		Outcome: e.key.outcome, Reason: e.key.reason, PeerReason: e.key.peerReason,
		ClientPolicy: e.key.clientPolicy, ServerPolicy: e.key.serverPolicy,
		WouldVerdict: e.key.wouldVerdict, WouldPolicy: e.key.wouldPolicy,
		Protection: e.key.protection, Local: e.key.local, Reporter: e.key.reporter, AddressOnly: e.class() == 1,
		Connections: e.amount.Connections, BytesSent: e.amount.Sent, BytesReceived: e.amount.Received,
		First: timestamppb.New(e.first), Last: timestamppb.New(e.last), ExternalAddress: address,
	})
	return true
}

func (r *edgeReport) place(e *End) uint32 {
	n, ok := r.places[e.id]
	if !ok {
		n = uint32(len(r.set.GetEnds()))
		r.places[e.id] = n
		r.set.Ends = append(r.set.Ends, e.message)
	}
	return n
}
