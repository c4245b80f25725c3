package mtls

import (
	"io"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// A peer that reads slowly must not lose the end of its stream: with every buffer on
// the way full, close_notify waits as data would, longer than the five seconds that
// crypto/tls gives it.
func TestEndWaitsForASlowReader(t *testing.T) {
	t.Parallel()
	web, db := endpoints(t)
	c, s := pair(t)
	if err := s.SetWriteBuffer(32 << 10); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadBuffer(32 << 10); err != nil {
		t.Fatal(err)
	}
	ctx := timeout(t)
	ch := accept(ctx, s, db, &symbolonv1.Verdict{Accept: true, Protection: encrypted})
	client, err := Dial(ctx, c, web, asking(encrypted))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.ReadVerdict(ctx); err != nil {
		t.Fatal(err)
	}
	server := (<-ch).conn
	sent := 0
	for !full(t, server) {
		n, err := server.Write(make([]byte, 512))
		if err != nil {
			t.Fatal(err)
		}
		sent += n
	}
	ended := make(chan error, 1)
	go func() { ended <- server.CloseWrite() }()
	select {
	case err := <-ended:
		t.Fatalf("the end fit in or was given up (%v): nothing is tested", err)
	case <-time.After(5500 * time.Millisecond):
	}
	got, err := io.Copy(io.Discard, client)
	if err != nil || int(got) != sent {
		t.Errorf("read %d of %d bytes, %v", got, sent, err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// full tells whether a write would block, and that this is not passing.
func full(t *testing.T, c *Conn) bool {
	t.Helper()
	raw, err := c.wire.Socket.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		var queued, limit int
		if err := raw.Control(func(fd uintptr) {
			queued, limit = sendQueue(t, int(fd))
		}); err != nil {
			t.Fatal(err)
		}
		if queued < limit {
			return false
		}
		time.Sleep(10 * time.Millisecond) // for what is on its way to arrive
	}
	return true
}

// sendQueue is the memory that a socket's unsent and unacknowledged bytes take, and
// its limit: numbers 5 and 3 of SO_MEMINFO (linux/sock_diag.h). The getter is the one
// of x/sys whose result is long enough; its field names mean nothing here.
func sendQueue(t *testing.T, fd int) (queued, limit int) {
	t.Helper()
	info, err := unix.GetsockoptTCPInfo(fd, unix.SOL_SOCKET, unix.SO_MEMINFO)
	if err != nil {
		t.Fatal(err)
	}
	return int(info.Rcv_mss), int(info.Ato) // at 20 and 12 bytes
}
