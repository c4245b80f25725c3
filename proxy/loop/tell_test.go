package loop

import (
	"bytes"
	"testing"
	"time"
)

// controls is the end of a tunnel that has frames.
type controls interface {
	OnControl(func([]byte) error)
	SendControl([]byte) error
}

// Control messages pass either way among data, of which they change nothing, also where
// sockets take little at a time.
func TestTell(t *testing.T) {
	for name, k := range kinds {
		if !k.framed {
			continue
		}
		t.Run(name, func(t *testing.T) {
			l := newLink(t, k)
			here, there := make(chan []byte, 8), make(chan []byte, 8)
			l.tunnel.OnControl(func(m []byte) error { here <- m; return nil })
			peer := l.peer.(controls)
			peer.OnControl(func(m []byte) error { there <- m; return nil })
			const first = "before it runs"
			l.relay.Tell([]byte(first))
			start(t, 1).Add(l.relay)
			sizes := []int{1, 1000, 20 << 10, 48 << 10}
			sent := make(chan error, 1)
			go func() {
				var err error
				for i, n := range sizes {
					l.relay.Tell(bytes.Repeat([]byte{byte(i)}, n))
					if e := peer.SendControl(bytes.Repeat([]byte{byte('a' + i)}, n)); e != nil {
						err = e
					}
				}
				sent <- err
			}()
			echo(t, l, 300<<10, func() {
				if err := <-sent; err != nil {
					t.Error(err)
				}
				select {
				case m := <-there:
					if string(m) != first {
						t.Errorf("the peer hears %d bytes first", len(m))
					}
				case <-time.After(patience):
					t.Fatal("what was told before it ran does not come")
				}
				for i, n := range sizes {
					for _, side := range []struct {
						ch   chan []byte
						want byte
					}{{there, byte(i)}, {here, byte('a' + i)}} {
						select {
						case m := <-side.ch:
							if !bytes.Equal(m, bytes.Repeat([]byte{side.want}, n)) {
								t.Errorf("message %d has %d bytes, of %d", i, len(m), n)
							}
						case <-time.After(patience):
							t.Fatalf("message %d does not come", i)
						}
					}
				}
			})
			l.clean(t)
			l.relay.Tell([]byte("after its end: nothing happens"))
		})
	}
}

// echo sends size bytes each way, waits by meanwhile, sends as many again, and ends.
func echo(t *testing.T, l *link, size int, meanwhile func()) {
	t.Helper()
	data := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	got := make(chan int, 2)
	for _, c := range []conn{l.app, l.peer} {
		go func() {
			n, b := 0, make([]byte, 4096)
			for {
				k, err := c.Read(b)
				for i := range k {
					if b[i] != data[(n+i)%len(data)] {
						n = -len(data) * 10
					}
				}
				if n += k; err != nil {
					got <- n
					return
				}
			}
		}()
	}
	write := func(c conn, done chan<- error) {
		_, err := c.Write(data)
		done <- err
	}
	both := func() {
		done := make(chan error, 2)
		go write(l.app, done)
		go write(l.peer, done)
		for range 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	both()
	meanwhile()
	both()
	for _, c := range []conn{l.app, l.peer} {
		if err := c.CloseWrite(); err != nil {
			t.Error(err)
		}
	}
	for range 2 {
		if n := <-got; n != 2*len(data) {
			t.Errorf("%d bytes arrived, want %d", n, 2*len(data))
		}
	}
}
