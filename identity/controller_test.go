package identity

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
)

// testController is the real Connect service on a small CA. Its answers can be
// made wrong.
type testController struct {
	symbolonv1connect.UnimplementedProxyServiceHandler
	t testing.TB

	mu       sync.Mutex
	root     *authority
	ca       *authority
	ttl      time.Duration
	rotate   time.Duration
	fail     error
	hang     bool
	spoil    func(*symbolonv1.IssueSVIDResponse)
	change   func(*x509.Certificate)
	requests []*symbolonv1.IssueSVIDRequest
	last     time.Time
	keys     map[string]bool
}

func newController(t testing.TB) *testController {
	root := newRoot(t, "acme.example")
	return &testController{t: t, root: root, ca: root.intermediate(nil), ttl: 24 * time.Hour, rotate: 30 * time.Minute, keys: map[string]bool{}}
}

// client talks to the controller through the real codec, without a network, which
// the fake clock of synctest does not know.
func (c *testController) client() symbolonv1connect.ProxyServiceClient {
	_, h := symbolonv1connect.NewProxyServiceHandler(c)
	return symbolonv1connect.NewProxyServiceClient(inProcess{h}, "http://controller")
}

type inProcess struct{ http.Handler }

func (p inProcess) Do(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	p.ServeHTTP(w, r)
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	return w.Result(), nil
}

func (c *testController) set(change func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change()
}

func (c *testController) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.requests)
}

func (c *testController) lastRequest() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last
}

func (c *testController) IssueSVID(ctx context.Context, r *connect.Request[symbolonv1.IssueSVIDRequest]) (*connect.Response[symbolonv1.IssueSVIDResponse], error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests = append(c.requests, r.Msg)
	c.last = time.Now()
	if c.hang {
		c.mu.Unlock()
		<-ctx.Done()
		c.mu.Lock()
		return nil, ctx.Err()
	}
	if c.fail != nil {
		return nil, c.fail
	}
	csr, err := x509.ParseCertificateRequest(r.Msg.Csr)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	c.keys[string(csr.RawSubjectPublicKeyInfo)] = true
	leaf := c.ca.issueFor(csr.PublicKey, webID, webClaims, func(x *x509.Certificate) {
		x.NotAfter = time.Now().Add(c.ttl)
		if c.change != nil {
			c.change(x)
		}
	})
	m := &symbolonv1.IssueSVIDResponse{Svid: &symbolonv1.IssuedSVID{
		SpiffeId: webID,
		Chain:    [][]byte{leaf.Raw, c.ca.cert.Raw},
		NotAfter: timestamppb.New(leaf.NotAfter),
		RotateAt: timestamppb.New(time.Now().Add(c.rotate)),
	}}
	if c.spoil != nil {
		c.spoil(m)
	}
	return connect.NewResponse(m), nil
}

var (
	acme        = spiffeid.RequireTrustDomainFromString("acme.example")
	webWorkload = &Workload{Key: Key{CgroupID: 7, UID: 33}, Attributes: Attributes{{"os.user", "web"}, {"proc.uid", "33"}}}
)

// watchOf starts a source on c, and a watch that ends with the test.
func watchOf(t *testing.T, c *testController) (*ControllerSource, <-chan Update) {
	t.Helper()
	s := NewControllerSource(c.client())
	s.SetBundle(acme, []*x509.Certificate{c.root.cert})
	ctx, cancel := context.WithCancel(t.Context())
	updates := s.Watch(ctx, webWorkload)
	t.Cleanup(func() {
		cancel()
		for range updates { // until it is closed
		}
	})
	return s, updates
}

// pending is the update that is there once everything has settled.
func pending(t *testing.T, updates <-chan Update) (Update, bool) {
	t.Helper()
	synctest.Wait()
	select {
	case u, ok := <-updates:
		if !ok {
			t.Fatal("the watch ended")
		}
		return u, true
	default:
		return Update{}, false
	}
}

func good(t *testing.T, updates <-chan Update) *Credential {
	t.Helper()
	u, ok := pending(t, updates)
	if !ok || u.Err != nil || u.Credential == nil {
		t.Fatalf("update %v: %+v", ok, u)
	}
	return u.Credential
}

func TestControllerSourceIssues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		_, updates := watchOf(t, c)
		cred := good(t, updates)
		if cred.SVID.ID.String() != webID || cred.SVID.Attributes.Get("env") != "prod" {
			t.Errorf("%s with %s", cred.SVID.ID, cred.SVID.Attributes)
		}
		if _, err := Verify(cred.SVID.Chain, cred.Bundles, time.Now()); err != nil {
			t.Error(err)
		}
		if d := cmp.Diff(webWorkload.Attributes, AttributesFromProto(c.requests[0].Attributes)); d != "" {
			t.Errorf("attributes sent (-want +got):\n%s", d)
		}
	})
}

func TestControllerSourceWaitsForABundle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		s := NewControllerSource(c.client())
		ctx, cancel := context.WithCancel(t.Context())
		updates := s.Watch(ctx, webWorkload)
		time.Sleep(time.Hour)
		if u, ok := pending(t, updates); ok || c.count() != 0 {
			t.Fatalf("asked without a way to check the answer: %+v", u)
		}
		s.SetBundle(acme, []*x509.Certificate{c.root.cert})
		good(t, updates)
		cancel()
		if _, ok := <-updates; ok {
			t.Error("an update after the end")
		}
	})
}

func TestControllerSourceRotates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		_, updates := watchOf(t, c)
		was := good(t, updates)
		for range 5 {
			last := c.lastRequest()
			time.Sleep(time.Until(last.Add(26 * time.Minute)))
			if u, ok := pending(t, updates); ok {
				t.Fatalf("rotated too soon: %+v", u)
			}
			time.Sleep(time.Until(last.Add(30*time.Minute + time.Second)))
			now := good(t, updates)
			if was.SVID.Chain[0].Equal(now.SVID.Chain[0]) {
				t.Fatal("the same certificate again")
			}
			was = now
		}
		if len(c.keys) != c.count() {
			t.Errorf("%d keys in %d requests: each rotation makes a new one", len(c.keys), c.count())
		}
	})
}

func TestControllerSourceOutlivesAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		_, updates := watchOf(t, c)
		cred := good(t, updates)
		c.set(func() { c.fail = connect.NewError(connect.CodeUnavailable, errors.New("away")) })
		time.Sleep(2 * time.Hour)
		u, ok := pending(t, updates)
		if !ok || connect.CodeOf(u.Err) != connect.CodeUnavailable || u.Credential != cred {
			t.Fatalf("during the outage: %+v", u)
		}
		if n := c.count(); n > 500 {
			t.Errorf("%d requests in two hours: no backing off", n)
		}
		c.set(func() { c.fail = nil })
		time.Sleep(maxRetry)
		if now := good(t, updates); now == cred {
			t.Error("nothing new after the outage")
		}
	})
}

func TestControllerSourceTriesHarderWithoutCredential(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		c.fail = connect.NewError(connect.CodeUnavailable, errors.New("away"))
		_, updates := watchOf(t, c)
		time.Sleep(10 * time.Minute)
		u, ok := pending(t, updates)
		if !ok || connect.CodeOf(u.Err) != connect.CodeUnavailable || u.Credential != nil {
			t.Fatalf("%+v", u)
		}
		if n := c.count(); n < 120 {
			t.Errorf("%d requests in ten minutes: a workload without SVID is refused everywhere", n)
		}
		c.set(func() { c.fail = nil })
		time.Sleep(maxFirstRetry)
		good(t, updates)
	})
}

// TestControllerSourceHeedsARefusal: what will be refused again is asked for seldom,
// and at once when something may have changed.
func TestControllerSourceHeedsARefusal(t *testing.T) {
	for _, code := range []connect.Code{connect.CodeInvalidArgument, connect.CodeFailedPrecondition, connect.CodePermissionDenied} {
		for name, wake := range map[string]func(*ControllerSource){
			"reissue": (*ControllerSource).Reissue, // the Profiles that were missing
			"bundle": func(s *ControllerSource) {
				s.SetBundle(spiffeid.RequireTrustDomainFromString("partner.example"), []*x509.Certificate{newRoot(t, "partner.example").cert})
			},
		} {
			for _, had := range []bool{false, true} {
				t.Run(fmt.Sprint(code, " ", name, " ", had), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						c := newController(t)
						refuse := func() { c.fail = connect.NewError(code, errors.New("no")) }
						if !had {
							refuse()
						}
						s, updates := watchOf(t, c)
						synctest.Wait()
						if had {
							good(t, updates)
							c.set(refuse)
							s.Reissue()
							synctest.Wait()
						}
						n := c.count()
						time.Sleep(time.Hour)
						u, ok := pending(t, updates)
						if !ok || connect.CodeOf(u.Err) != code || (u.Credential != nil) != had {
							t.Fatalf("%+v", u)
						}
						if n := c.count() - n; n < 55 || n > 70 {
							t.Errorf("%d requests in an hour, want about one a minute", n)
						}
						c.set(func() { c.fail = nil })
						before := time.Now()
						wake(s)
						good(t, updates)
						if d := time.Since(before); d != 0 {
							t.Errorf("after %s, want at once", d)
						}
					})
				})
			}
		}
	}
}

func TestControllerSourceTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		c.hang = true
		_, updates := watchOf(t, c)
		time.Sleep(issueTimeout)
		u, ok := pending(t, updates)
		if !ok || connect.CodeOf(u.Err) != connect.CodeDeadlineExceeded {
			t.Fatalf("%v: %+v", ok, u)
		}
	})
}

func TestControllerSourceReissues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		s, updates := watchOf(t, c)
		was := good(t, updates)
		s.Reissue()
		now := good(t, updates)
		if now.SVID == was.SVID || c.count() != 2 {
			t.Errorf("%d requests", c.count())
		}
		// The rhythm goes on from there.
		time.Sleep(26 * time.Minute)
		if _, ok := pending(t, updates); ok || c.count() != 2 {
			t.Errorf("%d requests", c.count())
		}
	})
}

func TestControllerSourceFollowsTheBundle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		s, updates := watchOf(t, c)
		was := good(t, updates)
		next := newRoot(t, "acme.example")

		s.SetBundle(acme, []*x509.Certificate{c.root.cert, next.cert})
		both := good(t, updates)
		if both.SVID != was.SVID || c.count() != 1 {
			t.Errorf("a good SVID was replaced: %d requests", c.count())
		}
		if b, _ := both.Bundles.Get(acme); len(b.X509Authorities()) != 2 {
			t.Error("the new root is missing")
		}
		s.SetBundle(acme, []*x509.Certificate{c.root.cert, next.cert})
		if u, ok := pending(t, updates); ok {
			t.Errorf("nothing changed: %+v", u)
		}
		if b, _ := was.Bundles.Get(acme); len(b.X509Authorities()) != 1 {
			t.Error("a credential was changed in place")
		}

		other := spiffeid.RequireTrustDomainFromString("partner.example")
		s.SetBundle(other, []*x509.Certificate{newRoot(t, "partner.example").cert})
		if cred := good(t, updates); !cred.Bundles.Has(other) || !cred.Bundles.Has(acme) {
			t.Error("a trust domain is missing")
		}
		s.SetBundle(other, nil)
		if cred := good(t, updates); cred.Bundles.Has(other) {
			t.Error("the trust domain is still there")
		}

		// A root that is withdrawn is not believed any more, even while the controller
		// has nothing better to give.
		c.set(func() { c.fail = connect.NewError(connect.CodeUnavailable, errors.New("away")) })
		s.SetBundle(acme, []*x509.Certificate{next.cert})
		u, ok := pending(t, updates)
		if !ok || u.Err == nil {
			t.Fatalf("%+v", u)
		}
		if _, err := Verify(u.Credential.SVID.Chain, u.Credential.Bundles, time.Now()); !errors.Is(err, ErrUntrusted) {
			t.Errorf("the old root is still trusted: %v", err)
		}
		c.set(func() { c.fail, c.root, c.ca = nil, next, next.intermediate(nil) })
		time.Sleep(maxRetry)
		if cred := good(t, updates); cred.SVID == was.SVID {
			t.Error("still the old SVID")
		}
	})
}

// What the controller says is checked like a stranger's word.
func TestControllerSourceRefusesAnswers(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit func(*testController)
		want error
	}{
		{"no chain", func(c *testController) { c.spoil = func(m *symbolonv1.IssueSVIDResponse) { m.Svid.Chain = nil } }, ErrMalformedSVID},
		{"no SVID", func(c *testController) { c.spoil = func(m *symbolonv1.IssueSVIDResponse) { m.Svid = nil } }, ErrMalformedSVID},
		{"garbage", func(c *testController) {
			c.spoil = func(m *symbolonv1.IssueSVIDResponse) { m.Svid.Chain[0] = []byte("x") }
		}, ErrMalformedSVID},
		{"a long chain", func(c *testController) {
			c.spoil = func(m *symbolonv1.IssueSVIDResponse) {
				for range maxChain {
					m.Svid.Chain = append(m.Svid.Chain, m.Svid.Chain[1])
				}
			}
		}, ErrMalformedSVID},
		{"another key", func(c *testController) {
			c.spoil = func(m *symbolonv1.IssueSVIDResponse) { m.Svid.Chain[0] = c.ca.issue(webID, nil, nil).Raw }
		}, ErrMalformedSVID},
		{"another root", func(c *testController) { c.ca = newRoot(c.t, "acme.example") }, ErrUntrusted},
		{"another trust domain", func(c *testController) {
			c.change = func(x *x509.Certificate) { x.URIs[0] = mustURI(c.t, "spiffe://evil.example/a/b") }
		}, ErrNoBundle},
		{"a host's name", func(c *testController) {
			c.change = func(x *x509.Certificate) { x.URIs[0] = mustURI(c.t, "spiffe://acme.example/symbolon/host/1") }
		}, ErrNotWorkload},
		{"expired", func(c *testController) { c.ttl = -time.Second }, ErrExpired},
		{"a CA", func(c *testController) {
			c.change = func(x *x509.Certificate) { x.IsCA, x.KeyUsage = true, x.KeyUsage|x509.KeyUsageCertSign }
		}, ErrMalformedSVID},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newController(t)
				tt.edit(c)
				_, updates := watchOf(t, c)
				u, ok := pending(t, updates)
				if !ok || u.Credential != nil || !errors.Is(u.Err, tt.want) {
					t.Errorf("%v %+v, want %v", ok, u, tt.want)
				}
			})
		})
	}
}

// TestControllerSourceIsFair: a user with very many workloads waits for himself.
func TestControllerSourceIsFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		m, _ := managerOf(t, c)
		const many = userBurst + 10*userRate
		var wg sync.WaitGroup
		for n := range uint64(many) {
			wg.Go(func() {
				if _, err := m.Get(t.Context(), worker(n)); err != nil {
					t.Error(err)
				}
			})
		}
		began := time.Now()
		synctest.Wait()
		if n := c.count(); n != userBurst {
			t.Errorf("%d requests at once, want %d", n, userBurst)
		}
		mustGet(t, m, webWorkload)
		mustGet(t, m, &Workload{Key: Key{CgroupID: 1}, Attributes: Attributes{{"proc.uid", "0"}}})
		if d := time.Since(began); d != 0 {
			t.Errorf("others waited %s", d)
		}
		wg.Wait()
		if d := time.Since(began); d < 9*time.Second || d > 11*time.Second {
			t.Errorf("the rest after %s, want 10 s", d)
		}
	})
}

func TestControllerSourceSlowReaderGetsTheLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newController(t)
		_, updates := watchOf(t, c)
		time.Sleep(3 * time.Hour)
		cred := good(t, updates)
		if age := time.Since(cred.SVID.Chain[0].NotBefore); age > 31*time.Minute+time.Minute {
			t.Errorf("an SVID of %s ago", age)
		}
		if _, ok := pending(t, updates); ok {
			t.Error("an older one after it")
		}
	})
}

func TestPauses(t *testing.T) {
	now, away := time.Now(), errors.New("away")
	for range 1000 {
		for n := 1; n < 100; n++ {
			if d := retryPause(n, true, away); d <= 0 || d > maxRetry+time.Millisecond {
				t.Fatalf("retry %d after %s", n, d)
			}
			if d := retryPause(n, false, away); d > maxFirstRetry+time.Millisecond {
				t.Fatalf("first retry %d after %s", n, d)
			}
		}
		for _, tt := range []struct{ rotate, end, least, most time.Duration }{
			{30 * time.Minute, 24 * time.Hour, 27 * time.Minute, 30 * time.Minute},
			{-time.Hour, 10 * time.Hour, 270 * time.Minute, 5 * time.Hour},
			{20 * time.Hour, 10 * time.Hour, 270 * time.Minute, 5 * time.Hour},
			{time.Millisecond, time.Hour, minRotation, minRotation},
			{0, time.Second, minRotation, minRotation},
		} {
			if d := rotationPause(now, now.Add(tt.rotate), now.Add(tt.end)); d < tt.least || d > tt.most {
				t.Fatalf("rotate in %s, ends in %s: %s", tt.rotate, tt.end, d)
			}
		}
	}
}
