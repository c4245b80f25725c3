package instance

import (
	"crypto/subtle"
	"crypto/x509"
	"slices"
	"strings"
	"time"

	"github.com/smallstep/pkcs7"

	"github.com/symbolon/symbolon/identity/cloud"
)

const (
	// azureTime is the form of times in the document.
	azureTime = "01/02/06 15:04:05 -0700"
	// azureName is what the signer's certificate is for, in the public cloud.
	azureName = "metadata.azure.com"
)

// Azure believes attested documents.
// https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service#attested-data
type Azure struct {
	// CertificatesFile has the roots and the intermediates above the signers, PEM:
	// documents do not bring them.
	CertificatesFile string `yaml:"certificates_file"`
	// Subscriptions are the IDs of those whose machines are let in; none: none.
	Subscriptions []string `yaml:"subscriptions"`
	// Names are the DNS names that a signer's certificate may be for, subdomains included;
	// none: metadata.azure.com. Other clouds of Microsoft's have others.
	Names []string `yaml:"names"`
}

var _ Authority = (*Azure)(nil)

// azureDocument is what we read of it.
type azureDocument struct {
	Nonce          string `json:"nonce"`
	SubscriptionID string `json:"subscriptionId"`
	VMID           string `json:"vmId"`
	TimeStamp      struct {
		CreatedOn string `json:"createdOn"`
		ExpiresOn string `json:"expiresOn"`
	} `json:"timeStamp"`
}

// Provider is cloud.Azure.
func (*Azure) Provider() string { return cloud.Azure }

// Check reads the certificates, of which one is a root.
func (a *Azure) Check() error { _, _, err := a.pools(); return err }

func (a *Azure) pools() (roots, intermediates *x509.CertPool, err error) {
	all, err := certificates(a.CertificatesFile)
	if err != nil {
		return nil, nil, err
	}
	return split(a.CertificatesFile, all)
}

// Verify judges the signer by its chain and its name, then the document by challenge,
// time and subscription.
func (a *Azure) Verify(document []byte, challenge cloud.Challenge, now time.Time) (*Instance, error) {
	roots, intermediates, err := a.pools()
	if err != nil {
		return nil, err
	}
	p, err := parse(document)
	if err != nil {
		return nil, err
	}
	if err := a.judgeSigner(p, roots, intermediates, now); err != nil {
		return nil, err
	}
	var d azureDocument
	if err := decode(p.Content, &d); err != nil {
		return nil, err
	}
	created, err1 := time.Parse(azureTime, d.TimeStamp.CreatedOn)
	expires, err2 := time.Parse(azureTime, d.TimeStamp.ExpiresOn)
	// Azure's are UUIDs, which some of its services write in capitals.
	subscription, vm := strings.ToLower(d.SubscriptionID), strings.ToLower(d.VMID)
	switch {
	case !word(subscription) || !word(vm) || err1 != nil || err2 != nil:
		return nil, refuse("it lacks subscriptionId, vmId or timeStamp")
	case challenge.Nonce == "" || subtle.ConstantTimeCompare([]byte(d.Nonce), []byte(challenge.Nonce)) != 1:
		return nil, refuse("it was not asked for on this connection: the nonce is another")
	case now.Add(leeway).Before(created) || !now.Before(expires):
		return nil, refuse("it is not valid at this time: %s to %s", created.UTC().Format(time.RFC3339), expires.UTC().Format(time.RFC3339))
	case !slices.ContainsFunc(a.Subscriptions, func(s string) bool { return strings.EqualFold(s, subscription) }):
		return nil, refuse("subscription %s is not in enrolment.cloud.azure", subscription)
	}
	return &Instance{
		Name:       "azure/" + subscription + "/" + vm,
		Attributes: attributes("provider", cloud.Azure, "subscription", subscription, "instance_id", vm),
	}, nil
}

// judgeSigner: the certificate that comes with the message has signed it, is the metadata
// service's, and leads to a root of ours.
func (a *Azure) judgeSigner(p *pkcs7.PKCS7, roots, intermediates *x509.CertPool, now time.Time) error {
	leaf := p.GetOnlySigner()
	if leaf == nil {
		return refuse("it does not bring its signer's certificate")
	}
	for _, c := range p.Certificates {
		intermediates.AddCert(c)
	}
	// The chain first: it costs a stranger's message less than a stranger's key does.
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
		return errSignature
	}
	names := a.Names
	if len(names) == 0 {
		names = []string{azureName}
	}
	if !slices.ContainsFunc(leaf.DNSNames, func(n string) bool { return within(n, names) }) {
		return refuse("its signer's certificate is not for %s", strings.Join(names, " or "))
	}
	if p.Verify() != nil {
		return errSignature
	}
	return nil
}

// within tells whether a name of a certificate, which may be a wildcard, is one of names
// or below one.
func within(name string, names []string) bool {
	name = strings.ToLower(strings.TrimPrefix(name, "*."))
	return slices.ContainsFunc(names, func(n string) bool { return name == n || strings.HasSuffix(name, "."+n) })
}
