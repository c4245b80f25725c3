package record

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"os"
	"sync"
	"testing"
	"time"
)

// timesOut reads once with nothing to come, and lets the reader go on later.
func timesOut(t *testing.T, c *Conn, set func(time.Time) error) {
	t.Helper()
	if err := set(time.Now().Add(20 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Next(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("error %v, want a timeout", err)
	}
	if err := set(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
}

// TestIdleHoldsNoBuffer: a connection at rest has no buffer, one inside a small
// record a small one, and one that has ended none.
func TestIdleHoldsNoBuffer(t *testing.T) {
	client, server, a, b := linked(t, nil)
	size := func() int {
		if client.buf == nil {
			return 0
		}
		return len(client.buf.data)
	}
	step := func(what string, want int) {
		t.Helper()
		if got := size(); got != want {
			t.Errorf("%s: buffer of %d bytes, want %d", what, got, want)
		}
	}
	step("new", 0)
	timesOut(t, client, a.SetReadDeadline)
	step("nothing came", 0)
	if _, err := server.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	for n := 0; n < 1<<20; {
		p, err := client.Next()
		if err != nil {
			t.Fatal(err)
		}
		n += len(p)
	}
	timesOut(t, client, a.SetReadDeadline)
	step("after a megabyte", 0)
	if _, err := server.Write([]byte("request")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(client.Reader, make([]byte, 7)); err != nil {
		t.Fatal(err)
	}
	step("after Read, before the next", 0)
	p := newState(t, secretOf(1))
	p.sequence = server.Writer.state.sequence
	record := sealed(t, p, typeApplicationData, []byte("slow"), 0)
	server.Writer.state.sequence++
	if _, err := b.Write(record[:10]); err != nil {
		t.Fatal(err)
	}
	timesOut(t, client, a.SetReadDeadline)
	step("inside a record", smallSize)
	if _, err := b.Write(record[10:]); err != nil {
		t.Fatal(err)
	}
	if got, err := client.Next(); err != nil || string(got) != "slow" {
		t.Fatalf("%q, %v", got, err)
	}
	timesOut(t, client, a.SetReadDeadline)
	step("after it", 0)
	if err := server.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Next(); err != io.EOF { //nolint:errorlint // exactly this
		t.Fatal(err)
	}
	step("after the end", 0)
}

// TestNoAllocations in steady state, by either way of writing and reading.
func TestNoAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes sync.Pool forget")
	}
	client, server, _, _ := linked(t, nil)
	near, app := tcpPair(t)
	far, sink := tcpPair(t)
	source, err := NewSource(near)
	if err != nil {
		t.Fatal(err)
	}
	chunk, buf := make([]byte, 50_000), make([]byte, 1<<20)
	check := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, f := range map[string]func(){
		"Write and Read": func() {
			_, err := client.Write(chunk)
			check(err)
			_, err = io.ReadFull(server.Reader, buf[:len(chunk)])
			check(err)
		},
		"SendFrom and ReceiveTo": func() {
			_, err := app.Write(chunk)
			check(err)
			for n := 0; n < len(chunk); {
				k, err := client.SendFrom(source)
				check(err)
				n += k
			}
			for n := 0; n < len(chunk); {
				k, err := server.ReceiveTo(far)
				check(err)
				n += k
			}
			_, err = io.ReadFull(sink, buf[:len(chunk)])
			check(err)
		},
	} {
		// A garbage collection in between may empty the pools.
		if n := testing.AllocsPerRun(200, f); n >= 1 {
			t.Errorf("%s: %v allocations a run", name, n)
		}
	}
}

// TestRelay: bytes of one TCP connection arrive in another through the paths that
// copy nothing, half-close passed on, and the deadlines of the ends apply.
func TestRelay(t *testing.T) {
	client, server, _, _ := linked(t, func(c *Config) { c.Limit = 50 })
	app, near := tcpPair(t)
	far, sink := tcpPair(t)
	want := noise(5, 20<<20)
	var wg sync.WaitGroup
	run := func(name string, f func() error) {
		wg.Go(func() {
			if err := f(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	run("app", func() error {
		_, err := app.Write(want)
		return errors.Join(err, app.CloseWrite())
	})
	run("client proxy", func() error {
		_, err := io.Copy(client.Writer, near)
		return errors.Join(err, client.CloseWrite())
	})
	run("server proxy", func() error {
		_, err := io.Copy(far, server.Reader)
		return errors.Join(err, far.CloseWrite())
	})
	got, err := io.ReadAll(sink)
	wg.Wait()
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d of %d bytes, %v", len(got), len(want), err)
	}
	source, err := NewSource(near)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := server.SendFrom(source); n != 0 || err != io.EOF { //nolint:errorlint // exactly this
		t.Errorf("after the end: %d, %v", n, err)
	}
	source, err = NewSource(app)
	if err != nil {
		t.Fatal(err)
	}
	if err := app.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := server.SendFrom(source); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("past the deadline: %d, %v", n, err)
	}
}

// TestSameRandomAttack: somebody who has seen a ClientHello runs a handshake of
// their own with its random, at the same time, against the same server. Neither
// connection is taken over, with whichever secrets; both go on under crypto/tls.
func TestSameRandomAttack(t *testing.T) {
	server := newParties()
	var arrived sync.WaitGroup
	arrived.Add(2)
	server.server.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		arrived.Done()
		arrived.Wait() // both ClientHellos are here, and no secrets yet
		return nil, nil
	}
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			client := newParties()
			client.client.Rand = sameRandom{}
			x, y := tcpPair(t)
			tap := NewTap(y, server.serverLog)
			defer tap.Release()
			a, b := tls.Client(x, client.client), tls.Server(tap, server.server)
			done := make(chan error, 1)
			go func() { done <- a.Handshake() }()
			if err := errors.Join(b.Handshake(), <-done); err != nil {
				t.Error(err)
				return
			}
			if want := ([randomSize]byte(bytes.Repeat([]byte{42}, randomSize))); tap.random != want {
				t.Errorf("client random %x: this test attacks nothing", tap.random)
			}
			if err := tap.Established(b.ConnectionState()); !errors.Is(err, ErrNoSecrets) {
				t.Errorf("Established: %v, want ErrNoSecrets", err)
			}
			if _, err := tap.Take(b); !errors.Is(err, ErrNoSecrets) {
				t.Errorf("Take: %v, want ErrNoSecrets", err)
			}
			go func() {
				_, err := a.Write([]byte("x"))
				done <- err
			}()
			if _, err := b.Read(make([]byte, 1)); err != nil {
				t.Errorf("crypto/tls goes on: %v", err)
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := server.serverLog.Len(); n != 0 {
		t.Errorf("%d handshakes still followed", n)
	}
}

// sameRandom is the randomness of a client who chooses its random.
type sameRandom struct{}

func (sameRandom) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 42
	}
	return len(p), nil
}

// TestRestDropsCiphers: a direction that has had no record since the last rest has no
// cipher, and the next record is none the worse for it, also after a key update, and the
// number of the record goes on.
func TestRestDropsCiphers(t *testing.T) {
	client, server, _, _ := linked(t, nil)
	say := func(what string) {
		t.Helper()
		if _, err := server.Write([]byte(what)); err != nil {
			t.Fatal(err)
		}
		if p, err := client.Next(); err != nil || string(p) != what {
			t.Fatalf("read %q, %v", p, err)
		}
	}
	for i, step := range []struct {
		do   func()
		warm bool
	}{
		{func() { say("one") }, true},
		{func() {}, false},
		{func() {}, false},
		{func() { say("two") }, true},
		{func() { say("three") }, true},
		{func() {}, false},
		{func() { server.answer.Store(true); say("with a key update before it") }, true},
		{func() { say("and after it") }, true},
		{func() {}, false},
		{func() { say("end") }, true},
	} {
		step.do()
		if w, r := server.Writer.Rest(), client.Reader.Rest(); w != step.warm || r != step.warm {
			t.Errorf("step %d: writer warm %v, reader %v, want %v", i, w, r, step.warm)
		}
		if (server.Writer.state.aead != nil) != step.warm || (client.Reader.state.aead != nil) != step.warm {
			t.Errorf("step %d: ciphers are there, or not, against what was said", i)
		}
	}
	if n := server.Writer.state.sequence; n != 3 {
		t.Errorf("the next record has number %d, want 3 since the key update", n)
	}
}

// TestRestedIsNotRevived: what was wiped stays so.
func TestRestedIsNotRevived(t *testing.T) {
	client, server, _, _ := linked(t, nil)
	server.Writer.Rest()
	server.Writer.state.wipe()
	if _, err := server.Write([]byte("x")); !errors.Is(err, ErrReleased) {
		t.Errorf("written after the end: %v", err)
	}
	client.Reader.Rest()
	client.Reader.state.wipe()
	if _, err := client.Reader.state.open(nil, make([]byte, headerSize+tagSize)); !errors.Is(err, ErrReleased) {
		t.Errorf("read after the end: %v", err)
	}
}
