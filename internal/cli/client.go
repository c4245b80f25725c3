package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
)

// errNotController: whatever answered did not prove to be our controller. The
// token was not sent.
var errNotController = errors.New("the server did not prove to be the controller")

// controllerPath is the path of the controller's SPIFFE ID, in any trust domain:
// the CA file decides which domain is ours.
const controllerPath = "/symbolon/controller"

// maxAnswer bounds what a controller may send in one message, bytes.
const maxAnswer = 64 << 20

// client makes an AdminService client. Every failure here is one of input: exit
// code 2.
func (a *app) client() (symbolonv1connect.AdminServiceClient, error) {
	s, err := a.resolve()
	if err != nil {
		return nil, err
	}
	address, err := hostPort(s.controller())
	if err != nil {
		return nil, err
	}
	roots, err := readRoots(s.caFile())
	if err != nil {
		return nil, err
	}
	token, err := a.readToken(s.tokenFile())
	if err != nil {
		return nil, err
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, usagef("controller address %q: %w", address, err)
	}
	transport := &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         (&net.Dialer{Timeout: min(a.timeout, 10*time.Second)}).DialContext,
		TLSHandshakeTimeout: min(a.timeout, 10*time.Second),
		ForceAttemptHTTP2:   true,
		TLSClientConfig: &tls.Config{
			MinVersion: tls.VersionTLS13,
			ServerName: host,
			// Names and addresses change behind NAT and balancers; the SPIFFE ID does
			// not. VerifyConnection does the whole verification instead, on resumption
			// too.
			InsecureSkipVerify: true, //nolint:gosec // see above
			VerifyConnection:   verifyController(roots, a.Now),
		},
	}
	httpClient := &http.Client{
		Transport: transport,
		// The token goes to the controller and to nobody that it points at.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return symbolonv1connect.NewAdminServiceClient(httpClient, "https://"+address,
		connect.WithInterceptors(bearer(token)), connect.WithReadMaxBytes(maxAnswer)), nil
}

// verifyController accepts a chain to one of the roots whose leaf has exactly one
// URI SAN: a controller's SPIFFE ID.
func verifyController(roots *x509.CertPool, now func() time.Time) func(tls.ConnectionState) error {
	return func(state tls.ConnectionState) error {
		if len(state.PeerCertificates) == 0 {
			return fmt.Errorf("%w: no certificate", errNotController)
		}
		leaf := state.PeerCertificates[0]
		intermediates := x509.NewCertPool()
		for _, c := range state.PeerCertificates[1:] {
			intermediates.AddCert(c)
		}
		if _, err := leaf.Verify(x509.VerifyOptions{
			Roots:         roots,
			Intermediates: intermediates,
			CurrentTime:   now(),
			KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		}); err != nil {
			return fmt.Errorf("%w: %w (is this the right CA file?)", errNotController, err)
		}
		if len(leaf.URIs) != 1 || leaf.URIs[0].Scheme != "spiffe" || leaf.URIs[0].Path != controllerPath {
			return fmt.Errorf("%w: its certificate is for %v, not for a controller", errNotController, leaf.URIs)
		}
		return nil
	}
}

func readRoots(path string) (*x509.CertPool, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, usagef("read the CA file: %w\nset --ca-file or SYMBOLON_CA_FILE to a copy of the controller's ca.pem", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, usagef("CA file %s: no PEM certificate in it", path)
	}
	return pool, nil
}

// readToken reads the secret, and warns when others can too.
func (a *app) readToken(path string) (string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return "", usagef("read the token file: %w\nset --token-file or SYMBOLON_TOKEN_FILE to a copy of the controller's admin.token", err)
	}
	token := strings.TrimSpace(string(data))
	if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		// The content stays unsaid: it may be a secret, just not this one.
		return "", usagef("token file %s: want one token on one line", path)
	}
	if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o077 != 0 {
		a.warning("%s can be read by others (mode %04o): chmod 600 it", path, info.Mode().Perm())
	}
	return token, nil
}

// bearer puts the token on every call.
type bearer string

func (b bearer) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		req.Header().Set("Authorization", "Bearer "+string(b))
		return next(ctx, req)
	}
}

func (b bearer) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		conn := next(ctx, spec)
		conn.RequestHeader().Set("Authorization", "Bearer "+string(b))
		return conn
	}
}

func (b bearer) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

// call makes one unary call within --timeout.
func call[Req, Resp any](ctx context.Context, a *app,
	rpc func(context.Context, *connect.Request[Req]) (*connect.Response[Resp], error), req *Req,
) (*Resp, error) {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	resp, err := rpc(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return resp.Msg, nil
}
