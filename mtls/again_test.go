package mtls

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/mtls/record"
)

// deaf is one end of a tunnel between two connections whose socket is elsewhere.
type deaf struct {
	*Conn
	fd int
	s  *Stream
	in []byte
}

// between is a tunnel whose first connection has ended, both sockets taken away.
func between(t *testing.T) (client, server *deaf) {
	t.Helper()
	c, s := framedTunnel(t)
	talk(t, c, s)
	client, server = &deaf{Conn: c}, &deaf{Conn: s}
	for _, d := range []*deaf{client, server} {
		d.fd, d.s, d.in = detach(t, d.Conn)
		t.Cleanup(func() {
			if fd := d.gone(); fd >= 0 {
				_ = unix.Close(fd)
			}
		})
	}
	return client, server
}

// gone is the descriptor, for whoever closes it.
func (d *deaf) gone() (fd int) {
	fd, d.fd = d.fd, -1
	return fd
}

func (d *deaf) write(t *testing.T, b []byte, err error) {
	t.Helper()
	if err == nil {
		_, err = unix.Write(d.fd, b)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// message waits for one.
func (d *deaf) message(t *testing.T) ([]byte, error) {
	t.Helper()
	for {
		n, m, err := d.s.Message(d.in)
		d.in = d.in[n:]
		if m != nil || err != nil {
			return m, err
		}
		more := wait(t, d.fd)
		if len(more) == 0 {
			return nil, ErrTruncated
		}
		d.in = append(d.in, more...)
	}
}

// sealed sends plain, whatever it is.
func (d *deaf) sealed(t *testing.T, plain []byte) {
	t.Helper()
	buf := make([]byte, MessageBuffer)
	for len(plain) > 0 {
		n := copy(buf[record.SlotsAt:][:record.SlotData], plain)
		b, err := d.s.w.Seal(buf, n)
		d.write(t, b, err)
		plain = plain[n:]
	}
}

// One connection after another without a socket coming back, and then one with it.
func TestAgainWithoutTheSocket(t *testing.T) {
	client, server := between(t)
	buf := make([]byte, MessageBuffer)
	for i := range 3 {
		open, _ := framed(nil)
		open.DestinationPort = uint32(1000 + i)
		b, _, err := client.SealOpen(buf, open, nil)
		client.write(t, b, err)
		m, err := server.message(t)
		got, err := server.TakeOpen(m, err)
		if err != nil || got.GetDestinationPort() != uint32(1000+i) {
			t.Fatalf("open %v, %v", got, err)
		}
		if client.Reusable() || server.Reusable() {
			t.Fatal("reusable while in use")
		}
		b, err = server.SealVerdict(buf, &symbolonv1.Verdict{Protection: encrypted, Keep: true})
		server.write(t, b, err)
		m, err = client.message(t)
		if v, err := client.TakeVerdict(m, err); err != nil || !v.GetAccept() || !v.GetKeep() {
			t.Fatalf("verdict %v, %v", v, err)
		}
		// The data phase is as ever.
		for _, d := range []*deaf{client, server} {
			n := copy(buf[record.SlotsAt+d.s.Lead():], "hello")
			b, err := d.s.Seal(buf, n)
			d.write(t, b, err)
			b, err = d.s.End(buf)
			d.write(t, b, err)
		}
		for _, d := range []*deaf{client, server} {
			var data []byte
			var end error
			for end == nil {
				n, got, err := d.s.Open(d.in, make([][]byte, 0, 4))
				d.in, end = d.in[n:], err
				data = append(data, bytes.Join(got, nil)...)
				if n == 0 && err == nil {
					d.in = append(d.in, wait(t, d.fd)...)
				}
			}
			if !errors.Is(end, io.EOF) || string(data) != "hello" {
				t.Fatalf("read %q, %v", data, end)
			}
		}
		if !client.Reusable() || !server.Reusable() {
			t.Fatal("not reusable after a clean end")
		}
	}
	for _, d := range []*deaf{client, server} {
		if err := d.Attach(d.gone(), d.s, d.in); err != nil {
			t.Fatal(err)
		}
	}
	open, _ := framed(nil)
	if err := client.Reopen(timeout(t), open); err != nil {
		t.Fatal(err)
	}
	if _, err := server.NextOpen(timeout(t)); err != nil {
		t.Fatal(err)
	}
}

// What is read of an Open on a tunnel in use is as strict as on a new one.
func TestBadOpenWithoutTheSocket(t *testing.T) {
	whole := func(o *symbolonv1.Open) []byte {
		b, err := appendMessage(nil, o)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	bad := func(change func(o *symbolonv1.Open)) []byte {
		o, _ := framed(nil)
		change(o)
		return whole(o)
	}
	for name, c := range map[string]struct {
		send []byte
		want error
	}{
		"nonsense":       {[]byte("\x00\x00\x00\x03junk"), ErrOpenMalformed},
		"too large":      {[]byte{0, 0, 0x40, 1}, ErrOpenTooLarge},
		"hugest":         {bytes.Repeat([]byte{255}, 100), ErrOpenTooLarge},
		"empty":          {[]byte{0, 0, 0, 0}, ErrVersion},
		"version":        {bad(func(o *symbolonv1.Open) { o.Version = 7 }), ErrVersion},
		"not framed":     {bad(func(o *symbolonv1.Open) { o.Framed = false }), ErrOpenMalformed},
		"weaker":         {bad(func(o *symbolonv1.Open) { o.Protection, o.Framed = authenticated, false }), ErrOpenMalformed},
		"weaker, framed": {bad(func(o *symbolonv1.Open) { o.Protection = authenticated }), ErrOpenMalformed},
		"no flow id":     {bad(func(o *symbolonv1.Open) { o.FlowId = nil }), ErrOpenMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			client, server := between(t)
			client.sealed(t, c.send)
			m, err := server.message(t)
			if _, err = server.TakeOpen(m, err); !errors.Is(err, c.want) {
				t.Fatalf("taken with %v, want %v", err, c.want)
			}
			if err := server.Attach(server.gone(), server.s, server.in); err != nil {
				t.Fatal(err)
			}
			refused := make(chan error, 1)
			go func() { refused <- server.RefuseOpen(err) }()
			m, merr := client.message(t)
			_ = unix.Close(client.gone())
			<-refused
			if _, err := client.TakeVerdict(m, merr); ReasonOf(err) != symbolonv1.Reason_REASON_PEER_REFUSED {
				t.Errorf("the client is told %v", err)
			}
		})
	}
	t.Run("nobody", func(t *testing.T) {
		_, server := between(t)
		for _, why := range []error{io.EOF, ErrTruncated, unix.ECONNRESET} {
			if _, err := server.TakeOpen(nil, why); !errors.Is(err, io.EOF) {
				t.Errorf("%v gives %v", why, err)
			}
		}
	})
}

// The client believes a verdict no more than on a new tunnel.
func TestBadVerdictWithoutTheSocket(t *testing.T) {
	for name, c := range map[string]struct {
		v    *symbolonv1.Verdict
		want symbolonv1.Reason
	}{
		"refused":    {&symbolonv1.Verdict{Reason: symbolonv1.Reason_REASON_DEFAULT}, symbolonv1.Reason_REASON_PEER_REFUSED},
		"weaker":     {&symbolonv1.Verdict{Accept: true, Protection: authenticated}, symbolonv1.Reason_REASON_PROTOCOL},
		"no such":    {&symbolonv1.Verdict{Accept: true, Protection: 77}, symbolonv1.Reason_REASON_PROTOCOL},
		"of nothing": {&symbolonv1.Verdict{Accept: true}, symbolonv1.Reason_REASON_PROTOCOL},
	} {
		t.Run(name, func(t *testing.T) {
			client, server := between(t)
			open, _ := framed(nil)
			b, _, err := client.SealOpen(make([]byte, MessageBuffer), open, nil)
			client.write(t, b, err)
			m, err := appendMessage(nil, c.v)
			if err != nil {
				t.Fatal(err)
			}
			server.sealed(t, m)
			m, err = client.message(t)
			if _, err := client.TakeVerdict(m, err); ReasonOf(err) != c.want {
				t.Errorf("taken with %v", err)
			}
			if client.Reusable() {
				t.Error("reusable")
			}
		})
	}
	client, _ := between(t)
	open, _ := asking(authenticated)(nil)
	if _, _, err := client.SealOpen(make([]byte, MessageBuffer), open, nil); !errors.Is(err, ErrOpenMalformed) {
		t.Errorf("an Open that no server takes is sealed: %v", err)
	}
}

// Two messages as large as they may be, in one go.
func TestLargestMessages(t *testing.T) {
	client, server := between(t)
	m := &symbolonv1.Verdict{Policy: string(bytes.Repeat([]byte("p"), MaxMessage-3))}
	if n := proto.Size(m); n != MaxMessage {
		t.Fatalf("the message has %d bytes", n)
	}
	for range 2 {
		b, err := client.s.sealMessage(make([]byte, MessageBuffer), m)
		client.write(t, b, err)
	}
	for range 2 {
		got, err := server.message(t)
		if err != nil || len(got) != MaxMessage {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
	}
	m.Policy += "p"
	if _, err := client.s.sealMessage(make([]byte, MessageBuffer), m); !errors.Is(err, ErrOpenTooLarge) {
		t.Errorf("sealed: %v", err)
	}
}

// FuzzStreamMessage: messages cut anywhere, over records and reads, are what a simple
// reader of the whole sees: the same messages, the same error, and the same rest.
func FuzzStreamMessage(f *testing.F) {
	f.Add([]byte{0, 0, 0, 2, 'h', 'i', 0, 0, 0, 0, 0, 0, 0, 1, 'x', 'y'}, []byte{1}, []byte{0})
	f.Add([]byte{0, 0, 0x40, 1, 'x'}, []byte{200}, []byte{255})
	f.Add(append([]byte{0, 0, 0x40, 0}, make([]byte, 0x4003)...), []byte{255, 255}, []byte{})
	f.Fuzz(func(t *testing.T, plain, records, reads []byte) {
		if len(plain) > 1<<17 {
			return
		}
		var sealed bytes.Buffer
		s, peer := madeUp(t, true, &sealed)
		for i, left := 0, plain; len(left) > 0; i++ {
			n := len(left)
			if len(records) > 0 && i < 2000 {
				n = min(n, 1+int(records[i%len(records)])*67)
			}
			if _, err := peer.Write(left[:n]); err != nil {
				t.Fatal(err)
			}
			left = left[n:]
		}
		var in []byte
		var got [][]byte
		var failed error
		for i, left := 0, sealed.Bytes(); len(left) > 0 && failed == nil; i++ {
			n := len(left)
			if len(reads) > 0 && i < 4000 {
				n = min(n, 1+int(reads[i%len(reads)])*71)
			}
			in, left = append(in, left[:n]...), left[n:]
			for {
				k, m, err := s.Message(in)
				in = append([]byte(nil), in[k:]...) // what was handed out must not be of in
				if failed = err; err != nil || m == nil {
					break
				}
				got = append(got, m)
			}
			if len(s.message) > lengthSize+MaxMessage {
				t.Fatalf("%d bytes wait", len(s.message))
			}
		}
		for _, m := range got {
			if n := int(binary.BigEndian.Uint32(plain)); n != len(m) || !bytes.Equal(plain[lengthSize:][:n], m) {
				t.Fatalf("a message of %d bytes, want %d, or others", len(m), n)
			}
			plain = plain[lengthSize+len(m):]
		}
		switch {
		case len(plain) >= lengthSize && binary.BigEndian.Uint32(plain) > MaxMessage:
			if !errors.Is(failed, ErrOpenTooLarge) {
				t.Fatalf("ends with %v", failed)
			}
		case failed != nil:
			t.Fatal(failed)
		case len(plain) >= lengthSize && len(plain)-lengthSize >= int(binary.BigEndian.Uint32(plain)):
			t.Fatal("a whole message was not handed out")
		case !bytes.Equal(append(s.message, s.plain...), plain):
			t.Fatal("the rest is another")
		}
	})
}
