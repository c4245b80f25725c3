package loop

import (
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
			speaker     func(*link) conn // whose bytes go to the held end
		}{
			"near": {(*Relay).nearEnd, (*Relay).farEnd, func(l *link) conn { return l.peer }},
			"far":  {(*Relay).farEnd, (*Relay).nearEnd, func(l *link) conn { return l.app }},
		} {
			for _, first := range []string{"nothing", "question", "end"} {
				l := newLink(t, k)
				held := side.held(l.relay)
				held.held = true // as by Side
				fd := held.fd
				if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0); err != nil {
					t.Fatal(err)
				}
				var err error
				switch speaker := side.speaker(l); first {
				case "question":
					_, err = speaker.Write([]byte(first))
				case "end":
					err = speaker.CloseWrite()
				}
				if err != nil {
					t.Fatal(err)
				}
				side.other(l.relay).readable = first != "nothing" // as with what came along with an Open
				s := start(t, 1)
				s.Add(l.relay)
				eventually(t, name+", "+first+": ACKs are not held back", func() bool {
					quick, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK)
					return err == nil && quick == 1
				})
			}
		}
	})
}

func (r *Relay) nearEnd() *end { return &r.near }
func (r *Relay) farEnd() *end  { return &r.far }
