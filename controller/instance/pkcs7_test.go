package instance_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"testing"
	"time"

	"github.com/symbolon/symbolon/controller/instance"
	"github.com/symbolon/symbolon/identity/cloud"
	"github.com/symbolon/symbolon/internal/cloudlab"
)

func TestAWSRefuses(t *testing.T) {
	c, stranger := newClouds(t), must[*cloudlab.AWS](t)(otherAWS())
	fields := c.aws.Instance("i-1")
	sign := func(m cloudlab.Message) []byte {
		t.Helper()
		if m.Content == nil {
			m.Content = fields.JSON()
		}
		return must[[]byte](t)(m.Marshal())
	}
	one := func(change func(*cloudlab.Signer)) []cloudlab.Signer {
		s := c.aws.Signer()
		change(&s)
		return []cloudlab.Signer{s}
	}
	genuine := must[[]byte](t)(c.aws.Document(fields))
	if _, err := c.onAWS.Verify(genuine, cloud.Challenge{}, time.Now()); err != nil {
		t.Fatal(err)
	}
	// The signed attributes of a genuine message, as content that was signed itself: the
	// signature is good, for it was made over these very bytes.
	attributes := c.aws.Signer()
	asContent := append([]byte{0x31, byte(len(attributes.Attributes(fields.JSON())))}, attributes.Attributes(fields.JSON())...)
	// The same serial number and issuer, another key.
	impostor := *c.aws.Cert
	const signature = "no certificate or key"
	ok := time.Now()
	for _, test := range []struct {
		name     string
		document []byte
		now      time.Time
		why      string
	}{
		{"nothing that makes sense", []byte("i-1"), ok, "no PKCS#7"},
		{"cut off", genuine[:len(genuine)-40], ok, ""},
		{"a byte of the document changed", bytes.Replace(genuine, []byte("eu-west-1a"), []byte("eu-west-1b"), 1), ok, signature},
		{"another's signature", sign(cloudlab.Message{Signers: []cloudlab.Signer{stranger.Signer()}}), ok, signature},
		{"another's signature, whose certificate comes along", sign(cloudlab.Message{Signers: []cloudlab.Signer{stranger.Signer()}, Certificates: []*x509.Certificate{stranger.Cert}}), ok, signature},
		{"another's signature in the signer's name", sign(cloudlab.Message{Signers: []cloudlab.Signer{{Cert: &impostor, Key: stranger.Key}}, Certificates: []*x509.Certificate{c.aws.Cert}}), ok, signature},
		{"no signer", sign(cloudlab.Message{}), ok, "0 signers"},
		{"two signers, the first good", sign(cloudlab.Message{Signers: []cloudlab.Signer{c.aws.Signer(), stranger.Signer()}}), ok, "2 signers"},
		{"two signers, the last good", sign(cloudlab.Message{Signers: []cloudlab.Signer{stranger.Signer(), c.aws.Signer()}}), ok, "2 signers"},
		{"SHA-1", sign(cloudlab.Message{Signers: one(func(s *cloudlab.Signer) { s.Hash = crypto.SHA1 })}), ok, "none of RSA or ECDSA with SHA-256"},
		{"attributes of other content", sign(cloudlab.Message{Signers: one(func(s *cloudlab.Signer) { s.Signed = fields.With("accountId", "1").JSON() })}), ok, signature},
		{"their digest in unsigned attributes", sign(cloudlab.Message{Signers: one(func(s *cloudlab.Signer) {
			s.Signed, s.Unsigned = []byte("{}"), [][]byte{cloudlab.DigestAttribute(fields.JSON())}
		})}), ok, signature},
		{"attributes of another type", sign(cloudlab.Message{Signers: one(func(s *cloudlab.Signer) { s.Type = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 5} })}), ok, "not about data"},
		{"attributes as content", sign(cloudlab.Message{Content: asContent, Signers: one(func(s *cloudlab.Signer) { s.Bare = true })}), ok, "no JSON document"},
		{"no document", sign(cloudlab.Message{Content: []byte{}, Signers: one(func(*cloudlab.Signer) {})}), ok, "no JSON document"},
		{"two documents", sign(cloudlab.Message{Content: append(fields.JSON(), fields.JSON()...), Signers: one(func(*cloudlab.Signer) {})}), ok, "no JSON document"},
		{"a list", sign(cloudlab.Message{Content: []byte("[" + string(fields.JSON()) + "]"), Signers: one(func(*cloudlab.Signer) {})}), ok, "no JSON document"},
		{"another account", must[[]byte](t)(c.aws.Document(fields.With("accountId", "210987654321"))), ok, "account 210987654321 is not"},
		{"no account", must[[]byte](t)(c.aws.Document(fields.With("accountId", ""))), ok, "lacks accountId"},
		{"an instance that is none", must[[]byte](t)(c.aws.Document(fields.With("instanceId", "i-1/../i-2"))), ok, "lacks accountId"},
		{"no time", must[[]byte](t)(c.aws.Document(fields.With("pendingTime", "0001-01-01T00:00:00Z"))), ok, "pendingTime"},
		{"after the certificate's time", genuine, ok.Add(48 * time.Hour), "not valid at this time"},
	} {
		refused(t, test.name, c.onAWS, test.document, test.now, test.why)
	}
	elsewhere := &instance.AWS{CertificatesFile: c.onAWS.CertificatesFile, Accounts: c.onAWS.Accounts, Regions: []string{"us-east-1"}}
	refused(t, "another region", elsewhere, genuine, ok, "region eu-west-1 is not")
	otherRegion := &instance.AWS{CertificatesFile: write(t, stranger.Certificates()), Accounts: c.onAWS.Accounts}
	refused(t, "another region's certificate", otherRegion, genuine, ok, signature)
	refused(t, "an instance of the future", c.onAWS, must[[]byte](t)(c.aws.Document(fields.With("pendingTime", ok.Add(time.Hour).UTC().Format(time.RFC3339)))), ok, "will be started")
	young := &instance.AWS{CertificatesFile: c.onAWS.CertificatesFile, Accounts: c.onAWS.Accounts, StartedWithin: 15 * time.Minute}
	started := func(ago time.Duration) []byte {
		return must[[]byte](t)(c.aws.Document(fields.With("pendingTime", ok.Add(-ago).UTC().Format(time.RFC3339))))
	}
	refused(t, "an old instance", young, started(16*time.Minute), ok, "longer than started_within")
	if _, err := young.Verify(started(14*time.Minute), cloud.Challenge{}, ok); err != nil {
		t.Errorf("a young instance: %v", err)
	}
	nobody := &instance.AWS{CertificatesFile: c.onAWS.CertificatesFile}
	refused(t, "no account is named", nobody, genuine, ok, "account "+account+" is not")
}

func TestAzureRefuses(t *testing.T) {
	c, other := newClouds(t), must[*cloudlab.Azure](t)(cloudlab.NewAzure())
	fields := c.azure.Instance(vm, challenge.Nonce)
	signedBy := func(leaf *x509.Certificate, along ...*x509.Certificate) []byte {
		t.Helper()
		m := cloudlab.Message{Content: fields.JSON(), Signers: []cloudlab.Signer{{Cert: leaf, Key: c.azure.Key}}, Certificates: along}
		return must[[]byte](t)(m.Marshal())
	}
	certify := func(name string) *x509.Certificate { return must[*x509.Certificate](t)(c.azure.Certify(name)) }
	for _, name := range []string{"eastus.metadata.azure.com", "*.metadata.azure.com", "Metadata.Azure.COM"} {
		leaf := certify(name)
		if _, err := c.onAzure.Verify(signedBy(leaf, leaf), challenge, time.Now()); err != nil {
			t.Errorf("a signer for %s: %v", name, err)
		}
	}
	genuine := must[[]byte](t)(c.azure.Document(fields))
	government := &instance.Azure{CertificatesFile: c.onAzure.CertificatesFile, Subscriptions: c.onAzure.Subscriptions, Names: []string{"metadata.azure.us"}}
	refused(t, "another cloud of Microsoft's", government, genuine, time.Now(), "not for metadata.azure.us")

	var many []*x509.Certificate
	for range 6 {
		many = append(many, c.azure.Leaf)
	}
	evil, fake := certify("metadata.azure.com.evil.example"), certify("notmetadata.azure.com")
	ok := time.Now()
	const signature = "no certificate or key"
	for _, test := range []struct {
		name     string
		document []byte
		now      time.Time
		why      string
	}{
		{"another's roots", must[[]byte](t)(other.Document(fields)), ok, signature},
		{"another's roots, which come along", must[[]byte](t)((&cloudlab.Message{
			Content: fields.JSON(), Signers: []cloudlab.Signer{{Cert: other.Leaf, Key: other.Key}}, Certificates: []*x509.Certificate{other.Leaf, other.Intermediate, other.Root},
		}).Marshal()), ok, signature},
		{"Azure's certificate, another's key", must[[]byte](t)((&cloudlab.Message{
			Content: fields.JSON(), Signers: []cloudlab.Signer{{Cert: c.azure.Leaf, Key: other.Key}}, Certificates: []*x509.Certificate{c.azure.Leaf},
		}).Marshal()), ok, signature},
		{"a byte changed", bytes.Replace(genuine, []byte(vm), []byte("12aab8a4-74ef-476e-8182-f6d2ba4166a6"), 1), ok, signature},
		{"a name that begins alike", signedBy(evil, evil), ok, "not for metadata.azure.com"},
		{"a name that ends alike", signedBy(fake, fake), ok, "not for metadata.azure.com"},
		{"without its signer", signedBy(c.azure.Leaf), ok, "does not bring"},
		{"many certificates", signedBy(c.azure.Leaf, many...), ok, "6 certificates"},
		{"a huge key along", signedBy(c.azure.Leaf, c.azure.Leaf, hugeKey(t)), ok, "RSA of 2048 to 8192"},
		{"two signers", must[[]byte](t)((&cloudlab.Message{Content: fields.JSON(), Certificates: []*x509.Certificate{c.azure.Leaf},
			Signers: []cloudlab.Signer{{Cert: c.azure.Leaf, Key: c.azure.Key}, {Cert: c.azure.Leaf, Key: c.azure.Key}}}).Marshal()), ok, "2 signers"},
		{"another nonce", must[[]byte](t)(c.azure.Document(fields.With("nonce", "00112233445566778899aabbccddeefe"))), ok, "nonce is another"},
		{"no nonce", must[[]byte](t)(c.azure.Document(fields.With("nonce", ""))), ok, "nonce is another"},
		{"too late", genuine, ok.Add(7 * time.Hour), "not valid at this time"},
		{"too early", genuine, ok.Add(-10 * time.Minute), "not valid at this time"},
		{"after the certificate's time", genuine, ok.Add(48 * time.Hour), signature},
		{"no times", must[[]byte](t)(c.azure.Document(fields.With("timeStamp", cloudlab.Fields{}))), ok, "lacks subscriptionId"},
		{"another subscription", must[[]byte](t)(c.azure.Document(fields.With("subscriptionId", "11111111-8125-4ba9-a717-bf7490507b3d"))), ok, "subscription 11111111"},
		{"no machine", must[[]byte](t)(c.azure.Document(fields.With("vmId", ""))), ok, "lacks subscriptionId"},
	} {
		refused(t, test.name, c.onAzure, test.document, test.now, test.why)
	}
	if _, err := c.onAzure.Verify(must[[]byte](t)(c.azure.Document(fields.With("nonce", ""))), cloud.Challenge{}, ok); err == nil {
		t.Error("an empty nonce answers an empty challenge")
	}
	// A leaf that is not for servers is somebody's mail certificate.
	mail := must[*x509.Certificate](t)(cloudlab.Certificate(&x509.Certificate{
		Subject: pkix.Name{CommonName: "metadata.azure.com"}, DNSNames: []string{"metadata.azure.com"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection},
	}, c.azure.Leaf, c.azure.Key.Public(), c.azure.Key))
	refused(t, "a certificate below a leaf", c.onAzure, signedBy(mail, mail, c.azure.Leaf), ok, signature)
}

// hugeKey is a certificate with an RSA key that nobody can use, and everybody would
// verify by for seconds.
func hugeKey(t *testing.T) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	n := new(big.Int).Lsh(big.NewInt(1), 40_000)
	n.Add(n, big.NewInt(1))
	return must[*x509.Certificate](t)(cloudlab.Certificate(&x509.Certificate{Subject: pkix.Name{CommonName: "huge"}}, nil, &rsa.PublicKey{N: n, E: 65537}, key))
}

// A message of nothing but openings costs little.
func TestNestedMessage(t *testing.T) {
	c := newClouds(t)
	deep := bytes.Repeat([]byte{0x30, 0x80}, cloud.MaxDocument/4)
	deep = append(deep, bytes.Repeat([]byte{0, 0}, cloud.MaxDocument/4)...)
	began := time.Now()
	refused(t, "deep", c.onAWS, deep, began, "")
	t.Logf("%d levels: %v", cloud.MaxDocument/4, time.Since(began))
	flat := append([]byte{0x30, 0x80}, bytes.Repeat([]byte{0x05, 0x00}, (cloud.MaxDocument-4)/2)...)
	began = time.Now()
	refused(t, "flat", c.onAWS, append(flat, 0, 0), began, "")
	t.Logf("%d elements: %v", (cloud.MaxDocument-4)/2, time.Since(began))
}

func FuzzMessage(f *testing.F) {
	aws, err := theAWS()
	if err != nil {
		f.Fatal(err)
	}
	azure, err := theAzure()
	if err != nil {
		f.Fatal(err)
	}
	genuine, err := aws.Document(aws.Instance("i-1"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(genuine)
	attested, err := azure.Document(azure.Instance(vm, challenge.Nonce))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(attested)
	f.Add([]byte{0x30, 0x80, 0, 0})
	dir := f.TempDir()
	onAWS := &instance.AWS{CertificatesFile: dir + "/aws", Accounts: []string{account}}
	onAzure := &instance.Azure{CertificatesFile: dir + "/azure", Subscriptions: []string{subscription}}
	save(f, onAWS.CertificatesFile, aws.Certificates())
	save(f, onAzure.CertificatesFile, azure.Certificates())
	f.Fuzz(func(t *testing.T, document []byte) {
		// What is believed says what was signed: the account and the machine are no others.
		if i, _, err := instance.Verify([]instance.Authority{onAWS}, cloud.AWS, document, challenge, time.Now()); err == nil && i.Name != "aws/"+account+"/eu-west-1/i-1" {
			t.Errorf("%s", i.Name)
		}
		if i, _, err := instance.Verify([]instance.Authority{onAzure}, cloud.Azure, document, challenge, time.Now()); err == nil && i.Name != "azure/"+subscription+"/"+vm {
			t.Errorf("%s", i.Name)
		}
	})
}
