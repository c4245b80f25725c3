package cloudlab

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// Fields are a document's.
type Fields map[string]any

// With is a copy with one field changed.
func (f Fields) With(key string, value any) Fields {
	out := Fields{key: value}
	for k, v := range f {
		if k != key {
			out[k] = v
		}
	}
	return out
}

// JSON is the document.
func (f Fields) JSON() []byte {
	b, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		panic(err) // of values that tests make
	}
	return b
}

// Certificate makes one of a template, signed by parent's key; a nil parent: by its own.
func Certificate(template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	if template.NotAfter.IsZero() {
		template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	}
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// PEM is a file of certificates.
func PEM(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

// AWS is one region's signer.
type AWS struct {
	Cert *x509.Certificate
	Key  *rsa.PrivateKey
}

// NewAWS makes a signer's key of 2048 bits and its certificate, which signs itself.
func NewAWS() (*AWS, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	cert, err := Certificate(&x509.Certificate{
		Subject: pkix.Name{Country: []string{"US"}, Province: []string{"Washington State"}, Locality: []string{"Seattle"}, Organization: []string{"Amazon Web Services LLC"}},
	}, nil, key.Public(), key)
	return &AWS{cert, key}, err
}

// Certificates is the file that a controller believes.
func (a *AWS) Certificates() []byte { return PEM(a.Cert) }

// Instance is what AWS says of one.
func (*AWS) Instance(id string) Fields {
	return Fields{
		"accountId": "123456789012", "architecture": "x86_64", "availabilityZone": "eu-west-1a", "billingProducts": nil,
		"devpayProductCodes": nil, "marketplaceProductCodes": nil, "imageId": "ami-0a1b2c3d4e5f60718", "instanceId": id,
		"instanceType": "m5.large", "kernelId": nil, "pendingTime": "2026-01-02T03:04:05Z", "privateIp": "10.0.0.9", "ramdiskId": nil,
		"region": "eu-west-1", "version": "2017-09-30",
	}
}

// Signer is the region's.
func (a *AWS) Signer() Signer { return Signer{Cert: a.Cert, Key: a.Key} }

// Document is signed as AWS does: the certificate is not in it.
func (a *AWS) Document(f Fields) ([]byte, error) {
	return (&Message{Content: f.JSON(), Signers: []Signer{a.Signer()}, Indefinite: true}).Marshal()
}

// GCP is Google's signer.
type GCP struct {
	Key   *rsa.PrivateKey
	KeyID string
}

// NewGCP makes a signer.
func NewGCP() (*GCP, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	return &GCP{key, "0a1b2c3d4e5f"}, err
}

// JWKS is the file that a controller believes.
func (g *GCP) JWKS() ([]byte, error) {
	return json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: g.Key.Public(), KeyID: g.KeyID, Algorithm: "RS256", Use: "sig"}}})
}

// Instance is what Google says of one, to an audience.
func (*GCP) Instance(id, audience string) Fields {
	now := time.Now()
	return Fields{
		"aud": audience, "azp": "107517467455664443765", "sub": "107517467455664443765", "iss": "https://accounts.google.com",
		"email": "1234567890-compute@developer.gserviceaccount.com", "email_verified": true, "iat": now.Unix(), "exp": now.Add(time.Hour).Unix(),
		"google": Fields{"compute_engine": Engine(id)},
	}
}

// Engine is the part about the instance.
func Engine(id string) Fields {
	return Fields{
		"instance_creation_timestamp": 1767323045, "instance_id": id, "instance_name": "db-1",
		"project_id": "acme-prod", "project_number": 1234567890, "zone": "europe-west4-a",
	}
}

// Token is signed as Google does.
func (g *GCP) Token(f Fields) ([]byte, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: g.Key}, (&jose.SignerOptions{}).WithType("JWT").WithHeader("kid", g.KeyID))
	if err != nil {
		return nil, err
	}
	text, err := jwt.Signed(signer).Claims(map[string]any(f)).Serialize()
	return []byte(text), err
}

// Azure is the metadata service's signer, below an intermediate and a root.
type Azure struct {
	Root, Intermediate, Leaf *x509.Certificate
	Key                      *rsa.PrivateKey // the leaf's
	intermediateKey          crypto.Signer
}

// NewAzure makes all three; the leaf is for metadata.azure.com.
func NewAzure() (*Azure, error) {
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	middleKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	a := &Azure{intermediateKey: middleKey}
	authority := func(name string) *x509.Certificate {
		return &x509.Certificate{Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	}
	if a.Root, err = Certificate(authority("Test Global Root G2"), nil, rootKey.Public(), rootKey); err != nil {
		return nil, err
	}
	if a.Intermediate, err = Certificate(authority("Test Azure RSA TLS Issuing CA 07"), a.Root, middleKey.Public(), rootKey); err != nil {
		return nil, err
	}
	if a.Key, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		return nil, err
	}
	a.Leaf, err = a.Certify("metadata.azure.com")
	return a, err
}

// Certify makes a leaf for the same key and another name.
func (a *Azure) Certify(name string) (*x509.Certificate, error) {
	return Certificate(&x509.Certificate{
		Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.Intermediate, a.Key.Public(), a.intermediateKey)
}

// Certificates is the file that a controller believes.
func (a *Azure) Certificates() []byte { return PEM(a.Root, a.Intermediate) }

// Instance is what Azure says of one, for a nonce.
func (*Azure) Instance(id, nonce string) Fields {
	const form = "01/02/06 15:04:05 -0000"
	now := time.Now().UTC()
	return Fields{
		"licenseType": "", "nonce": nonce, "plan": Fields{"name": "", "product": "", "publisher": ""}, "sku": "12-gen2",
		"subscriptionId": "8d10da13-8125-4ba9-a717-bf7490507b3d", "vmId": id,
		"timeStamp": Fields{"createdOn": now.Format(form), "expiresOn": now.Add(6 * time.Hour).Format(form)},
	}
}

// Document is signed as Azure does: with the leaf, without what is above.
func (a *Azure) Document(f Fields) ([]byte, error) {
	return (&Message{Content: f.JSON(), Signers: []Signer{{Cert: a.Leaf, Key: a.Key}}, Certificates: []*x509.Certificate{a.Leaf}}).Marshal()
}
