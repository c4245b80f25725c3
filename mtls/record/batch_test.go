package record

import (
	"crypto/tls"
	"io"
	"slices"
	"testing"
)

// counted counts the writes that a connection sees.
type counted struct{ sizes []int }

func (c *counted) Write(p []byte) (int, error) {
	c.sizes = append(c.sizes, len(p))
	return len(p), nil
}

// TestWritesAreCoalesced: four full records leave in one write.
func TestWritesAreCoalesced(t *testing.T) {
	out := &counted{}
	w, err := NewWriter(out, Config{Suite: tls.TLS_AES_256_GCM_SHA384, WriteSecret: secretOf(1)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, 5*maxPlaintext+1)); err != nil {
		t.Fatal(err)
	}
	if want := []int{4 * slotSize, slotSize + 1 + overhead}; !slices.Equal(out.sizes, want) {
		t.Errorf("writes of %v bytes, want %v", out.sizes, want)
	}
}

// TestBatch: records that have arrived together come out together, those in front of
// an error too, and the error after them.
func TestBatch(t *testing.T) {
	p := newState(t, secretOf(1))
	var stream []byte
	for _, s := range []string{"one", "two", "three"} {
		stream = append(stream, sealed(t, p, typeApplicationData, []byte(s), 0)...)
	}
	stream = append(stream, sealed(t, p, typeAlert, []byte{alertWarning, 0}, 0)...)
	c, _ := receiver(t, stream)
	batch, err := c.Batch()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, b := range batch {
		got = append(got, string(b))
	}
	if want := []string{"one", "two", "three"}; !slices.Equal(got, want) {
		t.Errorf("batch %q, want %q", got, want)
	}
	if _, err := c.Batch(); err != io.EOF { //nolint:errorlint // exactly this
		t.Errorf("then %v, want io.EOF", err)
	}
}
