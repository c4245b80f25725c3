package loop

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/symbolon/symbolon/mtls"
)

// came makes l's relay again, with all that say has the peer say as if it had been read
// with what came before the relay: still sealed, or, without a tunnel, an Open's early bytes.
// harm may do something to it.
func (l *link) came(t *testing.T, say func(), harm func(sealed []byte)) {
	t.Helper()
	say()
	var b []byte
	buf := make([]byte, 64<<10)
	for quiet := 0; quiet < 20; {
		n, err := read(l.far.FD, buf)
		switch {
		case err == errAgain: //nolint:errorlint // one value, made for this
			quiet++
			time.Sleep(5 * time.Millisecond)
		case err != nil:
			t.Fatal(err)
		case n == 0:
			quiet = 20
		default:
			b, quiet = append(b, buf[:n]...), 0
		}
	}
	if harm != nil {
		harm(b)
	}
	if l.far.Stream != nil {
		l.far.Sealed = append(l.far.Sealed, b...)
	} else {
		l.far.Early = b
	}
	l.relay = New(l.near, l.far, func(err error, k *Tunnel) { l.done <- ending{err, k} })
}

// says has the peer say something.
func (l *link) says(t *testing.T, what string) {
	t.Helper()
	if _, err := l.peer.Write([]byte(what)); err != nil {
		t.Fatal(err)
	}
}

func ofTunnels(t *testing.T, test func(*testing.T, kind)) {
	each(t, func(t *testing.T, k kind) {
		if !k.tunnel {
			t.Skip("no tunnel")
		}
		test(t, k)
	})
}

// What has come before the relay is with the application before any loop is.
func TestHurry(t *testing.T) {
	each(t, func(t *testing.T, k kind) {
		l := newLink(t, k)
		const said = "a question in three pieces"
		l.came(t, func() {
			for _, s := range []string{said[:2], said[2:10], said[10:]} {
				l.says(t, s)
			}
		}, nil)
		l.relay.Hurry()
		got := make([]byte, len(said))
		if _, err := io.ReadFull(l.app, got); err != nil || string(got) != said {
			t.Fatalf("before the loop the application has %q, %v", got, err)
		}
		if n, at := l.relay.ToNear.Load(), l.relay.FirstToNear.Load(); n != uint64(len(said)) || at == 0 {
			t.Errorf("%d bytes are counted, the first at %d", n, at)
		}
		l.relay.Hurry() // nothing twice
		start(t, 1).Add(l.relay)
		l.says(t, ", and one more")
		if err := l.peer.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if rest, err := io.ReadAll(l.app); err != nil || string(rest) != ", and one more" {
			t.Fatalf("then it has %q, %v", rest, err)
		}
		if _, err := l.app.Write([]byte("answer")); err != nil {
			t.Fatal(err)
		}
		if err := l.app.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if answer, err := io.ReadAll(l.peer); err != nil || string(answer) != "answer" {
			t.Fatalf("the peer has %q, %v", answer, err)
		}
		l.clean(t)
	})
}

// The end may have come along, and more than the application takes at once.
func TestHurryMuch(t *testing.T) {
	each(t, func(t *testing.T, k kind) {
		l := newLink(t, k)
		said := []byte(strings.Repeat("0123456789abcdef", 16<<10/16))
		l.came(t, func() {
			if _, err := l.peer.Write(said); err != nil {
				t.Fatal(err)
			}
			if k.tunnel {
				if err := l.peer.CloseWrite(); err != nil {
					t.Fatal(err)
				}
			}
		}, nil)
		l.relay.Hurry()
		start(t, 1).Add(l.relay)
		if !k.tunnel {
			if err := l.peer.CloseWrite(); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := io.ReadAll(l.app); err != nil || !bytes.Equal(got, said) {
			t.Fatalf("the application has %d bytes of %d, %v", len(got), len(said), err)
		}
		if err := l.app.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		l.clean(t)
	})
}

// A record that was tampered with ends both sides, and nothing of it gets through.
func TestHurryForged(t *testing.T) {
	ofTunnels(t, func(t *testing.T, k kind) {
		l := newLink(t, k)
		l.came(t, func() { l.says(t, "question") }, func(sealed []byte) { sealed[len(sealed)-1] ^= 1 })
		l.relay.Hurry()
		start(t, 1).Add(l.relay)
		if e := l.ended(t); e.err == nil || e.kept != nil {
			t.Errorf("the relay ends with %v", e.err)
		}
		if got, err := io.ReadAll(l.app); len(got) > 0 || !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("the application has %q, %v", got, err)
		}
	})
}

// What is cut before it begins does not carry a byte.
func TestHurryCut(t *testing.T) {
	each(t, func(t *testing.T, k kind) {
		l := newLink(t, k)
		l.came(t, func() { l.says(t, "question") }, nil)
		l.relay.Cut()
		l.relay.Hurry()
		start(t, 1).Add(l.relay)
		if e := l.ended(t); !errors.Is(e.err, ErrCut) {
			t.Errorf("the relay ends with %v", e.err)
		}
		if got, err := io.ReadAll(l.app); len(got) > 0 || !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("the application has %q, %v", got, err)
		}
	})
}

// An application that has reset its connection by then is no clean end for the peer.
func TestHurryReset(t *testing.T) {
	each(t, func(t *testing.T, k kind) {
		l := newLink(t, k)
		l.came(t, func() { l.says(t, "question") }, nil)
		if err := l.app.Reset(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the reset has arrived", func() bool { return !nothing(l.near.FD) })
		l.relay.Hurry()
		start(t, 1).Add(l.relay)
		if e := l.ended(t); !errors.Is(e.err, unix.ECONNRESET) && !errors.Is(e.err, unix.EPIPE) {
			t.Errorf("the relay ends with %v", e.err)
		}
		if _, err := io.ReadAll(l.peer); err == nil {
			t.Error("the peer sees a clean end")
		} else if k.tunnel && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, mtls.ErrTruncated) {
			t.Errorf("the peer has %v", err)
		}
	})
}

// A control message may have come along, and its answer goes out once there is a loop.
func TestHurryControl(t *testing.T) {
	ofTunnels(t, func(t *testing.T, k kind) {
		if !k.framed {
			t.Skip("no frames")
		}
		l := newLink(t, k)
		peer, answers := l.peer.(controls), make(chan string, 1)
		peer.OnControl(func(m []byte) error { answers <- string(m); return nil })
		l.tunnel.OnControl(func(m []byte) error { l.relay.Tell(append([]byte("answer to "), m...)); return nil })
		l.came(t, func() {
			if err := peer.SendControl([]byte("a renewal")); err != nil {
				t.Fatal(err)
			}
			l.says(t, "question")
		}, nil)
		l.relay.Hurry()
		start(t, 1).Add(l.relay)
		go func() { _, _ = io.ReadAll(l.peer) }() // whoever reads hears
		select {
		case m := <-answers:
			if m != "answer to a renewal" {
				t.Errorf("the peer hears %q", m)
			}
		case <-time.After(patience):
			t.Fatal("the peer hears nothing")
		}
		got := make([]byte, len("question"))
		if _, err := io.ReadFull(l.app, got); err != nil || string(got) != "question" {
			t.Errorf("the application has %q, %v", got, err)
		}
	})
}
