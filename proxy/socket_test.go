package proxy

import (
	"errors"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/redirect"
)

// Who ends a socket ends it, also where it becomes the runtime's just then.
func TestEndedWhileAttached(t *testing.T) {
	l := listen(t, "127.0.0.1:0")
	d := redirect.Dialer(redirect.MarkControl, redirect.DefaultKeepAlive)
	for name, end := range map[string]func(*socket){
		"reset": (*socket).reset,
		"close": func(s *socket) { _ = s.Close() },
		"detach": func(s *socket) {
			if fd, err := s.detach(); err == nil {
				_ = unix.Close(fd)
			}
		},
	} {
		for range 1500 { // it takes about as many to hit the moment
			peer := must(d.Dial("tcp", l.Addr().String()))(t)
			s := &socket{fd: must(mtls.DetachTCP(must(l.AcceptTCP())(t)))(t), inline: true}
			var both sync.WaitGroup
			both.Go(func() { _, _ = s.attach() })
			both.Go(func() { end(s) })
			both.Wait()
			_ = peer.SetReadDeadline(time.Now().Add(patience))
			_, err := peer.Read(make([]byte, 1))
			_, _ = peer.Close(), s.Close()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: the socket is open still", name)
				break
			}
		}
	}
}
