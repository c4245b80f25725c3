package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
	"github.com/symbolon/symbolon/controller"
	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/internal/handover"
	"github.com/symbolon/symbolon/proxy"
	"github.com/symbolon/symbolon/redirect"
)

// startController runs a real one on loopback, and makes a join token.
func startController(t *testing.T, change ...func(*controller.Config)) (address, token string) {
	t.Helper()
	cfg := controller.DefaultConfig()
	cfg.TrustDomain, cfg.Listen, cfg.DataDir = "acme.example", "127.0.0.1:0", t.TempDir()
	for _, f := range change {
		f(&cfg)
	}
	s, err := controller.New(t.Context(), cfg, controller.Options{Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(cfg.DataDir, name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(read("ca.pem"))
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	admin := symbolonv1connect.NewAdminServiceClient(&http.Client{Transport: transport}, "https://"+s.Addr().String())
	req := connect.NewRequest(&symbolonv1.CreateJoinTokenRequest{Namespace: "/"})
	req.Header().Set("Authorization", "Bearer "+strings.TrimSpace(string(read("admin.token"))))
	res, err := admin.CreateJoinToken(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return s.Addr().String(), res.Msg.GetToken()
}

// joined is the daemon with all that its pages show: enrolled, one workload with an
// SVID, a policy. It loads no rules.
type joined struct {
	*daemonParts
	token string
	svid  *identity.SVID
}

func newJoined(t *testing.T) *joined {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("needs root: the proxy marks its sockets")
	}
	address, token := startController(t)
	dir := t.TempDir()
	cfg := proxy.DefaultConfig()
	cfg.Controller.Address, cfg.Controller.JoinTokenFile = address, filepath.Join(dir, "join.token")
	cfg.Socket, cfg.Admin = filepath.Join(dir, "run", "p.sock"), "127.0.0.1:0"
	if err := os.WriteFile(cfg.Controller.JoinTokenFile, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := forget(cfg.Socket); err != nil {
			t.Error(err)
		}
	})
	j := &joined{daemonParts: &daemonParts{cfg: cfg, log: zap.NewNop(), host: &host{cfg: cfg, log: zap.NewNop()}}, token: token}
	if err := j.host.join(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.host.api.Load().transport.CloseIdleConnections() })
	rules, err := cfg.Rules()
	if err != nil {
		t.Fatal(err)
	}
	if j.rules, err = redirect.NewRules(rules); err != nil {
		t.Fatal(err)
	}
	j.source = identity.NewControllerSource(newest{j.host})
	j.manager = identity.NewManager(j.source)
	j.keeper = newKeeper(handover.Store{}, j.log, j.snapshot)
	t.Cleanup(j.manager.Close)
	j.reports = flow.NewReporter(func(context.Context, *symbolonv1.ReportFlowsRequest) error { return nil })
	j.session = &proxy.Session{}
	j.proxy = proxy.New(proxy.Options{Log: j.log, Credentials: j.manager, Records: j.reports})
	j.hostChanged(j.host.cred.Load())
	if err := j.proxy.SetPolicy([]*symbolonv1.Resource{{Namespace: "/", Kind: &symbolonv1.Resource_NamespaceKind{NamespaceKind: &symbolonv1.Namespace{
		Mode: symbolonv1.Mode_MODE_ENFORCE, Default: symbolonv1.Default_DEFAULT_DENY, Protection: symbolonv1.Protection_PROTECTION_ENCRYPTED,
	}}}}, 7); err != nil {
		t.Fatal(err)
	}
	cred, err := j.manager.Get(t.Context(), &identity.Workload{
		Key:        identity.Key{CgroupID: 1, UID: 33},
		Attributes: identity.NewAttributes(map[string][]string{"os.user": {"www-data"}, "proc.exe": {"/usr/sbin/nginx"}}),
	})
	if err != nil {
		t.Fatal(err)
	}
	j.svid = cred.SVID
	return j
}

// forms are the ways in which a private key could be told. It is found out here that
// the careless ways of showing a key are among them.
func forms(t *testing.T, key crypto.Signer) [][]byte {
	t.Helper()
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		t.Fatalf("a %T", key)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(ec)
	if err != nil {
		t.Fatal(err)
	}
	sec1, err := x509.MarshalECPrivateKey(ec)
	if err != nil {
		t.Fatal(err)
	}
	d, err := ec.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	all := [][]byte{[]byte("PRIVATE KEY"), []byte(ec.D.String())} //nolint:staticcheck // as encoding/json would show it
	for _, b := range [][]byte{d, pkcs8, sec1} {
		h, numbers := hex.EncodeToString(b), strings.Trim(fmt.Sprintf("%d", b), "[]")
		all = append(all, b, []byte(h), []byte(strings.ToUpper(h)), []byte(numbers), []byte(strings.ReplaceAll(numbers, " ", ",")))
		for _, e := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
			all = append(all, []byte(e.EncodeToString(b)))
		}
	}
	careless, err := json.Marshal(map[string]any{"ec": ec})
	if err != nil {
		t.Fatal(err)
	}
	for _, shown := range [][]byte{
		careless, []byte(fmt.Sprintf("%+v", ec)), []byte(fmt.Sprintf("%x", pkcs8)),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}),
	} {
		if tells(shown, all) == "" {
			t.Fatalf("would not be found: %s", shown)
		}
	}
	return all
}

// tells returns what b gives away, or "".
func tells(b []byte, secrets [][]byte) string {
	for _, s := range secrets {
		if bytes.Contains(b, s) {
			return string(s)
		}
	}
	return ""
}

// get asks a server, over TCP or a Unix socket.
func get(t *testing.T, network, address, path string) (status int, body []byte) {
	t.Helper()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, address)
	}}
	res, err := (&http.Client{Transport: transport, Timeout: 30 * time.Second}).Get("http://proxy" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if body, err = io.ReadAll(res.Body); err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, body
}

// TestPagesKeepKeysToThemselves: with a real host key and a real workload's SVID in
// the proxy, no page has a private key or a secret, in any form.
func TestPagesKeepKeysToThemselves(t *testing.T) {
	j := newJoined(t)
	stop, err := j.serveAdmin()
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	host, err := j.host.cred.Load().SVID()
	if err != nil {
		t.Fatal(err)
	}
	secrets := append(forms(t, j.svid.Key), forms(t, host.Key)...)
	secrets = append(secrets, []byte(strings.Split(j.token, ".")[2]))

	pages := []string{"/metrics", "/healthz", "/readyz"}
	for _, p := range debugPages {
		pages = append(pages, "/debug/"+p)
	}
	shown := make(map[string]string)
	for _, p := range pages {
		status, body := get(t, "unix", j.cfg.Socket, p)
		if status != http.StatusOK || len(body) == 0 {
			t.Errorf("%s: %d %s", p, status, body)
		}
		if s := tells(body, secrets); s != "" {
			t.Errorf("%s gives away %q", p, s)
		}
		if strings.HasPrefix(p, "/debug/") && !json.Valid(body) {
			t.Errorf("%s is not JSON: %s", p, body)
		}
		shown[p] = string(body)
	}
	// The pages are about these very identities.
	for page, word := range map[string]string{
		"/debug/identities": j.svid.ID.String(), "/debug/status": j.host.cred.Load().HostID, "/debug/policies": "kind: Namespace",
	} {
		if !strings.Contains(shown[page], word) {
			t.Errorf("%s lacks %q: %s", page, word, shown[page])
		}
	}
	// Nor does the function behind the page say more to another encoder.
	for name, text := range map[string]string{"%+v": fmt.Sprintf("%+v", j.debugIdentities()), "%#v": fmt.Sprintf("%#v", j.debugIdentities())} {
		if s := tells([]byte(text), secrets); s != "" {
			t.Errorf("%s gives away %q", name, s)
		}
	}
}

// TestAdminPageHasNoDebugging: what every local user may see is health and numbers;
// who talks to whom is for root, on the socket.
func TestAdminPageHasNoDebugging(t *testing.T) {
	j := newJoined(t)
	j.cfg.Admin = freePort(t)
	var err error
	if j.page, err = j.pageListener(&handover.Inherited{}); err != nil {
		t.Fatal(err)
	}
	stop, err := j.serveAdmin()
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	for _, p := range []string{"/metrics", "/healthz", "/readyz"} {
		if status, body := get(t, "tcp", j.cfg.Admin, p); status != http.StatusOK {
			t.Errorf("%s: %d %s", p, status, body)
		}
	}
	for _, p := range append(debugPages, "", "pprof/", "vars", "../debug/identities") {
		status, body := get(t, "tcp", j.cfg.Admin, "/debug/"+p)
		if status != http.StatusNotFound || strings.Contains(string(body), j.svid.Name) {
			t.Errorf("/debug/%s: %d %s", p, status, body)
		}
	}
	if _, body := get(t, "tcp", j.cfg.Admin, "/metrics"); strings.Contains(string(body), "spiffe://") {
		t.Error("metrics name identities")
	}
	info, err := os.Stat(j.cfg.Socket)
	if err != nil {
		t.Fatal(err)
	}
	if m := info.Mode(); m.Type() != os.ModeSocket || m.Perm() != 0o600 {
		t.Errorf("the socket is %v", m)
	}
	// A second run takes the socket of one that was killed.
	l, err := (&daemonParts{cfg: proxy.Config{Socket: j.cfg.Socket}}).debugListener()
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// TestDebugCommandReadsThePages of a running proxy.
func TestDebugCommandReadsThePages(t *testing.T) {
	j := newJoined(t)
	stop, err := j.serveAdmin()
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	var out bytes.Buffer
	c := command()
	c.SetArgs([]string{"debug", "identities", "--socket", j.cfg.Socket})
	c.SetOut(&out)
	if err := c.ExecuteContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	var page []struct {
		SPIFFEID   string              `json:"spiffe_id"`
		UID        uint32              `json:"uid"`
		Attributes map[string][]string `json:"attributes"`
	}
	if err := json.Unmarshal(out.Bytes(), &page); err != nil {
		t.Fatalf("%s: %v", &out, err)
	}
	if len(page) != 1 || page[0].SPIFFEID != j.svid.ID.String() || page[0].UID != 33 || page[0].Attributes["proc.exe"][0] != "/usr/sbin/nginx" {
		t.Errorf("%s", &out)
	}
}

// TestHostKeyWaitsInTheKernel: a second run takes the identity over without a join
// token; after forget it needs a new one, for the first is spent.
func TestHostKeyWaitsInTheKernel(t *testing.T) {
	j := newJoined(t)
	again := &host{cfg: j.cfg, log: zap.NewNop()}
	again.cfg.Controller.JoinTokenFile = ""
	if err := again.join(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	defer again.api.Load().transport.CloseIdleConnections()
	if got, want := again.cred.Load().HostID, j.host.cred.Load().HostID; got != want {
		t.Errorf("host %s, want %s", got, want)
	}
	if _, err := again.client().ReportFlows(t.Context(), connect.NewRequest(&symbolonv1.ReportFlowsRequest{})); err != nil {
		t.Errorf("the controller does not take it: %v", err)
	}
	other := &host{cfg: j.cfg, log: zap.NewNop()}
	other.cfg.Socket += "2" // another proxy of the same machine
	other.cfg.Controller.JoinTokenFile = ""
	if err := other.join(t.Context(), nil); err == nil {
		t.Error("took over another proxy's identity")
	}
	if err := forget(j.cfg.Socket); err != nil {
		t.Fatal(err)
	}
	err := (&host{cfg: j.cfg, log: zap.NewNop()}).join(t.Context(), nil)
	if err == nil || !strings.Contains(err.Error(), "used") {
		t.Errorf("after forget, with a spent token: %v", err)
	}
	if strings.Contains(fmt.Sprint(err), strings.Split(j.token, ".")[2]) {
		t.Error("the error holds the token")
	}
}
