package mtls

import (
	"crypto/tls"
	"testing"
)

// TestKeyExchangesMeet: each group that an operator may name is negotiated where both sides
// put it first, and where they differ by a second ClientHello, not by a refusal.
func TestKeyExchangesMeet(t *testing.T) {
	type groups = []tls.CurveID
	ca := newAuthority(t, "acme.example")
	for name, test := range map[string]struct {
		client, server groups
		want           string
	}{
		"hybrid with P-256":      {groups{tls.SecP256r1MLKEM768}, groups{tls.SecP256r1MLKEM768}, "SecP256r1MLKEM768"},
		"the server has another": {groups{tls.SecP256r1MLKEM768, tls.X25519MLKEM768}, nil, "X25519MLKEM768"},
		"the client has another": {nil, groups{tls.SecP256r1MLKEM768, tls.X25519MLKEM768}, "X25519MLKEM768"},
		"by a second hello":      {groups{tls.CurveP256, tls.X25519}, groups{tls.X25519}, "X25519"},
	} {
		t.Run(name, func(t *testing.T) {
			web := NewEndpoint(ca.workload("/prod/web", nil), Options{Curves: test.client})
			db := NewEndpoint(ca.workload("/prod/db", nil), Options{Curves: test.server})
			a, b := tunnel(t, web, db, encrypted, encrypted)
			if a.Info().KeyExchange != test.want || b.Info().KeyExchange != test.want {
				t.Errorf("negotiated %s and %s, want %s", a.Info().KeyExchange, b.Info().KeyExchange, test.want)
			}
			talk(t, a, b)
		})
	}
}
