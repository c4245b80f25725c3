package controller_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
	"github.com/symbolon/symbolon/controller"
	"github.com/symbolon/symbolon/controller/enrol"
	"github.com/symbolon/symbolon/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a controller on loopback, over real TLS, with a clock that is offset
// from the real one.
type world struct {
	t      *testing.T
	cfg    controller.Config
	offset atomic.Int64 // nanoseconds
	server *controller.Server
	stop   context.CancelFunc
	ended  chan error
}

func newWorld(t *testing.T, change ...func(*world)) *world {
	t.Helper()
	cfg := controller.DefaultConfig()
	cfg.TrustDomain, cfg.Listen, cfg.DataDir = "acme.example", "127.0.0.1:0", filepath.Join(t.TempDir(), "data")
	w := &world{t: t, cfg: cfg}
	for _, f := range change {
		f(w)
	}
	w.start()
	t.Cleanup(w.halt)
	return w
}

func (w *world) start() {
	w.t.Helper()
	s, err := controller.New(w.t.Context(), w.cfg, controller.Options{
		Version: "test",
		Now:     func() time.Time { return time.Now().Add(time.Duration(w.offset.Load())) },
	})
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.server, w.stop, w.ended = s, cancel, make(chan error, 1)
	go func() { w.ended <- s.Serve(ctx) }()
}

// halt ends the controller and reports how it ended, once.
func (w *world) halt() {
	w.t.Helper()
	if w.stop == nil {
		return
	}
	w.stop()
	w.stop = nil
	if err := <-w.ended; err != nil {
		w.t.Errorf("serve: %v", err)
	}
}

func (w *world) address() string { return w.server.Addr().String() }

// client makes an HTTP client with a TLS configuration, closed at the end.
func (w *world) client(config *tls.Config) *http.Client {
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	w.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// tls trusts the controller by ca.pem, as an operator would.
func (w *world) tls() *tls.Config {
	w.t.Helper()
	pem, err := os.ReadFile(filepath.Join(w.cfg.DataDir, "ca.pem"))
	if err != nil {
		w.t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		w.t.Fatal("ca.pem has no certificate")
	}
	return &tls.Config{RootCAs: roots}
}

// bearer adds the admin token to every call.
type bearer struct {
	token string
	next  http.RoundTripper
}

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+b.token)
	return b.next.RoundTrip(r)
}

func (w *world) adminToken() string {
	w.t.Helper()
	token, err := os.ReadFile(filepath.Join(w.cfg.DataDir, "admin.token"))
	if err != nil {
		w.t.Fatal(err)
	}
	return strings.TrimSpace(string(token))
}

func (w *world) admin() symbolonv1connect.AdminServiceClient {
	w.t.Helper()
	c := w.client(w.tls())
	c.Transport = bearer{w.adminToken(), c.Transport}
	return symbolonv1connect.NewAdminServiceClient(c, "https://"+w.address())
}

// apply applies one file and returns the answer.
func (w *world) apply(yaml string) *symbolonv1.ApplyResponse {
	w.t.Helper()
	res, err := w.tryApply(&symbolonv1.ApplyRequest{Files: []*symbolonv1.SourceFile{{Name: "test.yaml", Content: []byte(yaml)}}})
	if err != nil {
		w.t.Fatal(err)
	}
	return res
}

func (w *world) tryApply(req *symbolonv1.ApplyRequest) (*symbolonv1.ApplyResponse, error) {
	w.t.Helper()
	res, err := w.admin().Apply(w.t.Context(), connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

func (w *world) token(namespace string, labels map[string]string) enrol.Token {
	w.t.Helper()
	res, err := w.admin().CreateJoinToken(w.t.Context(), connect.NewRequest(&symbolonv1.CreateJoinTokenRequest{Namespace: namespace, Labels: labels}))
	if err != nil {
		w.t.Fatal(err)
	}
	token, err := enrol.ParseToken(res.Msg.GetToken())
	if err != nil {
		w.t.Fatal(err)
	}
	return token
}

// host is an enrolled host and its client.
type host struct {
	*enrol.HostCredential
	symbolonv1connect.ProxyServiceClient
}

func (w *world) enrol(namespace string, labels map[string]string) *host {
	w.t.Helper()
	attrs := identity.NewAttributes(map[string][]string{"os.hostname": {"db1"}, "os.distribution": {"debian 12"}})
	c, err := enrol.Enrol(w.t.Context(), w.address(), w.token(namespace, labels), attrs, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	return &host{c, w.proxy(c.TLS())}
}

func (w *world) proxy(config *tls.Config) symbolonv1connect.ProxyServiceClient {
	return symbolonv1connect.NewProxyServiceClient(w.client(config), "https://"+w.address(), connect.WithGRPC())
}

// csr is a request for a new P-256 key.
func csr(t *testing.T) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return key, der
}

func attributes(pairs ...string) map[string]*symbolonv1.LabelValues {
	m := make(map[string]*symbolonv1.LabelValues)
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i]] = &symbolonv1.LabelValues{Values: []string{pairs[i+1]}}
	}
	return m
}

func (h *host) issue(ctx context.Context, t *testing.T, pairs ...string) (*symbolonv1.IssueSVIDResponse, error) {
	t.Helper()
	_, der := csr(t)
	res, err := h.IssueSVID(ctx, connect.NewRequest(&symbolonv1.IssueSVIDRequest{Csr: der, Attributes: attributes(pairs...)}))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

// wantCode checks the code of an error, and that its text has all the words.
func wantCode(t *testing.T, err error, code connect.Code, words ...string) {
	t.Helper()
	if err == nil || connect.CodeOf(err) != code {
		t.Errorf("err = %v, want %v", err, code)
		return
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("err = %q, want it to say %q", err, word)
		}
	}
}

// tree is a little organization.
const tree = `
kind: Namespace
name: /
mode: enforce
default: deny
attributes: {app: {}, env: {values: [dev, prod]}, ext: {}}
---
kind: Namespace
name: /acme
mode: enforce
---
kind: Namespace
name: /acme/prod
mode: enforce
---
kind: Namespace
name: /acme/dev
mode: enforce
---
kind: Profile
namespace: /acme/prod
name: db
match: {proc.exe: /usr/bin/postgres, host.role: db}
workload: payments-db
labels: {app: db, env: prod}
---
kind: Profile
namespace: /acme/prod
name: web
match: {proc.exe: /usr/sbin/nginx}
workload: web
labels: {app: web, env: prod}
claims: [proc.exe]
---
kind: Policy
namespace: /acme
name: web-to-db
subject: {app: web}
verb: allow
object: {app: db}
ports: [tcp/5432]
propagate: true
---
kind: Policy
namespace: /acme/prod
name: web-to-cards
subject: {app: web}
verb: allow
object: {ext: cards}
---
kind: External
namespace: /acme
name: cards
labels: {ext: cards}
addresses: {cidrs: [203.0.113.0/24], ports: [tcp/443]}
`
