package controller_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
	"github.com/symbolon/symbolon/controller"
	"github.com/symbolon/symbolon/controller/enrol"
)

// popCA is an operator's own.
type popCA struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newPopCA(t *testing.T) *popCA {
	t.Helper()
	key, _ := csr(t)
	a := &popCA{t: t, key: key, file: filepath.Join(t.TempDir(), "hosts.pem")}
	root := &x509.Certificate{Subject: pkix.Name{CommonName: "hosts"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	a.cert = a.sign(root, key.Public())
	if err := os.WriteFile(a.file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *popCA) sign(tmpl *x509.Certificate, key crypto.PublicKey) *x509.Certificate {
	a.t.Helper()
	tmpl.SerialNumber, _ = rand.Int(rand.Reader, big.NewInt(1<<62))
	if tmpl.NotAfter.IsZero() {
		tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	parent := a.cert
	if parent == nil {
		parent = tmpl
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert
}

// machine is a certificate as machines have it; ids make it an SVID.
func (a *popCA) machine(key crypto.Signer, change func(*x509.Certificate), ids ...string) tls.Certificate {
	a.t.Helper()
	tmpl := &x509.Certificate{
		Subject: pkix.Name{CommonName: "db1"}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	for _, id := range ids {
		u, err := url.Parse(id)
		if err != nil {
			a.t.Fatal(err)
		}
		tmpl.URIs = append(tmpl.URIs, u)
	}
	if change != nil {
		change(tmpl)
	}
	return tls.Certificate{Certificate: [][]byte{a.sign(tmpl, key.Public()).Raw}, PrivateKey: key}
}

func ecKey(t *testing.T) crypto.Signer { key, _ := csr(t); return key }

// roots are the controller's, as an operator hands them to hosts.
func (w *world) roots() []*x509.Certificate {
	w.t.Helper()
	b, err := os.ReadFile(filepath.Join(w.cfg.DataDir, "ca.pem"))
	if err != nil {
		w.t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		w.t.Fatal(err)
	}
	return []*x509.Certificate{root}
}

func (w *world) byCertificate(cert tls.Certificate) (*host, error) {
	w.t.Helper()
	c, err := enrol.ByCertificate(w.t.Context(), w.address(), w.roots(), cert, nil, nil)
	if err != nil {
		return nil, err
	}
	return &host{c, w.proxy(c.TLS())}, nil
}

func popWorld(t *testing.T) (w *world, machines, agents *popCA) {
	t.Helper()
	machines, agents = newPopCA(t), newPopCA(t)
	w = newWorld(t, func(w *world) {
		w.cfg.Enrolment.X509PoP = []controller.X509PoPConfig{
			{CAFile: agents.file, Namespace: "/acme/prod", Labels: map[string]string{"role": "db"}, SPIFFEIDs: []string{"spiffe://spire.example/spire/agent/**"}},
			{CAFile: machines.file, Namespace: "/acme/dev"},
		}
	})
	w.apply(tree)
	return w, machines, agents
}

func TestEnrolByCertificate(t *testing.T) {
	w, machines, agents := popWorld(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, _ := ed25519.GenerateKey(rand.Reader)
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	for name, key := range map[string]crypto.Signer{"ECDSA P-256": ecKey(t), "P-384": p384, "RSA": rsaKey, "Ed25519": edKey} {
		h, err := w.byCertificate(machines.machine(key, nil))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if h.Namespace != "/acme/dev" {
			t.Errorf("%s: in %s", name, h.Namespace)
		}
		again, err := w.byCertificate(machines.machine(key, nil)) // renewed, the same key
		if err != nil || again.HostID != h.HostID {
			t.Errorf("%s: again: %v, %v; want the same host", name, again, err)
		}
	}

	const id = "spiffe://spire.example/spire/agent/x509pop/1"
	agent, err := w.byCertificate(agents.machine(ecKey(t), nil, id))
	if err != nil {
		t.Fatal(err)
	}
	res, err := agent.issue(t.Context(), t, "proc.exe", "/usr/bin/postgres")
	if err != nil {
		t.Fatal(err)
	}
	p := principal(t, agent.HostCredential, res.GetSvid())
	if p.Attributes.Get("host.spiffe_id") != id || p.Attributes.Get("host.role") != "db" || p.ID.Path() != "/acme/prod/payments-db" {
		t.Errorf("%s %s", p.ID, p.Attributes)
	}
	// Another key, the same agent: the same host; and the first one's session gives way.
	s := agent.open(t, &symbolonv1.Hello{})
	s.generation()
	next, err := w.byCertificate(agents.machine(ecKey(t), nil, id))
	if err != nil || next.HostID != agent.HostID {
		t.Fatalf("again: %v, %v", next, err)
	}
	next.open(t, &symbolonv1.Hello{}).generation()
	wantCode(t, s.end(), connect.CodeAborted)

	// Removed is removed, whatever it still holds; a token brings it back.
	if _, err := w.admin().RemoveHost(t.Context(), connect.NewRequest(&symbolonv1.RemoveHostRequest{Id: agent.HostID})); err != nil {
		t.Fatal(err)
	}
	w.halt()
	w.cfg.Listen = "127.0.0.1:0"
	w.start()
	_, err = w.byCertificate(agents.machine(ecKey(t), nil, id))
	wantCode(t, err, connect.CodePermissionDenied, "removed", "join token")
	w.enrol("/acme/prod", nil)
}

func TestEnrolByCertificateRefuses(t *testing.T) {
	w, machines, agents := popWorld(t)
	stranger, key := newPopCA(t), ecKey(t)
	weak := func() crypto.Signer {
		t.Setenv("GODEBUG", "rsa1024min=0")
		k, err := rsa.GenerateKey(rand.Reader, 1024)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}()
	const agent = "spiffe://spire.example/spire/agent/1"
	serverOnly := func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }
	past := func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	}
	for name, tt := range map[string]struct {
		cert tls.Certificate
		word string
	}{
		"another CA's":                 {stranger.machine(key, nil), "no CA"},
		"another CA's SVID":            {stranger.machine(key, nil, agent), "no CA"},
		"expired":                      {machines.machine(key, past), "at this time"},
		"a server's":                   {machines.machine(key, serverOnly), "client authentication"},
		"not for signatures":           {machines.machine(key, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }), "digitalSignature"},
		"a CA's":                       {machines.machine(key, func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }), "CA"},
		"no SVID of the SPIFFE CA":     {agents.machine(key, nil), "no CA"},
		"a workload of SPIRE's":        {agents.machine(key, nil, "spiffe://spire.example/web"), "no CA"},
		"another trust domain's":       {agents.machine(key, nil, "spiffe://other.example/spire/agent/1"), "no CA"},
		"an SVID of ours, forged":      {machines.machine(key, nil, "spiffe://acme.example/symbolon/host/1"), "no way into it"},
		"an SVID of ours, by SPIRE":    {agents.machine(key, nil, "spiffe://acme.example/spire/agent/1"), "no way into it"},
		"two names":                    {agents.machine(key, nil, agent, "spiffe://spire.example/web"), "no CA"},
		"a short key":                  {machines.machine(weak, nil), "RSA"},
		"the chain without its leaf":   {tls.Certificate{PrivateKey: key}, "0 certificates"},
		"more above it than there are": {tls.Certificate{PrivateKey: key, Certificate: make([][]byte, 6)}, "6 certificates"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := w.byCertificate(tt.cert)
			if err == nil || !strings.Contains(err.Error(), tt.word) {
				t.Errorf("%v, want it to say %q", err, tt.word)
			}
		})
	}
	// The machines' CA may not sign for the agents, and take over what they enrolled.
	first, err := w.byCertificate(agents.machine(ecKey(t), nil, agent))
	if err != nil {
		t.Fatal(err)
	}
	other, err := w.byCertificate(machines.machine(ecKey(t), nil, agent))
	if err != nil {
		t.Fatal(err)
	}
	if other.HostID == first.HostID || other.Namespace != "/acme/dev" {
		t.Errorf("another CA's certificate became the agent's host: %s in %s", other.HostID, other.Namespace)
	}
	hosts, err := w.admin().ListHosts(t.Context(), connect.NewRequest(&symbolonv1.ListHostsRequest{}))
	if err != nil || len(hosts.Msg.GetHosts()) != 2 {
		t.Errorf("hosts %v, %v", hosts, err)
	}
	for _, h := range hosts.Msg.GetHosts() {
		if h.GetId() == other.HostID && h.GetAttributes()["host.spiffe_id"] != nil {
			t.Error("a SPIFFE ID that no pattern allows became an attribute")
		}
	}
}

// The attack: nobody has signed anything, but to find that out costs crypto/x509 seconds
// with RSA keys as large as the message may be. They are not looked at.
func TestHugeKeysAreNotVerifiedBy(t *testing.T) {
	w, machines, agents := popWorld(t)
	huge := &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), 1<<17, 1), E: 1<<31 - 1}
	above := machines.sign(&x509.Certificate{Subject: pkix.Name{CommonName: "above"}, IsCA: true, BasicConstraintsValid: true}, huge)
	for name, cert := range map[string]tls.Certificate{
		"as the leaf's":  {Certificate: [][]byte{machines.sign(&x509.Certificate{}, huge).Raw}},
		"above the leaf": {Certificate: [][]byte{machines.machine(ecKey(t), nil).Certificate[0], above.Raw}},
		"above an SVID":  {Certificate: [][]byte{agents.machine(ecKey(t), nil, "spiffe://spire.example/spire/agent/1").Certificate[0], above.Raw}},
	} {
		client, _ := w.onOneConnection()
		_, request := csr(t)
		_, err := client.Enrol(t.Context(), connect.NewRequest(&symbolonv1.EnrolRequest{
			Csr: request, Hostname: "h", X509Pop: &symbolonv1.X509Proof{Chain: cert.Certificate, Signature: []byte("none")},
		}))
		wantCode(t, err, connect.CodeInvalidArgument, "RSA of 2048 to 8192 bits")
		if t.Failed() {
			t.Fatal(name)
		}
	}
}

// A host that is revoked has its certificate still: that is no way to another SVID.
func TestARevokedHostDoesNotEnrolAgain(t *testing.T) {
	w, machines, _ := popWorld(t)
	cert := machines.machine(ecKey(t), nil)
	h, err := w.byCertificate(cert)
	if err != nil {
		t.Fatal(err)
	}
	made := w.revoke(&symbolonv1.RevokeRequest{Host: h.HostID, Reason: "r"})
	_, err = w.byCertificate(cert)
	wantCode(t, err, connect.CodePermissionDenied, "revoked")
	w.unrevoke(made.GetRecord().GetRevocation().GetId())
	again, err := w.byCertificate(cert)
	if err != nil || again.HostID != h.HostID {
		t.Errorf("unrevoked: %v, %v", again, err)
	}
}

// onOneConnection is a client whose calls all go over one TLS connection, and its state.
func (w *world) onOneConnection() (symbolonv1connect.EnrolmentServiceClient, tls.ConnectionState) {
	w.t.Helper()
	config := w.tls()
	config.NextProtos = []string{"h2"}
	conn, err := tls.Dial("tcp", w.address(), config)
	if err != nil {
		w.t.Fatal(err)
	}
	transport := &http.Transport{ForceAttemptHTTP2: true, DialTLSContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil }}
	w.t.Cleanup(transport.CloseIdleConnections)
	return symbolonv1connect.NewEnrolmentServiceClient(&http.Client{Transport: transport}, "https://"+w.address(), connect.WithGRPC()), conn.ConnectionState()
}

// proof signs as the format says, apart from the code under test.
func proof(t *testing.T, state tls.ConnectionState, csr []byte, cert tls.Certificate, key *ecdsa.PrivateKey) *symbolonv1.X509Proof {
	t.Helper()
	of := sha256.Sum256(csr)
	material, err := state.ExportKeyingMaterial("EXPORTER-symbolon-enrolment", of[:], 32)
	if err != nil {
		t.Fatal(err)
	}
	text := sha256.Sum256(bytes.Join([][]byte{bytes.Repeat([]byte{' '}, 64), []byte("symbolon enrolment x509pop v1\x00"), material}, nil))
	signature, err := ecdsa.SignASN1(rand.Reader, key, text[:])
	if err != nil {
		t.Fatal(err)
	}
	return &symbolonv1.X509Proof{Chain: cert.Certificate, Signature: signature}
}

// A proof is good for the connection and the request that it was made for: who records
// one, or sits in the middle, cannot use it, and a certificate alone is nothing.
func TestProofsCannotBeUsedElsewhere(t *testing.T) {
	w, machines, _ := popWorld(t)
	key, _ := csr(t)
	cert := machines.machine(key, nil)
	_, request := csr(t)
	client, state := w.onOneConnection()
	call := func(client symbolonv1connect.EnrolmentServiceClient, csr []byte, p *symbolonv1.X509Proof) error {
		_, err := client.Enrol(t.Context(), connect.NewRequest(&symbolonv1.EnrolRequest{Csr: csr, Hostname: "h", X509Pop: p}))
		return err
	}
	good := proof(t, state, request, cert, key)

	elsewhere, _ := w.onOneConnection()
	wantCode(t, call(elsewhere, request, good), connect.CodeUnauthenticated, "not proven")
	_, mine := csr(t)
	wantCode(t, call(client, mine, good), connect.CodeUnauthenticated, "not proven")
	thief, _ := csr(t)
	wantCode(t, call(client, mine, proof(t, state, mine, cert, thief)), connect.CodeUnauthenticated, "not proven")
	wantCode(t, call(client, mine, &symbolonv1.X509Proof{Chain: cert.Certificate}), connect.CodeUnauthenticated, "not proven")
	wantCode(t, call(client, mine, &symbolonv1.X509Proof{Chain: [][]byte{[]byte("no")}}), connect.CodeInvalidArgument)
	_, err := client.Enrol(t.Context(), connect.NewRequest(&symbolonv1.EnrolRequest{Csr: request, Hostname: "h", X509Pop: good, TokenId: "0011223344556677"}))
	wantCode(t, err, connect.CodeInvalidArgument, "one of them")
	if hosts, err := w.admin().ListHosts(t.Context(), connect.NewRequest(&symbolonv1.ListHostsRequest{})); err != nil || len(hosts.Msg.GetHosts()) != 0 {
		t.Fatalf("an attack made a host: %v, %v", hosts, err)
	}

	if err := call(client, request, good); err != nil {
		t.Errorf("where it belongs: %v", err)
	}
}

// The certificate is not shown to whoever answers: the controller is proven before.
func TestCertificateIsNotShownToAnImpostor(t *testing.T) {
	w, machines, _ := popWorld(t)
	impostor := newWorld(t)
	_, err := enrol.ByCertificate(t.Context(), impostor.address(), w.roots(), machines.machine(ecKey(t), nil), nil, nil)
	if err == nil || connect.CodeOf(err) == connect.CodeUnavailable || !strings.Contains(err.Error(), "not the trust domain's controller") {
		t.Errorf("%v", err)
	}
}

func TestEnrolByCertificateInNoNamespace(t *testing.T) {
	machines := newPopCA(t)
	w := newWorld(t, func(w *world) {
		w.cfg.Enrolment.X509PoP = []controller.X509PoPConfig{{CAFile: machines.file, Namespace: "/not/there"}}
	})
	_, err := w.byCertificate(machines.machine(ecKey(t), nil))
	wantCode(t, err, connect.CodeFailedPrecondition, "/not/there")
}

// A machine that an operator has removed is known by the names in its certificate, with
// whatever key it comes; another machine is not.
func TestRemovedMachineWithAnotherKey(t *testing.T) {
	w, machines, _ := popWorld(t)
	named := func(names ...string) func(*x509.Certificate) { return func(c *x509.Certificate) { c.DNSNames = names } }
	remove := func(h *host) {
		t.Helper()
		if _, err := w.admin().RemoveHost(t.Context(), connect.NewRequest(&symbolonv1.RemoveHostRequest{Id: h.HostID})); err != nil {
			t.Fatal(err)
		}
	}
	h, err := w.byCertificate(machines.machine(ecKey(t), named("db1.acme.example", "DB1")))
	if err != nil {
		t.Fatal(err)
	}
	remove(h)
	_, err = w.byCertificate(machines.machine(ecKey(t), named("db1", "db1.acme.example")))
	wantCode(t, err, connect.CodePermissionDenied, "removed this host")
	if _, err := w.byCertificate(machines.machine(ecKey(t), named("db2.acme.example"))); err != nil {
		t.Errorf("another machine: %v", err)
	}
	// Without names there is only the key.
	key := ecKey(t)
	if h, err = w.byCertificate(machines.machine(key, nil)); err != nil {
		t.Fatal(err)
	}
	remove(h)
	_, err = w.byCertificate(machines.machine(key, nil))
	wantCode(t, err, connect.CodePermissionDenied, "removed this host")
	if _, err := w.byCertificate(machines.machine(ecKey(t), nil)); err != nil {
		t.Errorf("another key: %v", err)
	}
}
