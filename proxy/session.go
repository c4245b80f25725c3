package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
	"github.com/symbolon/symbolon/identity"
)

const (
	reconnectFirst = 500 * time.Millisecond
	reconnectMax   = 60 * time.Second
	// steady is how long a session must have lasted for the next failure to count
	// as the first.
	steady = time.Minute
)

// Session keeps one stream to the controller open: it says what the host has, takes
// generations and acknowledges them.
type Session struct {
	// Client is asked for before every attempt, since the host's SVID rotates.
	Client func() symbolonv1connect.ProxyServiceClient
	// Hello is what the proxy says first.
	Hello func() *symbolonv1.Hello
	// Apply puts a generation in force, or leaves everything as it was but for the bundle,
	// which counts whatever becomes of the rest.
	Apply func(*symbolonv1.Generation) error
	// Bundle is the version of the bundle in force.
	Bundle func() uint64
	// Peers puts other addresses in the place of Generation.peers.
	Peers func([][]byte)
	// Revoked puts a change of what is revoked in force, and says what of it was not
	// understood.
	Revoked func(*symbolonv1.Revocations) error
	// Reissue asks for new SVIDs, since profiles or what signs have changed; for the host's
	// own, too, if host.
	Reissue func(host bool)
	Log     *zap.Logger

	connected atomic.Bool
	turned    atomic.Pointer[time.Time] // when connected has changed
	heard     atomic.Pointer[time.Time]
}

// Connected tells whether the controller is there now.
func (s *Session) Connected() bool { return s.connected.Load() }

// Ages are since when Connected is as it is, and when the controller has said something
// last; zero: never in this process.
func (s *Session) Ages() (since, heard time.Time) {
	if t := s.turned.Load(); t != nil {
		since = *t
	}
	if t := s.heard.Load(); t != nil {
		heard = *t
	}
	return since, heard
}

// turn notes whether the controller is there, and tells how it was.
func (s *Session) turn(connected bool) (was bool) {
	was = s.connected.Swap(connected)
	if was != connected || s.turned.Load() == nil {
		now := time.Now().UTC()
		s.turned.Store(&now)
	}
	return was
}

type sessionStream = *connect.BidiStreamForClient[symbolonv1.SessionRequest, symbolonv1.SessionResponse]

// ErrRemoved: the controller does not know this host any more.
var ErrRemoved = errors.New("the controller refuses this host: it was removed, and must enrol again with a new join token")

// Run keeps trying, with full jitter, until ctx ends; then it returns nil. It gives
// up only with ErrRemoved.
func (s *Session) Run(ctx context.Context) error {
	attempt := 0
	for ctx.Err() == nil {
		began := time.Now()
		err := s.once(ctx)
		wasConnected := s.turn(false)
		if ctx.Err() != nil {
			return nil
		}
		if connect.CodeOf(err) == connect.CodePermissionDenied {
			return fmt.Errorf("%w: %w", ErrRemoved, err)
		}
		if time.Since(began) > steady {
			attempt = 0
		}
		pause := rand.N(min(reconnectMax, reconnectFirst<<min(attempt, 10)))
		attempt++
		if wasConnected || attempt == 1 {
			s.Log.Warn("no session with the controller; the last policy stays in force", zap.Error(err))
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
	return nil
}

func (s *Session) once(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream := s.Client().Session(ctx)
	defer func() {
		cancel()
		_ = stream.CloseRequest()
		_ = stream.CloseResponse()
	}()
	// net/http's HTTP/2 client sees the end of ctx only after the request's body.
	defer context.AfterFunc(ctx, func() { _ = stream.CloseRequest() })()
	hello := &symbolonv1.SessionRequest{Message: &symbolonv1.SessionRequest_Hello{Hello: s.Hello()}}
	if err := stream.Send(hello); err != nil {
		if errors.Is(err, io.EOF) { // the reason is with the response
			_, err = stream.Receive()
		}
		return fmt.Errorf("hello: %w", err)
	}
	for {
		m, err := stream.Receive()
		if err != nil {
			return err
		}
		now := time.Now().UTC()
		s.heard.Store(&now)
		if !s.turn(true) {
			s.Log.Info("session with the controller")
		}
		switch m := m.GetMessage().(type) {
		case *symbolonv1.SessionResponse_Revocations:
			if err := s.revoke(stream, m.Revocations); err != nil {
				return err
			}
		case *symbolonv1.SessionResponse_Generation:
			// First, and whatever becomes of the rest.
			if r := m.Generation.GetRevocations(); r != nil {
				if err := s.revoke(stream, r); err != nil {
					return err
				}
			}
			ack := &symbolonv1.Ack{Generation: m.Generation.GetNumber()}
			if err := s.Apply(m.Generation); err != nil {
				s.Log.Error("generation refused; the last good one stays in force", zap.Uint64("generation", m.Generation.GetNumber()), zap.Error(err))
				ack.Error = err.Error()
			}
			ack.BundleVersion = s.Bundle()
			if err := stream.Send(&symbolonv1.SessionRequest{Message: &symbolonv1.SessionRequest_Ack{Ack: ack}}); err != nil {
				return fmt.Errorf("ack: %w", err)
			}
		case *symbolonv1.SessionResponse_Peers:
			s.Peers(m.Peers.GetAddresses())
		case *symbolonv1.SessionResponse_Reissue:
			s.Reissue(!m.Reissue.GetWorkloadsOnly())
		}
	}
}

// revoke puts a change of what is revoked in force, and acknowledges it.
func (s *Session) revoke(stream sessionStream, r *symbolonv1.Revocations) error {
	ack := &symbolonv1.RevocationsAck{Number: r.GetNumber()}
	if err := s.Revoked(r); errors.Is(err, identity.ErrRevocationsMissed) {
		return err // a new session begins with the whole
	} else if err != nil {
		s.Log.Error("not all of what is revoked is understood", zap.Uint64("revocations", r.GetNumber()), zap.Error(err))
		ack.Error = err.Error()
	}
	if err := stream.Send(&symbolonv1.SessionRequest{Message: &symbolonv1.SessionRequest_Revoked{Revoked: ack}}); err != nil {
		return fmt.Errorf("ack: %w", err)
	}
	return nil
}
