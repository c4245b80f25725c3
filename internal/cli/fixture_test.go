package cli

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"flag"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
)

var update = flag.Bool("update", false, "write the golden files")

const adminToken = "a-token-of-the-test"

// now is when the tests take place.
var now = time.Date(2026, 11, 3, 12, 0, 0, 0, time.UTC)

func at(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(d)) }

// pki is a root with one leaf, made in memory.
type pki struct {
	rootPEM []byte
	leaf    tls.Certificate
}

type leafOptions struct {
	uris     []string
	notAfter time.Time
	noEKU    bool
}

func newPKI(t *testing.T, opts leafOptions) pki {
	t.Helper()
	key := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	sign := func(template, parent *x509.Certificate, pub, priv any) *x509.Certificate {
		der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, priv)
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	rootKey, leafKey := key(), key()
	rootTemplate := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	root := sign(rootTemplate, rootTemplate, rootKey.Public(), rootKey)
	if opts.notAfter.IsZero() {
		opts.notAfter = now.Add(time.Hour)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: now.Add(-time.Hour), NotAfter: opts.notAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		// Not the address that the test dials: the name must not matter.
		DNSNames: []string{"controller.acme.example"},
	}
	if opts.noEKU {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	}
	for _, s := range opts.uris {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = append(template.URIs, u)
	}
	leaf := sign(template, root, leafKey.Public(), rootKey)
	return pki{
		rootPEM: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw}),
		leaf:    tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: leafKey, Leaf: leaf},
	}
}

const controllerID = "spiffe://acme.example/symbolon/controller"

// world is a controller's API over TLS, and the files that a CLI needs to use it.
type world struct {
	t     *testing.T
	admin *adminServer
	env   map[string]string
	dir   string
	stdin string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	return newWorldWith(t, newPKI(t, leafOptions{uris: []string{controllerID}}))
}

func newWorldWith(t *testing.T, p pki) *world {
	t.Helper()
	admin := &adminServer{}
	mux := http.NewServeMux()
	mux.Handle(symbolonv1connect.NewAdminServiceHandler(admin))
	server := httptest.NewUnstartedServer(mux)
	server.TLS = &tls.Config{Certificates: []tls.Certificate{p.leaf}, MinVersion: tls.VersionTLS13}
	server.EnableHTTP2 = true
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // refused handshakes are what some tests want
	server.StartTLS()
	t.Cleanup(server.Close)
	w := &world{t: t, admin: admin, dir: t.TempDir()}
	w.env = map[string]string{
		"HOME":                w.dir,
		"SYMBOLON_CONTROLLER": server.Listener.Addr().String(),
		"SYMBOLON_TOKEN_FILE": w.write("admin.token", adminToken+"\n"),
		"SYMBOLON_CA_FILE":    w.write("ca.pem", string(p.rootPEM)),
	}
	return w
}

// write makes a file in the world's directory and returns its path.
func (w *world) write(name, content string) string {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return path
}

type result struct {
	code           int
	stdout, stderr string
}

// run runs one command line in the world.
func (w *world) run(args ...string) result {
	w.t.Helper()
	return w.runContext(w.t.Context(), nil, args...)
}

// runContext runs until ctx ends; stdout is also written to tee.
func (w *world) runContext(ctx context.Context, tee *lineWatcher, args ...string) result {
	w.t.Helper()
	var out, errs bytes.Buffer
	env := Env{
		Stdin: strings.NewReader(w.stdin), Stdout: &out, Stderr: &errs,
		Getenv: func(k string) string { return w.env[k] },
		Now:    func() time.Time { return now }, Location: time.UTC, Version: "0.1.0-test",
	}
	if tee != nil {
		tee.to, env.Stdout = &out, tee
	}
	code := Main(ctx, args, env)
	return result{code, out.String(), errs.String()}
}

// lineWatcher calls line for each write of a whole line.
type lineWatcher struct {
	to   *bytes.Buffer
	line func(string)
}

func (l *lineWatcher) Write(p []byte) (int, error) {
	n, err := l.to.Write(p)
	l.line(string(p))
	return n, err
}

// golden compares with testdata/name.golden; -update writes it.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

// adminServer answers what the test sets, and remembers what it was asked. It is
// the API's far end; what a controller does behind it is tested there.
type adminServer struct {
	symbolonv1connect.UnimplementedAdminServiceHandler

	mu       sync.Mutex
	fail     error
	calls    int
	status   *symbolonv1.GetStatusResponse
	hosts    *symbolonv1.ListHostsResponse
	list     *symbolonv1.ListResourcesResponse
	work     *symbolonv1.ListWorkloadsResponse
	applied  *symbolonv1.ApplyResponse
	explain  *symbolonv1.ExplainResponse
	history  *symbolonv1.ListGenerationsResponse
	past     *symbolonv1.GetGenerationResponse
	back     *symbolonv1.RollbackResponse
	tested   *symbolonv1.TestPolicyResponse
	linted   *symbolonv1.LintPolicyResponse
	flows    []*symbolonv1.WatchFlowsResponse
	requests []any

	edges     *symbolonv1.ListEdgesResponse
	hits      *symbolonv1.ListPolicyHitsResponse
	simulated *symbolonv1.SimulateResponse

	ca      *symbolonv1.GetCAResponse
	rotated *symbolonv1.RotateRootResponse
}

// admit checks the token, as the controller does, and notes the request.
func (s *adminServer) admit(h http.Header, req any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
	if h.Get("Authorization") != "Bearer "+adminToken {
		return connect.NewError(connect.CodeUnauthenticated, errString("unknown token"))
	}
	s.requests = append(s.requests, req)
	return s.fail
}

// asked returns the last request.
func (s *adminServer) asked() any {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.requests) == 0 {
		return nil
	}
	return s.requests[len(s.requests)-1]
}

type errString string

func (e errString) Error() string { return string(e) }

func answer[Req, Resp any](s *adminServer, req *connect.Request[Req], resp *Resp) (*connect.Response[Resp], error) {
	if err := s.admit(req.Header(), req.Msg); err != nil {
		return nil, err
	}
	return connect.NewResponse(resp), nil
}

func (s *adminServer) GetStatus(_ context.Context, r *connect.Request[symbolonv1.GetStatusRequest]) (*connect.Response[symbolonv1.GetStatusResponse], error) {
	return answer(s, r, s.status)
}

func (s *adminServer) ListHosts(_ context.Context, r *connect.Request[symbolonv1.ListHostsRequest]) (*connect.Response[symbolonv1.ListHostsResponse], error) {
	return answer(s, r, s.hosts)
}

func (s *adminServer) RemoveHost(_ context.Context, r *connect.Request[symbolonv1.RemoveHostRequest]) (*connect.Response[symbolonv1.RemoveHostResponse], error) {
	return answer(s, r, &symbolonv1.RemoveHostResponse{})
}

func (s *adminServer) CreateJoinToken(_ context.Context, r *connect.Request[symbolonv1.CreateJoinTokenRequest]) (*connect.Response[symbolonv1.CreateJoinTokenResponse], error) {
	return answer(s, r, &symbolonv1.CreateJoinTokenResponse{Token: "symbolon1.id.secret.pin", Expires: at(r.Msg.GetTtl().AsDuration())})
}

func (s *adminServer) ListResources(_ context.Context, r *connect.Request[symbolonv1.ListResourcesRequest]) (*connect.Response[symbolonv1.ListResourcesResponse], error) {
	return answer(s, r, s.list)
}

func (s *adminServer) ListWorkloads(_ context.Context, r *connect.Request[symbolonv1.ListWorkloadsRequest]) (*connect.Response[symbolonv1.ListWorkloadsResponse], error) {
	return answer(s, r, s.work)
}

func (s *adminServer) Apply(_ context.Context, r *connect.Request[symbolonv1.ApplyRequest]) (*connect.Response[symbolonv1.ApplyResponse], error) {
	return answer(s, r, s.applied)
}

func (s *adminServer) Delete(_ context.Context, r *connect.Request[symbolonv1.DeleteRequest]) (*connect.Response[symbolonv1.DeleteResponse], error) {
	return answer(s, r, &symbolonv1.DeleteResponse{Generation: 13})
}

func (s *adminServer) ListGenerations(_ context.Context, r *connect.Request[symbolonv1.ListGenerationsRequest]) (*connect.Response[symbolonv1.ListGenerationsResponse], error) {
	return answer(s, r, s.history)
}

func (s *adminServer) GetGeneration(_ context.Context, r *connect.Request[symbolonv1.GetGenerationRequest]) (*connect.Response[symbolonv1.GetGenerationResponse], error) {
	return answer(s, r, s.past)
}

func (s *adminServer) Rollback(_ context.Context, r *connect.Request[symbolonv1.RollbackRequest]) (*connect.Response[symbolonv1.RollbackResponse], error) {
	return answer(s, r, s.back)
}

func (s *adminServer) TestPolicy(_ context.Context, r *connect.Request[symbolonv1.TestPolicyRequest]) (*connect.Response[symbolonv1.TestPolicyResponse], error) {
	return answer(s, r, s.tested)
}

func (s *adminServer) LintPolicy(_ context.Context, r *connect.Request[symbolonv1.LintPolicyRequest]) (*connect.Response[symbolonv1.LintPolicyResponse], error) {
	return answer(s, r, s.linted)
}

func (s *adminServer) Explain(_ context.Context, r *connect.Request[symbolonv1.ExplainRequest]) (*connect.Response[symbolonv1.ExplainResponse], error) {
	return answer(s, r, s.explain)
}

func (s *adminServer) WatchFlows(ctx context.Context, r *connect.Request[symbolonv1.WatchFlowsRequest], stream *connect.ServerStream[symbolonv1.WatchFlowsResponse]) error {
	if err := s.admit(r.Header(), r.Msg); err != nil {
		return err
	}
	for _, f := range s.flows {
		if err := stream.Send(f); err != nil {
			return err
		}
	}
	if r.Msg.GetFollow() {
		<-ctx.Done()
	}
	return nil
}
