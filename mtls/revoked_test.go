package mtls

import (
	"crypto/x509"
	"errors"
	"net"
	"sync/atomic"
	"testing"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// A revoked peer is refused in every handshake, by whichever side knows of it, with its
// reason: also one that was verified a moment ago, and one that resumes a session from
// before.
func TestRevokedPeerIsRefused(t *testing.T) {
	for _, side := range []string{"client", "server"} {
		t.Run(side, func(t *testing.T) {
			ca := newAuthority(t, "acme.example")
			webCred, dbCred := ca.workload("/prod/web", nil), ca.workload("/prod/db", nil)
			var revoked atomic.Bool
			var asked atomic.Int64
			judge := Options{Verified: identity.NewVerifiedCache(8), Admit: func(_ *identity.Credential, _ *x509.Certificate, p *Peer) error {
				asked.Add(1)
				if want := map[string]*identity.Credential{"client": dbCred, "server": webCred}[side].SVID; p.Serial() != want.Serial() || p.ID != want.ID {
					t.Errorf("asked of %s, %s", p.ID, p.Serial())
				}
				if revoked.Load() {
					return &DeniedError{Reason: symbolonv1.Reason_REASON_REVOKED, Err: identity.ErrRevoked}
				}
				return nil
			}}
			options := map[string]Options{side: judge}
			web, db := NewEndpoint(webCred, options["client"]), NewEndpoint(dbCred, options["server"])
			// Sessions are kept by destination, so all connections go to one listener.
			l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			connect := func(web *Endpoint) (client *Conn, server accepted, err error) {
				t.Helper()
				return tunnelAt(t, l, web, db)
			}
			for i, resumed := range []bool{false, true} {
				a, b, err := connect(web)
				if err != nil || b.err != nil || a.Info().Resumed != resumed {
					t.Fatalf("connection %d: %v, %v, resumed %v", i, err, b.err, a.Info().Resumed)
				}
			}
			if asked.Load() < 2 {
				t.Fatalf("asked %d times in two handshakes", asked.Load())
			}
			revoked.Store(true)
			for kind, web := range map[string]*Endpoint{"resumed": web, "full": NewEndpoint(webCred, options["client"])} {
				_, b, err := connect(web)
				own, other := err, b.err
				if side == "server" {
					own, other = other, own
				}
				if ReasonOf(own) != symbolonv1.Reason_REASON_REVOKED || !errors.Is(own, identity.ErrRevoked) {
					t.Errorf("%s: who knows says %v (%v)", kind, ReasonOf(own), own)
				}
				if other == nil {
					t.Errorf("%s: for the other side it is open", kind)
				}
			}
		})
	}
}
