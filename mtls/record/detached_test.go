package record

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"testing"
)

// slotted puts p into the slots of a buffer for Seal.
func slotted(p []byte) (buf []byte) {
	n := (len(p) + SlotData - 1) / SlotData
	buf = make([]byte, SealBuffer(max(n, 1)))
	for i := range n {
		copy(buf[SlotsAt+i*SlotStride:][:SlotData], p[i*SlotData:])
	}
	return buf
}

// openAll opens what b holds, and returns what is left of it.
func openAll(r *Reader, b []byte) (data, rest []byte, err error) {
	for {
		p, n, err := r.Open(b)
		data = append(data, p...)
		b = b[n:]
		if err != nil || n == 0 {
			return data, b, err
		}
	}
}

// Seal and Write, and Open and Read, make and take the same records.
func TestSealIsWrite(t *testing.T) {
	for _, size := range []int{1, 2, 100, SlotData - 1, SlotData, SlotData + 1, 3 * SlotData, 8*SlotData - 4, MaxSlots * SlotData} {
		config := Config{Suite: tls.TLS_AES_256_GCM_SHA384, WriteSecret: secretOf(1), ReadSecret: secretOf(1)}
		wrote := &memory{}
		a, err := NewWriter(wrote, config)
		if err != nil {
			t.Fatal(err)
		}
		b, err := NewWriter(io.Discard, config)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Detach(io.Discard); err != nil {
			t.Fatal(err)
		}
		data := noise(1, size)
		if _, err := a.Write(data); err != nil {
			t.Fatal(err)
		}
		buf := slotted(data)
		sealed, err := b.Seal(buf, size)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(sealed, wrote.out.Bytes()) {
			t.Errorf("%d bytes: Seal and Write differ", size)
		}
		if len(sealed) > 0 && &sealed[0] != &buf[keyUpdateRecord] {
			t.Errorf("%d bytes: not sealed in place", size)
		}
		if err := a.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		end, err := b.SealEnd(make([]byte, SealBuffer(1)))
		if err != nil || !bytes.HasSuffix(wrote.out.Bytes(), end) {
			t.Errorf("SealEnd and CloseWrite differ: %v", err)
		}
		if _, err := b.Seal(buf, 1); !errors.Is(err, ErrClosed) {
			t.Errorf("sealed behind the end: %v", err)
		}

		r, err := NewReader(nil, config, b)
		if err != nil {
			t.Fatal(err)
		}
		// A byte at a time, the reader keeps nothing but its state.
		var in, got []byte
		for i, c := range wrote.out.Bytes() {
			in = append(in, c)
			data, n, err := r.Open(in)
			got, in = append(got, data...), in[n:]
			last := i == wrote.out.Len()-1
			if last != errors.Is(err, io.EOF) || !last && err != nil {
				t.Fatalf("byte %d: %v", i, err)
			}
		}
		if !bytes.Equal(got, data) || r.buf != nil {
			t.Errorf("%d bytes opened, want %d; buffer held: %v", len(got), len(data), r.buf != nil)
		}
		if _, n, err := r.Open(sealed); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("opened behind the end: %v", err)
		}
	}
}

// Both directions through this package without I/O, crypto/tls at the other end; with
// what was read before, and back again.
func TestDetachedAgainstStock(t *testing.T) {
	for _, side := range []string{"client", "server"} {
		t.Run(side, func(t *testing.T) {
			a, b := newParties().handshake(t)
			if side == "server" {
				a, b = b, a
			}
			c, stock := a.take(t), b.tls
			data := noise(2, 100_000)

			// Something is read, and not handed out, when the caller takes over.
			if _, err := stock.Write(data[:5000]); err != nil {
				t.Fatal(err)
			}
			first := make([]byte, 10)
			if _, err := io.ReadFull(c, first); err != nil {
				t.Fatal(err)
			}
			if n := c.Buffered(); n < 4990 {
				t.Errorf("%d bytes buffered", n)
			}
			plain, in := c.Reader.Detach()
			if err := c.Writer.Detach(io.Discard); err != nil {
				t.Fatal(err)
			}
			if c.Buffered() != 0 || c.buf != nil {
				t.Error("a detached reader holds bytes")
			}
			got := append(first, plain...)
			go func() { _, _ = stock.Write(data[5000:]) }()
			for len(got) < len(data) {
				p, rest, err := openAll(c.Reader, in)
				if err != nil {
					t.Fatal(err)
				}
				got, in = append(got, p...), bytes.Clone(rest)
				if len(got) < len(data) {
					b := make([]byte, 7001)
					n, err := a.tcp.Read(b)
					if err != nil {
						t.Fatal(err)
					}
					in = append(in, b[:n]...)
				}
			}
			if !bytes.Equal(got, data) {
				t.Fatal("other bytes")
			}
			sealed, err := c.Seal(slotted(data), len(data))
			if err == nil {
				_, err = a.tcp.Write(sealed)
			}
			if err != nil {
				t.Fatal(err)
			}
			back := make([]byte, len(data))
			if _, err := io.ReadFull(stock, back); err != nil || !bytes.Equal(back, data) {
				t.Fatalf("crypto/tls reads %v, or other bytes", err)
			}

			c.Reader.Attach(a.tcp, nil, in)
			if err := c.Writer.Attach(a.tcp); err != nil {
				t.Fatal(err)
			}
			exchange(t, c, stock, 300_000)
		})
	}
}

// Attach takes as much as there is: plaintext first, then records, even if they are
// more than a Reader would have read by itself.
func TestAttachMuch(t *testing.T) {
	config := Config{Suite: tls.TLS_AES_256_GCM_SHA384, WriteSecret: secretOf(1), ReadSecret: secretOf(1)}
	out := &memory{}
	w, err := NewWriter(out, config)
	if err != nil {
		t.Fatal(err)
	}
	data := noise(3, 300_000)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	for _, cut := range []int{0, 1, 4, 5, 4000, 4096, 4097, largeSize, largeSize + 1, 200_000, out.out.Len()} {
		r, err := NewReader(nil, config, w)
		if err != nil {
			t.Fatal(err)
		}
		sealed := bytes.Clone(out.out.Bytes())
		r.Attach(&crumbs{stream: sealed[cut:], script: []byte{3, 200}}, []byte("before"), sealed[:cut])
		got, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(got, append([]byte("before"), data...)) {
			t.Errorf("%d bytes attached: read %d, %v", cut, len(got), err)
		}
		if r.buf != nil {
			t.Errorf("%d bytes attached: buffer held", cut)
		}
	}
}

// A key's limit holds for Seal: the KeyUpdate comes in time, in front of the batch,
// and no key is used for more.
func TestSealLimit(t *testing.T) {
	if w, err := NewWriter(io.Discard, Config{Suite: tls.TLS_AES_256_GCM_SHA384, WriteSecret: secretOf(1), Limit: 2*MaxSlots - 1}); err != nil {
		t.Fatal(err)
	} else if err := w.Detach(io.Discard); !errors.Is(err, ErrConfig) {
		t.Errorf("detached with a limit below two batches: %v", err)
	}
	for _, batch := range []int{1, 3, 7, MaxSlots} {
		t.Run(fmt.Sprint(batch), func(t *testing.T) {
			config := Config{Suite: tls.TLS_AES_256_GCM_SHA384, WriteSecret: secretOf(1), ReadSecret: secretOf(1), Limit: 2 * MaxSlots}
			w, err := NewWriter(io.Discard, config)
			if err != nil {
				t.Fatal(err)
			}
			if err := w.Detach(io.Discard); err != nil {
				t.Fatal(err)
			}
			r, err := NewReader(nil, config, w)
			if err != nil {
				t.Fatal(err)
			}
			updates, last := 0, bytes.Clone(w.state.secret)
			data := noise(5, batch*SlotData)
			for range 100 {
				b, err := w.Seal(slotted(data), len(data))
				if err != nil {
					t.Fatal(err)
				}
				if w.state.sequence > config.Limit {
					t.Fatalf("%d records under one key", w.state.sequence)
				}
				if !bytes.Equal(w.state.secret, last) {
					updates, last = updates+1, bytes.Clone(w.state.secret)
				}
				got, rest, err := openAll(r, b)
				if err != nil || len(rest) > 0 || !bytes.Equal(got, data) {
					t.Fatalf("%d bytes opened, %d left, %v", len(got), len(rest), err)
				}
			}
			if want := 100 * batch / 2 / MaxSlots; updates < want {
				t.Errorf("%d key updates, want %d or more", updates, want)
			}
		})
	}
}

// The peer's request for a KeyUpdate is answered once, in front of the next data; an
// alert goes where Detach says, and once; nothing is sealed after it.
func TestDetachedAnswersAndAlerts(t *testing.T) {
	config := Config{Suite: tls.TLS_AES_256_GCM_SHA384, WriteSecret: secretOf(1), ReadSecret: secretOf(2)}
	w, err := NewWriter(io.Discard, config)
	if err != nil {
		t.Fatal(err)
	}
	alerts := &memory{}
	if err := w.Detach(alerts); err != nil {
		t.Fatal(err)
	}
	r, err := NewReader(nil, config, w)
	if err != nil {
		t.Fatal(err)
	}
	peer, mine := newState(t, secretOf(2)), newState(t, secretOf(1))
	for range 3 {
		for range 2 {
			b := sealed(t, peer, typeHandshake, handshakeMessage(messageKeyUpdate, []byte{1}), 0)
			if err := peer.update(); err != nil {
				t.Fatal(err)
			}
			if data, n, err := r.Open(b); len(data) > 0 || n != len(b) || err != nil {
				t.Fatalf("%q, %d of %d bytes, %v", data, n, len(b), err)
			}
		}
		b, err := w.Seal(slotted([]byte("data")), 4)
		if err != nil {
			t.Fatal(err)
		}
		inner, err := mine.open(nil, b[:keyUpdateRecord])
		if err != nil || inner[len(inner)-1] != typeHandshake || !bytes.Equal(inner[:len(inner)-1], handshakeMessage(messageKeyUpdate, []byte{0})) {
			t.Fatalf("the answer is %v, %v", inner, err)
		}
		if err := mine.update(); err != nil {
			t.Fatal(err)
		}
		if inner, err = mine.open(nil, b[keyUpdateRecord:]); err != nil || string(inner[:4]) != "data" || len(inner) != 5 {
			t.Fatalf("the data is %q, %v", inner, err)
		}
		if b, err = w.Seal(slotted([]byte("x")), 1); err != nil {
			t.Fatal(err)
		}
		if inner, err = mine.open(nil, b); err != nil || string(inner[:1]) != "x" {
			t.Fatalf("then %q, %v", inner, err)
		}
	}
	bad := sealed(t, peer, typeApplicationData, []byte("secret"), 0)
	bad[len(bad)-1] ^= 1
	var protocol *ProtocolError
	for range 2 {
		if data, _, err := r.Open(bytes.Clone(bad)); len(data) > 0 || !errors.As(err, &protocol) {
			t.Fatalf("a bad record: %q, %v", data, err)
		}
	}
	inner, err := mine.open(nil, alerts.out.Bytes())
	if err != nil || !bytes.Equal(inner, []byte{alertFatal, byte(AlertBadRecordMAC), typeAlert}) {
		t.Errorf("the alert is %v, %v", inner, err)
	}
	if _, err := w.Seal(slotted([]byte("x")), 1); !errors.As(err, &protocol) {
		t.Errorf("sealed behind an alert: %v", err)
	}
	if !bytes.Equal(w.state.secret, make([]byte, 48)) || !bytes.Equal(r.state.secret, make([]byte, 48)) {
		t.Error("a secret is still there")
	}
}
