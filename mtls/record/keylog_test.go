package record

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"
)

func line(label string, random [randomSize]byte, secret byte) []byte {
	return fmt.Appendf(nil, "%s %x %x\n", label, random, secretOf(secret))
}

func deliver(t *testing.T, k *KeyLog, random [randomSize]byte, secret byte) {
	t.Helper()
	for i, label := range []string{"CLIENT_HANDSHAKE_TRAFFIC_SECRET", "CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0", "EXPORTER_SECRET"} {
		l := line(label, random, secret+byte(i))
		if n, err := k.Write(l); n != len(l) || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
	}
}

func TestKeyLogRoutes(t *testing.T) {
	k := NewKeyLog(0)
	a, b := [randomSize]byte{1}, [randomSize]byte{2}
	x, y := k.expect(a), k.expect(b)
	deliver(t, k, b, 20)
	deliver(t, k, [randomSize]byte{3}, 30) // nobody's
	if _, _, ok := k.get(x); ok {
		t.Error("a has secrets that are not its own")
	}
	client, server, ok := k.get(y)
	if !ok || client[0] != 21 || server[0] != 22 {
		t.Errorf("b has %x %x", client, server)
	}
	k.forget(b, y)
	if client[0] != 0 || server[0] != 0 {
		t.Error("secrets not wiped")
	}
	if k.Len() != 1 {
		t.Errorf("%d followed, want 1", k.Len())
	}
	k.forget(a, x)
	if k.Len() != 0 {
		t.Errorf("%d followed, want none", k.Len())
	}
}

// TestKeyLogSameRandom: a handshake with the random of another, run by somebody who
// knows the secrets of their own, gives the other none of them.
func TestKeyLogSameRandom(t *testing.T) {
	random := [randomSize]byte{7}
	t.Run("at the same time", func(t *testing.T) {
		k := NewKeyLog(0)
		victim := k.expect(random)
		if _, err := k.Write(line("CLIENT_TRAFFIC_SECRET_0", random, 1)); err != nil {
			t.Fatal(err)
		}
		attacker := k.expect(random)
		deliver(t, k, random, 66)
		for name, s := range map[string]*secrets{"victim": victim, "attacker": attacker} {
			if client, server, ok := k.get(s); ok {
				t.Errorf("%s has %x %x", name, client, server)
			}
		}
		k.forget(random, attacker)
		deliver(t, k, random, 66) // late lines
		if _, _, ok := k.get(victim); ok {
			t.Error("victim has secrets after the attacker left")
		}
		k.forget(random, victim)
		if k.Len() != 0 {
			t.Errorf("%d followed", k.Len())
		}
	})
	t.Run("after the victim's", func(t *testing.T) {
		k := NewKeyLog(0)
		victim := k.expect(random)
		deliver(t, k, random, 1)
		attacker := k.expect(random)
		deliver(t, k, random, 66)
		if client, server, ok := k.get(victim); !ok || client[0] != 2 || server[0] != 3 {
			t.Errorf("victim has %x %x %v", client, server, ok)
		}
		k.forget(random, victim)
		if client, _, ok := k.get(attacker); !ok || client[0] != 67 {
			t.Errorf("attacker has %x %v", client, ok)
		}
		k.forget(random, attacker)
		if k.Len() != 0 {
			t.Errorf("%d followed", k.Len())
		}
	})
}

func TestKeyLogBounded(t *testing.T) {
	k := NewKeyLog(2)
	a, b := k.expect([randomSize]byte{1}), k.expect([randomSize]byte{2})
	if c := k.expect([randomSize]byte{3}); a == nil || b == nil || c != nil {
		t.Errorf("%p %p %p, want two", a, b, c)
	}
	k.forget([randomSize]byte{1}, a)
	if k.expect([randomSize]byte{3}) == nil {
		t.Error("no room after one has gone")
	}
}

func TestKeyLogIgnoresNonsense(t *testing.T) {
	k := NewKeyLog(0)
	s := k.expect([randomSize]byte{})
	for _, l := range []string{
		"", "\n", " ", "CLIENT_TRAFFIC_SECRET_0", "CLIENT_TRAFFIC_SECRET_0 00", "CLIENT_TRAFFIC_SECRET_0  ",
		fmt.Sprintf("CLIENT_TRAFFIC_SECRET_0 %064x zz", 0), fmt.Sprintf("CLIENT_TRAFFIC_SECRET_0 %64s 00", "z"),
	} {
		if n, err := k.Write([]byte(l)); n != len(l) || err != nil {
			t.Errorf("%q: %d, %v", l, n, err)
		}
	}
	if _, _, ok := k.get(s); ok || s.client != nil {
		t.Error("secrets out of nothing")
	}
}

// TestConcurrentHandshakes share the two key logs, and each finds its own secrets.
func TestConcurrentHandshakes(t *testing.T) {
	p := newParties()
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			a, b := p.handshake(t)
			exchange(t, a.take(t), b.take(t), 10_000)
		})
	}
	wg.Wait()
	if n := p.clientLog.Len() + p.serverLog.Len(); n != 0 {
		t.Errorf("%d handshakes still followed", n)
	}
}

// TestNoSecretsGoesOn: where the secrets are not certain, crypto/tls carries on.
func TestNoSecretsGoesOn(t *testing.T) {
	p := newParties()
	p.serverLog = NewKeyLog(1)
	p.server.KeyLogWriter = p.serverLog
	p.serverLog.expect([randomSize]byte{1}) // full
	x, y := tcpPair(t)
	a, b := &end{tap: NewTap(x, p.clientLog)}, &end{tap: NewTap(y, p.serverLog)}
	a.tls, b.tls = tls.Client(a.tap, p.client), tls.Server(b.tap, p.server)
	both(t, a.tls.Handshake, b.tls.Handshake)
	if err := b.tap.Established(b.tls.ConnectionState()); !errors.Is(err, ErrNoSecrets) {
		t.Errorf("Established: %v", err)
	}
	if _, err := b.tap.Take(b.tls); !errors.Is(err, ErrNoSecrets) {
		t.Errorf("Take: %v", err)
	}
	b.tap.Loosen()
	if err := a.tap.Established(a.tls.ConnectionState()); err != nil {
		t.Fatal(err)
	}
	exchange(t, a.take(t), b.tls, 1_000_000)
}

// TestTapHeldBack: once it is told, reads never go beyond the record, so that bytes in the
// clear behind it stay in the kernel.
func TestTapHeldBack(t *testing.T) {
	a, b := newParties().handshake(t)
	a.tap.Precise() // the server's ticket may have been read by now
	if _, err := b.tls.Write([]byte("verdict")); err != nil {
		t.Fatal(err)
	}
	if _, err := b.tcp.Write([]byte("in the clear")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	if n, err := a.tls.Read(buf); err != nil || string(buf[:n]) != "verdict" {
		t.Fatalf("%q, %v", buf[:n], err)
	}
	if _, err := io.ReadFull(a.tcp, buf[:12]); err != nil || string(buf[:12]) != "in the clear" {
		t.Errorf("%q, %v", buf[:12], err)
	}
}

// TestTapReadsAhead: what has come with the handshake's last bytes is the Reader's.
func TestTapReadsAhead(t *testing.T) {
	p := newParties()
	x, y := tcpPair(t)
	a, b := &end{tap: NewTap(x, p.clientLog), tcp: x}, &end{tap: NewTap(y, p.serverLog), tcp: y}
	a.tls, b.tls = tls.Client(a.tap, p.client), tls.Server(b.tap, p.server)
	a.tap.Cork() // and all of it is one packet
	served := make(chan error, 1)
	go func() { served <- b.tls.Handshake() }()
	err := a.tls.Handshake()
	if err == nil {
		err = a.tap.Established(a.tls.ConnectionState())
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []string{"open", "early", "and more"} { // a record each
		if _, err := a.tls.Write([]byte(m)); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case err := <-served:
		t.Fatalf("the server's handshake is over before Uncork: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	if err := a.tap.Uncork(); err != nil {
		t.Fatal(err)
	}
	if err := <-served; err != nil {
		t.Fatal(err)
	}
	if err := b.tap.Established(b.tls.ConnectionState()); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	if n, err := b.tls.Read(buf); err != nil || string(buf[:n]) != "open" {
		t.Fatalf("%q, %v", buf[:n], err)
	}
	if b.tap.Ahead() == 0 {
		t.Error("nothing was read ahead")
	}
	c := b.take(t)
	if b.tap.Ahead() != 0 {
		t.Error("the Reader has not taken over what was read ahead")
	}
	if _, err := io.ReadFull(c, buf[:13]); err != nil || string(buf[:13]) != "earlyand more" {
		t.Errorf("%q, %v", buf[:13], err)
	}
	exchange(t, a.take(t), c, 100_000)
}

// TestCorkedHandshakeCannotHang: what is kept back leaves before an answer is waited for.
func TestCorkedHandshakeCannotHang(t *testing.T) {
	p := newParties()
	x, y := tcpPair(t)
	a, b := &end{tap: NewTap(x, p.clientLog), tcp: x}, &end{tap: NewTap(y, p.serverLog), tcp: y}
	a.tls, b.tls = tls.Client(a.tap, p.client), tls.Server(b.tap, p.server)
	a.tap.Cork()
	both(t, func() error {
		if err := a.tls.Handshake(); err != nil {
			return err
		}
		_, err := io.ReadFull(a.tls, make([]byte, 5))
		return err
	}, func() error {
		if err := b.tls.Handshake(); err != nil {
			return err
		}
		_, err := b.tls.Write([]byte("hello"))
		return err
	})
}

// TestTapTruncated: crypto/tls learns of a FIN without close_notify.
func TestTapTruncated(t *testing.T) {
	a, b := newParties().handshake(t)
	if err := b.tcp.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := a.tls.Read(make([]byte, 1)); !errors.Is(err, ErrTruncated) {
		t.Errorf("error %v, want ErrTruncated", err)
	}
}

// TestTakeInsideARecord is refused: half of it is in crypto/tls.
func TestTakeInsideARecord(t *testing.T) {
	a, b := newParties().handshake(t)
	if _, err := b.tcp.Write(header(typeApplicationData, 0x0303, 60)[:30]); err != nil {
		t.Fatal(err)
	}
	if err := a.tcp.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := a.tls.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	if _, err := a.tap.Take(a.tls); !errors.Is(err, ErrNoSecrets) {
		t.Errorf("error %v, want ErrNoSecrets", err)
	}
}

// TestStrangersAtTheTap: whatever a client sends first, nothing is followed that is
// not a ClientHello, and Release leaves nothing behind.
func TestStrangersAtTheTap(t *testing.T) {
	hello := make([]byte, 200)
	copy(hello, []byte{typeHandshake, 3, 1, 0, 195, helloClient, 0, 0, 191, 3, 3})
	short := append([]byte{}, hello...)
	short[4] = 20 // the random is not in this record
	for name, test := range map[string]struct {
		sent []byte
		want int
	}{
		"hello":          {hello, 1},
		"http":           {[]byte("GET / HTTP/1.1\r\nHost: a.very.long.name.example\r\n\r\n"), 0},
		"short record":   {short, 0},
		"few bytes":      {hello[:20], 0},
		"other message":  {append([]byte{22, 3, 1, 0, 195, 2}, hello[6:]...), 0},
		"data, not text": {append([]byte{23}, hello[1:]...), 0},
	} {
		t.Run(name, func(t *testing.T) {
			k := NewKeyLog(0)
			x, y := net.Pipe()
			tap := NewTap(y, k)
			go func() {
				_, _ = x.Write(test.sent)
				x.Close()
			}()
			_, _ = io.Copy(io.Discard, struct{ io.Reader }{tap})
			if k.Len() != test.want {
				t.Errorf("%d followed, want %d", k.Len(), test.want)
			}
			tap.Release()
			tap.Release()
			if k.Len() != 0 {
				t.Errorf("%d followed after Release", k.Len())
			}
		})
	}
}

// TestFIPS: in FIPS 140 mode the package leaves the connection to crypto/tls.
func TestFIPS(t *testing.T) {
	if os.Getenv("RECORD_TEST_FIPS") == "" {
		program, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		command := exec.Command(program, "-test.run=^TestFIPS$", "-test.v")
		command.Env = append(os.Environ(), "RECORD_TEST_FIPS=1", "GODEBUG=fips140=on")
		out, err := command.CombinedOutput()
		if err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	a, b := newParties().handshake(t)
	if _, err := a.tap.Take(a.tls); !errors.Is(err, ErrFIPS) {
		t.Errorf("error %v, want ErrFIPS", err)
	}
	both(t, func() error { _, err := a.tls.Write([]byte("x")); return err },
		func() error { _, err := b.tls.Read(make([]byte, 1)); return err })
}
