package redirect

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A peer that vanishes with bytes on their way to it is found; one that is alive and
// does not read is left alone, however long that takes.
func TestVanishedPeersAreFound(t *testing.T) {
	const limit = time.Second
	near, far := twoHosts(t)
	accepted := make(chan *net.TCPConn, 1)
	release := make(chan struct{})
	freed := sync.OnceFunc(func() { close(release) })
	far.serve("[::]:8080", "", func(c *net.TCPConn) { accepted <- c; <-release })
	t.Cleanup(freed)
	ctx, stop := context.WithCancel(context.Background())
	var watching sync.WaitGroup
	t.Cleanup(watching.Wait)
	t.Cleanup(stop)
	d := near.diag()
	watching.Go(func() { d.WatchVanished(ctx, limit, func(err error) { t.Error(err) }) })

	for _, to := range []string{"10.77.1.1:8080", "[fd77:1::1]:8080"} {
		stalled, err := near.dial(0, "", to)
		check(t, err)
		defer stalled.Close()
		reader := <-accepted
		sent := fillUp(t, stalled)
		gone, err := near.dial(0, "", to)
		check(t, err)
		defer gone.Close()
		<-accepted
		_, port, _ := net.SplitHostPort(gone.LocalAddr().String())
		far.sh("iptables -I INPUT -p tcp --sport " + port + " -j DROP; ip6tables -I INPUT -p tcp --sport " + port + " -j DROP")
		start := time.Now()
		_, err = io.WriteString(gone, "anybody there?")
		check(t, err)
		check(t, gone.SetReadDeadline(time.Now().Add(60*time.Second)))
		if _, err := gone.Read(make([]byte, 1)); !errors.Is(err, unix.ETIMEDOUT) {
			t.Errorf("%s: a vanished peer: %v, want ETIMEDOUT", to, err)
		}
		if took := time.Since(start); took < limit {
			t.Errorf("%s: given up after %v", to, took)
		}
		// The other has stood still for longer than any vanished one would.
		for time.Since(start) < 5*limit {
			time.Sleep(limit / 10)
		}
		check(t, stalled.CloseWrite())
		check(t, reader.SetReadDeadline(time.Now().Add(60*time.Second)))
		if n, err := io.Copy(io.Discard, reader); err != nil || n != sent {
			t.Errorf("%s: a peer that did not read for a while got %d bytes of %d, %v", to, n, sent, err)
		}
	}
	freed()
}

// fillUp writes until nothing more goes.
func fillUp(t *testing.T, c *net.TCPConn) (sent int64) {
	t.Helper()
	chunk := make([]byte, 64<<10)
	for {
		check(t, c.SetWriteDeadline(time.Now().Add(300*time.Millisecond)))
		n, err := c.Write(chunk)
		sent += int64(n)
		if err != nil {
			check(t, c.SetWriteDeadline(time.Time{}))
			return sent
		}
	}
}
