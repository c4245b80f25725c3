package identity

import (
	"crypto/x509"
	"errors"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var partner = spiffeid.RequireTrustDomainFromString("partner.example")

func bundleJSON(t testing.TB, roots ...*x509.Certificate) []byte {
	t.Helper()
	data, err := spiffebundle.FromX509Authorities(partner, roots).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestParseBundle(t *testing.T) {
	root, other := newRoot(t, "partner.example"), newRoot(t, "other.example")
	leaf := root.issue("spiffe://partner.example/a/b", nil, nil)
	many := make([]*x509.Certificate, MaxRoots+1)
	for i := range many {
		many[i] = newRoot(t, "partner.example").cert
	}
	b, err := ParseBundle(partner, bundleJSON(t, root.cert))
	if err != nil || len(b.X509Authorities()) != 1 || !b.HasX509Authority(root.cert) {
		t.Fatalf("a good bundle: %v, %v", b, err)
	}
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"empty":                {nil, "not a JWK set"},
		"no JSON":              {[]byte("-----BEGIN CERTIFICATE-----"), "not a JWK set"},
		"no roots":             {[]byte(`{"keys":[]}`), "no X.509 authority"},
		"another domain's":     {bundleJSON(t, root.cert, other.cert), "of other.example, not of partner.example"},
		"a leaf":               {bundleJSON(t, leaf), "not a CA"},
		"too many roots":       {bundleJSON(t, many[:MaxRoots+1]...), "at most 32"},
		"a huge key":           {bundleJSON(t, root.cert, hugeCA(t, root)), "131073 bits, at most 8192"},
		"too large":            {make([]byte, MaxBundleSize+1), "larger than 64 KiB"},
		"a certificate broken": {[]byte(`{"keys":[{"use":"x509-svid","kty":"EC","crv":"P-256","x":"AA","y":"AA","x5c":["AAAA"]}]}`), "not a JWK set"},
	} {
		_, err := ParseBundle(partner, c.data)
		if !errors.Is(err, ErrMalformedBundle) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzParseBundle: whatever an endpoint sends does not panic, and what is accepted can
// be verified by.
func FuzzParseBundle(f *testing.F) {
	f.Add(bundleJSON(f, newRoot(f, "partner.example").cert))
	f.Add([]byte(`{"keys":[{"use":"jwt-svid","kty":"EC","kid":"a","crv":"P-256","x":"AA","y":"AA"}],"spiffe_sequence":1}`))
	f.Add([]byte(`{"keys":null,"spiffe_refresh_hint":-1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := ParseBundle(partner, data)
		if err == nil && len(b.X509Authorities()) == 0 {
			t.Error("no roots")
		}
	})
}
