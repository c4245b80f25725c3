package controller_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/durationpb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
	"github.com/symbolon/symbolon/controller/enrol"
	"github.com/symbolon/symbolon/identity"
)

func TestEnrolOnce(t *testing.T) {
	w := newWorld(t)
	w.apply(tree)
	token := w.token("/acme/prod", map[string]string{"role": "db"})
	attrs := identity.NewAttributes(map[string][]string{"os.hostname": {"db1"}})
	c, err := enrol.Enrol(t.Context(), w.address(), token, attrs, nil)
	if err != nil {
		t.Fatal(err)
	}
	if c.Namespace != "/acme/prod" || c.TrustDomain.Name() != "acme.example" || len(c.Chain) != 2 || len(c.Roots) != 1 {
		t.Errorf("credential %+v", c)
	}
	if got, want := c.Chain[0].URIs[0].String(), "spiffe://acme.example/symbolon/host/"+c.HostID; got != want {
		t.Errorf("ID %s, want %s", got, want)
	}
	if _, err := enrol.Enrol(t.Context(), w.address(), token, attrs, nil); !errors.Is(err, enrol.ErrTokenUsed) {
		t.Errorf("second use: %v, want ErrTokenUsed", err)
	}
	hosts, err := w.admin().ListHosts(t.Context(), connect.NewRequest(&symbolonv1.ListHostsRequest{}))
	if err != nil || len(hosts.Msg.GetHosts()) != 1 {
		t.Fatalf("%v, %v; want one host", hosts, err)
	}
	h := hosts.Msg.GetHosts()[0]
	want := identity.NewAttributes(map[string][]string{"host.id": {c.HostID}, "host.role": {"db"}, "os.hostname": {"db1"}})
	if diff := cmp.Diff(want, identity.AttributesFromProto(h.GetAttributes())); diff != "" || h.GetHostname() != "db1" || h.GetConnected() {
		t.Errorf("%v\n%s", h, diff)
	}
}

func TestEnrolRacesHaveOneWinner(t *testing.T) {
	w := newWorld(t)
	token := w.token("/", nil)
	var wg sync.WaitGroup
	results := make(chan error, 16)
	for range cap(results) {
		wg.Go(func() {
			_, err := enrol.Enrol(t.Context(), w.address(), token, nil, nil)
			results <- err
		})
	}
	wg.Wait()
	close(results)
	won := 0
	for err := range results {
		switch {
		case err == nil:
			won++
		case !errors.Is(err, enrol.ErrTokenUsed):
			t.Errorf("%v, want ErrTokenUsed", err)
		}
	}
	if won != 1 {
		t.Errorf("%d enrolments by one token", won)
	}
}

func TestEnrolRefusesTokens(t *testing.T) {
	w := newWorld(t)
	w.offset.Store(int64(-2 * time.Hour))
	expired := w.token("/", nil) // made two hours ago, for one
	w.offset.Store(0)
	good := w.token("/", nil)
	unknown, wrong := good, good
	unknown.ID = "0123456789abcdef"
	wrong.Secret[0] ^= 1
	for name, test := range map[string]struct {
		token enrol.Token
		want  error
	}{
		"expired":      {expired, enrol.ErrTokenExpired},
		"unknown ID":   {unknown, enrol.ErrTokenUnknown},
		"wrong secret": {wrong, enrol.ErrTokenUnknown},
	} {
		if _, err := enrol.Enrol(t.Context(), w.address(), test.token, nil, nil); !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
	}
	w.apply("kind: Namespace\nname: /brief\nmode: enforce\n")
	homeless := w.token("/brief", nil)
	_, err := w.admin().Delete(t.Context(), connect.NewRequest(&symbolonv1.DeleteRequest{Keys: []*symbolonv1.ResourceKey{{Kind: "Namespace", Namespace: "/brief"}}}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := enrol.Enrol(t.Context(), w.address(), homeless, nil, nil); !errors.Is(err, enrol.ErrTokenUnknown) {
		t.Errorf("into a namespace that was deleted: %v", err)
	}
	// A wrong secret must not have used it up.
	if _, err := enrol.Enrol(t.Context(), w.address(), good, nil, nil); err != nil {
		t.Errorf("the right secret after a wrong one: %v", err)
	}
}

// TestEnrolProtects: no request can cost the token, get another name or be large.
func TestEnrolProtects(t *testing.T) {
	w := newWorld(t)
	token := w.token("/", nil)
	client := symbolonv1connect.NewEnrolmentServiceClient(w.client(w.tls()), "https://"+w.address())
	_, der := csr(t)
	try := func(change func(*symbolonv1.EnrolRequest)) error {
		req := &symbolonv1.EnrolRequest{TokenId: token.ID, TokenSecret: token.Secret[:], Csr: der, Hostname: "h"}
		change(req)
		_, err := client.Enrol(t.Context(), connect.NewRequest(req))
		return err
	}
	forged := bytes.Clone(der)
	forged[len(forged)-1] ^= 1
	wantCode(t, try(func(r *symbolonv1.EnrolRequest) { r.Csr = forged }), connect.CodeInvalidArgument, "certificate request")
	wantCode(t, try(func(r *symbolonv1.EnrolRequest) { r.Attributes = attributes("host.role", "db") }), connect.CodePermissionDenied, "host.role")
	wantCode(t, try(func(r *symbolonv1.EnrolRequest) { r.Attributes = attributes("proc.exe", "/x") }), connect.CodePermissionDenied, "proc.exe")
	wantCode(t, try(func(r *symbolonv1.EnrolRequest) { r.Hostname = "evil\x1b[2J" }), connect.CodeInvalidArgument, "host name")
	wantCode(t, try(func(r *symbolonv1.EnrolRequest) { r.Csr = make([]byte, 128<<10) }), connect.CodeResourceExhausted)
	wantCode(t, try(func(r *symbolonv1.EnrolRequest) { r.TokenId = "../state" }), connect.CodeUnauthenticated, "unknown")
	if err := try(func(*symbolonv1.EnrolRequest) {}); err != nil {
		t.Errorf("the token after all that: %v", err)
	}
}

func TestEnrolIsRateLimited(t *testing.T) {
	w := newWorld(t)
	client := symbolonv1connect.NewEnrolmentServiceClient(w.client(w.tls()), "https://"+w.address())
	limited := 0
	for range 200 {
		_, err := client.Enrol(t.Context(), connect.NewRequest(&symbolonv1.EnrolRequest{}))
		switch connect.CodeOf(err) {
		case connect.CodeResourceExhausted:
			limited++
		case connect.CodeInvalidArgument: // no CSR
		default:
			t.Fatal(err)
		}
	}
	if limited == 0 {
		t.Error("200 tries in a row, none refused")
	}
}

func TestCreateJoinTokenRefuses(t *testing.T) {
	w := newWorld(t)
	for name, test := range map[string]struct {
		req  *symbolonv1.CreateJoinTokenRequest
		code connect.Code
		word string
	}{
		"no such namespace": {&symbolonv1.CreateJoinTokenRequest{Namespace: "/nowhere"}, connect.CodeNotFound, "/nowhere"},
		"not a path":        {&symbolonv1.CreateJoinTokenRequest{Namespace: "prod"}, connect.CodeInvalidArgument, "absolute"},
		"host.id":           {&symbolonv1.CreateJoinTokenRequest{Namespace: "/", Labels: map[string]string{"id": "x"}}, connect.CodeInvalidArgument, "host.id"},
		"bad key":           {&symbolonv1.CreateJoinTokenRequest{Namespace: "/", Labels: map[string]string{"a.b": "x"}}, connect.CodeInvalidArgument, "a.b"},
		"empty value":       {&symbolonv1.CreateJoinTokenRequest{Namespace: "/", Labels: map[string]string{"a": ""}}, connect.CodeInvalidArgument, "empty"},
		"too long":          {&symbolonv1.CreateJoinTokenRequest{Namespace: "/", Ttl: durationpb.New(365 * 24 * time.Hour)}, connect.CodeInvalidArgument, "ttl"},
		"negative":          {&symbolonv1.CreateJoinTokenRequest{Namespace: "/", Ttl: durationpb.New(-time.Hour)}, connect.CodeInvalidArgument, "ttl"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := w.admin().CreateJoinToken(t.Context(), connect.NewRequest(test.req))
			wantCode(t, err, test.code, test.word)
		})
	}
}

// TestJoinTokenSecretIsNotStored: who reads the store cannot enrol.
func TestJoinTokenSecretIsNotStored(t *testing.T) {
	w := newWorld(t)
	token := w.token("/", nil)
	w.halt()
	raw, err := os.ReadFile(filepath.Join(w.cfg.DataDir, "controller.db"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(raw, []byte(token.ID)) {
		t.Fatal("the token is not in the store at all")
	}
	revealed := []byte(token.Reveal())
	secret := bytes.Split(revealed, []byte("."))[2]
	for _, form := range [][]byte{token.Secret[:], secret, revealed} {
		if bytes.Contains(raw, form) {
			t.Error("the secret stands in the store")
		}
	}
}

func TestRenewAndKeep(t *testing.T) {
	w := newWorld(t)
	h := w.enrol("/", nil)
	next, err := h.Renew(t.Context(), h)
	if err != nil {
		t.Fatal(err)
	}
	if next.HostID != h.HostID || next.Chain[0].Equal(h.Chain[0]) || !next.RotateAt.After(time.Now()) {
		t.Errorf("renewed: %+v", next)
	}
	// What the proxy keeps in the kernel's memory works after its restart. (Never on a
	// disk: see internal/keyring.)
	kept, err := next.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	loaded, err := enrol.Unmarshal(kept)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := loaded.Renew(t.Context(), w.proxy(loaded.TLS())); err != nil {
		t.Errorf("with the kept credential: %v", err)
	}
	if svid, err := loaded.SVID(); err != nil || !identity.IsHost(svid.ID) {
		t.Errorf("SVID: %v, %v", svid, err)
	}
	if _, err := enrol.Unmarshal(kept[:len(kept)/2]); err == nil {
		t.Error("half a credential was read")
	}
	if _, err := enrol.Unmarshal(bytes.Replace(kept, []byte(next.HostID), []byte("0123456789abcdef"), 1)); !errors.Is(err, enrol.ErrResponse) {
		t.Errorf("for another host: %v, want ErrResponse", err)
	}
}

func TestHandshakeIsTLS13Only(t *testing.T) {
	w := newWorld(t)
	config := w.tls()
	config.MaxVersion = tls.VersionTLS12
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", w.address(), config)
	if err == nil {
		_ = conn.Close()
		t.Error("TLS 1.2 was accepted")
	}
}
