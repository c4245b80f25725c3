package proxy

import (
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/mtls"
)

// leavingTLS is a world whose connections leave TLS after the verdict.
func leavingTLS(t *testing.T, change ...func(*Options)) *world {
	w := newWorld(t, change...)
	w.policy(strings.Replace(baseline, "protection: encrypted", "protection: authenticated", 1))
	return w
}

// stockLayer has crypto/tls carry what is in TLS.
func stockLayer(o *Options) { o.TLS.StockTLS = true }

// What an application says at once goes along in the Open. It is sent once: by the server's
// proxy as far as that has taken it, in the clear from there.
func TestFirstBytesGoInTheOpen(t *testing.T) {
	long := strings.Repeat("0123456789", 3000)
	for name, tc := range map[string]struct {
		says   string
		takes  func(offered string) uint32
		grants symbolonv1.Protection
		stock  bool
		urgent string // of what it says: TCP's urgent byte
	}{
		"taken":                       {says: "hello"},
		"by a server that is older":   {says: "hello", takes: func(string) uint32 { return 0 }},
		"taken in part":               {says: "hello", takes: func(string) uint32 { return 2 }},
		"more than an Open holds":     {says: long},
		"nothing":                     {says: ""},
		"and encrypted from there":    {says: long, grants: encrypted},
		"stock":                       {says: long, stock: true},
		"stock, and encrypted":        {says: long, stock: true, grants: encrypted},
		"stock, encrypted, and older": {says: long, stock: true, grants: encrypted, takes: func(string) uint32 { return 0 }},
		"an urgent byte behind it":    {says: "AB!CD", urgent: "!"},
		"an urgent byte first":        {says: "!CD", urgent: "!"},
		"an urgent byte last":         {says: "AB!", urgent: "!"},
		"with an urgent byte in part": {says: "!CD", urgent: "!", takes: func(string) uint32 { return 2 }},
		"an urgent byte not taken":    {says: "!CD", urgent: "!", takes: func(string) uint32 { return 0 }},
		"stock, and an urgent byte":   {says: "!CD", urgent: "!", stock: true},
	} {
		t.Run(name, func(t *testing.T) {
			var change []func(*Options)
			if tc.stock {
				change = append(change, stockLayer)
			}
			w := leavingTLS(t, change...)
			w.creds.set("0", w.web())
			if tc.grants == 0 {
				tc.grants = authenticated
			}
			want := tc.says
			said, arrived := make(chan struct{}), make(chan string, 1)
			at := w.serveOther(other4+":0", func(c *net.TCPConn) {
				<-said
				x := w.server(c, w.db(), nil)
				o, err := readOpen(x)
				if err != nil {
					arrived <- err.Error()
					return
				}
				offered := string(o.GetEarly())
				offers := min(len(tc.says), mtls.MaxEarly)
				if at := strings.Index(tc.says, tc.urgent); at > 0 {
					offers = at // the kernel gives what stands before it by itself
				}
				if len(offered) != offers || !strings.HasPrefix(tc.says, offered) {
					t.Errorf("the Open has %d early bytes", len(offered))
				}
				n := uint32(len(offered))
				if tc.takes != nil {
					n = tc.takes(offered)
				}
				_, _ = x.Write(message(&symbolonv1.Verdict{Accept: true, Protection: tc.grants, FlowId: o.GetFlowId(), Early: n}))
				var data interface {
					io.ReadWriter
					CloseWrite() error
				} = c
				if tc.grants == encrypted {
					data = x
				}
				rest, _ := io.ReadAll(data)
				arrived <- offered[:n] + string(rest)
				_, _ = io.WriteString(data, "bye")
				_ = data.CloseWrite()
				_, _ = io.Copy(io.Discard, c)
			})
			c := w.connect(at)
			rest := tc.says
			if tc.urgent != "" {
				var before string
				before, rest, _ = strings.Cut(rest, tc.urgent)
				_, _ = io.WriteString(c, before)
				urgent(t, c, tc.urgent)
			}
			_, _ = io.WriteString(c, rest)
			_ = c.CloseWrite()
			close(said)
			got, err := ended(t, c)
			if at := within(t, arrived, "the bytes"); at != want {
				t.Errorf("%d bytes arrived, want %d: %.40q", len(at), len(want), at)
			}
			r := w.records.next()
			if string(got) != "bye" || err != nil || r.Outcome != "allow" || r.BytesSent != uint64(len(want)) || r.BytesReceived != 3 || r.FirstByteMicros == 0 {
				t.Errorf("answered %q, %v, recorded %+v", got, err, r)
			}
		})
	}
}

// A server that has taken what it was not shown is no server of ours: the application is
// reset before a byte is left out.
func TestServerTakesWhatNobodySaid(t *testing.T) {
	w := leavingTLS(t)
	w.creds.set("0", w.web())
	at := w.serveOther(other4+":0", func(c *net.TCPConn) {
		answers(func(o *symbolonv1.Open) []byte {
			return message(&symbolonv1.Verdict{Accept: true, Protection: authenticated, FlowId: o.GetFlowId(), Early: uint32(len(o.GetEarly())) + 1})
		})(w, c)
	})
	if got, err := w.ask(at, "secret"); !errors.Is(err, syscall.ECONNRESET) || len(got) > 0 {
		t.Errorf("the application reads %q, %v; want a reset", got, err)
	}
	if r := w.records.next(); r.Reason != "protocol" || !strings.Contains(r.Detail, "early bytes") {
		t.Errorf("recorded %s (%s)", r.Reason, r.Detail)
	}
}

// showing is a client's tunnel to the application here, whose Open has early bytes.
func (w *world) showing(early string) (*mtls.Conn, *symbolonv1.Verdict, error) {
	w.Helper()
	ctx := w.ctx()
	t, err := mtls.DialEarly(ctx, w.call(w.app.addr), mtls.NewEndpoint(w.web(), mtls.Options{}), func(*mtls.Peer) (*symbolonv1.Open, error) {
		return mtls.NewOpen(mtls.NewFlowID(), w.app.addr, authenticated, 1), nil
	}, func() ([]byte, error) { return []byte(early), nil })
	if err != nil {
		return nil, nil, err
	}
	v, err := t.ReadVerdict(ctx)
	return t, v, err
}

// Whoever is let in has its first bytes delivered before the others, and counted once.
func TestFirstBytesAreDelivered(t *testing.T) {
	for name, tc := range map[string]struct {
		grants symbolonv1.Protection
		change []func(*Options)
	}{
		"authenticated":        {grants: authenticated},
		"raised to encrypted":  {grants: encrypted},
		"stock":                {grants: authenticated, change: []func(*Options){stockLayer}},
		"stock, and encrypted": {grants: encrypted, change: []func(*Options){stockLayer}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, tc.change...)
			if tc.grants == authenticated {
				w.policy(strings.Replace(baseline, "protection: encrypted", "protection: authenticated", 1))
			}
			for _, early := range []string{"", "hello", strings.Repeat("0123456789", 700)} {
				c, v, err := w.showing(early)
				if err != nil {
					t.Fatal(err)
				}
				if int(v.GetEarly()) != len(early) || c.Protection() != tc.grants {
					t.Errorf("%d of %d bytes taken, granted %v", v.GetEarly(), len(early), c.Protection())
				}
				_ = c.SetReadDeadline(time.Now().Add(patience))
				got := make([]byte, len(early))
				if _, err := io.ReadFull(c, got); err != nil || string(got) != early {
					t.Errorf("the application answers %d bytes, %v", len(got), err)
				}
				_, _ = io.WriteString(c, "more")
				_ = c.CloseWrite()
				rest, err := io.ReadAll(c)
				c.Close()
				n := uint64(len(early) + 4)
				if r := w.records.next(); string(rest) != "more" || err != nil || r.Outcome != "allow" || r.BytesSent != n || r.BytesReceived != n {
					t.Errorf("answered %q, %v, recorded %+v", rest, err, r)
				}
			}
		})
	}
}

// A client that ends its direction right behind its first bytes, or resets the connection.
func TestEndBehindFirstBytes(t *testing.T) {
	w := leavingTLS(t)
	c, _, err := w.showing("hello")
	if err != nil {
		t.Fatal(err)
	}
	_ = c.CloseWrite()
	_ = c.SetReadDeadline(time.Now().Add(patience))
	if got, err := io.ReadAll(c); string(got) != "hello" || err != nil {
		t.Errorf("answered %q, %v", got, err)
	}
	c.Close()
	if r := w.records.next(); r.Outcome != "allow" || r.BytesSent != 5 || r.BytesReceived != 5 {
		t.Errorf("recorded %+v", r)
	}
	saw := make(chan error, 1)
	w.app.handle(func(c *net.TCPConn) { _, err := io.Copy(io.Discard, c); saw <- err })
	if c, _, err = w.showing("hello"); err != nil {
		t.Fatal(err)
	}
	_ = c.Reset()
	if err := within(t, saw, "the application's end"); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the application sees %v, want a reset", err)
	}
	if r := w.records.next(); r.Outcome != "allow" || r.Detail != "reset" {
		t.Errorf("recorded %s %s (%s)", r.Outcome, r.Reason, r.Detail)
	}
}

// First bytes stop where the Open does: nobody is reached, whoever refuses and why.
func TestFirstBytesOfARefusedOpen(t *testing.T) {
	w := leavingTLS(t)
	w.policy(strings.NewReplacer("protection: encrypted", "protection: authenticated", "verb: allow", "verb: deny").Replace(baseline))
	_, v, err := w.showing("secret")
	if mtls.ReasonOf(err) != symbolonv1.Reason_REASON_PEER_REFUSED || v.GetEarly() != 0 {
		t.Errorf("%v, %v, want a refusal", v, err)
	}
	if r := w.records.next(); r.Reason != "policy" || r.Outcome != "deny" || r.BytesSent != 0 {
		t.Errorf("recorded %+v", r)
	}
	w.policy(strings.Replace(baseline, "protection: encrypted", "protection: authenticated", 1))
	for name, change := range map[string]func(*symbolonv1.Open){
		"too many":        func(o *symbolonv1.Open) { o.Early = []byte(strings.Repeat("secret", 2000)) },
		"with encryption": func(o *symbolonv1.Open) { o.Protection, o.Early = encrypted, []byte("secret") },
		"renewing":        func(o *symbolonv1.Open) { o.Renews, o.Early = make([]byte, len(mtls.Claim{})), []byte("secret") },
	} {
		o := mtls.NewOpen(mtls.NewFlowID(), w.app.addr, authenticated, 1)
		change(o)
		c := w.call(w.app.addr)
		x := w.handshake(c, w.web().SVID.TLS, nil)
		_, _ = x.Write(message(o))
		if r := w.records.next(); r.Reason != "open-malformed" || r.Outcome != "deny" {
			t.Errorf("%s: recorded %s %s (%s)", name, r.Outcome, r.Reason, r.Detail)
		}
		_, _ = ended(t, c)
	}
	if w.app.accepts.Load() != 0 || w.app.received() != "" {
		t.Errorf("the application was reached: %q", w.app.received())
	}
}
