package ca_test

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"testing"

	"github.com/symbolon/symbolon/controller/seal"
	"github.com/symbolon/symbolon/controller/store"
)

// unseal opens what the CA keeps under one key of the store, and so also holds the
// stored form.
func unseal(t *testing.T, key *seal.Key, kv store.KV) []byte {
	t.Helper()
	var packed struct{ Certificate, Key []byte }
	if err := json.Unmarshal(kv.Value, &packed); err != nil {
		t.Fatal(err)
	}
	der, err := key.Open(kv.Key, packed.Key, packed.Certificate)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// secretForms are the ways in which a private key could lie in a file. Base64 of
// the scalar inside a longer text is covered by that of the whole.
func secretForms(scalar, der []byte) map[string][]byte {
	return map[string][]byte{
		"scalar":            scalar,
		"hex":               []byte(hex.EncodeToString(scalar)),
		"base64":            []byte(base64.StdEncoding.EncodeToString(scalar)),
		"base64url":         []byte(base64.RawURLEncoding.EncodeToString(scalar)),
		"PKCS#8":            der,
		"base64 of PKCS#8":  []byte(base64.StdEncoding.EncodeToString(der)),
		"half of the key":   scalar[:16],
		"last half of keys": scalar[16:],
	}
}
