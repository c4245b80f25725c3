package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/symbolon/symbolon/internal/netlab"
)

// The test is the program as well, for the lab to start.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "backend", "load", "bare":
			main()
			return
		}
	}
	os.Exit(m.Run())
}

// As in a run: the rules bring the load to the pair, the wire shows that they do, and every
// workload it is measured in comes through.
func TestBareWorkloads(t *testing.T) {
	netlab.Require(t, "iptables", "tcpdump")
	l, err := newLab(t.Context(), &options{systems: []string{nameBare}}, io.Discard)
	if l != nil {
		defer func() {
			if err := l.close(); err != nil {
				t.Error(err)
			}
		}()
	}
	if err != nil {
		t.Fatal(err)
	}
	p := l.pairs[0]
	known := make(map[string]workload)
	for _, w := range allWorkloads(nil) {
		known[w.name] = w
	}
	for _, name := range p.only {
		w, ok := known[name]
		if !ok {
			t.Errorf("there is no workload %s", name)
			continue
		}
		r, err := l.load(t.Context(), p, w, 50*time.Millisecond, nil)
		if err != nil || r.Errors > 0 || r.Requests+r.Bytes == 0 {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
	if err := l.restart(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if err := l.prove(t.Context(), p); err != nil {
		t.Errorf("after a restart: %v", err)
	}
}

// bareWorld is a pair with an application of the test's own; nil: nobody listens.
type bareWorld struct {
	*pair
	app net.Listener
}

func newBareWorld(t *testing.T) *bareWorld {
	w := netlab.Test(t, "ip", "iptables", "tcpdump")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b := &bareWorld{pair: &pair{client: w.Host("c"), server: w.Host("s")}}
	for _, h := range []*netlab.Host{b.client, b.server} { // little, so that sockets do fill
		h.Sysctl("net.ipv4.tcp_rmem", "4096 65536 262144")
		h.Sysctl("net.ipv4.tcp_wmem", "4096 65536 262144")
	}
	w.Link(b.client, b.server, []string{clientAddr + "/24"}, []string{serverAddr + "/24"})
	if err := startBare(t.Context(), &lab{world: w, exe: exe}, b.pair); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bareWorld) listen(t *testing.T) {
	t.Helper()
	var err error
	if b.app, err = b.server.Listen("tcp", remote); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.app.Close() })
}

// dial connects a client, which says something first unless that is empty, with the
// application: both ends, to be read and written within a minute.
func (b *bareWorld) dial(t *testing.T, first string) (client, app *net.TCPConn) {
	t.Helper()
	c := b.dialOnly(t)
	if _, err := io.WriteString(c, first); err != nil {
		t.Fatal(err)
	}
	a, err := b.app.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	_ = a.SetDeadline(time.Now().Add(time.Minute))
	got := make([]byte, len(first))
	if _, err := io.ReadFull(a, got); err != nil || string(got) != first {
		t.Fatalf("the application got %q, %v", got, err)
	}
	return c, a.(*net.TCPConn)
}

func (b *bareWorld) dialOnly(t *testing.T) *net.TCPConn {
	t.Helper()
	c, err := b.client.Dial(t.Context(), "tcp", remote)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	return c.(*net.TCPConn)
}

func TestBareEnds(t *testing.T) {
	b := newBareWorld(t)
	t.Run("nobody listens", func(t *testing.T) {
		// The Open does not wait for first bytes, so that the reset may come at any time.
		c, err := b.client.Dial(t.Context(), "tcp", remote)
		if err == nil {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(time.Minute))
			_, err = c.Read(make([]byte, 1))
		}
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("what came of it: %v", err)
		}
	})
	b.listen(t)
	t.Run("the application speaks first", func(t *testing.T) {
		client, app := b.dial(t, "")
		if _, err := io.WriteString(app, "hello"); err != nil {
			t.Fatal(err)
		}
		app.Close()
		if got, err := io.ReadAll(client); err != nil || string(got) != "hello" {
			t.Errorf("%q, %v", got, err)
		}
	})
	t.Run("nothing is said at all", func(t *testing.T) {
		c := b.dialOnly(t)
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		app, err := b.app.Accept()
		if err != nil {
			t.Fatal(err)
		}
		_ = app.SetDeadline(time.Now().Add(time.Minute))
		if got, err := io.ReadAll(app); err != nil || len(got) > 0 {
			t.Errorf("the application got %q, %v", got, err)
		}
		app.Close()
		if got, err := io.ReadAll(c); err != nil || len(got) > 0 {
			t.Errorf("the client got %q, %v", got, err)
		}
	})
	t.Run("resets", func(t *testing.T) {
		for _, fromClient := range []bool{true, false} {
			one, other := b.dial(t, "x")
			if !fromClient {
				one, other = other, one
			}
			_ = one.SetLinger(0)
			one.Close()
			if n, err := other.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("by the client %v: %d bytes, %v", fromClient, n, err)
			}
		}
	})
}

// Both directions are full before anybody reads, and each ends by itself: nothing is lost.
func TestBareBackpressure(t *testing.T) {
	b := newBareWorld(t)
	b.listen(t)
	for i := range 3 { // the second time on the same carrier
		client, app := b.dial(t, "x")
		said := bytes.Repeat([]byte{byte(i), 'a', 'b'}, 16<<20/3)
		wrote := make(chan error, 2)
		for _, c := range []*net.TCPConn{client, app} {
			go func() {
				_, err := c.Write(said)
				wrote <- errors.Join(err, c.CloseWrite())
			}()
		}
		// More than sockets and the pair hold: both writers have to wait for the readers.
		select {
		case err := <-wrote:
			t.Fatalf("nobody has read, and all is written: %v", err)
		case <-time.After(200 * time.Millisecond):
		}
		for _, c := range []*net.TCPConn{client, app} {
			got, err := io.ReadAll(c)
			if err != nil || sha256.Sum256(got) != sha256.Sum256(said) {
				t.Errorf("%d bytes of %d arrived, or others, %v", len(got), len(said), err)
			}
		}
		for range 2 {
			if err := <-wrote; err != nil {
				t.Error(err)
			}
		}
	}
}

// One connection between the hosts serves one of the applications after the other; each
// loop has its own.
func TestBareReuse(t *testing.T) {
	b := newBareWorld(t)
	b.listen(t)
	capture, err := b.server.Capture("eth0", "tcp")
	if err != nil {
		t.Fatal(err)
	}
	for range 8 * runtime.NumCPU() {
		client, app := b.dial(t, "ask")
		if err := client.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(app, app); err != nil {
			t.Fatal(err)
		}
		app.Close()
		if got, err := io.ReadAll(client); err != nil || len(got) > 0 {
			t.Fatalf("%q, %v", got, err)
		}
	}
	if _, err := capture.Stop(); err != nil {
		t.Fatal(err)
	}
	streams, err := capture.Streams()
	if err != nil {
		t.Fatal(err)
	}
	if err := proveBare(streams); err != nil {
		t.Error(err)
	}
	if n := len(streams); n > 2*runtime.NumCPU() { // one in each direction
		t.Errorf("%d streams for as many connections as loops: %d", n, runtime.NumCPU())
	}
	if err := proveBare([]netlab.Stream{{}, {Data: []byte("GET / HTTP/1.0")}, {Data: []byte{opEcho, 1, 2, 3, 4, 5}}}); !errors.Is(err, errNotBare) {
		t.Errorf("what went past the pair: %v", err)
	}
}
