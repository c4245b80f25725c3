package mtls

import (
	"crypto/x509"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

func renewable(p *Peer) (*symbolonv1.Open, error) {
	o, err := framed(p)
	o.Renewable = true
	return o, err
}

// keptTunnel is one between web and db, in its first use, as ask opens it.
func keptTunnel(t *testing.T, web, db *Endpoint, ask func(*Peer) (*symbolonv1.Open, error)) (client, server *Conn) {
	t.Helper()
	ctx := timeout(t)
	c, s := pair(t)
	ch := accept(ctx, s, db, &symbolonv1.Verdict{Accept: true, Protection: encrypted, Keep: true})
	client, err := Dial(ctx, c, web, ask)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.ReadVerdict(ctx); err != nil {
		t.Fatal(err)
	}
	a := <-ch
	if a.err != nil {
		t.Fatal(a.err)
	}
	return client, a.conn
}

// hears collects what comes.
func hears(c *Conn) <-chan []byte {
	ch := make(chan []byte, 4)
	c.OnControl(func(m []byte) error { ch <- m; return nil })
	return ch
}

// reads reads in the background, as a relay would, n bytes.
func reads(t *testing.T, c *Conn, n int) <-chan string {
	t.Helper()
	ch := make(chan string, 1)
	go func() {
		b := make([]byte, n)
		if _, err := io.ReadFull(c, b); err != nil {
			b = []byte(err.Error())
		}
		ch <- string(b)
	}()
	return ch
}

// Either side shows its newer certificate between two pieces of data, by the own record
// layer and by crypto/tls, detached and not.
func TestRenewal(t *testing.T) {
	for name, o := range map[string]Options{"own record layer": {}, "crypto/tls": {StockTLS: true}} {
		t.Run(name, func(t *testing.T) {
			ca := newAuthority(t, "acme.example")
			labels := map[string][]string{"app": {"x"}}
			web, db := NewEndpoint(ca.workload("/prod/web", labels), o), NewEndpoint(ca.workload("/prod/db", labels), o)
			client, server := keptTunnel(t, web, db, renewable)
			for role, at := range map[string]struct {
				asks, proves *Conn
				by           *Endpoint
				path         string
			}{
				"the client": {server, client, db, "/prod/web"},
				"the server": {client, server, web, "/prod/db"},
			} {
				heard, answered := hears(at.proves), hears(at.asks)
				a, b := at.asks.Renewal(), at.proves.Renewal()
				data, back := reads(t, at.proves, 6), reads(t, at.asks, 4)
				m, request, err := a.Ask()
				if err != nil {
					t.Fatal(err)
				}
				io.WriteString(at.asks, "abc")
				if err := at.asks.SendControl(m); err != nil {
					t.Fatal(err)
				}
				io.WriteString(at.asks, "def")
				q, err := ParseControl(<-heard)
				if err != nil || len(q.GetRequest()) == 0 {
					t.Fatalf("%s hears %v, %v", role, q, err)
				}
				newer := NewEndpoint(ca.workload(at.path, map[string][]string{"app": {"y"}}), o)
				if m, err = b.Prove(q.GetRequest(), newer, "token"); err != nil {
					t.Fatal(err)
				}
				if err := at.proves.SendControl(m); err != nil {
					t.Fatal(err)
				}
				io.WriteString(at.proves, "back")
				answer, err := ParseControl(<-answered)
				if err != nil || answer.GetToken() != "token" {
					t.Fatalf("%s answers %v, %v", role, answer, err)
				}
				peer, err := a.Check(request, answer, at.by, time.Now())
				if err != nil || peer.Leaf.SerialNumber.Cmp(newer.credential.SVID.Chain[0].SerialNumber) != 0 || peer.Attributes.Get("app") != "y" {
					t.Fatalf("%s has become %+v, %v", role, peer, err)
				}
				if got := <-data; got != "abcdef" {
					t.Errorf("data around the question: %q", got)
				}
				if got := <-back; got != "back" {
					t.Errorf("data behind the answer: %q", got)
				}
			}
			if client.CloseWrite(); !errors.Is(client.SendControl([]byte("x")), errEnded) {
				t.Error("sent behind the end")
			}
		})
	}
}

// What a newer certificate must be is what the first one had to be, and the same one's.
func TestRenewalRefused(t *testing.T) {
	ca, stranger := newAuthority(t, "acme.example"), newAuthority(t, "acme.example")
	revoked := errors.New("revoked")
	var bar *identity.Credential
	o := Options{Admit: func(_ *identity.Credential, leaf *x509.Certificate, _ *Peer) error {
		if bar != nil && leaf.SerialNumber.Cmp(bar.SVID.Chain[0].SerialNumber) == 0 {
			return &DeniedError{Reason: symbolonv1.Reason_REASON_REVOKED, Err: revoked}
		}
		return nil
	}}
	web, db := NewEndpoint(ca.workload("/prod/web", nil), o), NewEndpoint(ca.workload("/prod/db", nil), o)
	client, server := keptTunnel(t, web, db, renewable)
	old := ca.leaf("/prod/web", nil)
	old.NotBefore, old.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	barred := ca.workload("/prod/web", nil)
	bar = barred
	elsewhere, _ := keptTunnel(t, web, db, renewable)
	for name, tc := range map[string]struct {
		shown  *identity.Credential
		by     *Conn
		reason symbolonv1.Reason
	}{
		"another workload":    {ca.workload("/prod/admin", nil), client, symbolonv1.Reason_REASON_PROOF_INVALID},
		"another's signature": {stranger.workload("/prod/web", nil), client, symbolonv1.Reason_REASON_PEER_UNVERIFIED},
		"an expired one":      {ca.credential(old), client, symbolonv1.Reason_REASON_SVID_EXPIRED},
		"a revoked one":       {barred, client, symbolonv1.Reason_REASON_REVOKED},
		"a host's":            {ca.host("h1"), client, symbolonv1.Reason_REASON_NOT_A_WORKLOAD},
		"another connection":  {ca.workload("/prod/web", nil), elsewhere, symbolonv1.Reason_REASON_PROOF_INVALID},
		"one that is good":    {ca.workload("/prod/web", nil), client, 0},
	} {
		r := server.Renewal()
		_, request, err := r.Ask()
		if err != nil {
			t.Fatal(err)
		}
		m, err := tc.by.Renewal().Prove(request, NewEndpoint(tc.shown, o), "")
		if err != nil {
			t.Fatal(err)
		}
		answer, err := ParseControl(m)
		if err != nil {
			t.Fatal(err)
		}
		_, err = r.Check(request, answer, db, time.Now())
		if tc.reason == 0 {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if got := ReasonOf(err); err == nil || got != tc.reason {
			t.Errorf("%s: %v (%v), want %v", name, got, err, tc.reason)
		}
	}
}

// Who did not agree to control messages gets none, and takes none.
func TestControlMessagesOutOfPlace(t *testing.T) {
	web, db := endpoints(t)
	heard := func(m []byte) error { t.Errorf("heard %q", m); return nil }
	for name, tc := range map[string]struct {
		ask  func(*Peer) (*symbolonv1.Open, error)
		told func([]byte) error
		send []byte
	}{
		"not agreed":   {framed, heard, appendControl(nil, []byte("x"))},
		"nobody hears": {renewable, nil, appendControl(nil, []byte("x"))},
		"empty":        {renewable, heard, appendControl(nil, nil)},
		"too large":    {renewable, heard, binary.BigEndian.AppendUint32(nil, controlFrame|MaxControl+1)},
	} {
		t.Run(name, func(t *testing.T) {
			client, server := keptTunnel(t, web, db, tc.ask)
			if name == "not agreed" && (client.Renewal() != nil || server.Renewal() != nil) {
				t.Error("renewable")
			}
			server.OnControl(tc.told)
			if _, err := client.out.Write(tc.send); err != nil {
				t.Fatal(err)
			}
			if _, err := server.Read(make([]byte, 1)); !errors.Is(err, ErrProtocol) {
				t.Errorf("read %v, want ErrProtocol", err)
			}
		})
	}
	o := NewOpen(NewFlowID(), somewhere, encrypted, 1)
	for _, claim := range []int{1, len(Claim{}) - 1, len(Claim{}) + 1} {
		o.Renews = make([]byte, claim)
		if err := checkOpen(o); !errors.Is(err, ErrOpenMalformed) {
			t.Errorf("a claim of %d bytes: %v", claim, err)
		}
	}
	for _, m := range [][]byte{{}, {0xff}, must(control(&symbolonv1.Control{Request: []byte("a"), Authenticator: []byte("b")}))} {
		if _, err := ParseControl(m); !errors.Is(err, ErrOpenMalformed) {
			t.Errorf("%q: %v", m, err)
		}
	}
	if _, err := control(&symbolonv1.Control{Token: strings.Repeat("x", MaxControl)}); !errors.Is(err, ErrOpenTooLarge) {
		t.Errorf("an endless token: %v", err)
	}
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

// A control message that comes in pieces, between data in pieces, by the own layer.
func TestControlInPieces(t *testing.T) {
	f := &frames{renewable: true}
	var heard []string
	f.told = func(m []byte) error { heard = append(heard, string(m)); return nil }
	var in []byte
	for _, s := range []string{"one", "two"} {
		in = append(binary.BigEndian.AppendUint32(in, uint32(len(s))), s...)
		in = appendControl(in, []byte("told "+s))
	}
	in = append(in, 0, 0, 0, 0)
	for size := 1; size <= len(in); size++ {
		*f = frames{renewable: true, told: f.told}
		heard = nil
		var data []byte
		for at := 0; at < len(in) && !f.readEnd; at += size {
			rest := in[at:min(at+size, len(in))]
			for len(rest) > 0 && !f.readEnd {
				b, left, err := f.open(rest)
				if err != nil && !errors.Is(err, io.EOF) {
					t.Fatal(err)
				}
				data, rest = append(data, b...), left
			}
		}
		if string(data) != "onetwo" || strings.Join(heard, ",") != "told one,told two" || !f.readEnd {
			t.Fatalf("in pieces of %d: %q, heard %q, ended %v", size, data, heard, f.readEnd)
		}
	}
}
