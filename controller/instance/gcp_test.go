package instance_test

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/symbolon/symbolon/controller/instance"
	"github.com/symbolon/symbolon/identity/cloud"
	"github.com/symbolon/symbolon/internal/cloudlab"
)

func save(t testing.TB, file string, content []byte) {
	t.Helper()
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// token makes a JWT by an algorithm and a key of an attacker's choice.
func token(t *testing.T, f cloudlab.Fields, algorithm jose.SignatureAlgorithm, key any, kid string) []byte {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: key}, (&jose.SignerOptions{}).WithType("JWT").WithHeader("kid", kid))
	if err != nil {
		t.Fatal(err)
	}
	text, err := jwt.Signed(signer).Claims(map[string]any(f)).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return []byte(text)
}

func TestGCPRefuses(t *testing.T) {
	c, stranger := newClouds(t), must[*cloudlab.GCP](t)(cloudlab.NewGCP())
	fields := c.gcp.Instance("77", challenge.Audience)
	genuine := must[[]byte](t)(c.gcp.Token(fields))
	engine := func(key string, value any) []byte {
		return must[[]byte](t)(c.gcp.Token(fields.With("google", cloudlab.Fields{"compute_engine": cloudlab.Engine("77").With(key, value)})))
	}
	with := func(key string, value any) []byte { return must[[]byte](t)(c.gcp.Token(fields.With(key, value))) }
	part := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return base64.RawURLEncoding.EncodeToString(b)
	}
	parts := strings.Split(string(genuine), ".")
	none := part(map[string]string{"alg": "none", "kid": c.gcp.KeyID}) + "." + parts[1] + "."
	public := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: must[[]byte](t)(x509.MarshalPKIXPublicKey(c.gcp.Key.Public()))})
	ownKey := jose.JSONWebKey{Key: stranger.Key.Public(), KeyID: c.gcp.KeyID}
	embedded, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: stranger.Key},
		(&jose.SignerOptions{}).WithHeader("kid", c.gcp.KeyID).WithHeader("jwk", ownKey))
	if err != nil {
		t.Fatal(err)
	}
	bringsKey := must[string](t)(jwt.Signed(embedded).Claims(map[string]any(fields)).Serialize())
	ok := time.Now()
	const signature, form = "no certificate or key", "no JWT"
	for _, test := range []struct {
		name     string
		document []byte
		now      time.Time
		why      string
	}{
		{"nothing that makes sense", []byte("77"), ok, form},
		{"alg none", []byte(none), ok, form},
		{"HS256 by the public key", token(t, fields, jose.HS256, public, c.gcp.KeyID), ok, form},
		{"PS256 by the right key", token(t, fields, jose.PS256, c.gcp.Key, c.gcp.KeyID), ok, form},
		{"JSON with two signatures", []byte(`{"payload":"` + parts[1] + `","signatures":[{"protected":"` + parts[0] + `","signature":"` + parts[2] + `"},{"protected":"` + parts[0] + `","signature":"` + parts[2] + `"}]}`), ok, form},
		{"another's key", token(t, fields, jose.RS256, stranger.Key, c.gcp.KeyID), ok, signature},
		{"another's key, which comes along", []byte(bringsKey), ok, signature},
		{"a key that is not known", token(t, fields, jose.RS256, c.gcp.Key, "other"), ok, signature},
		{"no key ID", token(t, fields, jose.RS256, c.gcp.Key, ""), ok, signature},
		{"other claims", []byte(parts[0] + "." + part(fields.With("sub", "1")) + "." + parts[2]), ok, signature},
		{"another issuer", with("iss", "https://accounts.google.com.evil.example"), ok, "not issued by"},
		{"another audience", with("aud", "symbolon-enrolment:0012"), ok, "audience is another"},
		{"our audience among others", with("aud", []string{challenge.Audience, "other"}), ok, "audience is another"},
		{"no audience", with("aud", ""), ok, "audience is another"},
		{"too late", genuine, ok.Add(61 * time.Minute), "not valid at this time"},
		{"too early", genuine, ok.Add(-10 * time.Minute), "not valid at this time"},
		{"without an end", with("exp", nil), ok, "not valid at this time"},
		{"for years", with("exp", ok.Add(10000*time.Hour).Unix()), ok, "for longer"},
		{"format=standard, or a service account's own", with("google", nil), ok, "not about an instance"},
		{"no instance", engine("instance_id", ""), ok, "not about an instance"},
		{"another project", engine("project_id", "evil"), ok, ""},
		{"oversized", append(bytes.Clone(genuine), bytes.Repeat([]byte("A"), cloud.MaxDocument)...), ok, "bytes"},
	} {
		if test.name == "another project" { // by name and by number
			test.document = must[[]byte](t)(c.gcp.Token(fields.With("google", cloudlab.Fields{"compute_engine": cloudlab.Engine("77").With("project_id", "evil").With("project_number", 6)})))
			test.why = "project evil is not"
		}
		refused(t, test.name, c.onGCP, test.document, test.now, test.why)
	}
	byNumber := &instance.GCP{JWKSFile: c.onGCP.JWKSFile, Projects: []string{"1234567890"}, Regions: []string{"europe-west4"}}
	if _, err := byNumber.Verify(genuine, challenge, ok); err != nil {
		t.Errorf("a project by its number: %v", err)
	}
	elsewhere := &instance.GCP{JWKSFile: c.onGCP.JWKSFile, Projects: c.onGCP.Projects, Regions: []string{"us-central1"}}
	refused(t, "another region", elsewhere, genuine, ok, "region europe-west4 is not")
	if _, err := c.onGCP.Verify(with("aud", ""), cloud.Challenge{}, ok); err == nil {
		t.Error("an empty audience answers an empty challenge")
	}
}

// What is no trust anchor is found at the start, with its place.
func TestAnchorsAreChecked(t *testing.T) {
	c := newClouds(t)
	private, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: c.gcp.Key, KeyID: "1"}}})
	if err != nil {
		t.Fatal(err)
	}
	anonymous, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: c.gcp.Key.Public()}}})
	if err != nil {
		t.Fatal(err)
	}
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte{1}})
	aws := func(b []byte) instance.Authority { return &instance.AWS{CertificatesFile: write(t, b)} }
	azure := func(b []byte) instance.Authority { return &instance.Azure{CertificatesFile: write(t, b)} }
	gcp := func(b []byte) instance.Authority { return &instance.GCP{JWKSFile: write(t, b)} }
	for _, test := range []struct {
		name string
		a    instance.Authority
		why  string
	}{
		{"no file", &instance.AWS{CertificatesFile: "/nowhere/aws.pem"}, "/nowhere/aws.pem"},
		{"an empty file", aws(nil), "no certificate"},
		{"a key", aws(append(c.aws.Certificates(), key...)), "a PRIVATE KEY"},
		{"a huge RSA key", aws(cloudlab.PEM(c.aws.Cert, hugeKey(t))), "certificate 2"},
		{"a leaf among CAs", azure(cloudlab.PEM(c.azure.Root, c.azure.Leaf)), "not a CA"},
		{"no root", azure(cloudlab.PEM(c.azure.Intermediate)), "no root"},
		{"no key set", gcp([]byte("keys")), "no JSON Web Key Set"},
		{"an empty key set", gcp([]byte("{}")), "no key"},
		{"a private key", gcp(private), "no public RSA key"},
		{"a key without an ID", gcp(anonymous), "no public RSA key"},
		{"a large file", gcp(bytes.Repeat([]byte(" "), 1<<20+1)), "more than"},
	} {
		if err := test.a.Check(); !errors.Is(err, instance.ErrAnchors) || !strings.Contains(err.Error(), test.why) {
			t.Errorf("%s: %v; want what says %q", test.name, err, test.why)
		}
	}
}
