package mtls

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"testing"
	"time"
)

// certified is a self-signed certificate: who vouches for it is another question.
func certified(t testing.TB, key crypto.Signer) *tls.Certificate {
	t.Helper()
	template := &x509.Certificate{SerialNumber: serial(t), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func signers(t testing.TB) map[string]crypto.Signer {
	t.Helper()
	out := make(map[string]crypto.Signer)
	for name, c := range map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384(), "P-521": elliptic.P521()} {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		out[name] = k
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	out["Ed25519"], out["RSA"] = ed, rsaKey
	return out
}

// fixed is a connection's exporter that depends on the label alone.
func fixed(connection string) exporter {
	return func(label string, _ []byte, n int) ([]byte, error) {
		return bytes.Repeat([]byte(connection+label), n)[:n], nil
	}
}

func TestAuthenticator(t *testing.T) {
	for name, key := range signers(t) {
		for role, client := range map[string]bool{"the client's": true, "the server's": false} {
			t.Run(role+" "+name, func(t *testing.T) {
				x, err := fixed("one").of(client)
				if err != nil {
					t.Fatal(err)
				}
				cert := certified(t, key)
				request := newRequest(!client)
				a, err := authenticate(x, request, client, cert)
				if err != nil {
					t.Fatal(err)
				}
				chain, err := verifyAuthenticator(x, request, client, a)
				if err != nil || len(chain) != 1 || !bytes.Equal(chain[0].Raw, cert.Certificate[0]) {
					t.Fatalf("%d certificates, %v", len(chain), err)
				}
				// No byte of it can be another.
				for i := range a {
					bad := bytes.Clone(a)
					bad[i] ^= 1
					if _, err := verifyAuthenticator(x, request, client, bad); err == nil {
						t.Fatalf("byte %d of %d changed, and it verifies", i, len(a))
					}
				}
				for _, n := range []int{0, 1, 4, len(a) / 2, len(a) - 1} {
					if _, err := verifyAuthenticator(x, request, client, a[:n]); !errors.Is(err, ErrAuthenticator) {
						t.Errorf("the first %d bytes: %v", n, err)
					}
				}
				if _, err := verifyAuthenticator(x, request, client, append(bytes.Clone(a), 0)); !errors.Is(err, ErrAuthenticator) {
					t.Errorf("a byte behind it: %v", err)
				}
			})
		}
	}
}

// It is good for one connection, one direction and one question.
func TestAuthenticatorElsewhere(t *testing.T) {
	key := newKey(t)
	cert := certified(t, key)
	x, _ := fixed("one").of(true)
	request := newRequest(false)
	a, err := authenticate(x, request, true, cert)
	if err != nil {
		t.Fatal(err)
	}
	other, _ := fixed("two").of(true)
	mine, _ := fixed("one").of(false)
	stolen := *cert
	stolen.PrivateKey = newKey(t)
	forged, err := authenticate(x, request, true, &stolen)
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		x       exported
		request []byte
		client  bool
		a       []byte
	}{
		"another connection":                {other, request, true, a},
		"played back by the one who asked":  {mine, newRequest(true), false, a},
		"the answer to another question":    {x, newRequest(false), true, a},
		"a certificate of somebody else's":  {x, request, true, forged},
		"the other side's kind of question": {x, newRequest(true), true, a},
	} {
		if _, err := verifyAuthenticator(tc.x, tc.request, tc.client, tc.a); err == nil {
			t.Errorf("%s: it verifies", name)
		}
	}
	if _, err := authenticate(x, newRequest(true), true, cert); !errors.Is(err, ErrProtocol) {
		t.Errorf("a client's request, answered by a client: %v", err)
	}
	for name, bad := range map[string][]byte{
		"empty": {}, "cut short": request[:len(request)-1], "longer": append(bytes.Clone(request), 0),
		"no algorithms": {msgCertificateRequest, 0, 0, 3, 0, 0, 0},
	} {
		if _, err := authenticate(x, bad, true, cert); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s request: %v", name, err)
		}
	}
	onlyRSA := append(bytes.Clone(request[:len(request)-2*len(signatureSchemes)]), bytes.Repeat([]byte{8, 4}, len(signatureSchemes))...)
	if _, err := authenticate(x, onlyRSA, true, cert); err == nil {
		t.Error("signed in a way that was not asked for")
	}
}

func FuzzAuthenticator(f *testing.F) {
	x, _ := fixed("one").of(true)
	request := newRequest(false)
	cert := certified(f, newKey(f))
	a, err := authenticate(x, request, true, cert)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(request, a)
	f.Add(newRequest(true), []byte{})
	f.Fuzz(func(t *testing.T, r, b []byte) {
		_, _, _ = parseRequest(r, true)
		_, _ = authenticate(x, r, true, cert)
		if _, err := verifyAuthenticator(x, request, true, b); err == nil && !bytes.Equal(a, b) {
			t.Fatal("something else verifies")
		}
	})
}
