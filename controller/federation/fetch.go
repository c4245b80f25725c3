// Package federation fetches the SPIFFE bundles of other trust domains (SPIFFE
// Federation, section 4).
//
// An endpoint is what an operator has written, and its answer a stranger's: redirects
// are not followed, the answer is bounded in size and time, and nothing of it is
// repeated in an error. (go-spiffe's federation.FetchBundle does the first and bounds
// neither, nor does it look at the status; it also leaves a connection open behind each
// fetch.)
package federation

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
	"unicode"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/symbolon/symbolon/identity"
)

const (
	// fetchTimeout bounds one fetch, from the name lookup to the last byte.
	fetchTimeout = 30 * time.Second
	maxHeader    = 16 << 10
	// maxError bounds what an error says of a stranger's certificate or name server.
	maxError = 300
)

var (
	// ErrEndpoint: the endpoint cannot be reached, is not who it should be, or does not
	// answer with a bundle. identity.ErrMalformedBundle is another error.
	ErrEndpoint = errors.New("bundle endpoint")
)

// Endpoint is where a trust domain serves its bundle.
type Endpoint struct {
	TrustDomain spiffeid.TrustDomain
	URL         string
	// ID is the endpoint's SPIFFE ID with profile https_spiffe; zero: https_web.
	ID spiffeid.ID
}

// Fetch asks once. bundle verifies an endpoint with an ID: it is the trust domain's own,
// as known so far. roots verify any other; nil: the system's.
// Errors: ErrEndpoint, identity.ErrMalformedBundle.
func Fetch(ctx context.Context, e Endpoint, bundle x509bundle.Source, roots *x509.CertPool) (*spiffebundle.Bundle, error) {
	config := &tls.Config{RootCAs: roots}
	if !e.ID.IsZero() {
		if bundle == nil {
			return nil, fmt.Errorf("%w: there is no bundle to verify it by", ErrEndpoint)
		}
		config = tlsconfig.TLSClientConfig(bundle, tlsconfig.AuthorizeID(e.ID))
	}
	config.MinVersion = tls.VersionTLS12 // others' endpoints
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	client := &http.Client{
		// A redirect is an answer like any other, and not one that is wanted.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			DialContext:            (&net.Dialer{}).DialContext,
			TLSClientConfig:        config,
			DisableKeepAlives:      true,
			DisableCompression:     true,
			MaxResponseHeaderBytes: maxHeader,
		},
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, e.URL, http.NoBody)
	if err != nil {
		return nil, fmt.Errorf("%w: %s", ErrEndpoint, clip(err))
	}
	response, err := client.Do(request)
	if err != nil {
		return nil, fmt.Errorf("%w: %s", ErrEndpoint, clip(err))
	}
	defer func() { _ = response.Body.Close() }()
	switch code := response.StatusCode; {
	case code >= 300 && code < 400:
		return nil, fmt.Errorf("%w: it redirects (status %d), which is not followed; write the URL that it leads to", ErrEndpoint, code)
	case code != http.StatusOK:
		return nil, fmt.Errorf("%w: it answers with status %d", ErrEndpoint, code)
	}
	data, err := io.ReadAll(io.LimitReader(response.Body, identity.MaxBundleSize+1))
	if err != nil {
		return nil, fmt.Errorf("%w: %s", ErrEndpoint, clip(err))
	}
	return identity.ParseBundle(e.TrustDomain, data)
}

// clip is an error's text without the URL, which is known, and bounded: a stranger's
// certificate has names of any length and in any bytes.
func clip(err error) string {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return "no answer in time"
	}
	s := err.Error()
	if len(s) > maxError {
		s = s[:maxError] + "…"
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}
