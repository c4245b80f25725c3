package enrol

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"time"

	"connectrpc.com/connect"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
	"github.com/symbolon/symbolon/identity"
)

const (
	// handshakeTimeout bounds the TLS handshake, callTimeout a whole call.
	handshakeTimeout = 10 * time.Second
	callTimeout      = 30 * time.Second
	// maxResponse bounds what a controller may answer, bytes.
	maxResponse = 1 << 20
)

var (
	// ErrPin: what answered is not the controller that made the token. The secret
	// was not sent.
	ErrPin = errors.New("the server's chain does not lead to the CA that the join token pins")
	// ErrController: what answered is not the trust domain's controller.
	ErrController = errors.New("the server is not the trust domain's controller")
	// ErrTokenUnknown, ErrTokenUsed and ErrTokenExpired are the controller's words.
	ErrTokenUnknown = errors.New("join token unknown")
	ErrTokenUsed    = errors.New("join token already used")
	ErrTokenExpired = errors.New("join token expired")
	// ErrResponse: the controller's answer does not hold together.
	ErrResponse = errors.New("the controller's answer is not usable")
)

// ReasonHeader is the metadata of a refused enrolment by which a program tells why.
// Its values are the Reason* constants.
const (
	ReasonHeader  = "Symbolon-Reason"
	ReasonUnknown = "token-unknown"
	ReasonUsed    = "token-used"
	ReasonExpired = "token-expired"
)

// Dialer makes the TCP connection; *net.Dialer is one.
type Dialer interface {
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

// Enrol trades a join token for a host SVID, at the controller at address
// ("host:port"). attrs are what the host says of itself: os.* only; os.hostname,
// or else the kernel's host name, becomes the name that operators see. A nil dialer
// is the plain one.
// Errors: ErrPin, ErrController (the token is still good), ErrTokenUnknown,
// ErrTokenUsed, ErrTokenExpired, ErrResponse, *connect.Error.
func Enrol(ctx context.Context, address string, token Token, attrs identity.Attributes, dialer Dialer, opts ...Option) (*HostCredential, error) {
	e := newEnrolment(address, pinnedTLS(token.Pin), dialer, opts)
	c, err := e.run(ctx, attrs, func(_ tls.ConnectionState, req *symbolonv1.EnrolRequest) error {
		req.TokenId, req.TokenSecret = token.ID, token.Secret[:]
		return nil
	})
	if err != nil {
		return nil, err
	}
	pinned := func(root *x509.Certificate) bool { return sha256.Sum256(root.RawSubjectPublicKeyInfo) == token.Pin }
	if !slices.ContainsFunc(c.Roots, pinned) {
		return nil, fmt.Errorf("enrol at %s: %w: the bundle lacks the pinned root", address, ErrResponse)
	}
	return c, nil
}

// ByCertificate is Enrol with a certificate that the host has already, from a CA
// that the controller's operator trusts for it; a SPIRE agent's, say. roots are the
// controller's. The certificate's key signs for the connection, and is not sent.
// Errors: ErrController, ErrKey, ErrResponse, *connect.Error (unauthenticated: the
// controller does not believe the certificate; permission_denied: the host was removed).
func ByCertificate(ctx context.Context, address string, roots []*x509.Certificate, cert tls.Certificate, attrs identity.Attributes, dialer Dialer, opts ...Option) (*HostCredential, error) {
	return newEnrolment(address, rootedTLS(roots), dialer, opts).rooted(ctx, roots, attrs, func(state tls.ConnectionState, req *symbolonv1.EnrolRequest) (err error) {
		req.X509Pop, err = prove(state, req.GetCsr(), cert)
		return err
	})
}

// enrolment is one try, on one connection of its own.
type enrolment struct {
	address  string
	tls      *tls.Config
	dialer   Dialer
	document DocumentSource // nil: none
}

func newEnrolment(address string, config *tls.Config, dialer Dialer, opts []Option) enrolment {
	e := enrolment{address: address, tls: config, dialer: dialer}
	for _, o := range opts {
		o(&e)
	}
	return e
}

// rooted is run, at a controller that is known by its roots.
func (e enrolment) rooted(ctx context.Context, roots []*x509.Certificate, attrs identity.Attributes, prove func(tls.ConnectionState, *symbolonv1.EnrolRequest) error) (*HostCredential, error) {
	c, err := e.run(ctx, attrs, prove)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(c.Roots, func(r *x509.Certificate) bool { return slices.ContainsFunc(roots, r.Equal) }) {
		return nil, fmt.Errorf("enrol at %s: %w: the bundle lacks the controller's root", e.address, ErrResponse)
	}
	return c, nil
}

// run enrols with the proof that prove adds to the request, which may depend on the
// connection: its TLS handshake is over, and has proven the controller.
func (e enrolment) run(ctx context.Context, attrs identity.Attributes, prove func(tls.ConnectionState, *symbolonv1.EnrolRequest) error) (*HostCredential, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("enrol: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("enrol: %w", err)
	}
	hostname := attrs.Get("os.hostname")
	if hostname == "" {
		if hostname, err = os.Hostname(); err != nil {
			return nil, fmt.Errorf("enrol: %w", err)
		}
	}
	conn, err := e.connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("enrol at %s: %w", e.address, err)
	}
	defer conn.Close()
	req := &symbolonv1.EnrolRequest{Csr: csr, Hostname: hostname, Attributes: attrs.Proto()}
	if err := e.addDocument(ctx, conn.ConnectionState(), req); err != nil {
		return nil, fmt.Errorf("enrol at %s: %w", e.address, err)
	}
	if err := prove(conn.ConnectionState(), req); err != nil {
		return nil, fmt.Errorf("enrol at %s: %w", e.address, err)
	}
	transport := newTransport(e.tls, e.dialer)
	transport.DialTLSContext = only(conn)
	defer transport.CloseIdleConnections()
	client := symbolonv1connect.NewEnrolmentServiceClient(
		&http.Client{Transport: transport, CheckRedirect: noRedirect}, "https://"+e.address,
		connect.WithGRPC(), connect.WithReadMaxBytes(maxResponse))
	res, err := client.Enrol(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, fmt.Errorf("enrol at %s: %w", e.address, refusal(err))
	}
	td, err := spiffeid.TrustDomainFromString(res.Msg.GetTrustDomain())
	if err != nil {
		return nil, fmt.Errorf("enrol at %s: %w: %w", e.address, ErrResponse, err)
	}
	c := &HostCredential{HostID: res.Msg.GetHostId(), Namespace: res.Msg.GetNamespace(), TrustDomain: td, BundleVersion: res.Msg.GetBundleVersion()}
	if err := c.install(res.Msg.GetSvid(), res.Msg.GetBundle(), key); err != nil {
		return nil, fmt.Errorf("enrol at %s: %w", e.address, err)
	}
	return c, nil
}

// connect makes the connection, and proves the controller. What may be otherwise at
// another time is a *connect.Error that says so.
func (e enrolment) connect(ctx context.Context) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	dialer := e.dialer
	if dialer == nil {
		dialer = &net.Dialer{}
	}
	raw, err := dialer.DialContext(ctx, "tcp", e.address)
	if err != nil {
		return nil, connect.NewError(connect.CodeUnavailable, err)
	}
	config := e.tls.Clone()
	config.NextProtos = []string{"h2"}
	config.ServerName, _, _ = net.SplitHostPort(e.address)
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		if errors.Is(err, ErrPin) || errors.Is(err, ErrController) {
			return nil, err
		}
		return nil, connect.NewError(connect.CodeUnavailable, err)
	}
	return conn, nil
}

// only gives one connection, once: a proof is worth nothing on another.
func only(conn *tls.Conn) func(context.Context, string, string) (net.Conn, error) {
	one := make(chan net.Conn, 1)
	one <- conn
	return func(context.Context, string, string) (net.Conn, error) {
		select {
		case c := <-one:
			return c, nil
		default:
			return nil, errors.New("the connection was lost")
		}
	}
}

// noRedirect keeps the secret from being sent on.
func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// newTransport makes connections of our own TLS; nothing is taken from the
// environment's proxy settings, which could be an attacker's way to see traffic
// patterns, and would not reach a controller inside anyway.
func newTransport(config *tls.Config, dialer Dialer) *http.Transport {
	if dialer == nil {
		dialer = &net.Dialer{Timeout: handshakeTimeout}
	}
	t := &http.Transport{
		DialContext:         dialer.DialContext,
		TLSClientConfig:     config,
		TLSHandshakeTimeout: handshakeTimeout,
		ForceAttemptHTTP2:   true,
		IdleConnTimeout:     90 * time.Second,
		// Notice a controller that is gone without a word.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 15 * time.Second, WriteByteTimeout: 30 * time.Second},
	}
	return t
}

// pinnedTLS accepts only a controller whose presented chain ends in the pinned root.
func pinnedTLS(pin [sha256.Size]byte) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		// The pin replaces the system's roots, and the SPIFFE ID the name; both are
		// checked in VerifyConnection, before a byte of the request is written.
		InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			chain := state.PeerCertificates
			for i, cert := range chain {
				if i == 0 || sha256.Sum256(cert.RawSubjectPublicKeyInfo) != pin {
					continue
				}
				// Anybody can append the root, which is public: the leaf must follow from it.
				err := verifyController(chain[:i], []*x509.Certificate{cert})
				if errors.Is(err, identity.ErrUntrusted) {
					return fmt.Errorf("%w: %w", ErrPin, err)
				}
				return err
			}
			return ErrPin
		},
	}
}

// rootedTLS accepts only a controller whose chain leads to one of roots.
func rootedTLS(roots []*x509.Certificate) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		// As for pinnedTLS.
		InsecureSkipVerify: true,
		VerifyConnection:   func(state tls.ConnectionState) error { return verifyController(state.PeerCertificates, roots) },
	}
}

// verifyController judges a server by the roots of its own trust domain.
func verifyController(chain, roots []*x509.Certificate) error {
	if len(chain) == 0 || len(chain[0].URIs) != 1 {
		return fmt.Errorf("%w: it has no SPIFFE ID", ErrController)
	}
	id, err := spiffeid.FromURI(chain[0].URIs[0])
	if err != nil {
		return fmt.Errorf("%w: %w", ErrController, err)
	}
	bundle := x509bundle.FromX509Authorities(id.TrustDomain(), roots)
	if _, err := identity.VerifySVID(chain, bundle, time.Now()); err != nil {
		return fmt.Errorf("%w: %w", ErrController, err)
	}
	if id.Path() != "/"+identity.ReservedPath+"/controller" {
		return fmt.Errorf("%w: it is %s", ErrController, id)
	}
	return nil
}

// refusal gives a refused token its sentinel. A server that is not the controller
// is not one that is unavailable, which a caller might try again.
func refusal(err error) error {
	var refused *connect.Error
	if !errors.As(err, &refused) {
		return err
	}
	if errors.Is(err, ErrPin) || errors.Is(err, ErrController) {
		return refused.Unwrap()
	}
	switch refused.Meta().Get(ReasonHeader) {
	case ReasonUnknown:
		return ErrTokenUnknown
	case ReasonUsed:
		return ErrTokenUsed
	case ReasonExpired:
		return ErrTokenExpired
	}
	return err
}
