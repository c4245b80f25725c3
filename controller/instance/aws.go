package instance

import (
	"crypto/x509"
	"slices"
	"time"

	"github.com/symbolon/symbolon/identity/cloud"
)

// AWS believes instance identity documents with the RSA-2048 signature.
// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/verify-rsa2048.html
//
// Such a document answers no challenge and does not end: every process of the instance
// can read it, at any time, and who has read it has it for good. So it is only good for
// what nobody has used it for before (Instance.Started).
type AWS struct {
	// CertificatesFile has the RSA-2048 certificates of the regions, PEM, as AWS publishes
	// them.
	CertificatesFile string `yaml:"certificates_file"`
	// Accounts are the IDs of those whose instances are let in; none: none.
	Accounts []string `yaml:"accounts"`
	// Regions are those of the instances; none: whatever the certificates are for.
	Regions []string `yaml:"regions"`
	// StartedWithin is for how long after the start of an instance its document counts; 0:
	// for ever. It bounds what a document is worth that somebody has stolen.
	StartedWithin time.Duration `yaml:"started_within"`
}

var _ Authority = (*AWS)(nil)

// awsDocument is what we read of it.
type awsDocument struct {
	AccountID        string    `json:"accountId"`
	Region           string    `json:"region"`
	AvailabilityZone string    `json:"availabilityZone"`
	InstanceID       string    `json:"instanceId"`
	InstanceType     string    `json:"instanceType"`
	ImageID          string    `json:"imageId"`
	PendingTime      time.Time `json:"pendingTime"`
}

// Provider is cloud.AWS.
func (*AWS) Provider() string { return cloud.AWS }

// Check reads the certificates.
func (a *AWS) Check() error { _, err := certificates(a.CertificatesFile); return err }

// Verify ignores the challenge, which the format has no room for.
func (a *AWS) Verify(document []byte, _ cloud.Challenge, now time.Time) (*Instance, error) {
	anchors, err := certificates(a.CertificatesFile)
	if err != nil {
		return nil, err
	}
	content, err := signedBy(document, anchors, now)
	if err != nil {
		return nil, err
	}
	var d awsDocument
	if err := decode(content, &d); err != nil {
		return nil, err
	}
	switch {
	case !word(d.AccountID) || !word(d.Region) || !word(d.InstanceID) || d.PendingTime.IsZero():
		return nil, refuse("it lacks accountId, region, instanceId or pendingTime")
	case !slices.Contains(a.Accounts, d.AccountID):
		return nil, refuse("account %s is not in enrolment.cloud.aws", d.AccountID)
	case len(a.Regions) > 0 && !slices.Contains(a.Regions, d.Region):
		return nil, refuse("region %s is not in enrolment.cloud.aws", d.Region)
	case now.Add(leeway).Before(d.PendingTime):
		return nil, refuse("the instance will be started only at %s", d.PendingTime.UTC().Format(time.RFC3339))
	case a.StartedWithin > 0 && now.Sub(d.PendingTime) > a.StartedWithin:
		return nil, refuse("the instance was started at %s, longer than started_within, %v, ago", d.PendingTime.UTC().Format(time.RFC3339), a.StartedWithin)
	}
	return &Instance{
		Name: "aws/" + d.AccountID + "/" + d.Region + "/" + d.InstanceID,
		Attributes: attributes("provider", cloud.AWS, "account", d.AccountID, "region", d.Region, "zone", d.AvailabilityZone,
			"instance_id", d.InstanceID, "instance_type", d.InstanceType, "image_id", d.ImageID),
		Started: d.PendingTime,
	}, nil
}

// signedBy is the content of a message that one of the certificates has signed, itself:
// those that come with the message are not looked at.
func signedBy(document []byte, anchors []*x509.Certificate, now time.Time) ([]byte, error) {
	p, err := parse(document)
	if err != nil {
		return nil, err
	}
	for _, c := range anchors {
		p.Certificates = []*x509.Certificate{c}
		if p.Verify() != nil {
			continue
		}
		if now.Before(c.NotBefore) || now.After(c.NotAfter) {
			return nil, refuse("the certificate that has signed it is not valid at this time")
		}
		return p.Content, nil
	}
	return nil, errSignature
}
