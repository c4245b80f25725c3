package mtls

import (
	"bytes"
	"encoding/hex"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// The wire format of symbolon/1 is a promise: these bytes never change.
func TestWireFormat(t *testing.T) {
	id := FlowID{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
	var open, verdict bytes.Buffer
	if err := writeMessage(&open, NewOpen(id, somewhere, encrypted, 7)); err != nil {
		t.Fatal(err)
	}
	var shown bytes.Buffer
	withToken := NewOpen(id, somewhere, encrypted, 7)
	withToken.Framed, withToken.Token = true, "jws"
	if err := writeMessage(&shown, withToken); err != nil {
		t.Fatal(err)
	}
	var early, takes bytes.Buffer
	withEarly := NewOpen(id, somewhere, authenticated, 7)
	withEarly.Early = []byte("GET")
	if err := writeMessage(&early, withEarly); err != nil {
		t.Fatal(err)
	}
	if err := writeMessage(&takes, &symbolonv1.Verdict{Accept: true, Protection: authenticated, Early: 3}); err != nil {
		t.Fatal(err)
	}
	v := &symbolonv1.Verdict{Accept: true, Reason: symbolonv1.Reason_REASON_POLICY, Protection: encrypted, FlowId: id[:], Policy: "/prod/p", Log: true}
	if err := writeMessage(&verdict, v); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ name, got, want string }{
		{"open", hex.EncodeToString(open.Bytes()), "000000210801" + "12040a000009" + "18b82a" + "2002" + "2a10000102030405060708090a0b0c0d0e0f" + "3007"},
		{"open with a token", hex.EncodeToString(shown.Bytes()), "000000280801" + "12040a000009" + "18b82a" + "2002" + "2a10000102030405060708090a0b0c0d0e0f" + "3007" + "3801" + "42036a7773"},
		{"open with early bytes", hex.EncodeToString(early.Bytes()), "000000260801" + "12040a000009" + "18b82a" + "2001" + "2a10000102030405060708090a0b0c0d0e0f" + "3007" + "5a03474554"},
		{"verdict that takes them", hex.EncodeToString(takes.Bytes()), "00000006" + "0801" + "1801" + "4803"},
		{"verdict", hex.EncodeToString(verdict.Bytes()), "00000023" + "0801" + "1001" + "1802" + "2210000102030405060708090a0b0c0d0e0f" + "2a072f70726f642f70" + "3001"},
	} {
		if tc.got != tc.want {
			t.Errorf("%s:\n got %s\nwant %s", tc.name, tc.got, tc.want)
		}
	}
}

func TestUnknownFieldsAreIgnored(t *testing.T) {
	var b bytes.Buffer
	if err := writeMessage(&b, NewOpen(NewFlowID(), somewhere, encrypted, 7)); err != nil {
		t.Fatal(err)
	}
	raw := protowire.AppendTag(b.Bytes(), 99, protowire.BytesType)
	raw = protowire.AppendBytes(raw, []byte("of a later version"))
	raw[3] = byte(len(raw) - lengthSize)
	got := &symbolonv1.Open{}
	if err := readMessage(bytes.NewReader(raw), got); err != nil {
		t.Fatal(err)
	}
	if err := checkOpen(got); err != nil {
		t.Fatal(err)
	}
}
