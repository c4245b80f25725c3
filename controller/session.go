package controller

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/store"
)

const (
	// helloTimeout bounds the wait for a session's first message.
	helloTimeout = 10 * time.Second
	// ackTimeout bounds the wait for an Ack: compiling 100,000 policies takes seconds.
	ackTimeout = 2 * time.Minute
	// sendTimeout bounds the sending of one message to a host that does not read.
	sendTimeout = time.Minute

	maxHelloAddresses = 64
	maxRefusal        = 4 << 10
)

var (
	errReplaced     = connect.NewError(connect.CodeAborted, errors.New("replaced by a newer session of the same host"))
	errShuttingDown = connect.NewError(connect.CodeUnavailable, errors.New("the controller is shutting down"))
)

type sessionStream = connect.BidiStream[symbolonv1.SessionRequest, symbolonv1.SessionResponse]

// session is one host's stream: whole generations, one unacknowledged at a time.
type session struct {
	*Server
	host   *hostRecord
	stream *sessionStream
	inbox  <-chan *symbolonv1.SessionRequest
	lost   <-chan error

	// sent is the last distribution sent, nil before the first; outstanding until
	// it is acknowledged.
	sent        *distribution
	outstanding bool
	profiles    [32]byte
	// needsPeers: the host is told the peers' addresses; peers are those that it has.
	needsPeers bool
	peers      *peerSet
	// revoked is the number of the revocations sent; 0 before the first.
	revoked uint64
}

// Session distributes until the host leaves, is removed or its certificate ends.
func (s proxyService) Session(ctx context.Context, stream *sessionStream) error {
	if strings.Contains(stream.RequestHeader().Get("Content-Type"), "json") {
		return connect.NewError(connect.CodeUnimplemented, errors.New("sessions speak binary protobuf only"))
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	inbox, lost := receive(ctx, stream)
	e := &session{Server: s.Server, host: hostOf(ctx), stream: stream, inbox: inbox, lost: lost}
	hello, err := e.hello(ctx)
	if err != nil {
		return err
	}
	a, err := s.hub.attach(e.host.ID, hello)
	if err != nil {
		return err
	}
	defer s.hub.detach(a)
	// A removal between the gate and attach has had nothing to cut.
	if _, _, err := s.hosts.get(ctx, e.host.ID); errors.Is(err, store.ErrNotFound) {
		return errRemoved(e.host.ID)
	} else if err != nil {
		return s.internal("read host", err)
	}
	log := s.log.With(zap.String("host", e.host.ID), zap.String("namespace", e.host.Namespace))
	log.Info("session started", zap.String("version", hello.GetVersion()), zap.Uint64("generation", hello.GetGeneration()))
	if err := s.reported(ctx, e.host, hello.GetAddresses()); err != nil && !errors.Is(err, store.ErrNotFound) {
		return s.internal("addresses", err)
	}
	if err := e.believes(ctx, hello.GetBundleVersion()); err != nil {
		return err
	}
	if s.owesReissue(e.host.ID) || s.ofEarlier(ctx, e.host.ID) { // something has happened while it was away
		a.anew()
	}
	err = e.run(ctx, a, hello.GetGeneration())
	log.Info("session ended", zap.Error(err))
	return err
}

// receive reads the stream into a channel. It ends with ctx, for which it may wait
// in Receive until the handler has returned and the stream is torn down.
func receive(ctx context.Context, stream *sessionStream) (<-chan *symbolonv1.SessionRequest, <-chan error) {
	inbox := make(chan *symbolonv1.SessionRequest)
	lost := make(chan error, 1)
	go func() {
		for {
			m, err := stream.Receive()
			if err != nil {
				lost <- err
				return
			}
			select {
			case inbox <- m:
			case <-ctx.Done():
				return
			}
		}
	}()
	return inbox, lost
}

func (e *session) hello(ctx context.Context) (*symbolonv1.Hello, error) {
	timeout := time.NewTimer(helloTimeout)
	defer timeout.Stop()
	select {
	case m := <-e.inbox:
		h := m.GetHello()
		switch {
		case h == nil:
			return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("a session starts with hello"))
		case len(h.GetAddresses()) > maxHelloAddresses:
			return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%d addresses, the limit is %d", len(h.GetAddresses()), maxHelloAddresses))
		}
		for _, text := range append([]string{h.GetVersion()}, h.GetAddresses()...) {
			if text != "" && (!printable(text) || len(text) > 256) {
				return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("version or address malformed"))
			}
		}
		return h, nil
	case err := <-e.lost:
		return nil, err
	case <-timeout.C:
		return nil, connect.NewError(connect.CodeDeadlineExceeded, errors.New("no hello"))
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// run sends what the host lacks whenever it has acknowledged what it got.
func (e *session) run(ctx context.Context, a *attachment, has uint64) error {
	expiry := time.NewTimer(callOf(ctx).peer.NotAfter.Sub(e.opts.Now()))
	defer expiry.Stop()
	ack := time.NewTimer(ackTimeout)
	defer ack.Stop()
	for {
		if err := e.refuseWithdrawnPeer(ctx); err != nil {
			return err
		}
		want, changed := e.hub.wanted(e.sent == nil)
		if !e.outstanding {
			if e.sent == nil || want.newer(e.sent) {
				if err := e.send(ctx, want, has); err != nil {
					return err
				}
				ack.Reset(ackTimeout)
			} else {
				ack.Stop()
			}
		}
		peersChanged, err := e.sendPeers(ctx)
		if err != nil {
			return err
		}
		revocationsChanged, err := e.sendRevocations(ctx)
		if err != nil {
			return err
		}
		if err := e.refuseRevokedPeer(ctx); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-revocationsChanged:
		case <-peersChanged:
		case m := <-e.inbox:
			if err := e.acknowledge(ctx, m); err != nil {
				return err
			}
		case err := <-e.lost:
			return ended(err)
		case <-a.reissue:
			if err := e.sendReissue(ctx); err != nil {
				return err
			}
		case <-a.cut:
			return a.reason
		case <-ack.C:
			return connect.NewError(connect.CodeDeadlineExceeded, fmt.Errorf("generation %d was not acknowledged within %v", e.sent.generation(), ackTimeout))
		case <-expiry.C:
			return connect.NewError(connect.CodeUnauthenticated, errors.New("the host SVID of this connection has expired: connect anew"))
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ended is nil for a host that closed its half, as one does that stops.
func ended(err error) error {
	if errors.Is(err, context.Canceled) || connect.CodeOf(err) == connect.CodeCanceled || errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// send gives the host a generation and, where its workloads' SVIDs may have been
// issued by other Profiles, tells it to ask for them anew.
func (e *session) send(ctx context.Context, d *distribution, has uint64) error {
	set, err := d.visibleTo(e.host.Namespace)
	if err != nil {
		return e.internal("encode generation", err)
	}
	response := callOf(ctx).response
	if err := response.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return e.internal("session", err)
	}
	peers, _ := e.Server.peers.now()
	var revoked *symbolonv1.Revocations
	if e.revoked == 0 {
		revoked, _ = e.revocations.since(0)
		e.revoked = revoked.GetNumber()
	}
	if err := e.stream.Send(set.message(e.host, peers, revoked)); err != nil {
		return err
	}
	if e.reissue(d, set, has) {
		if err := e.stream.Send(e.anew(ctx, d)); err != nil {
			return err
		}
	}
	if err := response.SetWriteDeadline(time.Time{}); err != nil {
		return e.internal("session", err)
	}
	e.sent, e.outstanding, e.profiles = d, true, set.profiles
	e.needsPeers, e.peers = set.needsPeers, peers
	return nil
}

// sendReissue has the host ask for its SVIDs anew, whatever its generation.
func (e *session) sendReissue(ctx context.Context) error {
	return e.timed(ctx, e.anew(ctx, e.sent))
}

// anew tells the host to ask for its SVIDs anew; for its own only where another intermediate
// has signed that, or it is not known which. A renewal that is under way while the intermediate
// is replaced finds that out itself (RenewHost).
func (e *session) anew(ctx context.Context, d *distribution) *symbolonv1.SessionResponse {
	h, _, err := e.hosts.get(ctx, e.host.ID)
	current := err == nil && h.Issuer == issuerName(e.ca.Status().Intermediate)
	return &symbolonv1.SessionResponse{Message: &symbolonv1.SessionResponse_Reissue{
		Reissue: &symbolonv1.Reissue{Generation: d.generation(), WorkloadsOnly: current},
	}}
}

// sendPeers tells a host that needs it which addresses have a proxy now, if that has changed
// since it was told. The channel closes when it should be called again; nil: never.
func (e *session) sendPeers(ctx context.Context) (<-chan struct{}, error) {
	if !e.needsPeers {
		return nil, nil
	}
	peers, changed := e.Server.peers.now()
	if peers == e.peers {
		return changed, nil
	}
	response := callOf(ctx).response
	if err := response.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return nil, e.internal("session", err)
	}
	err := e.stream.Send(&symbolonv1.SessionResponse{Message: &symbolonv1.SessionResponse_Peers{
		Peers: &symbolonv1.Peers{Addresses: peers.addresses},
	}})
	if err != nil {
		return nil, err
	}
	if err := response.SetWriteDeadline(time.Time{}); err != nil {
		return nil, e.internal("session", err)
	}
	e.peers = peers
	return changed, nil
}

// timed sends one message to a host that may not read.
func (e *session) timed(ctx context.Context, m *symbolonv1.SessionResponse) error {
	response := callOf(ctx).response
	if err := response.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return e.internal("session", err)
	}
	if err := e.stream.Send(m); err != nil {
		return err
	}
	if err := response.SetWriteDeadline(time.Time{}); err != nil {
		return e.internal("session", err)
	}
	return nil
}

// sendRevocations tells a host what is revoked beyond what it was told, at once: it does
// not wait for a generation to be acknowledged. The channel closes when it should be
// called again.
func (e *session) sendRevocations(ctx context.Context) (<-chan struct{}, error) {
	revoked, changed := e.revocations.since(e.revoked)
	if revoked == nil {
		return changed, nil
	}
	err := e.timed(ctx, &symbolonv1.SessionResponse{Message: &symbolonv1.SessionResponse_Revocations{Revocations: revoked}})
	if err != nil {
		return nil, err
	}
	e.revoked = revoked.GetNumber()
	return changed, nil
}

// reissue compares with what this session sent before. At its start, all that is
// known is the generation that the host comes with; a host that comes with none
// has no SVIDs either.
func (e *session) reissue(d *distribution, set *visibleSet, has uint64) bool {
	if e.sent != nil {
		return set.profiles != e.profiles
	}
	// A greater one is of another life of this controller, before a restore.
	return has != 0 && (has < d.profilesGeneration || has > d.generation())
}

func (e *session) acknowledge(ctx context.Context, m *symbolonv1.SessionRequest) error {
	if r := m.GetRevoked(); r != nil {
		e.hub.heardOfRevocations(e.host.ID, r.GetNumber())
		if r.GetError() != "" {
			e.log.Error("a host does not understand all that is revoked", zap.String("host", e.host.ID),
				zap.Uint64("revocations", r.GetNumber()), zap.String("error", cleanText(r.GetError(), maxRefusal)))
		}
		return nil
	}
	ack := m.GetAck()
	if ack == nil || !e.outstanding || ack.GetGeneration() != e.sent.generation() {
		return connect.NewError(connect.CodeInvalidArgument, errors.New("an ack for the outstanding generation was expected"))
	}
	e.outstanding = false
	refusal := strings.ToValidUTF8(ack.GetError(), "�")
	if len(refusal) > maxRefusal {
		refusal = strings.ToValidUTF8(refusal[:maxRefusal], "")
	}
	e.hub.acknowledged(e.host.ID, ack.GetGeneration(), refusal)
	if refusal != "" {
		e.log.Error("generation refused by a host", zap.String("host", e.host.ID),
			zap.Uint64("generation", ack.GetGeneration()), zap.String("error", refusal))
	}
	return e.believes(ctx, ack.GetBundleVersion())
}
