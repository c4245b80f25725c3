package ca_test

import (
	"bytes"
	"encoding/base64"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/symbolon/symbolon/controller/ca"
	"github.com/symbolon/symbolon/identity/token"
)

// Keys take turns: each is announced a day before it signs, and stays announced until
// its last token has ended, through restarts.
func TestTokenKeysRotate(t *testing.T) {
	w := newWorld(t, "acme.example")
	c, err := w.try(w.config())
	if err != nil {
		t.Fatal(err)
	}
	keys, err := c.OpenTokenKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	names := func(k *ca.TokenKeys) (ids []string) {
		for _, p := range k.Public() {
			ids = append(ids, p.GetId())
		}
		return ids
	}
	signer := func() string {
		s, err := keys.Sign(&token.Statement{
			Subject: spiffeid.RequireFromString("spiffe://site-a.test/x"), Audience: w.td, Thumbprint: "x",
			IssuedAt: w.now, Expiry: w.now.Add(time.Minute),
		})
		if err != nil {
			t.Fatal(err)
		}
		v := token.NewVerifier()
		for _, p := range keys.Public() {
			if err := v.Set(w.td, append(keys.Public()[:0:0], p)); err != nil {
				t.Fatal(err)
			}
			if v.Signed(s) {
				return p.GetId()
			}
		}
		t.Fatal("nobody's signature")
		return ""
	}
	renew := func(want bool) {
		t.Helper()
		if changed, err := keys.Renew(t.Context()); err != nil || changed != want {
			t.Errorf("changed %v, %v; want %v", changed, err, want)
		}
	}
	first := names(keys)
	if len(first) != 1 || signer() != first[0] {
		t.Fatalf("first %v", first)
	}
	again, err := c.OpenTokenKeys(t.Context())
	if err != nil || len(names(again)) != 1 || names(again)[0] != first[0] {
		t.Fatalf("reopened %v, %v", names(again), err)
	}
	w.now = w.now.Add(28 * 24 * time.Hour)
	renew(false)
	w.now = w.now.Add(24 * time.Hour)
	renew(true)
	both := names(keys)
	if len(both) != 2 || both[0] != first[0] || signer() != first[0] {
		t.Fatalf("announced %v", both)
	}
	renew(false)
	w.now = w.now.Add(24 * time.Hour)
	renew(false)
	if signer() != both[1] {
		t.Error("the new key does not sign")
	}
	w.now = w.now.Add(2 * time.Hour)
	renew(true)
	if last := names(keys); len(last) != 1 || last[0] != both[1] || signer() != both[1] {
		t.Errorf("left %v", last)
	}
	// Nothing of it lies in the store in the clear: a PKCS#8 key of P-256 begins so.
	db, err := os.ReadFile(filepath.Join(w.dir, "db"))
	if err != nil {
		t.Fatal(err)
	}
	plain := []byte{0x30, 0x81, 0x87, 0x02, 0x01, 0x00, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86}
	for _, form := range [][]byte{plain, []byte(base64.StdEncoding.EncodeToString(plain))} {
		if bytes.Contains(db, form) {
			t.Errorf("a private key in the clear: %q", form)
		}
	}
}
