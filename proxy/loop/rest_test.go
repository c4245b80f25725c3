package loop

import (
	"io"
	"testing"
)

// A stream that rests gives its ciphers back, and the loop then sleeps for as long as
// nothing happens; what comes later is carried as before, both ways.
func TestRest(t *testing.T) {
	l := newLink(t, kind{tunnel: true, framed: true})
	s := start(t, 1)
	s.Add(l.relay)
	say := func(from io.Writer, to io.Reader, what string) {
		t.Helper()
		if _, err := from.Write([]byte(what)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, len(what))
		if _, err := io.ReadFull(to, b); err != nil || string(b) != what {
			t.Fatalf("read %q, %v", b, err)
		}
	}
	say(l.app, l.peer, "question")
	say(l.peer, l.app, "answer")
	// Events were before these, so that the loop is warm.
	eventually(t, "nothing is left to drop", func() bool { return !s.loops[0].warm.Load() })
	if l.relay.far.stream.Rest() { // the loop sleeps
		t.Error("a cipher is left")
	}
	say(l.app, l.peer, "another question")
	say(l.peer, l.app, "another answer")
}
