package mtls

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls/record"
)

const (
	// sessionsPerCredential bounds the client's tickets: one a destination.
	sessionsPerCredential = 256
	// verifiedChains is how many peers' chains an endpoint remembers by itself.
	verifiedChains = 1024
)

// Endpoint is one workload's end of tunnels: its credential in crypto/tls's form.
// A new credential means a new Endpoint, and with it new ticket keys and an empty
// session cache, so that no resumed session carries an old SVID. Safe for
// concurrent use; make it once per credential.
type Endpoint struct {
	credential     *identity.Credential
	verified       *identity.VerifiedCache
	admit          Admit
	client, server *tls.Config
	// Each side's traffic secrets on their way to the record layer; nil: stock TLS.
	clientKeys, serverKeys *record.KeyLog
}

// Admit has the last word on a peer whose chain verifies: nil, or why not, best a
// *DeniedError with its reason. It is asked on every handshake, a resumed one too, by
// both sides; local is what this side presents, leaf the peer's certificate.
type Admit func(local *identity.Credential, leaf *x509.Certificate, peer *Peer) error

// Options are what tests and configuration may change.
type Options struct {
	// Admit may refuse peers; nil: it does not.
	Admit Admit
	// Now is the clock that certificates are judged by; nil: time.Now.
	Now func() time.Time
	// Verified remembers chains that were verified; share one between endpoints. Nil:
	// each has its own.
	Verified *identity.VerifiedCache
	// StockTLS leaves the data phase to crypto/tls; otherwise the own record layer
	// takes over after the handshake, where it can (not in FIPS 140 mode).
	StockTLS bool
	// NoResumption makes every handshake a full one.
	NoResumption bool
	// FastOpen keeps a client's ClientHello so small that a SYN has room for it: a key share
	// for the first of Curves only, which each server must have, and no tickets. 1420 bytes
	// with X25519MLKEM768 are just what IPv4 carries with an MTU of 1500.
	FastOpen bool
	// Curves are the key exchanges, X25519MLKEM768 and X25519 by default.
	Curves []tls.CurveID
}

// NewEndpoint prepares both directions.
func NewEndpoint(c *identity.Credential, o Options) *Endpoint {
	if o.Now == nil {
		o.Now = time.Now
	}
	if len(o.Curves) == 0 {
		o.Curves = []tls.CurveID{tls.X25519MLKEM768, tls.X25519}
	}
	if o.Verified == nil {
		o.Verified = identity.NewVerifiedCache(verifiedChains)
	}
	e := &Endpoint{credential: c, verified: o.Verified, admit: o.Admit}
	verify := func(client bool) func(tls.ConnectionState) error {
		return func(s tls.ConnectionState) error {
			if err := checkState(&s); err != nil {
				return err
			}
			_, err := e.judge(s.PeerCertificates, o.Now(), client)
			return err
		}
	}
	base := &tls.Config{
		Certificates:                []tls.Certificate{*c.SVID.TLS},
		MinVersion:                  tls.VersionTLS13,
		NextProtos:                  []string{ALPN},
		CurvePreferences:            o.Curves,
		Time:                        o.Now,
		SessionTicketsDisabled:      o.NoResumption,
		DynamicRecordSizingDisabled: true,
		// crypto/tls would look for a host name in the certificate. VerifyConnection
		// judges the chain instead, by the bundle of the peer's own trust domain; it
		// runs on every handshake, resumed ones included.
		InsecureSkipVerify: true,
	}
	e.client, e.server = base, base.Clone()
	e.client.VerifyConnection = verify(true)
	e.server.VerifyConnection = verify(false)
	e.server.ClientAuth = tls.RequireAnyClientCert
	if !o.StockTLS {
		e.clientKeys, e.serverKeys = record.NewKeyLog(0), record.NewKeyLog(0)
		e.client.KeyLogWriter, e.server.KeyLogWriter = e.clientKeys, e.serverKeys
	}
	if !o.NoResumption {
		e.client.ClientSessionCache = tls.NewLRUClientSessionCache(sessionsPerCredential)
	}
	if o.FastOpen {
		e.client.CurvePreferences, e.client.ClientSessionCache = o.Curves[:1], nil
	}
	return e
}

// Credential is what the endpoint was made from.
func (e *Endpoint) Credential() *identity.Credential { return e.credential }

// checkState refuses a handshake that is not what symbolon/1 promises.
func checkState(s *tls.ConnectionState) error {
	switch {
	case s.Version != tls.VersionTLS13:
		return fmt.Errorf("%w: %s", ErrProtocol, tls.VersionName(s.Version))
	case s.CipherSuite != tls.TLS_AES_256_GCM_SHA384:
		return fmt.Errorf("%w: cipher suite %s", ErrProtocol, tls.CipherSuiteName(s.CipherSuite))
	case s.NegotiatedProtocol != ALPN:
		return fmt.Errorf("%w: ALPN %q", ErrProtocol, s.NegotiatedProtocol)
	}
	return nil
}

// judge verifies a peer's chain and names it. A client meets the certificate of a
// host where a port has no workload behind it: that peer can refuse and nothing
// else (Peer.Host).
func (e *Endpoint) judge(chain []*x509.Certificate, now time.Time, client bool) (Peer, error) {
	peer, err := e.verify(chain, now, client)
	if err == nil && e.admit != nil {
		err = e.admit(e.credential, chain[0], &peer)
	}
	return peer, err
}

func (e *Endpoint) verify(chain []*x509.Certificate, now time.Time, client bool) (Peer, error) {
	p, err := e.verified.Verify(chain, e.credential.Bundles, now)
	if err == nil {
		return Peer{Principal: p, Leaf: chain[0], Above: chain[1:], NotAfter: chain[0].NotAfter}, nil
	}
	if client && errors.Is(err, identity.ErrNotWorkload) {
		id, verr := identity.VerifySVID(chain, e.credential.Bundles, now)
		if verr == nil && identity.IsHost(id) {
			return Peer{Principal: identity.Principal{ID: id}, Leaf: chain[0], NotAfter: chain[0].NotAfter, Host: true}, nil
		}
	}
	return Peer{}, err
}

// Vouches tells whether the credential's bundles still vouch for certificates of a peer
// that an earlier credential's have: roots may have been withdrawn. When they end, is
// another question. Errors: identity.ErrNoBundle, identity.ErrUntrusted.
func (e *Endpoint) Vouches(leaf *x509.Certificate, above []*x509.Certificate, now time.Time) error {
	_, err := e.verified.Verify(append([]*x509.Certificate{leaf}, above...), e.credential.Bundles, now)
	if errors.Is(err, identity.ErrNoBundle) || errors.Is(err, identity.ErrUntrusted) {
		return err
	}
	return nil
}
