package mtls

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"golang.org/x/sys/unix"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/mtls/record"
)

// detach takes a tunnel's end as descriptor and Stream.
func detach(t testing.TB, c *Conn) (int, *Stream, []byte) {
	t.Helper()
	fd, s, sealed, err := c.Detach(io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	return fd, s, sealed
}

// endBoth ends the data phase of a framed tunnel whose server's end is detached: the
// client's first, then the server's.
func endBoth(t *testing.T, client *Conn, fd int, s *Stream, sealed []byte) (rest []byte) {
	t.Helper()
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	in := append(make([]byte, 0, 1<<16), sealed...)
	for {
		n, _, err := s.Open(in, make([][]byte, 0, 8))
		in = in[n:]
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			in = append(in, wait(t, fd)...)
		}
	}
	b, err := s.End(make([]byte, record.SealBuffer(1)))
	if err == nil {
		_, err = unix.Write(fd, b)
	}
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(client); len(b) > 0 || err != nil {
		t.Fatalf("the client reads %q, %v", b, err)
	}
	return in
}

// wait reads what is there, or comes soon.
func wait(t *testing.T, fd int) []byte {
	t.Helper()
	if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10_000); err != nil && !errors.Is(err, unix.EINTR) {
		t.Fatal(err)
	}
	b := make([]byte, 1<<14)
	n, err := unix.Read(fd, b)
	if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
		t.Fatal(err)
	}
	return b[:max(n, 0)]
}

// A tunnel goes to an event loop and back, connection after connection.
func TestDetachAndAttach(t *testing.T) {
	client, server := framedTunnel(t)
	ctx := timeout(t)
	for i := range 3 {
		fd, s, sealed := detach(t, server)
		rest := endBoth(t, client, fd, s, sealed)
		if err := server.Attach(fd, s, rest); err != nil {
			t.Fatal(err)
		}
		if !client.Reusable() || !server.Reusable() || !client.Idle() {
			t.Fatalf("use %d ended cleanly, and the tunnel is not reusable", i)
		}
		open, _ := framed(nil)
		if err := client.Reopen(ctx, open); err != nil {
			t.Fatal(err)
		}
		if _, err := server.NextOpen(ctx); err != nil {
			t.Fatal(err)
		}
		if err := server.Grant(ctx, &symbolonv1.Verdict{Protection: encrypted, Keep: true}); err != nil {
			t.Fatal(err)
		}
		if _, err := client.ReadVerdict(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

// A socket that cannot be given back, as when the process is out of descriptors, is
// the end of the tunnel: nobody may wait for the next connection on it.
func TestAttachFails(t *testing.T) {
	client, server := framedTunnel(t)
	fd, s, sealed := detach(t, server)
	rest := endBoth(t, client, fd, s, sealed)
	if err := unix.Close(fd); err != nil {
		t.Fatal(err)
	}
	notASocket, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Attach(notASocket, s, rest); err == nil {
		t.Fatal("attached to what is no socket")
	}
	if server.Reusable() {
		t.Error("reusable without a socket")
	}
	if _, err := s.Seal(make([]byte, record.SealBuffer(1)), 1); !errors.Is(err, record.ErrReleased) {
		t.Errorf("the keys are still there: %v", err)
	}
}

// What came behind the end and ahead of the next Open's answer is the peer's mistake,
// and its tunnel is not used again; were it still in the kernel, Idle would see it.
func TestNotIdleWithBytesReadAhead(t *testing.T) {
	client, server := framedTunnel(t)
	fd, s, sealed := detach(t, client)
	if err := server.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := server.out.Write([]byte("a verdict ahead of its open")); err != nil {
		t.Fatal(err)
	}
	in := sealed
	for {
		n, _, err := s.Open(in, make([][]byte, 0, 8))
		in = in[n:]
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			in = append(bytes.Clone(in), wait(t, fd)...)
		}
	}
	for len(in) == 0 {
		in = append(in, wait(t, fd)...)
	}
	b, err := s.End(make([]byte, record.SealBuffer(1)))
	if err == nil {
		_, err = unix.Write(fd, b)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := client.Attach(fd, s, in); err != nil {
		t.Fatal(err)
	}
	if client.Idle() {
		t.Error("idle, with bytes that were read ahead")
	}
}

// The end of a framed direction is final for who opens it.
func TestOpenAfterTheEnd(t *testing.T) {
	client, server := framedTunnel(t)
	fd, s, sealed := detach(t, server)
	rest := endBoth(t, client, fd, s, sealed)
	if _, err := client.out.Write([]byte{0, 0, 0, 1, 'x', 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	for len(rest) == 0 {
		rest = append(rest, wait(t, fd)...)
	}
	for range 2 {
		if n, data, err := s.Open(rest, make([][]byte, 0, 8)); n != 0 || len(data) > 0 || !errors.Is(err, io.EOF) {
			t.Errorf("%d bytes used, data %q, %v", n, data, err)
		}
	}
	_ = unix.Close(fd)
}

// What crypto/tls keeps stays there, and goes on.
func TestNotDetachable(t *testing.T) {
	ca := newAuthority(t, "acme.example")
	web := NewEndpoint(ca.workload("/prod/web", nil), Options{StockTLS: true})
	db := NewEndpoint(ca.workload("/prod/db", nil), Options{StockTLS: true})
	a, b := tunnel(t, web, db, encrypted, encrypted)
	if a.Detachable() || b.Detachable() {
		t.Error("detachable")
	}
	if _, _, _, err := a.Detach(io.Discard); !errors.Is(err, ErrNotDetachable) {
		t.Errorf("detached: %v", err)
	}
	talk(t, a, b)
}
