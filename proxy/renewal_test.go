package proxy

import (
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
)

// holder is a hand-made end of a tunnel whose certificates can be renewed. What the
// proxy says beside data is heard; what is answered, is the test's.
type holder struct {
	*mtls.Conn
	messages *mtls.Renewal
	heard    chan *symbolonv1.Control
	data     *io.PipeReader
}

func hold(t *testing.T, c *mtls.Conn) *holder {
	t.Helper()
	h := &holder{Conn: c, messages: c.Renewal(), heard: make(chan *symbolonv1.Control, 8)}
	if h.messages == nil {
		t.Fatal("the tunnel is not renewable")
	}
	c.OnControl(func(m []byte) error {
		x, err := mtls.ParseControl(m)
		if err == nil {
			h.heard <- x
		}
		return err
	})
	_ = c.SetReadDeadline(time.Now().Add(patience))
	var w *io.PipeWriter
	h.data, w = io.Pipe()
	go func() { _, err := io.Copy(w, c); _ = w.CloseWithError(err) }()
	return h
}

func (h *holder) Read(b []byte) (int, error) { return h.data.Read(b) }

// request waits for the proxy's question.
func (h *holder) request(t *testing.T) []byte {
	t.Helper()
	q := within(t, h.heard, "the proxy's question")
	if len(q.GetRequest()) == 0 {
		t.Fatalf("heard %v, want a request", q)
	}
	return q.GetRequest()
}

func (h *holder) send(t *testing.T, m []byte, err error) {
	t.Helper()
	if err == nil {
		err = h.SendControl(m)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// shows answers a request with a certificate.
func (h *holder) shows(t *testing.T, request []byte, c *identity.Credential) {
	t.Helper()
	m, err := h.messages.Prove(request, mtls.NewEndpoint(c, mtls.Options{}), "")
	h.send(t, m, err)
}

// lasting is a workload's credential that is good for so long.
func (w *world) lasting(path, app string, valid time.Duration) *identity.Credential {
	l := w.ca.leaf(path, map[string][]string{"app": {app}})
	l.NotAfter = time.Now().Add(valid)
	return w.ca.credential(l, identity.NewSVID)
}

// held is an open tunnel from the credential's holder to the echoing application.
func (w *world) held(cred *identity.Credential) (*holder, <-chan error) {
	w.Helper()
	saw := make(chan error, 1)
	w.app.handle(func(c *net.TCPConn) { _, err := io.Copy(c, c); saw <- err })
	ctx := w.ctx()
	t, err := mtls.Dial(ctx, w.call(w.app.addr), mtls.NewEndpoint(cred, mtls.Options{}), func(*mtls.Peer) (*symbolonv1.Open, error) {
		o := mtls.NewOpen(mtls.NewFlowID(), w.app.addr, encrypted, 1)
		o.Framed, o.Renewable = true, true
		return o, nil
	})
	if err == nil {
		_, err = t.ReadVerdict(ctx)
	}
	if err != nil {
		w.Fatal(err)
	}
	h := hold(w.T, t)
	speaks(w, h)
	return h, saw
}

// stood waits until the connection stands on the certificate.
func (w *world) stood(peer *identity.Credential) {
	w.Helper()
	eventually(w, "the connection stands on the newer certificate", func() bool {
		all := w.p.table.snapshot()
		return len(all) == 1 && identity.SerialOf(all[0].leaf) == peer.SVID.Serial()
	})
}

// A connection outlives the certificates of both ends, as long as each has shown its
// next one: it is neither cut nor disturbed.
func TestRenewedCertificatesKeepAConnection(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"event loop": func(*Options) {},
		"crypto/tls": func(o *Options) { o.TLS.StockTLS = true },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, change)
			own := func(valid time.Duration) *identity.Credential { return w.lasting("/prod/db", "db", valid) }
			w.creds.set("0", own(time.Hour))
			h, saw := w.held(w.lasting("/prod/web", "web", time.Hour))

			// The peer asks before there is a newer one; it comes with the rotation.
			m, request, err := h.messages.Ask()
			h.send(t, m, err)
			speaks(t, h)
			if len(h.heard) > 0 {
				t.Fatal("answered with the SVID that is known")
			}
			next := own(4 * time.Hour)
			w.p.CredentialChanged(w.creds.set("0", next), next)
			answer := within(t, h.heard, "the answer")
			peer, err := h.messages.Check(request, answer, mtls.NewEndpoint(w.web(), mtls.Options{}), time.Now())
			if err != nil || peer.Serial() != next.SVID.Serial() {
				t.Fatalf("the proxy has shown %+v, %v", peer, err)
			}

			// The proxy asks in the last third of the peer's.
			w.clock.advance(45 * time.Minute)
			newer := w.lasting("/prod/web", "web", 4*time.Hour)
			h.shows(t, h.request(t), newer)
			w.stood(newer)
			w.clock.advance(time.Hour) // both have ended that it began with
			w.p.table.sweep(w.p.now())
			speaks(t, h)
			if n := w.p.table.size(); n != 1 {
				t.Errorf("%d connections are live", n)
			}
			w.clock.advance(3 * time.Hour) // and now the newer ones, of which nothing comes
			w.wasCut(h, saw, "svid-expired")
			if n := w.p.table.size(); n != 0 {
				t.Errorf("%d connections are live after the end", n)
			}
		})
	}
}

// What the newer certificate says counts from then on, and what does not prove it cuts.
func TestRenewalThatIsNotGood(t *testing.T) {
	for _, tc := range []struct {
		name string
		// does what the holder does, behind the proxy's question.
		does   func(t *testing.T, w *world, h *holder, request []byte)
		reason string
	}{
		{"claims that policy denies", func(t *testing.T, w *world, h *holder, request []byte) {
			h.shows(t, request, w.lasting("/prod/web", "other", 4*time.Hour))
		}, "policy-changed"},
		{"another workload's", func(t *testing.T, w *world, h *holder, request []byte) {
			h.shows(t, request, w.lasting("/prod/web2", "web", 4*time.Hour))
		}, "proof-invalid"},
		{"another CA's", func(t *testing.T, w *world, h *holder, request []byte) {
			h.shows(t, request, newAuthority(t, "acme.example").workload("/prod/web", map[string][]string{"app": {"web"}}))
		}, "peer-unverified"},
		{"one that is no newer", func(t *testing.T, w *world, h *holder, request []byte) {
			h.shows(t, request, w.lasting("/prod/web", "web", 50*time.Minute))
		}, "proof-invalid"},
		{"one that is revoked", func(t *testing.T, w *world, h *holder, request []byte) {
			c := w.lasting("/prod/web", "web", 4*time.Hour)
			w.revoke(revokedSerial(c))
			h.shows(t, request, c)
		}, "revoked"},
		{"one that is revoked later", func(t *testing.T, w *world, h *holder, request []byte) {
			c := w.lasting("/prod/web", "web", 4*time.Hour)
			h.shows(t, request, c)
			w.stood(c)
			speaks(t, h)
			w.revoke(revokedSerial(c))
		}, "revoked"},
		{"without its key", func(t *testing.T, w *world, h *holder, request []byte) {
			c := w.lasting("/prod/web", "web", 4*time.Hour)
			stolen := *c.SVID
			cert := *stolen.TLS
			cert.PrivateKey = newKey(t)
			stolen.TLS = &cert
			h.shows(t, request, &identity.Credential{SVID: &stolen, Bundles: c.Bundles})
		}, "proof-invalid"},
		{"an answer to another question", func(t *testing.T, w *world, h *holder, _ []byte) {
			_, other, err := h.messages.Ask()
			if err != nil {
				t.Fatal(err)
			}
			other[0] = 13 // as a server's
			h.shows(t, other, w.lasting("/prod/web", "web", 4*time.Hour))
		}, "proof-invalid"},
		{"the answer twice", func(t *testing.T, w *world, h *holder, request []byte) {
			c := w.lasting("/prod/web", "web", 4*time.Hour)
			h.shows(t, request, c)
			w.stood(c)
			h.shows(t, request, c)
		}, "protocol"},
		{"two questions at once", func(t *testing.T, _ *world, h *holder, _ []byte) {
			for range 2 {
				m, _, err := h.messages.Ask()
				h.send(t, m, err)
			}
		}, "protocol"},
		{"a question that is none", func(t *testing.T, w *world, h *holder, _ []byte) {
			m, err := proto.Marshal(&symbolonv1.Control{Request: []byte("what?")})
			h.send(t, m, err)
			next := w.lasting("/prod/db", "db", 48*time.Hour)
			w.p.CredentialChanged(w.creds.set("0", next), next)
		}, "protocol"},
		{"no message at all", func(t *testing.T, _ *world, h *holder, _ []byte) {
			h.send(t, []byte{0xff}, nil)
		}, "protocol"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.creds.set("0", w.lasting("/prod/db", "db", 24*time.Hour))
			h, saw := w.held(w.lasting("/prod/web", "web", time.Hour))
			w.clock.advance(45 * time.Minute)
			request := h.request(t)
			tc.does(t, w, h, request)
			if tc.reason != "protocol" {
				w.wasCut(h, saw, tc.reason)
				return
			}
			// Broken off with an alert, which this end's TLS may tell before the reset.
			if _, err := io.ReadAll(h); err == nil {
				t.Error("the client sees a clean end")
			}
			if err := within(w, saw, "the application's end"); !errors.Is(err, syscall.ECONNRESET) {
				w.Errorf("the application sees %v, want a reset", err)
			}
			if r := w.records.next(); r.Reason != tc.reason {
				w.Errorf("recorded %s %s (%s), want %s", r.Outcome, r.Reason, r.Detail, tc.reason)
			}
		})
	}
}

// Whoever does not know of renewals is cut with the certificate, as before.
func TestWithoutRenewal(t *testing.T) {
	w := newWorld(t)
	w.creds.set("0", w.lasting("/prod/db", "db", 24*time.Hour))
	c, saw := w.openEcho(w.lasting("/prod/web", "web", time.Hour))
	w.clock.advance(45 * time.Minute)
	w.p.table.askAll(w.p.now())
	speaks(t, c)
	w.clock.advance(time.Hour)
	w.wasCut(c, saw, "svid-expired")
}

// The client's side of the same: it asks the server, and answers it.
func TestRenewalOfTheServer(t *testing.T) {
	w := newWorld(t)
	w.creds.set("0", w.lasting("/prod/web", "web", time.Hour))
	held := make(chan *holder, 1)
	to := w.serveOther(other4+":0", func(c *net.TCPConn) {
		x, open, err := mtls.Accept(w.ctx(), c, mtls.NewEndpoint(w.lasting("/prod/db", "db", time.Hour), mtls.Options{}))
		if err == nil {
			err = x.Grant(w.ctx(), &symbolonv1.Verdict{Protection: encrypted, FlowId: open.GetFlowId(), Keep: true})
		}
		if err != nil {
			t.Error(err)
			return
		}
		h := hold(t, x)
		held <- h
		_, _ = io.Copy(h, h)
		_ = h.CloseWrite()
		<-w.ctx().Done() // the proxy closes first
	})
	app := w.connect(to)
	speaks(t, app)
	h := within(t, held, "the tunnel")
	m, request, err := h.messages.Ask()
	h.send(t, m, err)
	w.clock.advance(45 * time.Minute)
	asked := h.request(t)
	next := w.lasting("/prod/web", "web", 4*time.Hour)
	w.p.CredentialChanged(w.creds.set("0", next), next)
	peer, err := h.messages.Check(request, within(t, h.heard, "the answer"), mtls.NewEndpoint(w.lasting("/prod/db", "db", time.Hour), mtls.Options{}), time.Now())
	if err != nil || peer.Serial() != next.SVID.Serial() {
		t.Fatalf("the proxy has shown %+v, %v", peer, err)
	}
	newer := w.lasting("/prod/db", "db", 4*time.Hour)
	h.shows(t, asked, newer)
	w.stood(newer)
	w.clock.advance(time.Hour)
	w.p.table.sweep(w.p.now())
	speaks(t, app)
	_ = app.CloseWrite()
	if _, err := io.ReadAll(app); err != nil {
		t.Errorf("the application sees %v, want an end", err)
	}
	if r := w.records.next(); r.Outcome != "allow" || r.BytesSent == 0 {
		t.Errorf("recorded %+v", r)
	}
}

// A connection that rests does not begin to rest anew when its certificates are renewed.
func TestRenewalIsNoLife(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Idle = Idle{Open: 70 * time.Minute} })
	w.creds.set("0", w.lasting("/prod/db", "db", 24*time.Hour))
	h, saw := w.held(w.lasting("/prod/web", "web", time.Hour))
	w.clock.advance(5 * time.Minute)
	seen := w.p.now()
	eventually(t, "somebody has looked", func() bool {
		w.p.table.mu.Lock()
		defer w.p.table.mu.Unlock()
		first := w.p.table.round.first
		return first != nil && !first.round.looked.Before(seen)
	})
	w.clock.advance(40 * time.Minute)
	newer := w.lasting("/prod/web", "web", 24*time.Hour)
	h.shows(t, h.request(t), newer)
	w.stood(newer)
	w.clock.advance(35 * time.Minute)
	if _, err := io.ReadAll(h); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client sees %v, want a reset", err)
	}
	within(t, saw, "the application's end")
	if r := w.records.next(); r.Reason != "timed-out" {
		t.Errorf("recorded %s %s (%s)", r.Outcome, r.Reason, r.Detail)
	}
}
