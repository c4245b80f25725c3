package mtls

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// A connection may last for longer than the certificates that it began with. Before the
// peer's ends, this side asks it, in the tunnel, to prove the one that it has by then.

// MaxControl bounds a Control message, bytes: a chain of certificates and a token.
const MaxControl = 48 << 10

// Renewal carries one connection's Control messages. Its methods may be called by
// anyone; a message that has been made is to be sent as the next of its direction.
type Renewal struct {
	export exporter
	client bool // this side is the client
	id     spiffeid.ID
}

// Renewable tells whether both sides can renew what the connection that is open on c
// stands on: by Control messages where it is Framed, else by another tunnel.
func (c *Conn) Renewable() bool { return c.renewable }

// Claim names a connection to its two ends, and to nobody else: a flow's id, and what
// its tunnel's exporter makes of it.
type Claim [len(FlowID{}) + sha256.Size]byte

// Claim is for the connection of that flow, which is open on c. It is what Open.renews
// carries.
func (c *Conn) Claim(id FlowID) (claim Claim, err error) {
	b, err := c.export("EXPORTER-symbolon renews", id[:], sha256.Size)
	copy(claim[copy(claim[:], id[:]):], b)
	return claim, err
}

// OnControl lets told have each Control message of the connection that is open on c. It
// is called by whoever reads, and must not block; m is its caller's afterwards. An error
// breaks the connection off. It is to be set before anything is read.
func (c *Conn) OnControl(told func(m []byte) error) {
	if c.frames != nil {
		c.frames.told = told
	}
}

// Renewal is for the connection that is open on c; nil: it takes no Control messages.
func (c *Conn) Renewal() *Renewal {
	if c.frames == nil || !c.renewable {
		return nil
	}
	return &Renewal{export: c.export, client: c.client, id: c.peer.ID}
}

// Ask makes the message that asks the peer to prove its newer certificate. request is
// what its answer is to be checked by.
func (r *Renewal) Ask() (message, request []byte, err error) {
	request = newRequest(r.client)
	message, err = control(&symbolonv1.Control{Request: request})
	return message, request, err
}

// Prove makes the answer to a request of the peer's: e's certificate, bound to this
// connection, and the token that stands beside it, "" for none.
func (r *Renewal) Prove(request []byte, e *Endpoint, token string) (message []byte, err error) {
	x, err := r.export.of(r.client)
	if err != nil {
		return nil, err
	}
	a, err := authenticate(x, request, r.client, e.credential.SVID.TLS)
	if err != nil {
		return nil, err
	}
	return control(&symbolonv1.Control{Authenticator: a, Token: token})
}

// Check verifies the peer's answer to request as a handshake would have, by e, and that
// it is about whom the handshake was about. Errors are *DeniedError: PROOF_INVALID, and
// those of a handshake.
func (r *Renewal) Check(request []byte, answer *symbolonv1.Control, e *Endpoint, now time.Time) (*Peer, error) {
	x, err := r.export.of(!r.client)
	var chain []*x509.Certificate
	if err == nil {
		chain, err = verifyAuthenticator(x, request, !r.client, answer.GetAuthenticator())
	}
	if err != nil {
		return nil, &DeniedError{Reason: symbolonv1.Reason_REASON_PROOF_INVALID, Err: err}
	}
	peer, err := e.judge(chain, now, false)
	if err != nil {
		return nil, handshakeError(err, false)
	}
	if peer.ID != r.id {
		return nil, &DeniedError{
			Reason: symbolonv1.Reason_REASON_PROOF_INVALID,
			Err:    fmt.Errorf("%w: it is of %s, the connection of %s", ErrAuthenticator, peer.ID, r.id),
		}
	}
	return &peer, nil
}

// ParseControl reads a message, of which exactly one part must be there.
// Errors: ErrOpenMalformed.
func ParseControl(m []byte) (*symbolonv1.Control, error) {
	c := &symbolonv1.Control{}
	if err := unmarshalMessage(m, c); err != nil {
		return nil, err
	}
	if (len(c.GetRequest()) > 0) == (len(c.GetAuthenticator()) > 0) {
		return nil, fmt.Errorf("%w: a control message of none or several kinds", ErrOpenMalformed)
	}
	return c, nil
}

func control(c *symbolonv1.Control) ([]byte, error) {
	b, err := proto.Marshal(c)
	if err == nil && len(b) > MaxControl {
		err = fmt.Errorf("%w: a control message of %d bytes, at most %d", ErrOpenTooLarge, len(b), MaxControl)
	}
	return b, err
}

// errEnded: this direction has ended, and carries nothing more.
var errEnded = errors.New("the direction has ended")

// SendControl sends m on a tunnel that is not detached, in order with what Write sends.
func (c *Conn) SendControl(m []byte) error {
	if c.frames == nil {
		return errNotDetached
	}
	return c.frames.sendControl(c.out, m)
}

// SealControl makes m's frame in buf, as Seal makes that of application data. Nil: this
// direction has ended.
func (s *Stream) SealControl(buf, m []byte) ([]byte, error) {
	if s.frames == nil || s.frames.writeEnd {
		return nil, nil
	}
	return s.sealBytes(buf, appendControl(make([]byte, 0, lengthSize+len(m)), m))
}

// exporterOf keeps of s what derives keying material, and not the certificates.
func exporterOf(s tls.ConnectionState) exporter {
	s.PeerCertificates, s.VerifiedChains, s.SignedCertificateTimestamps, s.OCSPResponse = nil, nil, nil, nil
	return s.ExportKeyingMaterial
}
