package proxy

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/policydb"
)

// standing is what an open connection through a tunnel stands on: how its two ends know
// each other. It begins with what the handshake showed, and is renewed in the tunnel.
type standing struct {
	// shown is the endpoint whose SVID this side has shown.
	shown *mtls.Endpoint
	// peer is the other side by the certificate that it has shown last, who by the
	// token beside it where the certificate carries no claims.
	peer *mtls.Peer
	who  *identity.Principal
}

// live is the connection that asks q.
func (s standing) live(q question, judge func(*policydb.Compiled, time.Time) (bool, time.Time)) *live {
	return &live{
		question: q, judge: judge,
		expires:  s.shown.Credential().SVID.NotAfter,
		notAfter: s.peer.NotAfter,
		leaf:     s.peer.Leaf,
		above:    s.peer.Above,
		peer:     s.who,
	}
}

// standing is x as a connection of me's that stands on s for now.
func (x *conn) standing(me *party, s standing, judged func(standing) *live) *live {
	l := judged(s)
	l.renewal = &renewal{p: x.p, me: me, judged: judged, stands: s, flow: x.flowID, peer: s.peer.ID}
	return l
}

// renewal keeps a connection open beyond the certificates that it began with: before
// the peer's ends, it asks the peer for the next one; and it shows this side's next one,
// if the peer asks for it, once there is one. A direction that has ended carries no
// question, and one that nobody reads brings no answer: such a connection ends with the
// certificate. Safe for concurrent use.
type renewal struct {
	p  *Proxy
	me *party
	// judged is the connection for the table, as it stands.
	judged func(standing) *live
	// token: a token of ours was shown in Open.
	token bool

	flow mtls.FlowID
	// from and to are where the client's side has dialled; not valid: this is the server's.
	from netip.Addr
	to   netip.AddrPort
	peer spiffeid.ID

	// Set by begin, before anything is heard.
	messages *mtls.Renewal // nil: there is no room for messages
	tell     func(m []byte)
	claim    mtls.Claim // names a connection that is renewed aside; zero: it is not

	mu     sync.Mutex
	stands standing
	live   *live  // as registered now; nil: not open
	asked  []byte // the request that the peer has not answered
	wanted []byte // the peer's, which waits for an SVID newer than the one it knows

	// Guarded by the table's lock.
	at    time.Time // when to ask
	place int
}

func (n *renewal) when() time.Time { return n.at }
func (n *renewal) spot() *int      { return &n.place }

// errUnasked: the peer's control message is not its turn.
var errUnasked = fmt.Errorf("%w: a control message out of turn", mtls.ErrProtocol)

// begin prepares r's connection, of which nothing has been read yet.
func (n *renewal) begin(l *live, r *relay) {
	n.live = l
	c := r.tunnel.Conn
	if n.messages = c.Renewal(); n.messages == nil {
		if c.Renewable() {
			n.claim, _ = c.Claim(n.flow) // it fails for nobody who has a handshake behind
		}
		return
	}
	c.OnControl(n.heard)
	n.tell = func(m []byte) {
		if r.loop != nil {
			r.loop.Tell(m)
			return
		}
		go func() { _ = c.SendControl(m) }() // it may wait; whoever ends the connection ends that
	}
}

// started lets the questions begin: the relay carries bytes.
func (n *renewal) started() {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.live == nil: // over already
	case n.messages != nil:
		n.p.table.askAt(n, askAt(n.stands.peer, n.p.now()))
	case n.claim == mtls.Claim{}:
	case n.to.IsValid():
		n.p.table.askAt(n, asideAt(n.stands, n.p.now()))
	default:
		n.p.asides.put(n.claim, n)
	}
}

// start is for a connection whose bytes flow.
func (l *live) start() {
	if l.renewal != nil {
		l.renewal.started()
	}
}

// over is for the end of the connection, and returns it as it was registered last.
func (n *renewal) over() *live {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := n.live
	n.live = nil
	aside := n.claim != mtls.Claim{}
	if n.messages != nil || aside {
		n.p.table.askAt(n, time.Time{})
	}
	if aside {
		n.p.asides.drop(n.claim)
	}
	return l
}

// askAfter is how old a connection, or the last answer in it, is when its peer is asked
// for its next certificate, give or take a half: most connections are over before. The
// question waits for the peer's next rotation. So a connection that lasts stands on what
// is newest, and is not cut where a CA is retired.
const askAfter = time.Minute

// soon is askAfter from now, give or take a half: not all at the same moment.
func soon(now time.Time) time.Time {
	return now.Add(askAfter/2 + rand.N(askAfter)) //nolint:gosec // it only spreads load
}

// askAt is when to ask for the certificate after peer's: soon, or before it has lived for
// two thirds of its time.
func askAt(peer *mtls.Peer, now time.Time) time.Time {
	at := soon(now)
	if last := peer.NotAfter.Add(-peer.NotAfter.Sub(peer.Leaf.NotBefore) / 3); last.Before(at) {
		at = last
	}
	if at.Before(now) {
		at = now
	}
	return at
}

// ask asks the peer for its next certificate.
func (n *renewal) ask() {
	if n.messages == nil {
		n.goAside()
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.live == nil || n.asked != nil {
		return
	}
	m, request, err := n.messages.Ask()
	if err != nil {
		n.failed(deny(symbolonv1.Reason_REASON_INTERNAL, err))
		return
	}
	n.asked = request
	n.tell(m)
}

// heard takes a control message from whoever reads the tunnel, and does not wait.
func (n *renewal) heard(m []byte) error {
	c, err := mtls.ParseControl(m)
	if err != nil {
		return fmt.Errorf("%w: %w", mtls.ErrProtocol, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.live == nil {
		return nil // it has just been ended
	}
	// One question and one answer at a time: more would let a peer keep us busy.
	if len(c.GetRequest()) > 0 {
		if n.wanted != nil {
			return errUnasked
		}
		n.wanted = c.GetRequest()
		n.run(n.answer)
		return nil
	}
	request := n.asked
	if request == nil {
		return errUnasked
	}
	n.asked = nil
	n.run(func() { n.check(request, c) })
	return nil
}

// run runs f apart from the loop, which counts as being under way.
func (n *renewal) run(f func()) {
	n.p.conns.Add(1) // the connection is counted until it is over
	n.p.crew.run(func() {
		defer n.p.conns.Done()
		f()
	})
}

// answer shows the workload's SVID, if it is newer than the one that the peer knows, and
// the peer has asked. Otherwise the question waits for the next one.
func (n *renewal) answer() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.live == nil || n.wanted == nil {
		return
	}
	e := n.me.current.Load()
	was, is := n.stands.shown.Credential(), e.Credential()
	// Two may end in the same second.
	if is.SVID.Chain[0].Equal(was.SVID.Chain[0]) || is.SVID.NotAfter().Before(was.SVID.NotAfter()) || is.SVID.ID != was.SVID.ID {
		return
	}
	token := ""
	if n.token {
		// The peer knows us by a token, which is bound to the former SVID's key.
		if token = n.p.tokenFor(is, &n.stands.peer.Principal); token == "" {
			return
		}
	}
	m, err := n.messages.Prove(n.wanted, e, token)
	if err != nil {
		n.failed(deny(mtls.ReasonOf(err), err))
		return
	}
	n.wanted = nil
	n.tell(m)
	n.stand(standing{e, n.stands.peer, n.stands.who})
}

// check verifies the peer's answer, and judges the connection by what it shows.
func (n *renewal) check(request []byte, answer *symbolonv1.Control) {
	peer, err := n.messages.Check(request, answer, n.me.current.Load(), n.p.now())
	var who *identity.Principal
	if err == nil {
		who, err = n.p.shown(peer, answer)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.live == nil {
		return
	}
	if err == nil && peer.NotAfter.Before(n.stands.peer.NotAfter) {
		err = deny(symbolonv1.Reason_REASON_PROOF_INVALID, errors.New("the certificate ends before the one that is known"))
	}
	if err != nil {
		n.failed(err)
		return
	}
	n.stand(standing{n.stands.shown, peer, who})
	n.p.table.askAt(n, askAt(peer, n.p.now()))
	n.p.metrics.renewals.WithLabelValues("renewed").Inc()
}

// stand registers the connection by what it stands on now. It is judged as a new one is.
func (n *renewal) stand(s standing) {
	was := n.live
	l := n.judged(s)
	l.first, l.renewal = was.origin(), n
	l.moved, l.record = was.moved, was.record
	n.stands, n.live = s, l
	now := n.p.now()
	n.p.table.add(l, now)
	n.p.table.remove(was)
	// The peer was verified by some bundles, this side shows what belongs to others: the
	// ones in use now count.
	if err := n.me.current.Load().Vouches(s.peer.Leaf, s.peer.Above, now); err != nil {
		n.failed(deny(disbelief(err), err))
	}
}

func (n *renewal) failed(err error) {
	n.p.metrics.renewals.WithLabelValues("failed").Inc()
	if n.live.end(mtls.ReasonOf(err)) {
		n.p.log.Info("connection cut, since its peer's certificate could not be renewed in it", renewalFields(n, err)...)
	}
}

func renewalFields(n *renewal, err error) []zap.Field {
	return []zap.Field{zap.Stringer("flow_id", n.flow), zap.Stringer("spiffe_id", n.peer), zap.Error(err)}
}

// askAt notes when n is to ask; zero: never.
func (t *table) askAt(n *renewal, at time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n.at = at
	t.asking.put(n)
}

// askAll asks the peers whose time has come.
func (t *table) askAll(now time.Time) {
	var due []*renewal
	t.mu.Lock()
	for n, ok := t.asking.due(now); ok; n, ok = t.asking.due(now) {
		due = append(due, n)
	}
	t.mu.Unlock()
	for _, n := range due {
		n.ask()
	}
}

// renewed lets those answer whose peers have asked w for a newer SVID.
func (t *table) renewed(w *party) {
	var all []*renewal
	t.mu.Lock()
	for g := range t.byParty[w] {
		for _, l := range g.members {
			if l.renewal != nil {
				all = append(all, l.renewal)
			}
		}
	}
	t.mu.Unlock()
	for _, n := range all {
		if n.messages != nil {
			n.answer()
		} else {
			n.hurry()
		}
	}
}
