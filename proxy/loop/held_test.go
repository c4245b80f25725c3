package loop

import (
	"testing"

	"golang.org/x/sys/unix"
)

// A relay holds ACKs back no longer than until it has written what there is at first:
// an application that speaks first, or answers in pieces, is not kept waiting.
func TestHeld(t *testing.T) {
	each(t, func(t *testing.T, k kind) {
		for _, spoken := range []bool{false, true} {
			l := newLink(t, k)
			l.relay.near.held = true // as by Side
			fd := l.near.FD
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0); err != nil {
				t.Fatal(err)
			}
			if spoken {
				if _, err := l.peer.Write([]byte("question")); err != nil {
					t.Fatal(err)
				}
				l.relay.far.readable = true // as with what came along with an Open
			}
			s := start(t, 1)
			s.Add(l.relay)
			eventually(t, "ACKs are not held back", func() bool {
				quick, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK)
				return err == nil && quick == 1
			})
		}
	})
}
