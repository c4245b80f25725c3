package controller_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// session is the proxy's side of a Session.
type session struct {
	t      *testing.T
	stream *connect.BidiStreamForClient[symbolonv1.SessionRequest, symbolonv1.SessionResponse]
}

func (h *host) open(t *testing.T, hello *symbolonv1.Hello) *session {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	s := &session{t, h.Session(ctx)}
	t.Cleanup(func() {
		cancel()
		_ = s.stream.CloseRequest()
		_ = s.stream.CloseResponse()
	})
	if err := s.stream.Send(&symbolonv1.SessionRequest{Message: &symbolonv1.SessionRequest_Hello{Hello: hello}}); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *session) receive() *symbolonv1.SessionResponse {
	s.t.Helper()
	m, err := s.stream.Receive()
	if err != nil {
		s.t.Fatal(err)
	}
	return m
}

func (s *session) generation() *symbolonv1.Generation {
	s.t.Helper()
	m := s.receive()
	if m.GetGeneration() == nil {
		s.t.Fatalf("got %v, want a generation", m)
	}
	return m.GetGeneration()
}

func (s *session) reissue() uint64 {
	s.t.Helper()
	m := s.receive()
	if m.GetReissue() == nil {
		s.t.Fatalf("got %v, want reissue", m)
	}
	return m.GetReissue().GetGeneration()
}

func (s *session) ack(generation uint64, refusal string) {
	s.t.Helper()
	err := s.stream.Send(&symbolonv1.SessionRequest{Message: &symbolonv1.SessionRequest_Ack{Ack: &symbolonv1.Ack{Generation: generation, Error: refusal}}})
	if err != nil {
		s.t.Fatal(err)
	}
}

// end returns the error that the session ends with, skipping what was under way.
func (s *session) end() error {
	for {
		if _, err := s.stream.Receive(); err != nil {
			return err
		}
	}
}

// hostOf is what ListHosts says of h.
func (w *world) hostOf(h *host) *symbolonv1.Host {
	w.t.Helper()
	res, err := w.admin().ListHosts(w.t.Context(), connect.NewRequest(&symbolonv1.ListHostsRequest{}))
	if err != nil {
		w.t.Fatal(err)
	}
	for _, x := range res.Msg.GetHosts() {
		if x.GetId() == h.HostID {
			return x
		}
	}
	return nil
}

// eventually waits for what the controller does behind the caller's back.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestSessionReceivesGenerations(t *testing.T) {
	w := newWorld(t)
	first := w.apply(tree).GetGeneration()
	h := w.enrol("/acme/prod", map[string]string{"role": "db"})
	s := h.open(t, &symbolonv1.Hello{Version: "v1", Addresses: []string{"10.0.0.1"}})
	g := s.generation()
	if g.GetNumber() != first || g.GetHostNamespace() != "/acme/prod" {
		t.Errorf("generation %d for %s, want %d", g.GetNumber(), g.GetHostNamespace(), first)
	}
	var refs []string
	for _, r := range g.GetResources() {
		refs = append(refs, r.GetNamespace()+" "+r.GetName())
	}
	slices.Sort(refs)
	want := []string{"/ ", "/acme ", "/acme cards", "/acme web-to-db", "/acme/prod ", "/acme/prod db", "/acme/prod web", "/acme/prod web-to-cards"}
	if diff := cmp.Diff(want, refs); diff != "" {
		t.Errorf("visible to /acme/prod, not that of /acme/dev:\n%s", diff)
	}
	if diff := cmp.Diff([][]byte{h.Roots[0].Raw}, g.GetBundle()); diff != "" {
		t.Errorf("bundle: %s", diff)
	}
	wantHost := identity.NewAttributes(map[string][]string{"host.role": {"db"}, "host.id": {h.HostID}})
	if diff := cmp.Diff(wantHost, identity.AttributesFromProto(g.GetHostAttributes())); diff != "" {
		t.Errorf("host attributes: %s", diff)
	}
	if u := g.ProtoReflect().GetUnknown(); len(u) > 0 {
		t.Errorf("%d unknown bytes arrived", len(u))
	}
	s.ack(first, "")
	eventually(t, "acknowledged", func() bool { x := w.hostOf(h); return x.GetGeneration() == first && x.GetConnected() })
	if x := w.hostOf(h); x.GetVersion() != "v1" || x.GetError() != "" || !cmp.Equal(x.GetAddresses(), []string{"10.0.0.1"}) {
		t.Errorf("%v", x)
	}

	// A policy alone: a new generation, no new SVIDs.
	second := w.apply("kind: Policy\nnamespace: /acme/prod\nname: x\nsubject: any\nverb: deny\nobject: {env: dev}\n").GetGeneration()
	if got := s.generation().GetNumber(); got != second || second != first+1 {
		t.Errorf("generation %d, want %d", got, second)
	}
	s.ack(second, "policy x: too new for me")
	eventually(t, "refused", func() bool { return w.hostOf(h).GetError() != "" })
	if x := w.hostOf(h); x.GetGeneration() != first || x.GetError() != "policy x: too new for me" {
		t.Errorf("after a refusal: %v", x)
	}

	// A profile: new SVIDs too.
	third := w.apply("kind: Profile\nnamespace: /acme/prod\nname: why\nmatch: {os.user: why}\nworkload: why\n").GetGeneration()
	if got := s.generation().GetNumber(); got != third {
		t.Errorf("generation %d, want %d", got, third)
	}
	if got := s.reissue(); got != third {
		t.Errorf("reissue %d, want %d", got, third)
	}
	s.ack(third, "")
	eventually(t, "the error is gone", func() bool { x := w.hostOf(h); return x.GetError() == "" && x.GetGeneration() == third })

	// A profile that this host does not see: no new SVIDs, but the number advances.
	fourth := w.apply("kind: Profile\nnamespace: /acme/dev\nname: z\nmatch: {os.user: z}\nworkload: z\n").GetGeneration()
	if got := s.generation().GetNumber(); got != fourth {
		t.Errorf("generation %d, want %d", got, fourth)
	}
	s.ack(fourth, "")
	fifth := w.apply("kind: Policy\nnamespace: /acme\nname: x\nsubject: any\nverb: deny\nobject: {env: dev}\n").GetGeneration()
	if got := s.generation().GetNumber(); got != fifth {
		t.Errorf("after a generation without reissue: %d, want %d", got, fifth)
	}
}

// TestSessionCoalesces: at most one generation is outstanding, and then the newest
// follows, not each one between.
func TestSessionCoalesces(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	h := w.enrol("/acme/prod", nil)
	s := h.open(t, &symbolonv1.Hello{})
	g := s.generation()
	var last uint64
	for i := range 10 {
		last = w.apply(fmt.Sprintf("kind: Policy\nnamespace: /acme/prod\nname: p%d\nsubject: any\nverb: deny\nobject: {env: dev}\n", i)).GetGeneration()
	}
	received := 1
	for g.GetNumber() != last {
		s.ack(g.GetNumber(), "")
		g = s.generation()
		received++
	}
	if received > 6 {
		t.Errorf("%d generations were sent for 10 changes while the first was unacknowledged", received)
	}
}

// TestSessionReissuesWhatItMissed: a host that comes back with an older generation
// is told to renew its SVIDs if any Profile changed since, also by a controller that
// restarted in between; one that has seen the last is not.
func TestSessionReissuesWhatItMissed(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	h := w.enrol("/acme/prod", nil)
	profiles := w.apply("kind: Profile\nnamespace: /acme/prod\nname: why\nmatch: {os.user: why}\nworkload: why\n").GetGeneration()
	last := w.apply("kind: Policy\nnamespace: /acme/prod\nname: x\nsubject: any\nverb: deny\nobject: {env: dev}\n").GetGeneration()
	w.halt()
	w.start()
	h.ProxyServiceClient = w.proxy(h.TLS())

	s := h.open(t, &symbolonv1.Hello{Generation: profiles - 1})
	if got := s.generation().GetNumber(); got != last {
		t.Errorf("generation %d, want %d", got, last)
	}
	if got := s.reissue(); got != last {
		t.Errorf("reissue %d, want %d", got, last)
	}
	for _, has := range []uint64{profiles, last, 0} {
		s := h.open(t, &symbolonv1.Hello{Generation: has})
		s.ack(s.generation().GetNumber(), "")
		next := w.apply(fmt.Sprintf("kind: Policy\nnamespace: /acme/prod\nname: x%d\nsubject: any\nverb: deny\nobject: {env: dev}\n", has)).GetGeneration()
		if got := s.receive(); got.GetGeneration().GetNumber() != next {
			t.Errorf("with generation %d: %v, want generation %d and no reissue", has, got, next)
		}
	}
}

func TestSessionIsCut(t *testing.T) {
	t.Run("host removed", func(t *testing.T) {
		w := newWorld(t)
		h := w.enrol("/", nil)
		s := h.open(t, &symbolonv1.Hello{})
		s.generation()
		if _, err := h.issue(t.Context(), t, "os.user", "x"); err != nil {
			t.Fatal(err)
		}
		if _, err := w.admin().RemoveHost(t.Context(), connect.NewRequest(&symbolonv1.RemoveHostRequest{Id: h.HostID})); err != nil {
			t.Fatal(err)
		}
		wantCode(t, s.end(), connect.CodePermissionDenied, "removed", h.HostID)
		eventually(t, "its workloads are forgotten", func() bool {
			res, err := w.admin().ListWorkloads(t.Context(), connect.NewRequest(&symbolonv1.ListWorkloadsRequest{}))
			return err == nil && len(res.Msg.GetWorkloads()) == 0
		})
	})
	t.Run("replaced", func(t *testing.T) {
		w := newWorld(t)
		h := w.enrol("/", nil)
		s := h.open(t, &symbolonv1.Hello{})
		s.generation()
		h.open(t, &symbolonv1.Hello{Version: "second"}).generation()
		wantCode(t, s.end(), connect.CodeAborted, "newer session")
		if x := w.hostOf(h); !x.GetConnected() || x.GetVersion() != "second" {
			t.Errorf("%v", x)
		}
	})
	t.Run("certificate ended", func(t *testing.T) {
		w := newWorld(t)
		h := w.enrol("/", nil)
		if _, err := h.issue(t.Context(), t, "os.user", "x"); err != nil { // opens the connection
			t.Fatal(err)
		}
		w.offset.Store(int64(time.Until(h.NotAfter()) - 3*time.Second))
		s := h.open(t, &symbolonv1.Hello{})
		s.generation()
		wantCode(t, s.end(), connect.CodeUnauthenticated, "expired")
		w.offset.Store(int64(25 * time.Hour))
		_, err := h.issue(t.Context(), t, "os.user", "x")
		wantCode(t, err, connect.CodeUnauthenticated, "expired")
	})
	t.Run("shutdown", func(t *testing.T) {
		w := newWorld(t)
		h := w.enrol("/", nil)
		s := h.open(t, &symbolonv1.Hello{})
		s.generation()
		go w.stop()
		wantCode(t, s.end(), connect.CodeUnavailable, "shutting down")
	})
}

// TestSessionRefusesNonsense: a host that does not keep to the protocol loses its
// session, nothing else.
func TestSessionRefusesNonsense(t *testing.T) {
	w := newWorld(t)
	h := w.enrol("/", nil)
	ack := func(g uint64) *symbolonv1.SessionRequest {
		return &symbolonv1.SessionRequest{Message: &symbolonv1.SessionRequest_Ack{Ack: &symbolonv1.Ack{Generation: g}}}
	}
	hello := func(h *symbolonv1.Hello) *symbolonv1.SessionRequest {
		return &symbolonv1.SessionRequest{Message: &symbolonv1.SessionRequest_Hello{Hello: h}}
	}
	many := make([]string, 1000)
	for name, messages := range map[string][]*symbolonv1.SessionRequest{
		"no hello":           {ack(1)},
		"empty":              {{}},
		"hello twice":        {hello(&symbolonv1.Hello{}), hello(&symbolonv1.Hello{})},
		"ack of another":     {hello(&symbolonv1.Hello{}), ack(77)},
		"ack twice":          {hello(&symbolonv1.Hello{}), ack(1), ack(1)},
		"too many addresses": {hello(&symbolonv1.Hello{Addresses: many})},
		"terminal escapes":   {hello(&symbolonv1.Hello{Version: "\x1b]0;x\a"})},
	} {
		t.Run(name, func(t *testing.T) {
			s := &session{t, h.Session(t.Context())}
			for _, m := range messages {
				_ = s.stream.Send(m)
			}
			wantCode(t, s.end(), connect.CodeInvalidArgument)
			_ = s.stream.CloseRequest()
			_ = s.stream.CloseResponse()
		})
	}
	s := h.open(t, &symbolonv1.Hello{Version: "well behaved"})
	s.generation()
	if err := s.stream.CloseRequest(); err != nil {
		t.Fatal(err)
	}
	if err := s.end(); errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a host that leaves: %v", err)
	}
	eventually(t, "it has left", func() bool { return !w.hostOf(h).GetConnected() })
}

// TestSharedEncodingIsWhole: the message put together from an encoded part is the
// one that would have been encoded at once.
func TestSharedEncodingIsWhole(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	a, b := w.enrol("/acme/prod", map[string]string{"role": "a"}), w.enrol("/acme/prod", map[string]string{"role": "b"})
	var got [2]*symbolonv1.Generation
	for i, h := range []*host{a, b} {
		got[i] = h.open(t, &symbolonv1.Hello{}).generation()
		if role := got[i].GetHostAttributes()["host.role"].GetValues(); len(role) != 1 || role[0] != string(rune('a'+i)) {
			t.Errorf("host %d: role %v", i, role)
		}
		got[i] = proto.CloneOf(got[i])
		got[i].HostAttributes = nil
	}
	if diff := cmp.Diff(got[0], got[1], protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}
