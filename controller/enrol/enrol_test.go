package enrol_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	"github.com/symbolon/symbolon/controller/enrol"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// authority is a CA of the test's own.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{key: newKey(t)}
	a.cert = a.sign(t, nil, &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, a.key)
	return a
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (a *authority) sign(t *testing.T, parent *x509.Certificate, tmpl *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	tmpl.SerialNumber = big.NewInt(time.Now().UnixNano())
	tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	if parent == nil {
		parent = tmpl
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// leaf is a server's certificate with a SPIFFE ID ("" for none), and its key.
func (a *authority) leaf(t *testing.T, id string) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key := newKey(t)
	tmpl := &x509.Certificate{
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, BasicConstraintsValid: true,
	}
	if id != "" {
		u, err := url.Parse(id)
		if err != nil {
			t.Fatal(err)
		}
		tmpl.URIs = []*url.URL{u}
	}
	return a.sign(t, a.cert, tmpl, key), key
}

func (a *authority) pin() [sha256.Size]byte { return sha256.Sum256(a.cert.RawSubjectPublicKeyInfo) }

// impostor accepts TLS with a chain and keeps every plain byte that it is sent.
type impostor struct {
	net.Listener
	mu   sync.Mutex
	got  bytes.Buffer
	done sync.WaitGroup
}

func newImpostor(t *testing.T, key *ecdsa.PrivateKey, chain ...*x509.Certificate) *impostor {
	t.Helper()
	cert := tls.Certificate{PrivateKey: key}
	for _, c := range chain {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2", "http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	i := &impostor{Listener: l}
	i.done.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			i.done.Go(func() {
				defer func() { _ = conn.Close() }()
				_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
				b := make([]byte, 64<<10)
				for {
					n, err := conn.Read(b)
					i.mu.Lock()
					i.got.Write(b[:n])
					i.mu.Unlock()
					if err != nil {
						return
					}
				}
			})
		}
	})
	t.Cleanup(i.stop)
	return i
}

func (i *impostor) stop() {
	_ = i.Close()
	i.done.Wait()
}

const controllerID = "spiffe://acme.example/symbolon/controller"

// TestSecretIsNotSentToAnImpostor: whatever chain a server shows that does not
// prove it to be the controller of the pinned CA, it does not get to see a byte.
func TestSecretIsNotSentToAnImpostor(t *testing.T) {
	genuine, other := newAuthority(t), newAuthority(t)
	for name, test := range map[string]struct {
		chain func(t *testing.T) (*ecdsa.PrivateKey, []*x509.Certificate)
		want  error
	}{
		"another CA": {func(t *testing.T) (*ecdsa.PrivateKey, []*x509.Certificate) {
			leaf, key := other.leaf(t, controllerID)
			return key, []*x509.Certificate{leaf, other.cert}
		}, enrol.ErrPin},
		"another CA, the pinned root appended": {func(t *testing.T) (*ecdsa.PrivateKey, []*x509.Certificate) {
			leaf, key := other.leaf(t, controllerID)
			return key, []*x509.Certificate{leaf, other.cert, genuine.cert}
		}, enrol.ErrPin},
		"no root in the chain": {func(t *testing.T) (*ecdsa.PrivateKey, []*x509.Certificate) {
			leaf, key := genuine.leaf(t, controllerID)
			return key, []*x509.Certificate{leaf}
		}, enrol.ErrPin},
		"a workload of the real CA": {func(t *testing.T) (*ecdsa.PrivateKey, []*x509.Certificate) {
			leaf, key := genuine.leaf(t, "spiffe://acme.example/acme/prod/web")
			return key, []*x509.Certificate{leaf, genuine.cert}
		}, enrol.ErrController},
		"a host of the real CA": {func(t *testing.T) (*ecdsa.PrivateKey, []*x509.Certificate) {
			leaf, key := genuine.leaf(t, "spiffe://acme.example/symbolon/host/1")
			return key, []*x509.Certificate{leaf, genuine.cert}
		}, enrol.ErrController},
		"no SPIFFE ID": {func(t *testing.T) (*ecdsa.PrivateKey, []*x509.Certificate) {
			leaf, key := genuine.leaf(t, "")
			return key, []*x509.Certificate{leaf, genuine.cert}
		}, enrol.ErrController},
	} {
		t.Run(name, func(t *testing.T) {
			key, chain := test.chain(t)
			i := newImpostor(t, key, chain...)
			token := enrol.NewToken(genuine.pin())
			_, err := enrol.Enrol(t.Context(), i.Addr().String(), token, nil, nil)
			if !errors.Is(err, test.want) {
				t.Errorf("err = %v, want %v", err, test.want)
			}
			if code := connect.CodeOf(err); code != connect.CodeUnknown {
				t.Errorf("code %v: callers would try again", code)
			}
			i.stop()
			if i.got.Len() != 0 {
				t.Errorf("the impostor got %d bytes: %q", i.got.Len(), i.got.Bytes())
			}
		})
	}
}

// TestImpostorSeesWhatIsSent: the impostor of these tests would notice a secret.
func TestImpostorSeesWhatIsSent(t *testing.T) {
	genuine := newAuthority(t)
	leaf, key := genuine.leaf(t, controllerID)
	i := newImpostor(t, key, leaf, genuine.cert)
	token := enrol.NewToken(genuine.pin())
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := enrol.Enrol(ctx, i.Addr().String(), token, nil, nil); err == nil {
		t.Error("enrolled at a server that says nothing")
	}
	i.stop()
	if !bytes.Contains(i.got.Bytes(), []byte("PRI * HTTP/2.0")) {
		t.Errorf("a server that proves itself got %q", i.got.Bytes())
	}
}

func TestDialerIsUsed(t *testing.T) {
	refused := errors.New("refused by the test")
	dialer := dialFunc(func(_ context.Context, network, address string) (net.Conn, error) {
		if network != "tcp" || address != "192.0.2.1:7443" {
			t.Errorf("dialled %s %s", network, address)
		}
		return nil, refused
	})
	if _, err := enrol.Enrol(t.Context(), "192.0.2.1:7443", enrol.NewToken([32]byte{}), nil, dialer); !errors.Is(err, refused) {
		t.Errorf("err = %v", err)
	}
}

type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

func (f dialFunc) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return f(ctx, network, address)
}

func TestTokenRoundTrip(t *testing.T) {
	token := enrol.NewToken(sha256.Sum256([]byte("root")))
	for _, s := range []string{token.Reveal(), token.Reveal() + "\n", "  " + token.Reveal() + "\r\n"} {
		got, err := enrol.ParseToken(s)
		if err != nil || got != token {
			t.Errorf("%v, %v", got, err)
		}
	}
	if another := enrol.NewToken(token.Pin); another.ID == token.ID || another.Secret == token.Secret {
		t.Error("two tokens share id or secret")
	}
}

func TestTokenGolden(t *testing.T) {
	const s = "symbolon1.00112233445566ff.AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8.ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff00"
	token, err := enrol.ParseToken(s)
	if err != nil {
		t.Fatal(err)
	}
	if token.ID != "00112233445566ff" || token.Secret[31] != 0x1f || token.Pin[31] != 0 || token.Pin[0] != 0xff || token.Reveal() != s {
		t.Errorf("%#v", token)
	}
}

func TestTokenHidesItsSecret(t *testing.T) {
	token := enrol.NewToken([32]byte{})
	secret := strings.Split(token.Reveal(), ".")[2]
	for _, s := range []string{fmt.Sprint(token), fmt.Sprintf("%v %+v %#v %s %q", token, token, token, token, token), fmt.Sprintf("%v", &token)} {
		if strings.Contains(s, secret) || strings.Contains(s, strings.Trim(fmt.Sprintf("%d", token.Secret[:4]), "[]")) || !strings.Contains(s, token.ID) {
			t.Errorf("printed as %s", s)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add(enrol.NewToken([32]byte{1}).Reveal())
	f.Add("symbolon1...")
	f.Add("symbolon2.00112233445566ff.AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8.ff")
	f.Fuzz(func(t *testing.T, s string) {
		token, err := enrol.ParseToken(s)
		if err != nil {
			if !errors.Is(err, enrol.ErrTokenMalformed) {
				t.Errorf("%v", err)
			}
			if len(s) > 20 && strings.Contains(err.Error(), s) {
				t.Errorf("the error shows the token: %v", err)
			}
			return
		}
		if token.Reveal() != strings.TrimSpace(s) {
			t.Errorf("%q reads as %q", s, token.Reveal())
		}
	})
}
