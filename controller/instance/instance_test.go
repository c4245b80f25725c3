package instance_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/symbolon/symbolon/controller/instance"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/cloud"
	"github.com/symbolon/symbolon/internal/cloudlab"
)

const (
	account      = "123456789012"
	subscription = "8d10da13-8125-4ba9-a717-bf7490507b3d"
	vm           = "02aab8a4-74ef-476e-8182-f6d2ba4166a6"
)

var challenge = cloud.Challenge{Audience: "symbolon-enrolment:0011", Nonce: "00112233445566778899aabbccddeeff"}

// must is for what tests make.
func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func write(t *testing.T, content []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "anchors")
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// clouds is one of each, and an authority that believes it.
type clouds struct {
	aws   *cloudlab.AWS
	gcp   *cloudlab.GCP
	azure *cloudlab.Azure

	onAWS   *instance.AWS
	onGCP   *instance.GCP
	onAzure *instance.Azure
}

// made once: RSA keys take their time.
var (
	theAWS   = sync.OnceValues(cloudlab.NewAWS)
	otherAWS = sync.OnceValues(cloudlab.NewAWS)
	theGCP   = sync.OnceValues(cloudlab.NewGCP)
	theAzure = sync.OnceValues(cloudlab.NewAzure)
)

func newClouds(t *testing.T) *clouds {
	t.Helper()
	c := &clouds{aws: must[*cloudlab.AWS](t)(theAWS()), gcp: must[*cloudlab.GCP](t)(theGCP()), azure: must[*cloudlab.Azure](t)(theAzure())}
	c.onAWS = &instance.AWS{CertificatesFile: write(t, c.aws.Certificates()), Accounts: []string{account}}
	c.onGCP = &instance.GCP{JWKSFile: write(t, must[[]byte](t)(c.gcp.JWKS())), Projects: []string{"acme-prod"}}
	c.onAzure = &instance.Azure{CertificatesFile: write(t, c.azure.Certificates()), Subscriptions: []string{strings.ToUpper(subscription)}}
	for _, a := range []instance.Authority{c.onAWS, c.onGCP, c.onAzure} {
		if err := a.Check(); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func TestAttributes(t *testing.T) {
	c := newClouds(t)
	all := []instance.Authority{c.onAzure, c.onGCP, c.onAWS}
	for _, test := range []struct {
		provider string
		document []byte
		place    int
		want     instance.Instance
	}{
		{cloud.AWS, must[[]byte](t)(c.aws.Document(c.aws.Instance("i-0a1b"))), 2, instance.Instance{
			Name: "aws/123456789012/eu-west-1/i-0a1b", Started: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
			Attributes: identity.NewAttributes(map[string][]string{
				"cloud.provider": {"aws"}, "cloud.account": {account}, "cloud.region": {"eu-west-1"}, "cloud.zone": {"eu-west-1a"},
				"cloud.instance_id": {"i-0a1b"}, "cloud.instance_type": {"m5.large"}, "cloud.image_id": {"ami-0a1b2c3d4e5f60718"},
			}),
		}},
		{cloud.GCP, must[[]byte](t)(c.gcp.Token(c.gcp.Instance("77", challenge.Audience))), 1, instance.Instance{
			Name: "gcp/1234567890/77",
			Attributes: identity.NewAttributes(map[string][]string{
				"cloud.provider": {"gcp"}, "cloud.project": {"acme-prod"}, "cloud.region": {"europe-west4"}, "cloud.zone": {"europe-west4-a"},
				"cloud.instance_id": {"77"}, "cloud.instance_name": {"db-1"},
			}),
		}},
		{cloud.Azure, must[[]byte](t)(c.azure.Document(c.azure.Instance(strings.ToUpper(vm), challenge.Nonce))), 0, instance.Instance{
			Name: "azure/" + subscription + "/" + vm,
			Attributes: identity.NewAttributes(map[string][]string{
				"cloud.provider": {"azure"}, "cloud.subscription": {subscription}, "cloud.instance_id": {vm},
			}),
		}},
	} {
		got, place, err := instance.Verify(all, test.provider, test.document, challenge, time.Now())
		if err != nil {
			t.Errorf("%s: %v", test.provider, err)
			continue
		}
		if diff := cmp.Diff(test.want, *got); diff != "" || place != test.place {
			t.Errorf("%s: authority %d:\n%s", test.provider, place, diff)
		}
	}
}

// refused checks that a document is, and why.
func refused(t *testing.T, name string, a instance.Authority, document []byte, now time.Time, why string) {
	t.Helper()
	_, _, err := instance.Verify([]instance.Authority{a}, a.Provider(), document, challenge, now)
	if !errors.Is(err, instance.ErrDocument) || !strings.Contains(err.Error(), why) {
		t.Errorf("%s: %v; want a refusal that says %q", name, err, why)
	}
}

func TestAuthorityOfAnother(t *testing.T) {
	c := newClouds(t)
	document := must[[]byte](t)(c.aws.Document(c.aws.Instance("i-1")))
	if _, _, err := instance.Verify([]instance.Authority{c.onGCP}, cloud.AWS, document, challenge, time.Now()); err == nil || !strings.Contains(err.Error(), "no enrolment.cloud.aws") {
		t.Errorf("no authority: %v", err)
	}
	if _, _, err := instance.Verify([]instance.Authority{c.onGCP}, "\x1b[2Jevil", document, challenge, time.Now()); err == nil || strings.Contains(err.Error(), "evil") {
		t.Errorf("an unknown provider: %v", err)
	}
	// The account that is missing is told, not the certificate that another entry has.
	stranger := must[*cloudlab.AWS](t)(otherAWS())
	others := []instance.Authority{
		&instance.AWS{CertificatesFile: c.onAWS.CertificatesFile, Accounts: []string{"999999999999"}},
		&instance.AWS{CertificatesFile: write(t, stranger.Certificates()), Accounts: []string{account}},
	}
	if _, _, err := instance.Verify(others, cloud.AWS, document, challenge, time.Now()); err == nil || !strings.Contains(err.Error(), "account "+account) {
		t.Errorf("two that refuse: %v", err)
	}
	_, place, err := instance.Verify(append(others, c.onAWS), cloud.AWS, document, challenge, time.Now())
	if err != nil || place != 2 {
		t.Errorf("the third of three: %d, %v", place, err)
	}
	for _, size := range []int{0, cloud.MaxDocument + 1} {
		if _, _, err := instance.Verify([]instance.Authority{c.onAWS}, cloud.AWS, make([]byte, size), challenge, time.Now()); !errors.Is(err, instance.ErrDocument) || !strings.Contains(err.Error(), "bytes") {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

// What is trusted is read when it is needed: a cloud's new key counts at once, and one
// that was taken out counts no longer; a file that is away says nothing about a document.
func TestAnchorsAreReadAnew(t *testing.T) {
	c := newClouds(t)
	next := must[*cloudlab.AWS](t)(otherAWS())
	document := must[[]byte](t)(next.Document(next.Instance("i-1")))
	refused(t, "before", c.onAWS, document, time.Now(), "no certificate or key")
	if err := os.WriteFile(c.onAWS.CertificatesFile, next.Certificates(), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := c.onAWS.Verify(document, challenge, time.Now()); err != nil {
		t.Errorf("after: %v", err)
	}
	refused(t, "the old one", c.onAWS, must[[]byte](t)(c.aws.Document(c.aws.Instance("i-1"))), time.Now(), "no certificate or key")
	if err := os.Remove(c.onAWS.CertificatesFile); err != nil {
		t.Fatal(err)
	}
	if _, err := c.onAWS.Verify(document, challenge, time.Now()); !errors.Is(err, instance.ErrAnchors) || errors.Is(err, instance.ErrDocument) {
		t.Errorf("no file: %v", err)
	}
}
