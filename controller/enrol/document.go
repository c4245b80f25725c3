package enrol

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/cloud"
)

const (
	// documentLabel names the keying material that a cloud's document is asked for by.
	documentLabel = "EXPORTER-symbolon-cloud-document"
	// audiencePrefix keeps a token that was made for an enrolment from being one for
	// anything else.
	audiencePrefix = "symbolon-enrolment:"
	// azureNonce is as much as Azure takes, hexadecimal digits: 128 bits.
	azureNonce = 32
)

// DocumentSource gets a cloud's instance document that answers a challenge; cloud.Client
// is behind it. It has seconds: the controller waits.
type DocumentSource func(context.Context, cloud.Challenge) (*symbolonv1.CloudDocument, error)

// Option is an addition to an enrolment.
type Option func(*enrolment)

// WithDocument adds a cloud's instance document to what a host enrols by: its content
// becomes the host's cloud.* attributes. The error of the source is the enrolment's.
func WithDocument(source DocumentSource) Option {
	return func(e *enrolment) { e.document = source }
}

// ByDocument is Enrol with a cloud's instance document and nothing else. roots are the
// controller's.
// Errors: ErrController, ErrResponse, those of source, *connect.Error (unauthenticated:
// the controller does not believe the document; permission_denied: the instance has
// enrolled before, or was removed).
func ByDocument(ctx context.Context, address string, roots []*x509.Certificate, source DocumentSource, attrs identity.Attributes, dialer Dialer) (*HostCredential, error) {
	e := newEnrolment(address, rootedTLS(roots), dialer, []Option{WithDocument(source)})
	return e.rooted(ctx, roots, attrs, func(tls.ConnectionState, *symbolonv1.EnrolRequest) error { return nil })
}

// ChallengeOf is what a document must answer to count for a request on a connection.
// Nobody but the two ends knows it before, and neither can choose it: a document that was
// asked for on another connection, or for another key, does not.
func ChallengeOf(state tls.ConnectionState, csr []byte) (cloud.Challenge, error) {
	b, err := binding(state, documentLabel, csr)
	if err != nil {
		return cloud.Challenge{}, err
	}
	text := hex.EncodeToString(b)
	return cloud.Challenge{Audience: audiencePrefix + text, Nonce: text[:azureNonce]}, nil
}

func (e enrolment) addDocument(ctx context.Context, state tls.ConnectionState, req *symbolonv1.EnrolRequest) error {
	if e.document == nil {
		return nil
	}
	challenge, err := ChallengeOf(state, req.GetCsr())
	if err != nil {
		return err
	}
	req.Cloud, err = e.document(ctx, challenge)
	return err
}
