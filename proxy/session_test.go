package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"google.golang.org/protobuf/testing/protocmp"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
	"github.com/symbolon/symbolon/redirect"
)

type stream = connect.BidiStream[symbolonv1.SessionRequest, symbolonv1.SessionResponse]

// control is a controller's end of sessions: what a test makes of it, behind a real
// Connect server on HTTP/2 and TLS.
type control struct {
	symbolonv1connect.UnimplementedProxyServiceHandler
	session  func(context.Context, *stream) error
	sessions atomic.Int64
}

func (c *control) Session(ctx context.Context, s *stream) error {
	c.sessions.Add(1)
	return c.session(ctx, s)
}

// newSession is a session with a controller that behaves like serve; run it.
func newSession(t *testing.T, serve func(context.Context, *stream) error) (*Session, *control) {
	t.Helper()
	c := &control{session: serve}
	mux := http.NewServeMux()
	mux.Handle(symbolonv1connect.NewProxyServiceHandler(c))
	server := httptest.NewUnstartedServer(mux)
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	transport := &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: server.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs},
		ForceAttemptHTTP2: true,
		// The proxy's own business: no rule touches it.
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return redirect.Dialer(redirect.MarkControl, redirect.DefaultKeepAlive).DialContext(ctx, network, address)
		},
	}
	t.Cleanup(transport.CloseIdleConnections)
	client := symbolonv1connect.NewProxyServiceClient(&http.Client{Transport: transport}, server.URL, connect.WithGRPC())
	return &Session{
		Client:  func() symbolonv1connect.ProxyServiceClient { return client },
		Hello:   func() *symbolonv1.Hello { return &symbolonv1.Hello{Version: "test", Generation: 4} },
		Apply:   func(*symbolonv1.Generation) error { return nil },
		Bundle:  func() uint64 { return 11 },
		Reissue: func(bool) {},
		Peers:   func([][]byte) {},
		Revoked: func(*symbolonv1.Revocations) error { return nil },
		Log:     zap.NewNop(),
	}, c
}

// run runs s until the test's end, or until stop is called, which waits for it.
func run(t *testing.T, s *Session) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	var stopped atomic.Bool
	stop = func() error { stopped.Store(true); cancel(); return within(t, done, "the session's end") }
	t.Cleanup(func() {
		if !stopped.Load() {
			_ = stop()
		}
	})
	return stop
}

func generation(n uint64) *symbolonv1.SessionResponse {
	return &symbolonv1.SessionResponse{Message: &symbolonv1.SessionResponse_Generation{Generation: &symbolonv1.Generation{Number: n}}}
}

func TestSessionAcknowledges(t *testing.T) {
	addresses := &symbolonv1.SessionResponse{Message: &symbolonv1.SessionResponse_Peers{Peers: &symbolonv1.Peers{Addresses: [][]byte{{10, 0, 0, 1}}}}}
	heard := make(chan *symbolonv1.SessionRequest, 8)
	s, _ := newSession(t, func(ctx context.Context, st *stream) error {
		for _, m := range []*symbolonv1.SessionResponse{nil, generation(5), generation(6), {Message: &symbolonv1.SessionResponse_Reissue{}}, {Message: &symbolonv1.SessionResponse_Reissue{Reissue: &symbolonv1.Reissue{WorkloadsOnly: true}}}, addresses, generation(7)} {
			if m != nil {
				if err := st.Send(m); err != nil {
					return err
				}
			}
			if m == nil || m.GetGeneration() != nil {
				r, err := st.Receive()
				if err != nil {
					return err
				}
				heard <- r
			}
		}
		<-ctx.Done()
		return nil
	})
	var applied []uint64
	reissued := make(chan bool, 2)
	s.Apply = func(g *symbolonv1.Generation) error {
		if g.GetNumber() == 6 {
			return errors.New("cannot be read")
		}
		applied = append(applied, g.GetNumber())
		return nil
	}
	s.Reissue = func(host bool) { reissued <- host }
	peers := make(chan [][]byte, 1)
	s.Peers = func(p [][]byte) { peers <- p }
	stop := run(t, s)
	ack := func(n uint64, refused string) *symbolonv1.SessionRequest {
		return &symbolonv1.SessionRequest{Message: &symbolonv1.SessionRequest_Ack{Ack: &symbolonv1.Ack{Generation: n, Error: refused, BundleVersion: 11}}}
	}
	want := []*symbolonv1.SessionRequest{
		{Message: &symbolonv1.SessionRequest_Hello{Hello: &symbolonv1.Hello{Version: "test", Generation: 4}}},
		ack(5, ""), ack(6, "cannot be read"), ack(7, ""),
	}
	for _, m := range want {
		if diff := cmp.Diff(m, within(t, heard, "a message"), protocmp.Transform()); diff != "" {
			t.Errorf("said (-want +got):\n%s", diff)
		}
	}
	// Of an older controller, which says nothing of it, the host's own is asked for, too.
	if !within(t, reissued, "the reissue") || within(t, reissued, "another") {
		t.Error("for the host the first, and not the second, was wanted")
	}
	if p := within(t, peers, "the peers"); len(p) != 1 || string(p[0]) != "\n\x00\x00\x01" {
		t.Errorf("peers %q", p)
	}
	if !s.Connected() {
		t.Error("it does not count as connected")
	}
	since, said := s.Ages()
	if since.IsZero() || said.Before(since) {
		t.Errorf("connected since %v, said %v", since, said)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if s.Connected() {
		t.Error("it counts as connected after its end")
	}
	if away, last := s.Ages(); !away.After(since) || last.Before(said) {
		t.Errorf("away since %v, said %v; it was there since %v, and said something at %v", away, last, since, said)
	}
	if diff := cmp.Diff([]uint64{5, 7}, applied); diff != "" {
		t.Errorf("applied (-want +got):\n%s", diff)
	}
}

// A controller that goes, in whatever manner, is sought again; the session says then
// what the proxy has now.
func TestSessionReconnects(t *testing.T) {
	hellos := make(chan uint64, 8)
	var n atomic.Int64
	s, c := newSession(t, func(ctx context.Context, st *stream) error {
		m, err := st.Receive()
		if err != nil {
			return err
		}
		hellos <- m.GetHello().GetGeneration()
		switch n.Add(1) {
		case 1:
			return connect.NewError(connect.CodeUnavailable, errors.New("shutting down"))
		case 2: // an end in order, after a generation
			if err := st.Send(generation(9)); err != nil {
				return err
			}
			_, err := st.Receive()
			return err
		}
		<-ctx.Done()
		return nil
	})
	var has atomic.Uint64
	s.Hello = func() *symbolonv1.Hello { return &symbolonv1.Hello{Generation: has.Load()} }
	s.Apply = func(g *symbolonv1.Generation) error { has.Store(g.GetNumber()); return nil }
	stop := run(t, s)
	for i, want := range []uint64{0, 0, 9} {
		if got := within(t, hellos, "a hello"); got != want {
			t.Errorf("hello %d says generation %d, want %d", i+1, got, want)
		}
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if c.sessions.Load() != 3 {
		t.Errorf("%d sessions, want 3", c.sessions.Load())
	}
}

// The end of ctx ends the session at once, in whatever it waits for.
func TestSessionEndsAtOnce(t *testing.T) {
	for _, tc := range []struct {
		name string
		// serve closes up when the session is where the test wants it.
		serve func(ctx context.Context, st *stream, up chan<- struct{}) error
	}{
		{"waiting for the first message", func(ctx context.Context, st *stream, up chan<- struct{}) error {
			_, err := st.Receive()
			close(up)
			<-ctx.Done()
			return err
		}},
		{"connected", func(ctx context.Context, st *stream, up chan<- struct{}) error {
			_, _ = st.Receive()
			if err := st.Send(generation(5)); err != nil {
				return err
			}
			_, err := st.Receive()
			close(up)
			<-ctx.Done()
			return err
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			up, left := make(chan struct{}), make(chan struct{})
			s, _ := newSession(t, func(ctx context.Context, st *stream) error {
				defer close(left)
				return tc.serve(ctx, st, up)
			})
			stop := run(t, s)
			within(t, up, "the session")
			began := time.Now()
			if err := stop(); err != nil {
				t.Error(err)
			}
			if d := time.Since(began); d > 2*time.Second {
				t.Errorf("it took %v", d)
			}
			within(t, left, "the controller notices")
		})
	}
}

// While the controller cannot be reached, the end of ctx does not wait for the next
// attempt.
func TestSessionEndsBetweenAttempts(t *testing.T) {
	s, _ := newSession(t, nil)
	tried := make(chan struct{}, 64)
	away := symbolonv1connect.NewProxyServiceClient(&http.Client{Transport: roundTripper(func(*http.Request) (*http.Response, error) {
		select {
		case tried <- struct{}{}:
		default:
		}
		return nil, io.ErrUnexpectedEOF
	})}, "http://controller", connect.WithGRPC())
	s.Client = func() symbolonv1connect.ProxyServiceClient { return away }
	stop := run(t, s)
	for range 3 {
		within(t, tried, "an attempt")
	}
	began := time.Now()
	if err := stop(); err != nil {
		t.Error(err)
	}
	if d := time.Since(began); d > time.Second {
		t.Errorf("it took %v", d)
	}
	if s.Connected() {
		t.Error("it counts as connected")
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// A host that was removed does not knock for ever.
func TestSessionOfARemovedHost(t *testing.T) {
	s, c := newSession(t, func(context.Context, *stream) error {
		return connect.NewError(connect.CodePermissionDenied, errors.New("no such host"))
	})
	done := make(chan error, 1)
	go func() { done <- s.Run(context.Background()) }()
	if err := within(t, done, "the session's end"); !errors.Is(err, ErrRemoved) {
		t.Errorf("it ends with %v, want ErrRemoved", err)
	}
	if c.sessions.Load() != 1 {
		t.Errorf("%d sessions, want 1", c.sessions.Load())
	}
}
