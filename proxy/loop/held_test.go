package loop

import (
	"io"
	"testing"

	"golang.org/x/sys/unix"
)

// A relay holds ACKs back no longer than until it has written what there is at first:
// an application that speaks first, or answers in pieces, is not kept waiting, on
// whichever side it is.
func TestHeld(t *testing.T) {
	each(t, func(t *testing.T, k kind) {
		for name, side := range map[string]struct {
			held, other func(*Relay) *end
			speaker     func(*link) io.Writer // whose bytes go to the held end
		}{
			"near": {(*Relay).nearEnd, (*Relay).farEnd, func(l *link) io.Writer { return l.peer }},
			"far":  {(*Relay).farEnd, (*Relay).nearEnd, func(l *link) io.Writer { return l.app }},
		} {
			for _, spoken := range []bool{false, true} {
				l := newLink(t, k)
				held := side.held(l.relay)
				held.held = true // as by Side
				fd := held.fd
				if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0); err != nil {
					t.Fatal(err)
				}
				if spoken {
					if _, err := side.speaker(l).Write([]byte("question")); err != nil {
						t.Fatal(err)
					}
					side.other(l.relay).readable = true // as with what came along with an Open
				}
				s := start(t, 1)
				s.Add(l.relay)
				eventually(t, name+": ACKs are not held back", func() bool {
					quick, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK)
					return err == nil && quick == 1
				})
			}
		}
	})
}

func (r *Relay) nearEnd() *end { return &r.near }
func (r *Relay) farEnd() *end  { return &r.far }
