package cloud

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
)

const (
	// tokenTTL is how long AWS's session token is good for: this fetch. Seconds.
	tokenTTL = "60"
	// maxSessionToken bounds that token, bytes; AWS's have 56.
	maxSessionToken = 1 << 10
	// azureVersion is the first with the document in the form that we read.
	azureVersion = "2021-02-01"
)

// aws asks by IMDSv2: a session token first, by a PUT, which a forwarded GET cannot be
// made into. Older metadata services, which do without, are not asked.
// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html
func (s service) aws(ctx context.Context) ([]byte, error) {
	token, _, err := s.ask(ctx, http.MethodPut, "/latest/api/token", http.Header{"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": {tokenTTL}})
	if err != nil {
		return nil, fmt.Errorf("session token: %w", err)
	}
	if !validToken(token) {
		return nil, fmt.Errorf("session token: %w", ErrAnswer)
	}
	body, _, err := s.ask(ctx, http.MethodGet, "/latest/dynamic/instance-identity/rsa2048", http.Header{"X-Aws-Ec2-Metadata-Token": {string(token)}})
	if err != nil {
		return nil, err
	}
	return decode(body)
}

// validToken: what may be the value of a header, and no more.
func validToken(token []byte) bool {
	return len(token) > 0 && len(token) <= maxSessionToken && !bytes.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' })
}

// gcp asks for the identity token of the instance, with what is known of the instance.
// https://cloud.google.com/compute/docs/instances/verifying-instance-identity
func (s service) gcp(ctx context.Context, audience string) ([]byte, error) {
	q := url.Values{"audience": {audience}, "format": {"full"}}
	body, header, err := s.ask(ctx, http.MethodGet, "/computeMetadata/v1/instance/service-accounts/default/identity?"+q.Encode(),
		http.Header{"Metadata-Flavor": {"Google"}})
	if errors.Is(err, ErrRefused) {
		return nil, fmt.Errorf("%w: does the instance have a service account?", err)
	}
	if err != nil {
		return nil, err
	}
	if header.Get("Metadata-Flavor") != "Google" {
		return nil, fmt.Errorf("%w: it is not Google's", ErrAnswer)
	}
	return bytes.TrimSpace(body), nil
}

// azure asks for the attested document.
// https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service#attested-data
func (s service) azure(ctx context.Context, nonce string) ([]byte, error) {
	q := url.Values{"api-version": {azureVersion}, "nonce": {nonce}}
	body, _, err := s.ask(ctx, http.MethodGet, "/metadata/attested/document?"+q.Encode(), http.Header{"Metadata": {"true"}})
	if err != nil {
		return nil, err
	}
	var answer struct {
		Encoding  string `json:"encoding"`
		Signature string `json:"signature"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return nil, fmt.Errorf("%w: it is not JSON", ErrAnswer)
	}
	if answer.Encoding != "pkcs7" {
		return nil, fmt.Errorf("%w: the encoding %q, want pkcs7", ErrAnswer, answer.Encoding)
	}
	return decode([]byte(answer.Signature))
}

// decode reads base64, which AWS breaks into lines.
func decode(text []byte) ([]byte, error) {
	out := make([]byte, base64.StdEncoding.DecodedLen(len(text)))
	n, err := base64.StdEncoding.Decode(out, bytes.TrimSpace(text))
	if err != nil {
		return nil, fmt.Errorf("%w: it is not base64", ErrAnswer)
	}
	return out[:n], nil
}
