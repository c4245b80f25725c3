package proxy

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/redirect"
)

const appPort = 7000

// app is the protected application: a plain TCP server that knows of no proxy. It
// keeps every byte it was sent, and by default sends it back.
type app struct {
	addr    netip.AddrPort
	accepts atomic.Int64
	mu      sync.Mutex
	got     bytes.Buffer
	open    map[*net.TCPConn]struct{}
	// serve replaces the echo; set it with handle.
	serve func(*net.TCPConn)
}

func newApp(t testing.TB) *app {
	t.Helper()
	a := &app{addr: netip.AddrPortFrom(netip.MustParseAddr(protected4), appPort), open: make(map[*net.TCPConn]struct{})}
	a.serve = a.echo
	l := listen(t, ":7000")
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if errors.Is(err, syscall.EMFILE) { // a test has taken them all
				time.Sleep(acceptPauseMin)
				continue
			}
			if err != nil {
				return
			}
			a.accepts.Add(1)
			a.mu.Lock()
			a.open[c] = struct{}{}
			serve := a.serve
			a.mu.Unlock()
			wg.Go(func() {
				serve(c)
				a.mu.Lock()
				delete(a.open, c)
				a.mu.Unlock()
				c.Close()
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		a.mu.Lock()
		for c := range a.open {
			c.Close()
		}
		a.mu.Unlock()
		wg.Wait()
	})
	return a
}

func (a *app) handle(serve func(*net.TCPConn)) {
	a.mu.Lock()
	a.serve = serve
	a.mu.Unlock()
}

func (a *app) echo(c *net.TCPConn) {
	b := make([]byte, 4096)
	for {
		n, err := c.Read(b)
		a.mu.Lock()
		a.got.Write(b[:n])
		a.mu.Unlock()
		if _, werr := c.Write(b[:n]); werr != nil || err != nil {
			_ = c.CloseWrite() // the other side may have gone
			return
		}
	}
}

func (a *app) received() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.got.String()
}

// call connects from the other host, which has no proxy.
func (w *world) call(to netip.AddrPort) *net.TCPConn {
	w.Helper()
	return w.callFrom(netip.Addr{}, to)
}

func (w *world) callFrom(from netip.Addr, to netip.AddrPort) *net.TCPConn {
	w.Helper()
	c, err := w.tryCall(from, to)
	if err != nil {
		w.Fatal(err)
	}
	return c
}

func (w *world) tryCall(from netip.Addr, to netip.AddrPort) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: patience}
	d.SetMultipathTCP(false)
	if from.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	}
	var c net.Conn
	if err := inOther(func() (err error) { c, err = d.Dial("tcp", to.String()); return err }); err != nil {
		return nil, err
	}
	w.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn), nil
}

// connect is an application of this host calling out; it meets the proxy.
func (w *world) connect(to netip.AddrPort) *net.TCPConn {
	w.Helper()
	d := net.Dialer{Timeout: patience}
	d.SetMultipathTCP(false)
	c, err := d.Dial("tcp", to.String())
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn)
}

// ask is an application of this host that calls out, says text, and reads until
// the end. A reset may come as early as in its connect.
func (w *world) ask(to netip.AddrPort, text string) (got []byte, err error) {
	w.Helper()
	c, err := net.DialTimeout("tcp", to.String(), patience)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	_, werr := io.WriteString(c, text)
	if got, err = ended(w, c); err == nil {
		err = werr
	}
	return got, err
}

// serveOther answers every connection to an address of the other host's with
// serve, which is waited for at the end of the test.
func (w *world) serveOther(address string, serve func(*net.TCPConn)) netip.AddrPort {
	w.Helper()
	var l net.Listener
	if err := inOther(func() (err error) {
		if l, err = redirect.ListenConfig(redirect.DefaultKeepAlive).Listen(w.Context(), "tcp", address); err == nil {
			err = redirect.AcceptFastOpen(l.(*net.TCPListener), true) // where the test allows it: fastOpenHosts
		}
		return err
	}); err != nil {
		w.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	open := make(map[net.Conn]struct{})
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = struct{}{}
			mu.Unlock()
			_ = c.SetDeadline(time.Now().Add(patience))
			wg.Go(func() { serve(c.(*net.TCPConn)); c.Close() })
		}
	})
	w.Cleanup(func() {
		l.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// pair is a connection over loopback that no rule touches.
func pair(t testing.TB) (a, b *net.TCPConn) {
	t.Helper()
	l := listen(t, "127.0.0.1:0")
	d := redirect.Dialer(redirect.MarkControl, redirect.DefaultKeepAlive)
	c, err := d.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Close() })
	for _, x := range []net.Conn{c, s} {
		_ = x.SetDeadline(time.Now().Add(patience))
	}
	return c.(*net.TCPConn), s
}

// urgent sends b as TCP's urgent data, of which the last byte is it.
func urgent(t testing.TB, c *net.TCPConn, b string) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	if err := raw.Write(func(fd uintptr) bool {
		failed = unix.Sendto(int(fd), []byte(b), unix.MSG_OOB, nil)
		return !errors.Is(failed, unix.EAGAIN)
	}); err != nil || failed != nil {
		t.Fatal(err, failed)
	}
}

// ended waits for the peer to end c, and returns what came before. An end is not
// a timeout.
func ended(t testing.TB, c io.Reader) (got []byte, err error) {
	t.Helper()
	got, err = io.ReadAll(c)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection is still open; read %q", got)
	}
	return got, err
}

// speaks holds that an open tunnel or connection reaches the echoing application.
func speaks(t testing.TB, c io.ReadWriter) {
	t.Helper()
	const text = "are you there?"
	if _, err := io.WriteString(c, text); err != nil {
		t.Errorf("write: %v", err)
		return
	}
	b := make([]byte, len(text))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != text {
		t.Errorf("the application answers %q, %v", b, err)
	}
}

// good holds that an honest client is served now, as if nothing had happened.
func (w *world) good() {
	w.Helper()
	w.exchange()
	if r := w.records.next(); r.Outcome != "allow" || r.ServerPolicy != "/prod/web-calls-db" || r.Protection != "encrypted" {
		w.Errorf("an honest client's record: %+v", r)
	}
}

// exchange is good, and leaves the record to the caller.
func (w *world) exchange() {
	w.Helper()
	before := w.app.accepts.Load()
	c, err := w.tunnel(w.web(), symbolonv1.Protection_PROTECTION_ENCRYPTED)
	if err != nil {
		w.Errorf("an honest client: %v", err)
		return
	}
	_ = c.SetReadDeadline(time.Now().Add(patience))
	speaks(w, c)
	if err := c.CloseWrite(); err != nil {
		w.Error(err)
	}
	if rest, err := io.ReadAll(c); err != nil || len(rest) > 0 {
		w.Errorf("the end: %q, %v", rest, err)
	}
	c.Close()
	if n := w.app.accepts.Load() - before; n != 1 {
		w.Errorf("the application saw %d connections, want 1", n)
	}
}
