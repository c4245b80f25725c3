package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/symbolon/symbolon/controller"
	"github.com/symbolon/symbolon/proxy"
)

// issueSVID makes a CA and, signed by it, what a SPIRE agent has: both as files.
func issueSVID(t *testing.T, dir, id string) (ca, cert, key string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		must(os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
		return path
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "spire.example"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	rootDER, err := x509.CreateCertificate(rand.Reader, root, root, caKey.Public(), caKey)
	must(err)
	u, err := url.Parse(id)
	must(err)
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), URIs: []*url.URL{u}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		NotBefore:   time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, root, leafKey.Public(), caKey)
	must(err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(leafKey)
	must(err)
	return write("hosts.pem", "CERTIFICATE", rootDER), write("agent.pem", "CERTIFICATE", leafDER), write("agent.key", "PRIVATE KEY", keyDER)
}

// A machine that has a SPIRE agent's SVID needs no join token, and is the same host each
// time.
func TestJoinByCertificate(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("needs root: the proxy marks its sockets")
	}
	dir := t.TempDir()
	const id = "spiffe://spire.example/spire/agent/join_token/1"
	ca, cert, key := issueSVID(t, dir, id)
	data := ""
	address, _ := startController(t, func(c *controller.Config) {
		data = c.DataDir
		c.Enrolment.X509PoP = []controller.X509PoPConfig{{CAFile: ca, Namespace: "/", SPIFFEIDs: []string{"spiffe://spire.example/spire/agent/**"}}}
	})
	cfg := proxy.DefaultConfig()
	cfg.Controller = proxy.ControllerConfig{Address: address, Join: proxy.JoinX509PoP, CertFile: cert, KeyFile: key, CAFile: filepath.Join(data, "ca.pem")}
	cfg.Socket = filepath.Join(dir, "p.sock")
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	ids := make(map[string]bool)
	for range 2 {
		h := &host{cfg: cfg, log: zap.NewNop()}
		if err := h.join(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		ids[h.cred.Load().HostID] = true
		h.api.Load().transport.CloseIdleConnections()
		if err := forget(cfg.Socket); err != nil { // as after a reboot
			t.Fatal(err)
		}
	}
	if len(ids) != 1 {
		t.Errorf("one machine is the hosts %v", ids)
	}

	for name, tt := range map[string]struct {
		change func(*proxy.ControllerConfig)
		want   string
	}{
		"no certificate":  {func(c *proxy.ControllerConfig) { c.CertFile += "x" }, "controller.cert_file"},
		"another's key":   {func(c *proxy.ControllerConfig) { _, _, c.KeyFile = issueSVID(t, t.TempDir(), id) }, "controller.key_file"},
		"no root":         {func(c *proxy.ControllerConfig) { c.CAFile = key }, "controller.ca_file"},
		"another's root":  {func(c *proxy.ControllerConfig) { c.CAFile = ca }, "not the trust domain's controller"},
		"an unknown CA's": {func(c *proxy.ControllerConfig) { _, c.CertFile, c.KeyFile = issueSVID(t, t.TempDir(), id) }, "not accepted"},
	} {
		t.Run(name, func(t *testing.T) {
			h := &host{cfg: cfg, log: zap.NewNop()}
			tt.change(&h.cfg.Controller)
			if err := h.join(t.Context(), nil); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}
