package proxy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/policydb"
	"github.com/symbolon/symbolon/proxy/loop"
)

// conn is one accepted connection and its record.
type conn struct {
	p        *Proxy
	accepted *socket
	started  time.Time
	rec      *symbolonv1.FlowRecord
	ends     [2]*flow.End // client and server as edges have them; nil: not identified
	flowID   mtls.FlowID
	allowed  bool
	counted  bool // on its edge
	reported bool
	release  func()    // gives back the place among the unauthorized; once
	slot     *slot     // of the accepted connection
	seats    [2]*party // that count it
	// after is called at the end of a connection that has gone on by itself; nil: end.
	after func(error)
	// quick: nothing may be waited for. rest is what was left then. See later.
	quick bool
	rest  func(context.Context) error
}

// newConn is a connection that was accepted as c, whose place s is.
func (p *Proxy) newConn(c *socket, s *slot, reporter symbolonv1.Reporter) *conn {
	x := &conn{p: p, accepted: c, slot: s, started: p.now(), flowID: mtls.NewFlowID(), release: func() {}}
	all := new(struct { // one piece of memory, which goes as one
		record symbolonv1.FlowRecord
		ends   [2]symbolonv1.FlowEndpoint
	})
	x.rec = &all.record
	x.rec.Reporter, x.rec.Host, x.rec.Source, x.rec.Destination = reporter, p.host, &all.ends[0], &all.ends[1]
	return x
}

// deny is an error with a reason, for the record.
func deny(reason symbolonv1.Reason, err error) error {
	return &mtls.DeniedError{Reason: reason, Err: err}
}

// networkError gives what the kernel said its reason.
func networkError(err error) error { return deny(mtls.NetworkReason(err), err) }

func (x *conn) addresses(src, dst netip.AddrPort) {
	x.rec.Source.Address, x.rec.Destination.Address = src.String(), dst.String()
}

// identified writes who is at one end of the record. Labels only: they are what maps
// and people go by, and the record stays small.
func (x *conn) identified(e *symbolonv1.FlowEndpoint, p *identity.Principal) {
	end := principalEnd(p)
	if e == x.rec.GetSource() {
		x.ends[0] = end
	} else {
		x.ends[1] = end
	}
	e.SpiffeId, e.Namespace, e.Workload = p.ID.String(), p.Namespace, p.Name
	e.Attributes, e.AttributesFrom = labelsOf(p.Attributes), string(p.Issuer)
}

// decided writes one side's decision, and turns a denial into an error.
func (x *conn) decided(side policydb.Side, c *policydb.Compiled, d *policydb.Decision) error {
	x.rec.Generation = c.Generation()
	if side == policydb.Client {
		x.rec.ClientPolicy = d.Policy
	} else {
		x.rec.ServerPolicy = d.Policy
	}
	if d.WouldAllow != nil {
		switch {
		case !*d.WouldAllow:
			x.rec.WouldVerdict, x.rec.WouldPolicy = "deny", d.WouldPolicy
		case x.rec.WouldVerdict == "": // the other side's no stands above this one's yes
			x.rec.WouldVerdict, x.rec.WouldPolicy = "allow", d.WouldPolicy
		}
	}
	if x.rec.Reason == symbolonv1.Reason_REASON_UNSPECIFIED || !d.Allow || d.Reason == symbolonv1.Reason_REASON_LEARN {
		x.rec.Reason = d.Reason
	}
	if d.Allow {
		return nil
	}
	who := "the client's side"
	if side == policydb.Server {
		who = "the server's side"
	}
	return deny(d.Reason, errors.New("denied by "+describe(d)+" on "+who))
}

func describe(d *policydb.Decision) string {
	switch {
	case d.Policy != "":
		return "policy " + d.Policy
	case d.Reason == symbolonv1.Reason_REASON_NO_CLAIMS:
		return "default, as nothing is known of the peer but its SPIFFE ID (a Profile that matches it gives it labels)"
	}
	return flow.ReasonName(d.Reason)
}

func (x *conn) tunnelled(t *mtls.Conn) {
	i := t.Info()
	x.rec.TlsVersion, x.rec.CipherSuite, x.rec.KeyExchange, x.rec.Resumed = i.Version, i.CipherSuite, i.KeyExchange, i.Resumed
	x.rec.Protection = t.Protection()
}

// errRelaying: the connection goes on by itself, and after is called at its end.
var errRelaying = errors.New("relaying")

// open registers the connection among the live ones and lets it run. local are the
// workloads of this host that take part in it.
func (x *conn) open(r *relay, l *live, local ...*party) error {
	x.allowed = true
	x.release() // from here on it is authorized
	held := x.p.hold(local...)
	over := func(err error) error {
		if l.renewal != nil {
			x.p.table.remove(l.renewal.over())
		} else {
			x.p.table.remove(l)
		}
		count(x.rec, r)
		held.release(x.p.now())
		if why := l.cutReason(); why != symbolonv1.Reason_REASON_UNSPECIFIED {
			return deny(why, errors.New("cut while open"))
		}
		return err
	}
	if l.renewal != nil {
		l.renewal.begin(l, r)
	}
	var err error
	if r.copier == nil {
		err = r.detach(func(err error, on *loop.Tunnel) {
			err = over(wanting(err))
			if on != nil {
				r.keep(on)
			}
			if x.after != nil {
				x.after(err)
			} else {
				x.end(err)
			}
			x.p.conns.Done()
		})
		if errors.Is(err, mtls.ErrNotDetachable) {
			_, err = r.copy()
		}
	}
	if err != nil {
		r.abort() // whatever is left of either side, of which nobody else knows yet
		return over(wanting(err))
	}
	// Counted now, not at the end: some connections last for weeks.
	x.rec.ServerPolicy = clip(x.rec.ServerPolicy)
	x.counted = true
	x.observed(symbolonv1.Outcome_OUTCOME_ALLOW, flow.Amount{Connections: 1})
	l.cut = r.abort
	l.moved = r.moved
	server := x.rec.GetServerPolicy() // report may change it while somebody looks
	l.record = func() *symbolonv1.FlowRecord {
		rec := x.snapshot(r)
		rec.ServerPolicy = server
		return rec
	}
	x.p.table.add(l, x.p.now())
	if r.copier != nil {
		l.start()
		return over(r.copier.finish())
	}
	x.accepted = nil // closed, one side's, and of some size
	x.p.conns.Add(1)
	r.loop.Hurry()
	x.p.loops.Add(r.loop)
	l.start()
	return errRelaying
}

// wanting gives its reason to what this host has not got enough of: descriptors, or
// memory to watch them with.
func wanting(err error) error {
	var unwatched *loop.WatchError
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.As(err, &unwatched) {
		return deny(symbolonv1.Reason_REASON_OVERLOADED, err)
	}
	return err
}

func count(rec *symbolonv1.FlowRecord, r *relay) {
	rec.BytesSent, rec.BytesReceived, rec.FirstByteMicros = r.counts()
	if r.serverIsNear {
		rec.BytesSent, rec.BytesReceived = rec.BytesReceived, rec.BytesSent
	}
}

// snapshot is the record of a connection that is still open. Everything but the
// counters is fixed by the time it is registered.
func (x *conn) snapshot(r *relay) *symbolonv1.FlowRecord {
	rec := &symbolonv1.FlowRecord{
		FlowId: x.flowID.String(), Reporter: x.rec.GetReporter(), Host: x.rec.GetHost(),
		Start: timestamppb.New(x.started), Source: x.rec.GetSource(), Destination: x.rec.GetDestination(),
		Outcome: symbolonv1.Outcome_OUTCOME_ALLOW, ClientPolicy: x.rec.GetClientPolicy(),
		Protection: x.rec.GetProtection(), CipherSuite: x.rec.GetCipherSuite(), KeyExchange: x.rec.GetKeyExchange(),
		TlsVersion: x.rec.GetTlsVersion(), Resumed: x.rec.GetResumed(), Reused: x.rec.GetReused(), Local: x.rec.GetLocal(), Generation: x.rec.GetGeneration(),
	}
	count(rec, r)
	return rec
}

// serve runs f, with a deadline for all that comes before the bytes, and ends the
// connection by what it returns. When ctx ends, the proxy
// stops: whatever f waits for is cut, a client that says nothing included.
func (x *conn) serve(ctx context.Context, f func(context.Context) error) {
	c := x.accepted
	stop := context.AfterFunc(ctx, c.reset)
	setup, cancel := context.WithTimeout(ctx, x.p.timeouts.Setup)
	err := f(setup)
	cancel()
	stop()
	x.ended(ctx, err)
}

// ended ends the connection by what serving it returned, unless it goes on by itself.
func (x *conn) ended(ctx context.Context, err error) {
	if errors.Is(err, errRelaying) {
		return
	}
	if err != nil && ctx.Err() != nil {
		err = deny(symbolonv1.Reason_REASON_SHUTTING_DOWN, err)
	}
	x.end(err)
}

// end closes the accepted connection, and writes the record unless report has. err
// is what serving returned.
func (x *conn) end(err error) {
	x.release()
	defer x.slot.leave()
	switch {
	case x.accepted == nil: // closed by the relay
	case err == nil:
		_ = x.accepted.Close()
	default:
		x.accepted.reset()
	}
	x.report(err)
}

// report writes the record, once.
func (x *conn) report(err error) {
	if x.reported {
		return
	}
	x.reported = true
	x.unseat()
	rec := x.rec
	rec.FlowId = x.flowID.String()
	rec.Start, rec.End = timestamppb.New(x.started), timestamppb.New(x.p.now())
	rec.Outcome = symbolonv1.Outcome_OUTCOME_ALLOW
	if x.counted {
		x.observed(rec.Outcome, flow.Amount{Sent: rec.GetBytesSent(), Received: rec.GetBytesReceived()})
	}
	if err != nil {
		x.failed(err)
	}
	// Names of programs and of peers' policies come from others, of any length and
	// in any bytes.
	rec.Detail, rec.ServerPolicy = clip(rec.Detail), clip(rec.ServerPolicy)
	if !x.counted || rec.Outcome == symbolonv1.Outcome_OUTCOME_DENY {
		x.observed(rec.Outcome, flow.Amount{Connections: 1}) // never open, or cut
	}
	x.p.count(rec)
	x.p.records.Record(rec)
}

// maxText bounds free text in a record, bytes.
const maxText = 512

func clip(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
	}
	return strings.ToValidUTF8(s, "?")
}

// failed writes how a connection that did not end well ended.
func (x *conn) failed(err error) {
	rec := x.rec
	reason := mtls.ReasonOf(err)
	rec.Detail = err.Error()
	if x.allowed && (reason == symbolonv1.Reason_REASON_RESET || errors.Is(err, net.ErrClosed)) {
		// One end reset it, which is its right: allowed all the same.
		rec.Outcome = symbolonv1.Outcome_OUTCOME_ALLOW
		rec.Detail = "reset"
		return
	}
	var denied *mtls.DeniedError
	if errors.As(err, &denied) && reason == symbolonv1.Reason_REASON_PEER_REFUSED {
		rec.PeerReason = denied.Peer
		rec.ServerPolicy = denied.Policy
		if isNetwork(denied.Peer) {
			reason = denied.Peer // the application's own answer, passed on
		}
	}
	rec.Reason = reason
	rec.Outcome = symbolonv1.Outcome_OUTCOME_DENY
	if isNetwork(reason) {
		rec.Outcome = symbolonv1.Outcome_OUTCOME_ERROR
	}
	if reason == symbolonv1.Reason_REASON_INTERNAL {
		x.p.log.Error("connection failed", zap.String("flow_id", rec.GetFlowId()), zap.Error(err))
	}
}

// isNetwork: neither side's decision, but what network, application or program did.
func isNetwork(r symbolonv1.Reason) bool {
	switch r {
	case symbolonv1.Reason_REASON_REFUSED, symbolonv1.Reason_REASON_UNREACHABLE,
		symbolonv1.Reason_REASON_TIMED_OUT, symbolonv1.Reason_REASON_RESET,
		symbolonv1.Reason_REASON_TRUNCATED, symbolonv1.Reason_REASON_INTERNAL,
		symbolonv1.Reason_REASON_SHUTTING_DOWN:
		return true
	}
	return false
}
