package loop

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/mtls/record"
)

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// say writes and holds that the other side reads it.
func say(t *testing.T, from io.Writer, to io.Reader, what string) {
	t.Helper()
	if _, err := io.WriteString(from, what); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, len(what))
	if _, err := io.ReadFull(to, b); err != nil || string(b) != what {
		t.Fatalf("read %q, %v; want %q", b, err, what)
	}
}

// Either side may end its direction first; the other goes on as long as it likes.
func TestHalfClose(t *testing.T) {
	each(t, func(t *testing.T, k kind) {
		for _, appFirst := range []bool{true, false} {
			l := begin(t, k)
			a, b := conn(l.app), l.peer
			if !appFirst {
				a, b = b, a
			}
			say(t, a, b, "ping")
			say(t, b, a, "pong")
			if err := a.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if _, err := b.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Fatalf("the end arrives as %v", err)
			}
			eventually(t, "half closed", l.relay.HalfClosed)
			for range 3 {
				say(t, b, a, "more")
			}
			go func() { _ = pour(b, 3, 300_000, 9_000) }()
			if err := drink(a, 3, 300_000, 5_000); err != nil {
				t.Error(err)
			}
			kept := l.clean(t)
			if kept != nil {
				kept.Close()
			}
			if sum := l.relay.ToFar.Load() + l.relay.ToNear.Load(); sum != 300_000+8+12 {
				t.Errorf("counted %d", sum)
			}
		}
	})
}

// A reset of either side resets the other: at rest, behind data, and after the other's
// or its own direction has ended.
func TestReset(t *testing.T) {
	each(t, func(t *testing.T, k kind) {
		for name, before := range map[string]func(a, b conn){
			"at rest":                 func(_, _ conn) {},
			"behind data":             func(a, _ conn) { _, _ = a.Write(make([]byte, 3000)) },
			"behind the other's end":  func(a, b conn) { _ = b.CloseWrite(); _, _ = a.Read(make([]byte, 1)) },
			"behind data not read":    func(_, b conn) { _, _ = b.Write(make([]byte, 3000)) },
			"with data on both sides": func(a, b conn) { _, _ = a.Write(make([]byte, 3000)); _, _ = b.Write(make([]byte, 3000)) },
		} {
			for _, fromApp := range []bool{true, false} {
				l := begin(t, k)
				a, b := conn(l.app), l.peer
				if !fromApp {
					a, b = b, a
				}
				before(a, b)
				_ = a.Reset()
				if e := l.ended(t); !isReset(e.err) || e.kept != nil {
					t.Errorf("%s, from the application %v: ends with %v, handed back %v", name, fromApp, e.err, e.kept)
				}
				if _, err := io.Copy(io.Discard, struct{ io.Reader }{b}); !isReset(err) {
					t.Errorf("%s, from the application %v: the other side reads %v", name, fromApp, err)
				}
			}
		}
	})
}

// An end of TCP is none of a tunnel's data phase, wherever it comes.
func TestTruncation(t *testing.T) {
	for _, framed := range []bool{false, true} {
		data := []byte("hello")
		whole := data
		if framed {
			whole = frame(data)
		}
		for name, cut := range map[string]func(f *forger) []byte{
			"nothing":              func(*forger) []byte { return nil },
			"between two records":  func(f *forger) []byte { return f.seal(t, whole) },
			"in a record's header": func(f *forger) []byte { return append(f.seal(t, whole), f.seal(t, whole)[:3]...) },
			"in a record":          func(f *forger) []byte { return append(f.seal(t, whole), f.seal(t, whole)[:20]...) },
			"in a frame":           func(f *forger) []byte { return f.seal(t, []byte{0, 0, 0, 9, 'h', 'e', 'l'}) },
			"in a frame's length":  func(f *forger) []byte { return append(f.seal(t, whole), f.seal(t, []byte{0, 0})...) },
			"close_notify framed":  func(f *forger) []byte { return append(f.seal(t, whole), f.closeNotify(t)...) },
		} {
			if !framed && (name == "in a frame" || name == "in a frame's length" || name == "close_notify framed") {
				continue
			}
			l, f := forgedLink(t, framed)
			start(t, 1).Add(l.relay)
			f.send(t, cut(f))
			_ = f.wire.TCPConn.CloseWrite()
			if e := l.ended(t); !errors.Is(e.err, mtls.ErrTruncated) || e.kept != nil {
				t.Errorf("framed %v, cut off %s: ends with %v", framed, name, e.err)
			}
			if got, err := io.ReadAll(l.app); !isReset(err) {
				t.Errorf("framed %v, cut off %s: the application reads %q, %v", framed, name, got, err)
			}
		}
	}
}

// What breaks the protocol ends both sides with a reset, and not a byte of it arrives.
func TestBadRecords(t *testing.T) {
	for name, c := range map[string]struct {
		framed bool
		make   func(f *forger) []byte
		want   error // nil: a record.ProtocolError
	}{
		"a bit changed": {make: func(f *forger) []byte {
			b := f.seal(t, []byte("secret"))
			b[len(b)-1] ^= 1
			return b
		}},
		"out of order":     {make: func(f *forger) []byte { f.seal(t, []byte("a")); return f.seal(t, []byte("secret")) }},
		"not encrypted":    {make: func(*forger) []byte { return []byte{21, 3, 3, 0, 2, 1, 0} }},
		"too long":         {make: func(*forger) []byte { return []byte{23, 3, 3, 0xff, 0xff} }},
		"no TLS":           {make: func(*forger) []byte { return []byte("GET / HTTP/1.1\r\n") }},
		"a huge frame":     {true, func(f *forger) []byte { return f.seal(t, binary.BigEndian.AppendUint32(nil, 1<<20+1)) }, mtls.ErrProtocol},
		"a hugest frame":   {true, func(f *forger) []byte { return f.seal(t, bytes.Repeat([]byte{255}, 100)) }, mtls.ErrProtocol},
		"empty, framed":    {true, func(*forger) []byte { return []byte{23, 3, 3, 0, 0} }, nil},
		"too many of none": {make: func(f *forger) []byte { return bytes.Repeat([]byte{23, 3, 3, 0, 17}, 200) }},
	} {
		l, f := forgedLink(t, c.framed)
		start(t, 1).Add(l.relay)
		f.send(t, c.make(f))
		e := l.ended(t)
		var protocol *record.ProtocolError
		if c.want != nil && !errors.Is(e.err, c.want) || c.want == nil && !errors.As(e.err, &protocol) {
			t.Errorf("%s: ends with %v", name, e.err)
		}
		if got, err := io.ReadAll(l.app); !isReset(err) || len(got) > 0 {
			t.Errorf("%s: the application reads %q, %v", name, got, err)
		}
	}
}

// A thousand frames of a byte each in one record, the end in the middle of another,
// and data behind it, which is not the application's.
func TestSmallFrames(t *testing.T) {
	l, f := forgedLink(t, true)
	start(t, 1).Add(l.relay)
	want := bytes.Repeat([]byte("x"), 3000)
	var plain []byte
	for _, b := range want {
		plain = append(plain, frame([]byte{b})...)
	}
	plain = append(append(plain, frame(nil)...), frame([]byte("secret"))...)
	sealed := f.seal(t, plain)
	next := f.seal(t, append(frame(nil), "what follows"...))
	f.send(t, append(bytes.Clone(sealed), next...))
	if got, err := io.ReadAll(l.app); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %q, %v", got, err)
	}
	_ = l.app.CloseWrite()
	kept := l.clean(t)
	if kept == nil {
		t.Fatal("not handed back")
	}
	defer kept.Close()
	if n := l.relay.ToFar.Load() + l.relay.ToNear.Load(); n != uint64(len(want)) {
		t.Errorf("counted %d", n)
	}
}

// The urgent byte keeps its place, wherever it stands and however the bytes travel.
func TestUrgentData(t *testing.T) {
	each(t, func(t *testing.T, k kind) {
		if k.buffers > 0 {
			return
		}
		for _, bulk := range []int{0, 1, 2 << 20} {
			l := begin(t, k)
			go func() {
				_, _ = l.app.Write(make([]byte, bulk))
				for range 5 {
					urgent(t, l.app, "!")
					_, _ = io.WriteString(l.app, "AB")
					urgent(t, l.app, "CD?")
					urgent(t, l.app, "#")
				}
				_, _ = l.app.Write(make([]byte, bulk))
				urgent(t, l.app, "$")
				_ = l.app.CloseWrite()
			}()
			want := append(append(make([]byte, bulk), bytes.Repeat([]byte("!ABCD?#"), 5)...), append(make([]byte, bulk), '$')...)
			if got, err := io.ReadAll(l.peer); err != nil || !bytes.Equal(got, want) {
				t.Errorf("behind %d bytes: read %d bytes, want %d, %v", bulk, len(got), len(want), err)
			}
			_ = l.peer.CloseWrite()
			if kept := l.clean(t); kept != nil {
				kept.Close()
			}
		}
	})
}

func urgent(t testing.TB, c wire, b string) {
	raw, err := c.SyscallConn()
	if err == nil {
		_ = raw.Write(func(fd uintptr) bool {
			err = unix.Sendto(int(fd), []byte(b), unix.MSG_OOB, nil)
			return !errors.Is(err, unix.EAGAIN)
		})
	}
	if err != nil {
		t.Error(err)
	}
}

// What an application says before it closes, and that it has closed, is one segment.
func TestLastWordsAndEndGoTogether(t *testing.T) {
	for name, k := range map[string]kind{"tunnel": {tunnel: true}, "framed": {tunnel: true, framed: true}} {
		t.Run(name, func(t *testing.T) {
			l := newLink(t, k)
			segments := func() uint32 {
				t.Helper()
				info, err := unix.GetsockoptTCPInfo(l.far.FD, unix.IPPROTO_TCP, unix.TCP_INFO)
				if err != nil {
					t.Fatal(err)
				}
				return info.Data_segs_out
			}
			before := segments()
			if _, err := l.app.Write([]byte("bye")); err != nil {
				t.Fatal(err)
			}
			if err := l.app.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "both have arrived", func() bool {
				p := []unix.PollFd{{Fd: int32(l.near.FD), Events: unix.POLLIN | unix.POLLRDHUP}}
				n, err := unix.Poll(p, 0)
				return err == nil && n == 1 && p[0].Revents&unix.POLLRDHUP != 0
			})
			start(t, 1).Add(l.relay)
			if b, err := io.ReadAll(l.peer); err != nil || string(b) != "bye" {
				t.Fatalf("read %q, %v", b, err)
			}
			if n := segments() - before; n != 1 {
				t.Errorf("%d segments, want 1", n)
			}
			if n := l.relay.ToFar.Load(); n != 3 {
				t.Errorf("counted %d bytes", n)
			}
		})
	}
}
