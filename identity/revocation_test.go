package identity

import (
	"errors"
	"math/big"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func revokeID(id, spiffeID string) *symbolonv1.Revocation {
	return &symbolonv1.Revocation{Id: id, Subject: &symbolonv1.Revocation_SpiffeId{SpiffeId: spiffeID}}
}

func revokeSerial(id, td string, s Serial) *symbolonv1.Revocation {
	return &symbolonv1.Revocation{Id: id, Subject: &symbolonv1.Revocation_Serial{Serial: &symbolonv1.RevokedSerial{TrustDomain: td, Serial: []byte(s)}}}
}

func revokeHost(id, td, host string) *symbolonv1.Revocation {
	return &symbolonv1.Revocation{Id: id, Subject: &symbolonv1.Revocation_Host{Host: &symbolonv1.RevokedHost{TrustDomain: td, HostId: host}}}
}

func revokeLabels(id string, labels map[string]string) *symbolonv1.Revocation {
	return &symbolonv1.Revocation{Id: id, Subject: &symbolonv1.Revocation_Labels{Labels: &symbolonv1.RevokedLabels{Labels: labels}}}
}

func TestRevocationsNameWhomTheyNameAndNobodyElse(t *testing.T) {
	const td = "acme.example"
	h1, h2, none := Serial(NewSerial("h1").Bytes()), Serial(NewSerial("h2").Bytes()), Serial(NewSerial("").Bytes())
	labels := map[string][]string{"app": {"web", "api"}, "env": {"prod"}}
	for _, tc := range []struct {
		name    string
		by      *symbolonv1.Revocation
		id      string
		serial  Serial
		revoked bool
	}{
		{"its ID", revokeID("r", "spiffe://acme.example/prod/web"), "spiffe://acme.example/prod/web", h1, true},
		{"another's ID", revokeID("r", "spiffe://acme.example/prod/web2"), "spiffe://acme.example/prod/web", h1, false},
		{"the ID of another trust domain", revokeID("r", "spiffe://acme.test/prod/web"), "spiffe://acme.example/prod/web", h1, false},
		{"its certificate", revokeSerial("r", td, h1), "spiffe://acme.example/prod/web", h1, true},
		{"another certificate of it", revokeSerial("r", td, Serial(NewSerial("h1").Bytes())), "spiffe://acme.example/prod/web", h1, false},
		{"the number at another CA", revokeSerial("r", "acme.test", h1), "spiffe://acme.example/prod/web", h1, false},
		{"its host", revokeHost("r", td, "h1"), "spiffe://acme.example/prod/web", h1, true},
		{"its host's own SVID", revokeHost("r", td, "h1"), "spiffe://acme.example/symbolon/host/h1", h1, true},
		{"on another host", revokeHost("r", td, "h1"), "spiffe://acme.example/prod/web", h2, false},
		{"of no host", revokeHost("r", td, "h1"), "spiffe://acme.example/prod/web", none, false},
		{"a foreign number that looks like the host's", revokeHost("r", td, "h1"), "spiffe://acme.test/prod/web", h1, false},
		{"a label", revokeLabels("r", map[string]string{"app": "web"}), "spiffe://acme.example/prod/web", h1, true},
		{"all labels", revokeLabels("r", map[string]string{"app": "api", "env": "prod"}), "spiffe://acme.example/prod/web", h1, true},
		{"not all labels", revokeLabels("r", map[string]string{"app": "web", "env": "dev"}), "spiffe://acme.example/prod/web", h1, false},
		{"the trust domain", revokeLabels("r", map[string]string{"spiffe.trust_domain": td}), "spiffe://acme.example/prod/web", h1, true},
		{"a certificate to come", revokeHost("r", td, "h1"), "spiffe://acme.example/prod/web", "", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := Principal{ID: spiffeid.RequireFromString(tc.id), Attributes: NewAttributes(labels).Union(Attributes{{"spiffe.trust_domain", spiffeid.RequireFromString(tc.id).TrustDomain().Name()}})}
			set, err := (*Revocations)(nil).Update(&symbolonv1.Revocations{Number: 1, Added: []*symbolonv1.Revocation{tc.by}})
			if err != nil {
				t.Fatal(err)
			}
			err = set.Check(tc.serial, &p)
			if errors.Is(err, ErrRevoked) != tc.revoked || tc.revoked && !strings.Contains(err.Error(), "by revocation r") && !strings.Contains(err.Error(), "of revocation r") {
				t.Errorf("%v, want revoked %v, by its id", err, tc.revoked)
			}
		})
	}
}

func TestRevocationsAreUpdated(t *testing.T) {
	web, db := "spiffe://acme.example/web", "spiffe://acme.example/db"
	revoked := func(r *Revocations) (out []string) {
		for _, id := range []string{web, db} {
			if r.Check("", &Principal{ID: spiffeid.RequireFromString(id)}) != nil {
				out = append(out, id)
			}
		}
		return out
	}
	var r *Revocations
	step := func(m *symbolonv1.Revocations, want error, now ...string) {
		t.Helper()
		next, err := r.Update(m)
		if !errors.Is(err, want) || (err == nil) != (want == nil) {
			t.Fatalf("%v, want %v", err, want)
		}
		r = next
		if diff := cmp.Diff(now, revoked(r)); diff != "" {
			t.Fatalf("revoked (-want +got):\n%s", diff)
		}
	}
	if r.Number() != 0 || r.Len() != 0 || r.Proto() != nil || r.CheckHost("acme.example", "h") != nil {
		t.Error("no set revokes something")
	}
	step(&symbolonv1.Revocations{Number: 4, Added: []*symbolonv1.Revocation{revokeID("a", web)}}, nil, web)
	step(&symbolonv1.Revocations{Number: 5, Base: 4, Added: []*symbolonv1.Revocation{revokeID("b", db)}}, nil, web, db)
	step(&symbolonv1.Revocations{Number: 6, Base: 5, Removed: []string{"a", "unheard-of"}}, nil, db)
	// What is missing in between is not guessed at.
	step(&symbolonv1.Revocations{Number: 9, Base: 8, Removed: []string{"b"}}, ErrRevocationsMissed, db)
	if r.Number() != 6 {
		t.Errorf("number %d", r.Number())
	}
	// What is not understood is said, and takes nothing else with it.
	step(&symbolonv1.Revocations{Number: 7, Base: 6, Added: []*symbolonv1.Revocation{{Id: "x"}, revokeLabels("everybody", nil), revokeID("c", web)}},
		errRevocation, web, db)
	whole, err := (*Revocations)(nil).Update(r.Proto())
	if !errors.Is(err, errRevocation) || whole.Number() != 7 || len(revoked(whole)) != 2 {
		t.Errorf("the set as it is passed on: %v, number %d, %v", err, whole.Number(), revoked(whole))
	}
	step(&symbolonv1.Revocations{Number: 2}, nil) // a whole one replaces all, whatever its number
}

func TestSerial(t *testing.T) {
	seen := map[string]bool{}
	for range 100 {
		n := NewSerial("h1")
		if n.Sign() <= 0 || len(n.Bytes()) != maxSerial || n.Bytes()[0] >= 0x80 || seen[n.String()] {
			t.Fatalf("serial %x", n)
		}
		seen[n.String()] = true
	}
	for text, want := range map[string]string{
		"0A:0b:0C": "0a0b0c", "a0b0c": "0a0b0c", "00ff": "ff", "": "", "xyz": "", "00": "", "-1": "", "0x10": "",
		strings.Repeat("ab", 20): strings.Repeat("ab", 20), strings.Repeat("ab", 21): "",
	} {
		s, err := ParseSerial(text)
		if s.String() != want || (err == nil) != (want != "") {
			t.Errorf("%q is %q, %v", text, s, err)
		}
	}
	if got := Serial(big.NewInt(0x1234).Bytes()).String(); got != "1234" {
		t.Error(got)
	}
}
