package controller_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller"
	"github.com/symbolon/symbolon/controller/enrol"
	"github.com/symbolon/symbolon/controller/instance"
	"github.com/symbolon/symbolon/identity/cloud"
	"github.com/symbolon/symbolon/internal/cloudlab"
)

const vmID = "02aab8a4-74ef-476e-8182-f6d2ba4166a6"

// clouds are what a world's controller believes, in files.
type clouds struct {
	aws   *cloudlab.AWS
	gcp   *cloudlab.GCP
	azure *cloudlab.Azure
	dir   string
}

// made once: RSA keys take their time.
var (
	theAWS   = sync.OnceValues(cloudlab.NewAWS)
	theGCP   = sync.OnceValues(cloudlab.NewGCP)
	theAzure = sync.OnceValues(cloudlab.NewAzure)
)

func newClouds(t *testing.T) *clouds {
	t.Helper()
	c := &clouds{dir: t.TempDir()}
	var err error
	if c.aws, err = theAWS(); err != nil {
		t.Fatal(err)
	}
	if c.gcp, err = theGCP(); err != nil {
		t.Fatal(err)
	}
	if c.azure, err = theAzure(); err != nil {
		t.Fatal(err)
	}
	jwks, err := c.gcp.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"aws.pem": c.aws.Certificates(), "google.json": jwks, "azure.pem": c.azure.Certificates()} {
		if err := os.WriteFile(c.file(name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func (c *clouds) file(name string) string { return filepath.Join(c.dir, name) }

// config lets all three in, each as db in /acme/prod.
func (c *clouds) config(a controller.AdmissionConfig) controller.CloudConfig {
	return controller.CloudConfig{
		AWS:   []controller.AWSConfig{{AWS: instance.AWS{CertificatesFile: c.file("aws.pem"), Accounts: []string{"123456789012"}}, AdmissionConfig: a}},
		GCP:   []controller.GCPConfig{{GCP: instance.GCP{JWKSFile: c.file("google.json"), Projects: []string{"acme-prod"}}, AdmissionConfig: a}},
		Azure: []controller.AzureConfig{{Azure: instance.Azure{CertificatesFile: c.file("azure.pem"), Subscriptions: []string{"8d10da13-8125-4ba9-a717-bf7490507b3d"}}, AdmissionConfig: a}},
	}
}

var asDB = controller.AdmissionConfig{Namespace: "/acme/prod", Labels: map[string]string{"role": "db"}}

func cloudWorld(t *testing.T, a controller.AdmissionConfig) (*world, *clouds) {
	t.Helper()
	c := newClouds(t)
	w := newWorld(t, func(w *world) { w.cfg.Enrolment.Cloud = c.config(a) })
	w.apply(tree)
	return w, c
}

// of is a source of documents that some function signs.
func (c *clouds) of(provider string, document func(cloud.Challenge) ([]byte, error)) enrol.DocumentSource {
	return func(_ context.Context, challenge cloud.Challenge) (*symbolonv1.CloudDocument, error) {
		b, err := document(challenge)
		return &symbolonv1.CloudDocument{Provider: provider, Document: b}, err
	}
}

// started is an instance of AWS's that was started at a time.
func (c *clouds) started(id, at string) enrol.DocumentSource {
	return c.of(cloud.AWS, func(cloud.Challenge) ([]byte, error) {
		return c.aws.Document(c.aws.Instance(id).With("pendingTime", at))
	})
}

func (c *clouds) onAWS(id string) enrol.DocumentSource { return c.started(id, "2026-01-02T03:04:05Z") }

func (c *clouds) onGCP(id string) enrol.DocumentSource {
	return c.of(cloud.GCP, func(ch cloud.Challenge) ([]byte, error) { return c.gcp.Token(c.gcp.Instance(id, ch.Audience)) })
}

func (c *clouds) onAzure(id string) enrol.DocumentSource {
	return c.of(cloud.Azure, func(ch cloud.Challenge) ([]byte, error) { return c.azure.Document(c.azure.Instance(id, ch.Nonce)) })
}

func (w *world) byDocument(source enrol.DocumentSource) (*host, error) {
	w.t.Helper()
	c, err := enrol.ByDocument(w.t.Context(), w.address(), w.roots(), source, nil, nil)
	if err != nil {
		return nil, err
	}
	return &host{c, w.proxy(c.TLS())}, nil
}

func (w *world) byToken(token enrol.Token, source enrol.DocumentSource) (*host, error) {
	w.t.Helper()
	c, err := enrol.Enrol(w.t.Context(), w.address(), token, nil, nil, enrol.WithDocument(source))
	if err != nil {
		return nil, err
	}
	return &host{c, w.proxy(c.TLS())}, nil
}

func (w *world) remove(h *host, readmit bool) {
	w.t.Helper()
	if _, err := w.admin().RemoveHost(w.t.Context(), connect.NewRequest(&symbolonv1.RemoveHostRequest{Id: h.HostID, Readmit: readmit})); err != nil {
		w.t.Fatal(err)
	}
}

// claims are the cloud.* ones of a new SVID of the host's.
func (w *world) cloudClaims(h *host) map[string]string {
	w.t.Helper()
	res, err := h.issue(w.t.Context(), w.t, "proc.exe", "/usr/bin/postgres")
	if err != nil {
		w.t.Fatal(err)
	}
	m := make(map[string]string)
	for k, v := range principal(w.t, h.HostCredential, res.GetSvid()).Attributes.Proto() {
		if strings.HasPrefix(k, "cloud.") {
			m[k] = strings.Join(v.GetValues(), " ")
		}
	}
	return m
}

func TestEnrolByDocument(t *testing.T) {
	w, c := cloudWorld(t, asDB)
	for _, test := range []struct {
		source enrol.DocumentSource
		want   map[string]string
	}{
		{c.onAWS("i-0a1b"), map[string]string{
			"cloud.provider": "aws", "cloud.account": "123456789012", "cloud.region": "eu-west-1", "cloud.zone": "eu-west-1a",
			"cloud.instance_id": "i-0a1b", "cloud.instance_type": "m5.large", "cloud.image_id": "ami-0a1b2c3d4e5f60718",
		}},
		{c.onGCP("77"), map[string]string{
			"cloud.provider": "gcp", "cloud.project": "acme-prod", "cloud.region": "europe-west4", "cloud.zone": "europe-west4-a",
			"cloud.instance_id": "77", "cloud.instance_name": "db-1",
		}},
		{c.onAzure(vmID), map[string]string{
			"cloud.provider": "azure", "cloud.subscription": "8d10da13-8125-4ba9-a717-bf7490507b3d", "cloud.instance_id": vmID,
		}},
	} {
		h, err := w.byDocument(test.source)
		if err != nil {
			t.Errorf("%s: %v", test.want["cloud.provider"], err)
			continue
		}
		if diff := cmp.Diff(test.want, w.cloudClaims(h)); diff != "" || h.Namespace != "/acme/prod" {
			t.Errorf("%s in %s:\n%s", test.want["cloud.provider"], h.Namespace, diff)
		}
		// What the controller vouches for stands when the host renews, and operators see it.
		if _, err := h.Renew(t.Context(), h); err != nil {
			t.Error(err)
		}
		hosts, err := w.admin().ListHosts(t.Context(), connect.NewRequest(&symbolonv1.ListHostsRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		for _, listed := range hosts.Msg.GetHosts() {
			if got := listed.GetAttributes()["cloud.instance_id"].GetValues(); listed.GetId() == h.HostID && (len(got) != 1 || got[0] != test.want["cloud.instance_id"]) {
				t.Errorf("the host is listed with cloud.instance_id %v", got)
			}
		}
	}
	// It does not take a host's word for it.
	h, err := w.byDocument(c.onAWS("i-0a1c"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = h.issue(t.Context(), t, "proc.exe", "/usr/bin/postgres", "cloud.region", "us-east-1")
	wantCode(t, err, connect.CodePermissionDenied, "cloud.region")
}

// A document that somebody has recorded is worth nothing to him, where the format can say
// what it was asked for; AWS's is worth something once.
func TestDocumentsAreNotReplayed(t *testing.T) {
	w, c := cloudWorld(t, asDB)
	recorded := func(source enrol.DocumentSource) enrol.DocumentSource {
		d, err := source(t.Context(), cloud.Challenge{Audience: "symbolon-enrolment:" + strings.Repeat("0", 64), Nonce: strings.Repeat("0", 32)})
		if err != nil {
			t.Fatal(err)
		}
		return func(context.Context, cloud.Challenge) (*symbolonv1.CloudDocument, error) { return d, nil }
	}
	_, err := w.byDocument(recorded(c.onGCP("77")))
	wantCode(t, err, connect.CodeUnauthenticated, "audience is another")
	_, err = w.byDocument(recorded(c.onAzure(vmID)))
	wantCode(t, err, connect.CodeUnauthenticated, "nonce is another")
	// One that was good on one connection is not on the next.
	var seen *symbolonv1.CloudDocument
	genuine := c.onGCP("77")
	if _, err := w.byDocument(func(ctx context.Context, ch cloud.Challenge) (d *symbolonv1.CloudDocument, err error) {
		seen, err = genuine(ctx, ch)
		return seen, err
	}); err != nil {
		t.Fatal(err)
	}
	_, err = w.byDocument(func(context.Context, cloud.Challenge) (*symbolonv1.CloudDocument, error) { return seen, nil })
	wantCode(t, err, connect.CodeUnauthenticated, "audience is another")

	// Of many who hold AWS's document, one is the host.
	var group sync.WaitGroup
	results := make(chan error, 8)
	for range cap(results) {
		group.Go(func() { _, err := w.byDocument(c.onAWS("i-0a1b")); results <- err })
	}
	group.Wait()
	close(results)
	in := 0
	for err := range results {
		if err == nil {
			in++
			continue
		}
		wantCode(t, err, connect.CodePermissionDenied, "enrolled before", "readmit")
	}
	if in != 1 {
		t.Errorf("%d of 8 are the host, want 1", in)
	}
	// Nor after a restart.
	w.halt()
	w.cfg.Listen = "127.0.0.1:0"
	w.start()
	_, err = w.byDocument(c.onAWS("i-0a1b"))
	wantCode(t, err, connect.CodePermissionDenied, "enrolled before")
	for name, source := range map[string]enrol.DocumentSource{
		"forged":           c.of(cloud.AWS, func(cloud.Challenge) ([]byte, error) { return []byte("i-0a1b"), nil }),
		"of another cloud": c.of(cloud.Azure, func(cloud.Challenge) ([]byte, error) { return c.aws.Document(c.aws.Instance("i-2")) }),
		"of no cloud":      c.of("oracle", func(cloud.Challenge) ([]byte, error) { return c.aws.Document(c.aws.Instance("i-2")) }),
		"too large":        c.of(cloud.AWS, func(cloud.Challenge) ([]byte, error) { return make([]byte, cloud.MaxDocument+1), nil }),
		"empty":            c.of(cloud.AWS, func(cloud.Challenge) ([]byte, error) { return nil, nil }),
	} {
		if _, err := w.byDocument(source); connect.CodeOf(err) != connect.CodeUnauthenticated {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// An instance that lost its key comes back as the host that it was, where the operator
// lets it: with a document that was made for this, or by a newer start than the last.
func TestInstancesComeBack(t *testing.T) {
	back := asDB
	back.Reenrol = true
	w, c := cloudWorld(t, back)
	first, err := w.byDocument(c.onGCP("77"))
	if err != nil {
		t.Fatal(err)
	}
	s := first.open(t, &symbolonv1.Hello{})
	s.generation()
	again, err := w.byDocument(c.onGCP("77"))
	if err != nil || again.HostID != first.HostID {
		t.Fatalf("again: %v, %v; want host %s", again, err, first.HostID)
	}
	again.open(t, &symbolonv1.Hello{}).generation()
	wantCode(t, s.end(), connect.CodeAborted)
	if other, err := w.byDocument(c.onGCP("78")); err != nil || other.HostID == first.HostID {
		t.Errorf("another instance: %v, %v", other, err)
	}

	const monday, tuesday = "2026-01-05T08:00:00Z", "2026-01-06T08:00:00Z"
	one, err := w.byDocument(c.started("i-1", monday))
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.byDocument(c.started("i-1", monday))
	wantCode(t, err, connect.CodePermissionDenied, "since it was started last")
	two, err := w.byDocument(c.started("i-1", tuesday))
	if err != nil || two.HostID != one.HostID {
		t.Fatalf("started anew: %v, %v; want host %s", two, err, one.HostID)
	}
	_, err = w.byDocument(c.started("i-1", monday))
	wantCode(t, err, connect.CodePermissionDenied, "since it was started last")

	// A host that was revoked does not come back by it.
	w.revoke(&symbolonv1.RevokeRequest{Host: first.HostID, Reason: "a test's"})
	_, err = w.byDocument(c.onGCP("77"))
	wantCode(t, err, connect.CodePermissionDenied, "revoked")
}

// A host that was removed stays away, unless the operator says otherwise.
func TestRemovedInstances(t *testing.T) {
	w, c := cloudWorld(t, asDB)
	enrol := func(what string) *host {
		t.Helper()
		h, err := w.byDocument(c.onAWS("i-1"))
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		return h
	}
	first := enrol("at first")
	w.remove(first, true)
	second := enrol("readmitted")
	if second.HostID == first.HostID {
		t.Error("it is the host that was removed")
	}
	w.remove(second, false)
	_, err := w.byDocument(c.onAWS("i-1"))
	wantCode(t, err, connect.CodePermissionDenied, "removed", "join token")
	third, err := w.byToken(w.token("/acme/prod", nil), c.onAWS("i-1"))
	if err != nil {
		t.Fatalf("by a join token: %v", err)
	}
	if got := w.cloudClaims(third)["cloud.instance_id"]; got != "i-1" {
		t.Errorf("cloud.instance_id %q", got)
	}
	w.remove(third, false)
	_, err = w.byDocument(c.onAWS("i-1"))
	wantCode(t, err, connect.CodePermissionDenied, "removed")
}

// Beside a token or a certificate a document adds attributes, and makes its instance that
// host's; it takes nothing from them.
func TestDocumentBesideAnother(t *testing.T) {
	machines, c := newPopCA(t), newClouds(t)
	w := newWorld(t, func(w *world) {
		w.cfg.Enrolment.X509PoP = []controller.X509PoPConfig{{CAFile: machines.file, Namespace: "/acme/dev"}}
		w.cfg.Enrolment.Cloud = c.config(controller.AdmissionConfig{})
	})
	w.apply(tree)
	token := w.token("/acme/dev", map[string]string{"role": "web"})
	_, err := w.byToken(token, c.of(cloud.AWS, func(cloud.Challenge) ([]byte, error) { return []byte("i-1"), nil }))
	wantCode(t, err, connect.CodeUnauthenticated, "no PKCS#7")
	_, err = w.byToken(token, func(context.Context, cloud.Challenge) (*symbolonv1.CloudDocument, error) {
		return nil, cloud.ErrRefused
	})
	if !errors.Is(err, cloud.ErrRefused) {
		t.Errorf("no document: %v", err)
	}
	h, err := w.byToken(token, c.onAWS("i-1")) // the token was not spent by the others
	if err != nil {
		t.Fatal(err)
	}
	if got := w.cloudClaims(h)["cloud.account"]; got != "123456789012" || h.Namespace != "/acme/dev" {
		t.Errorf("cloud.account %q, in %s", got, h.Namespace)
	}
	// A host of one namespace does not get the attributes of an instance that is another's.
	token = w.token("/acme/dev", nil)
	_, err = w.byToken(token, c.onAWS("i-1"))
	wantCode(t, err, connect.CodePermissionDenied, "another host", h.HostID)
	if _, err := w.byToken(token, c.onAWS("i-2")); err != nil {
		t.Errorf("its own: %v", err)
	}
	// Documents that only add attributes let nobody in.
	for name, source := range map[string]enrol.DocumentSource{"a host's": c.onAWS("i-1"), "nobody's": c.onAWS("i-3")} {
		if _, err := w.byDocument(source); connect.CodeOf(err) != connect.CodePermissionDenied {
			t.Errorf("%s document alone: %v", name, err)
		}
	}

	key := ecKey(t)
	cert := machines.machine(key, nil)
	byCert := func(source enrol.DocumentSource) (*host, error) {
		cred, err := enrol.ByCertificate(t.Context(), w.address(), w.roots(), cert, nil, nil, enrol.WithDocument(source))
		if err != nil {
			return nil, err
		}
		return &host{cred, w.proxy(cred.TLS())}, nil
	}
	_, err = byCert(c.onAWS("i-1"))
	wantCode(t, err, connect.CodePermissionDenied, "another host")
	machine, err := byCert(c.onGCP("9"))
	if err != nil {
		t.Fatal(err)
	}
	if again, err := byCert(c.onGCP("9")); err != nil || again.HostID != machine.HostID {
		t.Errorf("a certificate and a document again: %v, %v", again, err)
	}
	if got := w.cloudClaims(machine)["cloud.project"]; got != "acme-prod" {
		t.Errorf("cloud.project %q", got)
	}
	w.remove(h, false)
	_, err = byCert(c.onAWS("i-1"))
	wantCode(t, err, connect.CodePermissionDenied, "removed")
	// Without the document the next time, it is the same host without the attributes.
	plain, err := w.byCertificate(cert)
	if err != nil || plain.HostID != machine.HostID {
		t.Fatalf("%v, %v", plain, err)
	}
	if got := w.cloudClaims(plain); len(got) != 0 {
		t.Errorf("without a document: %v", got)
	}
}

// An instance that is a host by a token is not taken over by whoever runs there and can
// ask for its documents, even where documents let in.
func TestDocumentDoesNotTakeOver(t *testing.T) {
	back := asDB
	back.Reenrol = true
	w, c := cloudWorld(t, back)
	h, err := w.byToken(w.token("/acme/dev", nil), c.onAzure(vmID))
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.byDocument(c.onAzure(vmID))
	wantCode(t, err, connect.CodePermissionDenied, "by other means", h.HostID)
}

func TestCloudAnchorsAway(t *testing.T) {
	w, c := cloudWorld(t, asDB)
	if err := os.Remove(c.file("google.json")); err != nil {
		t.Fatal(err)
	}
	_, err := w.byDocument(c.onGCP("77"))
	wantCode(t, err, connect.CodeUnavailable, "its log says more")
	if strings.Contains(err.Error(), c.dir) {
		t.Errorf("%v: a stranger learns of paths", err)
	}
	w.halt()
	if _, err := controller.New(t.Context(), w.cfg, controller.Options{}); !errors.Is(err, controller.ErrConfig) || !strings.Contains(err.Error(), "enrolment.cloud.gcp") {
		t.Errorf("started without its anchors: %v", err)
	}
}

func TestCloudNotConfigured(t *testing.T) {
	w, c := newWorld(t), newClouds(t)
	_, err := w.byDocument(c.onGCP("77"))
	wantCode(t, err, connect.CodeUnauthenticated, "no enrolment.cloud.gcp")
}

func TestCloudConfig(t *testing.T) {
	const uuid = "8d10da13-8125-4ba9-a717-bf7490507b3d"
	load := func(text string) (controller.Config, error) {
		name := filepath.Join(t.TempDir(), "controller.yaml")
		if err := os.WriteFile(name, []byte("trust_domain: acme.example\nenrolment:\n  cloud:\n"+text), 0o600); err != nil {
			t.Fatal(err)
		}
		return controller.LoadConfig(name, func(string) (string, bool) { return "", false }, nil)
	}
	got, err := load(`
    aws:
      - {certificates_file: /aws.pem, accounts: ["012345678901"], regions: [eu-west-1], started_within: 15m, namespace: /acme, labels: {role: db}, reenrol: true}
    gcp: [{jwks_file: /google.json, projects: [acme-prod]}]
    azure: [{certificates_file: /azure.pem, subscriptions: [` + uuid + `], names: [metadata.azure.us]}]
`)
	if err != nil {
		t.Fatal(err)
	}
	want := controller.CloudConfig{
		AWS: []controller.AWSConfig{{
			AWS:             instance.AWS{CertificatesFile: "/aws.pem", Accounts: []string{"012345678901"}, Regions: []string{"eu-west-1"}, StartedWithin: 15 * time.Minute},
			AdmissionConfig: controller.AdmissionConfig{Namespace: "/acme", Labels: map[string]string{"role": "db"}, Reenrol: true},
		}},
		GCP:   []controller.GCPConfig{{GCP: instance.GCP{JWKSFile: "/google.json", Projects: []string{"acme-prod"}}}},
		Azure: []controller.AzureConfig{{Azure: instance.Azure{CertificatesFile: "/azure.pem", Subscriptions: []string{uuid}, Names: []string{"metadata.azure.us"}}}},
	}
	if diff := cmp.Diff(want, got.Enrolment.Cloud); diff != "" {
		t.Error(diff)
	}
	flags := map[string]string{"trust-domain": "acme.example", "enrolment-cloud-gcp": "[{jwks_file: /google.json, projects: [acme-prod]}]"}
	asFlag, err := controller.LoadConfig("", func(string) (string, bool) { return "", false }, flags)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want.GCP, asFlag.Enrolment.Cloud.GCP); diff != "" {
		t.Error(diff)
	}
	for text, words := range map[string][]string{
		"    aws: [{certificates_file: aws.pem, accounts: [\"123456789012\"]}]\n":                             {"enrolment.cloud.aws[0].certificates_file", "absolute"},
		"    aws: [{certificates_file: /aws.pem}]\n":                                                          {"enrolment.cloud.aws[0].accounts", "not set"},
		"    aws: [{certificates_file: /aws.pem, accounts: [12345]}]\n":                                       {"accounts", "12 digits"},
		"    aws: [{certificates_file: /aws.pem, accounts: [\"123456789012\"], started_within: -1s}]\n":       {"started_within", "negative"},
		"    aws: [{certificates_file: /aws.pem, accounts: [\"123456789012\"], labels: {a: b}}]\n":            {"namespace", "not set"},
		"    gcp: [{jwks_file: /k, projects: [\"\"]}]\n":                                                      {"enrolment.cloud.gcp[0].projects", "empty"},
		"    gcp: [{jwks_file: /k, projects: [a], reenrol: true}]\n":                                          {"namespace", "reenrol"},
		"    gcp: [{jwks_file: /k, projects: [a], namespace: acme}]\n":                                        {"namespace", "absolute"},
		"    gcp: [{jwks_file: /k, projects: [a], accounts: [b]}]\n":                                          {"accounts"},
		"    azure: [{certificates_file: /a, subscriptions: [a], names: [\"*.metadata.azure.com\"]}]\n":       {"names", "subdomains are included"},
		"    azure: [{certificates_file: /a, subscriptions: [a], namespace: /a, labels: {\"Bad Key\": b}}]\n": {"labels"},
	} {
		_, err := load(text)
		if !errors.Is(err, controller.ErrConfig) {
			t.Errorf("%s: %v", text, err)
			continue
		}
		for _, word := range words {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%s: %v; want it to say %q", text, err, word)
			}
		}
	}
}
