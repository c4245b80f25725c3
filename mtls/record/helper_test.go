package record

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"sync"
	"testing"
	"time"

	_ "unsafe" // for go:linkname
)

// crypto/tls documents both for linkname; see mtls/suite.go.
//
//go:linkname defaultCipherSuitesTLS13 crypto/tls.defaultCipherSuitesTLS13
var defaultCipherSuitesTLS13 []uint16

//go:linkname defaultCipherSuitesTLS13NoAES crypto/tls.defaultCipherSuitesTLS13NoAES
var defaultCipherSuitesTLS13NoAES []uint16

func init() { useSuite(tls.TLS_AES_256_GCM_SHA384) }

func useSuite(id uint16) {
	defaultCipherSuitesTLS13 = []uint16{id}
	defaultCipherSuitesTLS13NoAES = []uint16{id}
}

// memory is a connection of which one direction is given and the other kept.
type memory struct {
	in  io.Reader
	mu  sync.Mutex
	out bytes.Buffer
}

func (m *memory) Read(p []byte) (int, error) { return m.in.Read(p) }

func (m *memory) Write(p []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.out.Write(p)
}

// sealed is a record made by hand: any content type, any padding.
func sealed(t testing.TB, p *protection, contentType byte, content []byte, padding int) []byte {
	t.Helper()
	inner := append(append(bytes.Clone(content), contentType), make([]byte, padding)...)
	length := len(inner) + tagSize
	record := []byte{typeApplicationData, 3, 3, byte(length >> 8), byte(length)}
	if err := p.prepare(); err != nil {
		t.Fatal(err)
	}
	record = p.aead.Seal(record, p.nonce[:], inner, record)
	p.sequence++
	return record
}

func secretOf(b byte) []byte { return bytes.Repeat([]byte{b}, 48) }

func newState(t testing.TB, secret []byte) *protection {
	t.Helper()
	p, err := newProtection(tls.TLS_AES_256_GCM_SHA384, secret, 0)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// testCertificate is one key pair for everybody, and the pool that trusts it.
var testCertificate = sync.OnceValues(func() (tls.Certificate, *x509.CertPool) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, DNSNames: []string{"test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, pool
})

// parties are the two configurations of a mutual TLS 1.3 handshake, each with its
// key log.
type parties struct {
	client, server       *tls.Config
	clientLog, serverLog *KeyLog
}

func newParties() *parties {
	certificate, pool := testCertificate()
	p := &parties{clientLog: NewKeyLog(0), serverLog: NewKeyLog(0)}
	p.client = &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{certificate}, RootCAs: pool, ServerName: "test",
		KeyLogWriter: p.clientLog, DynamicRecordSizingDisabled: true,
	}
	p.server = &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{certificate}, ClientCAs: pool,
		ClientAuth: tls.RequireAndVerifyClientCert, KeyLogWriter: p.serverLog, DynamicRecordSizingDisabled: true,
	}
	return p
}

// end is one side of a connection after the handshake.
type end struct {
	tcp *net.TCPConn
	tap *Tap
	tls *tls.Conn
}

// tcpPair is a loopback connection; both sides are closed with the test.
func tcpPair(t testing.TB) (client, server *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.Close()
		b.Close()
	})
	for _, c := range []net.Conn{a, b} {
		if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	return a.(*net.TCPConn), b.(*net.TCPConn)
}

// handshake connects the parties.
func (p *parties) handshake(t testing.TB) (client, server *end) {
	t.Helper()
	a, b := tcpPair(t)
	client, server = &end{tcp: a, tap: NewTap(a, p.clientLog)}, &end{tcp: b, tap: NewTap(b, p.serverLog)}
	t.Cleanup(client.tap.Release)
	t.Cleanup(server.tap.Release)
	client.tls, server.tls = tls.Client(client.tap, p.client), tls.Server(server.tap, p.server)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	both(t, func() error { return client.tls.HandshakeContext(ctx) }, func() error { return server.tls.HandshakeContext(ctx) })
	for _, e := range []*end{client, server} {
		if err := e.tap.Established(e.tls.ConnectionState()); err != nil {
			t.Fatal(err)
		}
	}
	return client, server
}

// both runs two functions side by side and fails the test if one does.
func both(t testing.TB, f, g func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	err := g()
	if err := errors.Join(err, <-done); err != nil {
		t.Fatal(err)
	}
}

// stream is what crypto/tls and this package have in common.
type stream interface {
	io.Reader
	io.Writer
	CloseWrite() error
}

// take replaces crypto/tls at an end.
func (e *end) take(t testing.TB) *Conn {
	t.Helper()
	c, err := e.tap.Take(e.tls)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Release)
	return c
}

// ownPair is a connection with this package at both ends.
func ownPair(t testing.TB) (client, server *Conn, a, b *net.TCPConn) {
	t.Helper()
	x, y := newParties().handshake(t)
	return x.take(t), y.take(t), x.tcp, y.tcp
}

// linked are two ends over a real TCP connection with secrets made up: limits and
// sequence numbers are the test's choice.
func linked(t testing.TB, change func(*Config)) (client, server *Conn, a, b *net.TCPConn) {
	t.Helper()
	a, b = tcpPair(t)
	c := Config{
		Client: true, Suite: tls.TLS_AES_256_GCM_SHA384, ReadSecret: secretOf(1), WriteSecret: secretOf(2),
	}
	if change != nil {
		change(&c)
	}
	var err error
	if client, err = New(a, c); err != nil {
		t.Fatal(err)
	}
	c.Client = false
	c.ReadSecret, c.WriteSecret = c.WriteSecret, c.ReadSecret
	c.ReadSequence, c.WriteSequence = c.WriteSequence, c.ReadSequence
	if server, err = New(b, c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Release)
	t.Cleanup(server.Release)
	return client, server, a, b
}
