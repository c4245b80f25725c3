package proxy

import (
	"crypto/tls"
	"encoding/binary"
	"io"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
)

// framed is an Open that asks for a tunnel to be used again.
func (w *world) framed() []byte {
	o := mtls.NewOpen(mtls.NewFlowID(), w.app.addr, encrypted, 1)
	o.Framed = true
	return message(o)
}

// frame is data on such a tunnel; nothing ends the direction.
func frame(s string) string {
	return string(binary.BigEndian.AppendUint32(nil, uint32(len(s)))) + s
}

// firstUse opens a tunnel and ends its first connection in order; from there on it
// waits for another.
func (w *world) firstUse() *tls.Conn {
	w.Helper()
	x := w.handshake(w.call(w.app.addr), w.web().SVID.TLS, nil)
	_, _ = x.Write(append(w.framed(), frame("hello")+frame("")...))
	var head [4]byte
	if _, err := io.ReadFull(x, head[:]); err != nil {
		w.Fatal(err)
	}
	b := make([]byte, binary.BigEndian.Uint32(head[:]))
	if _, err := io.ReadFull(x, b); err != nil {
		w.Fatal(err)
	}
	v := &symbolonv1.Verdict{}
	if err := proto.Unmarshal(b, v); err != nil || !v.GetAccept() || !v.GetKeep() {
		w.Fatalf("verdict %v, %v", v, err)
	}
	expect(w.T, x, frame("hello")+frame(""))
	if r := w.records.next(); r.Outcome != "allow" || r.Reused || r.BytesSent != 5 {
		w.Errorf("first use: recorded %+v", r)
	}
	return x
}

// A tunnel that was let in once is not let in for good: each Open is read as strictly
// and judged afresh, and nothing behind it reaches the application before.
func TestSecondUseOfATunnel(t *testing.T) {
	for _, a := range []struct {
		name string
		// prepare happens between the two uses.
		prepare func(w *world)
		send    func(w *world) []byte
		// reason is the second record's; empty: there is none, since the tunnel is over.
		reason string
	}{
		{"an Open that is no protobuf", nil, func(*world) []byte { return []byte{0, 0, 0, 1, 0xff} }, "open-malformed"},
		{"an Open too large", nil, func(*world) []byte { return []byte{0, 0, 0x40, 1} }, "open-too-large"},
		{"an Open of another version", nil, func(*world) []byte { return message(&symbolonv1.Open{Version: 3}) }, "version"},
		{"data in place of an Open", nil, func(*world) []byte { return []byte(frame("secret")) }, "open-malformed"},
		{"policy denies by now", func(w *world) { w.policy(denied) }, func(w *world) []byte {
			return append(w.framed(), frame("secret")...)
		}, "policy"},
		{"the client's SVID has expired by now", func(w *world) { w.clock.advance(2 * time.Hour) }, func(w *world) []byte {
			return append(w.framed(), frame("secret")...)
		}, ""},
		{"our workload is another by now", func(w *world) {
			cred := w.ca.workload("/prod/cache", map[string][]string{"app": {"db"}})
			w.p.CredentialChanged(w.creds.set("0", cred), cred)
		}, func(w *world) []byte { return append(w.framed(), frame("secret")...) }, ""},
		{"our workload has no identity by now", func(w *world) {
			w.p.CredentialChanged(w.creds.set("0", nil), nil)
		}, func(w *world) []byte { return append(w.framed(), frame("secret")...) }, "no-identity"},
	} {
		for dataPhase, stock := range dataPhases {
			t.Run(a.name+", "+dataPhase, func(t *testing.T) {
				w := newWorld(t, stock)
				l := w.ca.leaf("/prod/db", map[string][]string{"app": {"db"}})
				l.NotAfter = time.Now().Add(24 * time.Hour)
				w.creds.set("0", w.ca.credential(l, identity.NewSVID))
				x := w.firstUse()
				if a.prepare != nil {
					a.prepare(w)
				}
				_, _ = x.Write(a.send(w))
				_, _ = ended(t, x)
				x.NetConn().Close()
				if a.reason != "" {
					if r := w.records.next(); r.Reason != a.reason || r.Outcome != "deny" || !r.Reused || r.Source.SPIFFEID != webID {
						t.Errorf("recorded %+v, want %s", r, a.reason)
					}
				}
				if err := w.stop(); err != nil {
					t.Error(err)
				}
				w.records.none()
				if n := w.app.accepts.Load(); n != 1 || strings.Contains(w.app.received(), "secret") {
					t.Errorf("the application was reached %d times, and read %q", n, w.app.received())
				}
			})
		}
	}
}

// dataPhases are who has a tunnel between two connections: an event loop, or the
// runtime.
var dataPhases = map[string]func(*Options){
	"own record layer": func(*Options) {},
	"crypto/tls":       func(o *Options) { o.TLS.StockTLS = true },
}

// And in order, it is used again: so the attacks above fail for their own reasons.
func TestSecondUseInOrder(t *testing.T) {
	for name, stock := range dataPhases {
		t.Run(name, func(t *testing.T) { secondUseInOrder(t, stock) })
	}
}

func secondUseInOrder(t *testing.T, stock func(*Options)) {
	w := newWorld(t, stock)
	x := w.firstUse()
	for range 3 {
		_, _ = x.Write(append(w.framed(), frame("again")+frame("")...))
		if r := w.records.next(); r.Outcome != "allow" || !r.Reused || r.BytesSent != 5 || r.BytesReceived != 5 {
			t.Errorf("recorded %+v", r)
		}
	}
	if n := w.app.accepts.Load(); n != 4 {
		t.Errorf("the application saw %d connections, want 4", n)
	}
	// A client that has gone, in its own time, is no event.
	_ = x.CloseWrite()
	_, _ = ended(t, x)
	x.NetConn().Close()
	w.good()
	w.records.none()
}

// A tunnel that is not used again does not wait for ever, nor does one on which an Open
// never becomes whole; and its place among the connections is given back.
func TestTunnelWaitsForSoLong(t *testing.T) {
	for name, begun := range map[string]func(x *tls.Conn, w *world){
		"nothing":          func(*tls.Conn, *world) {},
		"half an Open":     func(x *tls.Conn, w *world) { _, _ = x.Write(w.framed()[:11]) },
		"half of its size": func(x *tls.Conn, _ *world) { _, _ = x.Write([]byte{0, 0}) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			x := w.firstUse()
			begun(x, w)
			w.clock.advance(keepIdleServer - 2*time.Second)
			time.Sleep(2 * sweepEvery)
			if n := w.p.open.Load(); n != 1 {
				t.Errorf("%d connections count before the time has come, want 1", n)
			}
			w.clock.advance(4 * time.Second)
			_, _ = ended(t, x)
			eventually(t, "the place is free", func() bool { return w.p.open.Load() == 0 })
			w.records.none()
		})
	}
}
