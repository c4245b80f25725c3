// Package instance believes clouds' instance documents, or does not: whether a cloud has
// signed one, for a machine that an operator has named the account of, and, where the
// format can tell, for this very enrolment.
//
//	a := &instance.AWS{CertificatesFile: "/etc/symbolon/aws.pem", Accounts: []string{"123456789012"}}
//	err := a.Check()                                   // at the start: are the files there?
//	i, err := a.Verify(document, challenge, time.Now()) // i.Attributes are cloud.*
//
// Everything is verified offline: what is trusted is in files, which are read at each
// document, so that a cloud's new keys count as soon as they are there. Documents come
// from strangers: sizes, keys, chains and signers are bounded before anything is verified.
//
// Only what the cloud has signed becomes an attribute. What a document does not say
// (Azure's: the region) is not there.
package instance

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/cloud"
)

const (
	// maxFile bounds a file of certificates or keys, bytes.
	maxFile = 1 << 20
	// leeway is how far a cloud's clock may be from ours.
	leeway = time.Minute
	// maxWord bounds one value of a document, bytes.
	maxWord = 256
)

var (
	// ErrDocument: the document is not believed, or is of a machine that no operator has
	// named the account of.
	ErrDocument = errors.New("the instance document is not accepted")
	// ErrAnchors: what a document would be verified by cannot be read. It says nothing
	// about the document.
	ErrAnchors = errors.New("what instance documents are verified by cannot be read")
)

// Instance is what a document proves.
type Instance struct {
	// Name is the instance's among all of all clouds: "aws/123456789012/eu-west-1/i-0a1b".
	Name string
	// Attributes are cloud.* ones.
	Attributes identity.Attributes
	// Started is when the instance began to run, of documents that answer no challenge;
	// zero: this one does, and so was made for this enrolment.
	Started time.Time
}

// Authority believes one provider's documents, within the bounds of one entry of the
// configuration. Safe for concurrent use.
type Authority interface {
	// Provider is cloud.AWS, cloud.GCP or cloud.Azure.
	Provider() string
	// Check reads the files. Errors: ErrAnchors.
	Check() error
	// Verify judges a document. Errors: ErrDocument, ErrAnchors.
	Verify(document []byte, challenge cloud.Challenge, now time.Time) (*Instance, error)
}

// Verify asks authorities in turn; the first that believes the document counts, and its
// place is returned. Of several refusals the one that got furthest is told: the document
// of an account that is not named is more often the operator's mistake than a forgery.
// Errors: ErrDocument, ErrAnchors.
func Verify(authorities []Authority, provider string, document []byte, challenge cloud.Challenge, now time.Time) (*Instance, int, error) {
	if len(document) == 0 || len(document) > cloud.MaxDocument {
		return nil, 0, fmt.Errorf("%w: it has %d bytes, want 1 to %d", ErrDocument, len(document), cloud.MaxDocument)
	}
	var refusal error
	for n, a := range authorities {
		if a.Provider() != provider {
			continue
		}
		i, err := a.Verify(document, challenge, now)
		if err == nil {
			return i, n, nil
		}
		if refusal == nil || !errors.Is(err, errSignature) {
			refusal = err
		}
	}
	if refusal == nil {
		return nil, 0, fmt.Errorf("%w: the controller's configuration has no enrolment.cloud.%s", ErrDocument, known(provider))
	}
	return nil, 0, refusal
}

// known keeps a stranger's words out of our errors.
func known(provider string) string {
	for _, p := range cloud.Providers() {
		if p == provider {
			return p
		}
	}
	return "(unknown)"
}

// errSignature: no certificate or key of an authority has signed it.
var errSignature = fmt.Errorf("%w: no certificate or key of the configuration has signed it", ErrDocument)

func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrDocument, fmt.Sprintf(format, args...))
}

// read reads a file of trust anchors.
func read(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAnchors, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAnchors, err)
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("%w: %s has more than %d bytes", ErrAnchors, file, maxFile)
	}
	return b, nil
}

// word tells whether a value has the form that all of clouds' names have. It goes into
// attributes, keys of the store and logs.
func word(s string) bool {
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:-"
	return s != "" && len(s) <= maxWord && !strings.ContainsFunc(s, func(r rune) bool { return !strings.ContainsRune(letters, r) })
}

// attributes makes cloud.* attributes of pairs, without those that have no value.
func attributes(pairs ...string) identity.Attributes {
	m := make(map[string][]string, len(pairs)/2)
	for i := 0; i+1 < len(pairs); i += 2 {
		if word(pairs[i+1]) {
			m["cloud."+pairs[i]] = []string{pairs[i+1]}
		}
	}
	return identity.NewAttributes(m)
}
