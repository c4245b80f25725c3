package loop

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
)

// source is a stream of bytes that a seed and a length say all about.
func source(seed uint64, n int) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}), int64(n))
}

// pour writes source(seed, n) in pieces of 1 byte up to piece, and ends the direction.
func pour(w conn, seed uint64, n, piece int) error {
	src, rnd := source(seed, n), rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, piece)
	for {
		k, err := io.ReadFull(src, b[:1+rnd.IntN(piece)])
		if k == 0 && err == io.EOF {
			return w.CloseWrite()
		}
		if _, err := w.Write(b[:k]); err != nil {
			return err
		}
	}
}

// drink reads r to its end in pieces of up to piece, and holds that it was
// source(seed, n).
func drink(r io.Reader, seed uint64, n, piece int) error {
	want, got := sha256.New(), sha256.New()
	_, _ = io.Copy(want, source(seed, n))
	k, err := io.CopyBuffer(got, struct{ io.Reader }{r}, make([]byte, piece))
	if err != nil {
		return fmt.Errorf("after %d of %d bytes: %w", k, n, err)
	}
	if int(k) != n || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		return fmt.Errorf("%d bytes, want %d, or others", k, n)
	}
	return nil
}

// exchange carries up and down at once to their ends, and holds what arrived and
// what was counted.
func (l *link) exchange(t *testing.T, up, down, piece int) *Tunnel {
	t.Helper()
	l.both(t, up, down, piece)
	kept := l.clean(t)
	if l.relay.ToFar.Load() != uint64(up) || l.relay.ToNear.Load() != uint64(down) {
		t.Errorf("counted %d and %d, want %d and %d", l.relay.ToFar.Load(), l.relay.ToNear.Load(), up, down)
	}
	if up > 0 != (l.relay.FirstToFar.Load() > 0) || down > 0 != (l.relay.FirstToNear.Load() > 0) {
		t.Errorf("first bytes at %d and %d", l.relay.FirstToFar.Load(), l.relay.FirstToNear.Load())
	}
	return kept
}

func (l *link) both(t *testing.T, up, down, piece int) {
	t.Helper()
	errs := make(chan error, 4)
	go func() { errs <- pour(l.app, 1, up, piece) }()
	go func() { errs <- pour(l.peer, 2, down, piece) }()
	go func() { errs <- drink(l.peer, 1, up, piece) }()
	go func() { errs <- drink(l.app, 2, down, piece) }()
	for range 4 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
}

// What goes in comes out, whatever the sizes of writes, reads and buffers are.
func TestTransfer(t *testing.T) {
	each(t, func(t *testing.T, k kind) {
		for _, size := range []struct{ up, down, piece int }{
			{0, 0, 1}, {1, 0, 1}, {0, 1, 1}, {1000, 1000, 1}, {70_000, 300, 700}, {300, 70_000, 20_000},
			{1 << 20, 1 << 20, 40_000}, {5 << 20, 7 << 20, 300_000},
		} {
			if k.buffers > 0 {
				size.up, size.down = size.up/8, size.down/8
			}
			l := begin(t, k)
			kept := l.exchange(t, size.up, size.down, size.piece)
			if (kept != nil) != k.keep {
				t.Errorf("handed back: %v", kept)
			}
			if kept != nil {
				if err := attach(l.tunnel, kept); err != nil || !l.tunnel.Reusable() {
					t.Errorf("attached: %v, reusable %v", err, l.tunnel.Reusable())
				}
				l.tunnel.Close()
			}
		}
	})
}

// Much, with one end slower than the other, so that everything on the way is full.
func TestLargeTransfer(t *testing.T) {
	if testing.Short() {
		t.Skip("short")
	}
	for _, name := range []string{"plain", "tunnel", "framed"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			begin(t, kinds[name]).exchange(t, 64<<20, 24<<20, 1<<20)
		})
	}
}
