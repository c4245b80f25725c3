package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/mtls"
)

// A connection whose bytes are not in TLS any more has no room for messages. What it
// stands on is renewed aside: the client's proxy makes another tunnel to the same
// destination, both ends show their newer certificates in its handshake, and its Open
// names the connection, by what only the two ends of that know. A balancer may lead it to
// a proxy that knows nothing of the connection, which then ends with its certificates.

// asides are the connections that can be renewed so at the server's side. Safe for
// concurrent use.
type asides struct {
	mu  sync.Mutex
	all map[mtls.Claim]*renewal
}

func (a *asides) put(c mtls.Claim, n *renewal) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.all == nil {
		a.all = make(map[mtls.Claim]*renewal)
	}
	a.all[c] = n
}

func (a *asides) drop(c mtls.Claim) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.all, c)
}

func (a *asides) get(c mtls.Claim) *renewal {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.all[c]
}

// errNoSuchConnection: what is to be renewed is not open here, or not the peer's.
var errNoSuchConnection = errors.New("no open connection of this peer's to this workload is to be renewed")

// renews serves a tunnel whose Open brings no connection, but newer certificates for one.
// A renewal is no flow: only one that fails is recorded.
func (x *conn) renews(ctx context.Context, me *party, endpoint *mtls.Endpoint, t *mtls.Conn, open *symbolonv1.Open) error {
	copy(x.flowID[:], open.GetFlowId())
	err := x.p.renewAside(me, endpoint, t, open)
	if err != nil {
		t.Refuse(&symbolonv1.Verdict{Reason: mtls.ReasonOf(err), FlowId: x.flowID[:]})
		return err
	}
	if err := t.Grant(ctx, &symbolonv1.Verdict{FlowId: x.flowID[:]}); err != nil {
		return err
	}
	x.unseat()
	x.reported = true
	return nil
}

func (p *Proxy) renewAside(me *party, endpoint *mtls.Endpoint, t *mtls.Conn, open *symbolonv1.Open) error {
	n := p.asides.get(mtls.Claim(open.GetRenews()))
	if n == nil || n.me != me {
		return deny(symbolonv1.Reason_REASON_PROOF_INVALID, errNoSuchConnection)
	}
	who, err := p.shown(t.Peer(), open)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.live == nil || n.stands.peer.ID != t.Peer().ID {
		return deny(symbolonv1.Reason_REASON_PROOF_INVALID, errNoSuchConnection)
	}
	n.stand(standing{endpoint, t.Peer(), who})
	if why := n.live.cutReason(); why != 0 {
		return deny(why, errors.New("what the newer certificate says is not allowed"))
	}
	n.p.metrics.renewals.WithLabelValues("renewed").Inc()
	return nil
}

// asideAt is when the client's side renews aside: before two thirds of either
// certificate's life, not all at the same moment.
func asideAt(s standing, now time.Time) time.Time {
	at := earlier(lastThird(s.peer.NotAfter, s.peer.Leaf.NotBefore), lastThird(s.shown.Credential().SVID.NotAfter(), s.shown.Credential().SVID.Chain[0].NotBefore))
	if at.Before(now) { // tried before, or the next certificate is late
		at = soon(now)
	}
	return at
}

func lastThird(notAfter, notBefore time.Time) time.Time {
	life := notAfter.Sub(notBefore)
	at := notAfter.Add(-life / 3)
	if life >= 12 {
		at = at.Add(-rand.N(life / 12)) //nolint:gosec // it only spreads load
	}
	return at
}

// hurry renews aside soon where another CA has signed the workload's newer SVID: the one
// before may be about to be retired, and what stands on it to be cut.
func (n *renewal) hurry() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if (n.live == nil || n.claim == mtls.Claim{} || !n.to.IsValid()) {
		return
	}
	was, is := n.stands.shown.Credential().SVID.Chain[0], n.me.current.Load().Credential().SVID.Chain[0]
	if !bytes.Equal(was.AuthorityKeyId, is.AuthorityKeyId) {
		n.p.table.askAt(n, soon(n.p.now()))
	}
}

// goAside makes the tunnel that renews, apart from whoever asks.
func (n *renewal) goAside() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.live != nil {
		n.run(n.aside)
	}
}

// aside renews by another tunnel. If that fails, the connection stays as it is, and it is
// tried again, unless nobody knows the connection where the tunnel leads.
func (n *renewal) aside() {
	p := n.p
	ctx, cancel := context.WithTimeout(context.WithoutCancel(p.accepting), p.timeouts.Setup)
	defer cancel()
	endpoint := n.me.current.Load()
	peer, err := n.another(ctx, endpoint)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.live == nil {
		return
	}
	if err == nil {
		n.stand(standing{endpoint, peer, &peer.Principal})
		p.metrics.renewals.WithLabelValues("renewed").Inc()
	} else {
		p.metrics.renewals.WithLabelValues("failed").Inc()
		p.log.Info("an open connection's certificates could not be renewed by another tunnel", renewalFields(n, err)...)
		var denied *mtls.DeniedError
		if errors.As(err, &denied) && denied.Peer == symbolonv1.Reason_REASON_PROOF_INVALID {
			return
		}
	}
	p.table.askAt(n, asideAt(n.stands, p.now()))
}

// another makes a tunnel to where the connection goes, and returns who is there: who has
// been there.
func (n *renewal) another(ctx context.Context, endpoint *mtls.Endpoint) (*mtls.Peer, error) {
	tcp, err := n.p.dialTunnel(n.from, n.to)
	if err != nil {
		return nil, networkError(err)
	}
	t, err := mtls.Dial(ctx, tcp, endpoint, func(peer *mtls.Peer) (*symbolonv1.Open, error) {
		if peer.ID != n.peer {
			return nil, deny(symbolonv1.Reason_REASON_PROOF_INVALID, fmt.Errorf("the destination is %s by now, not %s", peer.ID, n.peer))
		}
		open := mtls.NewOpen(mtls.NewFlowID(), n.to, symbolonv1.Protection_PROTECTION_AUTHENTICATED, n.p.Generation())
		open.Renews = n.claim[:]
		open.Token = n.p.tokenFor(endpoint.Credential(), &peer.Principal)
		return open, nil
	})
	if err != nil {
		return nil, err
	}
	if _, err = t.ReadVerdict(ctx); err != nil {
		return nil, err
	}
	_ = t.Close()
	return t.Peer(), nil
}
