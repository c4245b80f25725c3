package main

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	"github.com/spiffe/spire-plugin-sdk/plugintest"
	credentialcomposerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/credentialcomposer/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
	"github.com/symbolon/symbolon/controller"
	"github.com/symbolon/symbolon/identity"
)

const policy = `
kind: Namespace
name: /
mode: enforce
default: deny
protection: encrypted
attributes: {app: {}, env: {}}
---
kind: Profile
namespace: /
name: site-a
match: {spiffe.trust_domain: site-a.test}
labels: {env: prod}
---
kind: Profile
namespace: /
name: web
match: {spiffe.id: "spiffe://site-a.test/web"}
labels: {app: web}
---
kind: Namespace
name: /acme
mode: enforce
---
kind: Profile
namespace: /acme
name: team
match: {spiffe.trust_domain: site-a.test}
labels: {app: team}
---
kind: Profile
namespace: /
name: process
match: {spiffe.id: "spiffe://site-a.test/web", os.user: root}
labels: {app: admin}
`

// world is a Symbolon controller on loopback, and the files that a composer needs.
type world struct {
	t      *testing.T
	cfg    controller.Config
	server *controller.Server
	stop   func()
	files  string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	cfg := controller.DefaultConfig()
	cfg.TrustDomain, cfg.Listen, cfg.DataDir = "acme.example", "127.0.0.1:0", filepath.Join(t.TempDir(), "data")
	w := &world{t: t, cfg: cfg, files: t.TempDir()}
	w.start()
	t.Cleanup(func() { w.halt() })
	w.apply(policy)
	return w
}

func (w *world) start() {
	w.t.Helper()
	s, err := controller.New(w.t.Context(), w.cfg, controller.Options{Version: "test"})
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx) }()
	w.server = s
	w.cfg.Listen = s.Addr().String() // where the next one listens, too
	w.stop = func() {
		cancel()
		if err := <-ended; err != nil {
			w.t.Errorf("serve: %v", err)
		}
	}
}

func (w *world) halt() {
	if w.stop != nil {
		w.stop()
		w.stop = nil
	}
}

func (w *world) apply(yaml string) {
	w.t.Helper()
	c := w.plugin()
	token, err := readToken(filepath.Join(w.cfg.DataDir, "admin.token"))
	if err != nil {
		w.t.Fatal(err)
	}
	api, err := c.client()
	if err != nil {
		w.t.Fatal(err)
	}
	defer api.CloseIdleConnections()
	admin := symbolonv1connect.NewAdminServiceClient(api, "https://"+c.Controller)
	req := connect.NewRequest(&symbolonv1.ApplyRequest{Files: []*symbolonv1.SourceFile{{Name: "test.yaml", Content: []byte(yaml)}}})
	req.Header().Set("Authorization", "Bearer "+token)
	if _, err := admin.Apply(w.t.Context(), req); err != nil {
		w.t.Fatal(err)
	}
}

// data is the plugin_data for this world.
func (w *world) data() string {
	return fmt.Sprintf("controller = %q\ntrust_domain = %q\nca_file = %q\ntoken_file = %q\nsnapshot_file = %q\nrefresh = \"1s\"\n",
		w.server.Addr(), w.cfg.TrustDomain, filepath.Join(w.cfg.DataDir, "ca.pem"), filepath.Join(w.cfg.DataDir, "claims.token"),
		filepath.Join(w.files, "claims.snapshot"))
}

func (w *world) plugin() *configuration {
	w.t.Helper()
	c, err := configure(w.data())
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

// running is a plugin as SPIRE's server sees it.
type running struct {
	t        *testing.T
	server   composer
	composer credentialcomposerv1.CredentialComposerPluginClient
	config   configv1.ConfigServiceClient
}

func serve(t *testing.T) *running {
	r := &running{t: t}
	plugintest.ServeInBackground(t, plugintest.Config{
		PluginServer:   credentialcomposerv1.CredentialComposerPluginServer(&r.server),
		PluginClient:   &r.composer,
		ServiceServers: []pluginsdk.ServiceServer{configv1.ConfigServiceServer(&r.server)},
		ServiceClients: []pluginsdk.ServiceClient{&r.config},
	})
	return r
}

func (r *running) configure(data string) error {
	_, err := r.config.Configure(r.t.Context(), &configv1.ConfigureRequest{HclConfiguration: data})
	return err
}

// claims composes an SVID for id, and reads its claims as a proxy would.
func (r *running) claims(id string) string {
	r.t.Helper()
	res, err := r.composer.ComposeWorkloadX509SVID(r.t.Context(), &credentialcomposerv1.ComposeWorkloadX509SVIDRequest{
		SpiffeId: id, Attributes: &credentialcomposerv1.X509SVIDAttributes{DnsSans: []string{"kept.example"}},
	})
	if err != nil {
		r.t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"kept.example"}, res.GetAttributes().GetDnsSans()); diff != "" {
		r.t.Errorf("names:\n%s", diff)
	}
	return claimsIn(r.t, res.GetAttributes().GetExtraExtensions())
}

// until waits for the claims of id.
func (r *running) until(id, want string) {
	r.t.Helper()
	got := ""
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if got = r.claims(id); got == want {
			return
		}
	}
	r.t.Fatalf("claims of %s: %q, want %q", id, got, want)
}

func claimsIn(t *testing.T, extensions []*credentialcomposerv1.X509Extension) string {
	t.Helper()
	leaf := &x509.Certificate{}
	for _, e := range extensions {
		var oid asn1.ObjectIdentifier
		for _, arc := range strings.Split(e.GetOid(), ".") {
			n, err := strconv.Atoi(arc) // as SPIRE does
			if err != nil {
				t.Fatal(err)
			}
			oid = append(oid, n)
		}
		leaf.Extensions = append(leaf.Extensions, pkix.Extension{Id: oid, Critical: e.GetCritical(), Value: e.GetValue()})
	}
	claims, err := identity.ClaimsOf(leaf)
	if err != nil {
		t.Fatal(err)
	}
	return claims.String()
}

func TestClaims(t *testing.T) {
	w := newWorld(t)
	r := serve(t)
	if err := r.configure(w.data()); err != nil {
		t.Fatal(err)
	}
	r.until("spiffe://site-a.test/web", "app=web env=prod")
	for id, want := range map[string]string{
		"spiffe://site-a.test/other":                 "env=prod",
		"spiffe://site-b.test/web":                   "",
		"spiffe://site-a.test/for/health/check/only": "env=prod",
		"spiffe://site-a.test/acme/shop/web":         "app=team env=prod", // a Profile of a namespace is for IDs there
		"not an id":                                  "",
		"spiffe://site-a.test.example/web":           "",
	} {
		if got := r.claims(id); got != want {
			t.Errorf("%s: %q, want %q", id, got, want)
		}
	}
	w.apply(strings.ReplaceAll(policy, "labels: {app: web}", "labels: {app: shop}"))
	r.until("spiffe://site-a.test/web", "app=shop env=prod")

	// The controller goes away: nothing changes, not even for a plugin that starts anew.
	w.halt()
	again := serve(t)
	if err := again.configure(w.data()); err != nil {
		t.Fatal(err)
	}
	for _, r := range []*running{r, again} {
		if got := r.claims("spiffe://site-a.test/web"); got != "app=shop env=prod" {
			t.Errorf("without the controller: %q", got)
		}
	}
	w.start()
	w.apply(policy)
	r.until("spiffe://site-a.test/web", "app=web env=prod")
	again.until("spiffe://site-a.test/web", "app=web env=prod")
}

// What another composer gave stays, and a certificate never has the extension twice.
func TestClaimsOfAnotherComposer(t *testing.T) {
	w := newWorld(t)
	r := serve(t)
	if err := r.configure(w.data()); err != nil {
		t.Fatal(err)
	}
	r.until("spiffe://site-a.test/web", "app=web env=prod")
	theirs := []*credentialcomposerv1.X509Extension{{Oid: identity.ClaimsOID.String(), Value: []byte{1}}, {Oid: "1.2.3", Value: []byte{2}}}
	res, err := r.composer.ComposeWorkloadX509SVID(t.Context(), &credentialcomposerv1.ComposeWorkloadX509SVIDRequest{
		SpiffeId: "spiffe://site-a.test/web", Attributes: &credentialcomposerv1.X509SVIDAttributes{ExtraExtensions: theirs},
	})
	if err != nil || len(res.GetAttributes().GetExtraExtensions()) != 2 {
		t.Errorf("%v, %v", res, err)
	}
}

// Nothing that is asked of it, and nothing that it holds, takes the plugin down.
func TestNeverFails(t *testing.T) {
	r := serve(t)
	for _, req := range []*credentialcomposerv1.ComposeWorkloadX509SVIDRequest{{}, {SpiffeId: "spiffe://x"}, {SpiffeId: strings.Repeat("x", 1<<16)}} {
		if _, err := r.composer.ComposeWorkloadX509SVID(t.Context(), req); err != nil {
			t.Errorf("%v: %v", req, err)
		}
	}
	r.server.current.Store(&snapshot{profiles: []*symbolonv1.Resource{nil, {}}}) // makes ClaimsByID fail
	if got := r.claims("spiffe://site-a.test/web"); got != "" {
		t.Errorf("claims %q", got)
	}
	// CAs, agents and JWT-SVIDs are left to SPIRE.
	_, err := r.composer.ComposeWorkloadJWTSVID(t.Context(), &credentialcomposerv1.ComposeWorkloadJWTSVIDRequest{})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("JWT-SVID: %v", err)
	}
}

func TestConfigurationErrors(t *testing.T) {
	w := newWorld(t)
	r := serve(t)
	good := w.data()
	for _, c := range []struct{ name, data, want string }{
		{"syntax", "controller = ", "plugin_data:"},
		{"a word too much", good + "tokenfile = 1\n", "tokenfile: is unknown"},
		{"no port", strings.Replace(good, w.server.Addr().String(), "controller.example", 1), `controller: "controller.example" is not address:port`},
		{"relative path", strings.Replace(good, w.files, "", 1) + "ca_file = \"ca.pem\"\n", "ca_file"},
		{"no token", strings.Replace(good, "claims.token", "claims.tok", 1), "token_file: open "},
		{"too often", strings.Replace(good, `"1s"`, `"1ms"`, 1), "refresh: "},
		{"no trust domain", strings.Replace(good, `"acme.example"`, `"ACME!"`, 1), "trust_domain: "},
	} {
		if err := r.configure(c.data); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	res, err := r.config.Validate(t.Context(), &configv1.ValidateRequest{HclConfiguration: "x = 1"})
	if err != nil || res.GetValid() || len(res.GetNotes()) == 0 {
		t.Errorf("validate: %v, %v", res, err)
	}
}

// An impostor at the controller's address is not sent the token, and changes nothing.
func TestImpostor(t *testing.T) {
	w, other := newWorld(t), newWorld(t)
	other.apply(strings.ReplaceAll(policy, "labels: {app: web}", "labels: {app: shop}"))
	c, err := configure(strings.Replace(w.data(), w.server.Addr().String(), other.server.Addr().String(), 1))
	if err != nil {
		t.Fatal(err)
	}
	r := &refresher{cfg: c}
	if next, err := r.ask(t.Context()); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("an impostor was believed: %v, %v", next, err)
	}
}

// The controller sends its Profiles only to who has others: by the generation, and by the
// digest, since after a restore from a backup a generation may come a second time.
func TestAsksForWhatItHasNot(t *testing.T) {
	w := newWorld(t)
	r := &refresher{cfg: w.plugin()}
	ask := func() *snapshot {
		t.Helper()
		next, err := r.ask(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return next
	}
	first := ask()
	if first == nil || len(first.digest) == 0 {
		t.Fatalf("at first: %+v", first)
	}
	r.known = first
	if next := ask(); next != nil {
		t.Errorf("the same again: %+v", next)
	}
	// Of the life before the restore, by the same number.
	r.known = &snapshot{generation: first.generation, digest: []byte("another set")}
	if next := ask(); next == nil || len(next.profiles) != len(first.profiles) {
		t.Errorf("with the digest of another set: %+v", next)
	}
	r.known = first
	w.apply(strings.ReplaceAll(policy, "labels: {app: web}", "labels: {app: shop}"))
	if next := ask(); next == nil || next.generation <= first.generation {
		t.Errorf("after a change: %+v", next)
	}
}

// A start goes on with what was in force before, at least: it is kept first.
func TestKeptBeforeInForce(t *testing.T) {
	w := newWorld(t)
	used := 0
	r := &refresher{cfg: w.plugin(), log: hclog.NewNullLogger(), use: func(s *snapshot) {
		used++
		kept, err := load(filepath.Join(w.files, "claims.snapshot"))
		if err != nil || kept.generation != s.generation {
			t.Errorf("kept is %+v (%v), in force generation %d", kept, err, s.generation)
		}
	}}
	r.attempt(t.Context())
	w.apply(strings.ReplaceAll(policy, "labels: {app: web}", "labels: {app: shop}"))
	r.attempt(t.Context())
	r.attempt(t.Context()) // nothing new
	if used != 2 {
		t.Errorf("%d were put in force, want 2", used)
	}
	// Where it cannot be kept, it is in force all the same.
	unkept := &refresher{cfg: w.plugin(), log: hclog.NewNullLogger(), use: func(*snapshot) { used++ }}
	unkept.cfg.SnapshotFile = filepath.Join(w.files, "no such directory", "claims.snapshot")
	unkept.attempt(t.Context())
	if used != 3 {
		t.Error("without a place for it, nothing is in force")
	}
}

func TestSnapshotFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "snapshot")
	if err := os.WriteFile(path, []byte("not a snapshot"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := load(path); err == nil || !strings.Contains(err.Error(), "remove it") {
		t.Errorf("garbage: %v", err)
	}
	// A Profile that asks for more than an ID gives nothing, even if a file has it.
	s := newSnapshot(&symbolonv1.ListClaimProfilesResponse{Generation: 7, Digest: []byte("set"), Profiles: []*symbolonv1.Resource{{
		Namespace: "/", Name: "p", Kind: &symbolonv1.Resource_Profile{Profile: &symbolonv1.Profile{
			Match: &symbolonv1.Term{Clauses: []*symbolonv1.Clause{{Key: "container.id", Operator: &symbolonv1.Clause_Exists{Exists: false}}}},
		}},
	}}})
	if len(s.profiles) != 0 {
		t.Errorf("kept %v", s.profiles)
	}
	if err := s.save(path); err != nil {
		t.Fatal(err)
	}
	got, err := load(path)
	if err != nil || got.generation != 7 || string(got.digest) != "set" {
		t.Errorf("%v, %v", got, err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
}
