package cloud

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// The providers.
const (
	AWS   = "aws"
	GCP   = "gcp"
	Azure = "azure"
)

// Providers are all of them.
func Providers() []string { return []string{AWS, GCP, Azure} }

// DefaultAddress is where all three serve metadata.
const DefaultAddress = "169.254.169.254:80"

const (
	// MaxDocument bounds a document, bytes. Those of AWS and GCP have about 2,000, Azure's
	// 4,000: it brings a certificate.
	MaxDocument = 16 << 10
	// maxBody bounds an answer, which may be in base64 and JSON; bytes.
	maxBody = 2 * MaxDocument
	// maxHeader bounds its headers, bytes.
	maxHeader = 16 << 10
	// fetchTimeout is for all of a fetch. Whoever waits at the other end of an enrolment's
	// connection waits for 10 seconds.
	fetchTimeout = 5 * time.Second
)

var (
	// ErrUnavailable: the service does not answer, or not now. Trying again may help.
	ErrUnavailable = errors.New("the metadata service is not available")
	// ErrRefused: the service has no document for this machine.
	ErrRefused = errors.New("the metadata service refuses")
	// ErrAnswer: what it says is no document.
	ErrAnswer = errors.New("the metadata service's answer is not usable")
	// ErrProvider: the provider is unknown.
	ErrProvider = errors.New("unknown cloud")
)

// Challenge is what makes a document good for one purpose at one time. Each provider has
// room for its own part of it, AWS for none.
type Challenge struct {
	// Audience is GCP's.
	Audience string
	// Nonce is Azure's: at most 32 letters and digits.
	Nonce string
}

// Dialer makes the TCP connection; *net.Dialer is one.
type Dialer interface {
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

// Client fetches documents. The zero value does, at DefaultAddress.
type Client struct {
	// Address is "address:port" of the service, or "".
	Address string
	// Dialer reaches it; nil: the plain one.
	Dialer Dialer
}

// Fetch asks a provider's service for its document, in the form of
// symbolon.v1.CloudDocument.document.
// Errors: ErrUnavailable, ErrRefused, ErrAnswer, ErrProvider.
func (c *Client) Fetch(ctx context.Context, provider string, challenge Challenge) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	transport := c.transport()
	defer transport.CloseIdleConnections()
	s := service{address: c.address(), http: &http.Client{Transport: transport, CheckRedirect: noRedirect}}
	var document []byte
	var err error
	switch provider {
	case AWS:
		document, err = s.aws(ctx)
	case GCP:
		document, err = s.gcp(ctx, challenge.Audience)
	case Azure:
		document, err = s.azure(ctx, challenge.Nonce)
	default:
		return nil, fmt.Errorf("%w: %q", ErrProvider, provider)
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s document from %s: %w", provider, c.address(), err)
	case len(document) == 0 || len(document) > MaxDocument:
		return nil, fmt.Errorf("%s document from %s: %w: it has %d bytes, want 1 to %d", provider, c.address(), ErrAnswer, len(document), MaxDocument)
	}
	return document, nil
}

func (c *Client) address() string {
	if c.Address == "" {
		return DefaultAddress
	}
	return c.Address
}

// transport knows one address, whatever a URL says.
func (c *Client) transport() *http.Transport {
	dialer := c.Dialer
	if dialer == nil {
		dialer = &net.Dialer{}
	}
	address := c.address()
	return &http.Transport{
		Proxy: nil, // of the environment's: it would see the document, or make one
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, network, address)
		},
		DisableCompression:     true, // a small answer could become a large one
		MaxResponseHeaderBytes: maxHeader,
	}
}

func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// service is the metadata service during one fetch.
type service struct {
	address string
	http    *http.Client
}

// ask makes one request and returns the answer's body and headers.
func (s service) ask(ctx context.Context, method, path string, header http.Header) ([]byte, http.Header, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+s.address+path, nil)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrAnswer, err)
	}
	req.Header = header
	res, err := s.http.Do(req)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	defer res.Body.Close()
	switch {
	case res.StatusCode >= 500 || res.StatusCode == http.StatusTooManyRequests:
		return nil, nil, fmt.Errorf("%w: it answers %d", ErrUnavailable, res.StatusCode)
	case res.StatusCode != http.StatusOK:
		return nil, nil, fmt.Errorf("%w: it answers %d", ErrRefused, res.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, maxBody+1))
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if len(body) > maxBody {
		return nil, nil, fmt.Errorf("%w: more than %d bytes", ErrAnswer, maxBody)
	}
	return body, res.Header, nil
}

// ValidAddress tells whether a metadata service may be at an address: an IP address with
// a port, of this machine or of its link. An answer from further away would be worth as
// much, since it is signed; but AWS's document lets in whoever has it first.
func ValidAddress(address string) bool {
	a, err := netip.ParseAddrPort(address)
	if err != nil || a.Port() == 0 || a.Addr().Zone() != "" {
		return false
	}
	ip := a.Addr()
	// Private IPv6: fd00:ec2::254 of AWS, fd20:ce::254 of GCP.
	return ip.IsLoopback() || ip.IsLinkLocalUnicast() || ip.Is6() && !ip.Is4In6() && ip.IsPrivate()
}
