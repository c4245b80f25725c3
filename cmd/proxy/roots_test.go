package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"os"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
	"github.com/symbolon/symbolon/controller/enrol"
)

// another is a root that nobody has heard of.
func another(t *testing.T) *x509.Certificate {
	t.Helper()
	ca, _, _ := issueSVID(t, t.TempDir(), "spiffe://acme.example/x")
	data, err := os.ReadFile(ca)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(data)
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func raws(certs ...*x509.Certificate) (out [][]byte) {
	for _, c := range certs {
		out = append(out, c.Raw)
	}
	return out
}

// believed are the roots in all the places where something is verified by them.
func (j *joined) believed(t *testing.T) map[string][]*x509.Certificate {
	t.Helper()
	out := map[string][]*x509.Certificate{"host": j.host.cred.Load().Roots}
	kept, err := j.host.kept()
	if err != nil {
		t.Fatal(err)
	}
	out["keyring"] = kept.Roots
	td := j.host.cred.Load().TrustDomain
	for _, s := range j.manager.Snapshot() {
		b, ok := s.Credential.Bundles.Get(td)
		if !ok {
			t.Fatal("a workload without a bundle")
		}
		out["workload"] = b.X509Authorities()
	}
	return out
}

// New roots are believed everywhere before the controller hears so, also where the policy
// that came with them is refused; older ones that come late change nothing; withdrawn ones
// are gone everywhere, and the number that is acknowledged says which set it is.
func TestRootsOfAGeneration(t *testing.T) {
	j := newJoined(t)
	j.host.changed = j.hostChanged
	own := j.host.cred.Load().Roots[0]
	next := another(t)
	apply := func(version uint64, bad bool, roots ...*x509.Certificate) error {
		g := &symbolonv1.Generation{Number: 8, HostNamespace: "/", Bundle: raws(roots...), BundleVersion: version, Resources: []*symbolonv1.Resource{{
			Namespace: "/", Kind: &symbolonv1.Resource_NamespaceKind{NamespaceKind: &symbolonv1.Namespace{
				Mode: symbolonv1.Mode_MODE_ENFORCE, Default: symbolonv1.Default_DEFAULT_DENY, Protection: symbolonv1.Protection_PROTECTION_ENCRYPTED,
			}},
		}}}
		if bad {
			g.Bundles = []*symbolonv1.TrustBundle{{TrustDomain: j.host.cred.Load().TrustDomain.Name(), Roots: raws(own)}}
		}
		return j.fromController(g)
	}
	want := func(what string, version uint64, roots ...*x509.Certificate) {
		t.Helper()
		if v := j.bundleVersion(); v != version {
			t.Errorf("%s: version %d, want %d", what, v, version)
		}
		// Workloads hear of it by their own goroutines.
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			missing := ""
			for place, is := range j.believed(t) {
				if len(is) != len(roots) {
					missing = place
					continue
				}
				for _, r := range roots {
					if !bytes.Contains(bytes.Join(raws(is...), nil), r.Raw) {
						missing = place
					}
				}
			}
			if missing == "" {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: not so for the %s", what, missing)
			}
		}
	}
	want("at first", 0, own)
	if err := apply(5, true, own, next); err == nil {
		t.Fatal("a set that gives the own trust domain other roots is in force")
	}
	want("policy refused", 5, own, next)
	if err := apply(4, false, own); err != nil {
		t.Fatal(err)
	}
	want("an older set, come late", 5, own, next)
	if err := apply(0, false, own); err != nil {
		t.Fatal(err)
	}
	want("a set without a number", 5, own, next)
	if err := apply(5, false, next, own); err != nil {
		t.Fatal(err)
	}
	want("the same in another order", 5, own, next)

	// What the next process finds.
	s, err := j.snapshot()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Wipe()
	left, err := enrol.Unmarshal(s.Host)
	if err != nil || left.BundleVersion != 5 || len(left.Roots) != 2 {
		t.Errorf("handed over: %v, %v", left, err)
	}
	if err := apply(6, false, own); err != nil {
		t.Fatal(err)
	}
	want("withdrawn", 6, own)
}

// A Reissue costs a renewal of the host's own SVID only where that is another by then.
func TestReissueRenewsTheHostWhenItMust(t *testing.T) {
	j := newJoined(t)
	j.host.asked = make(chan struct{}, 1)
	renewed := make(chan struct{}, 64)
	j.host.changed = func(*enrol.HostCredential) { renewed <- struct{}{} }
	ctx, cancel := context.WithCancel(t.Context())
	var loop sync.WaitGroup
	loop.Go(func() { j.host.renew(ctx) })
	defer loop.Wait()
	defer cancel()
	serial := func() string { return j.manager.Snapshot()[0].Credential.SVID.Serial().String() }
	for range 5 {
		was := serial()
		j.reissue(false)
		for deadline := time.Now().Add(30 * time.Second); serial() == was; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the workload has no other SVID")
			}
		}
	}
	if n := len(renewed) + len(j.host.asked); n != 0 {
		t.Errorf("%d renewals of the host's", n)
	}
	own := j.host.cred.Load().Chain[0]
	j.reissue(true)
	select {
	case <-renewed:
	case <-time.After(30 * time.Second):
		t.Fatal("the host has no other SVID")
	}
	if j.host.cred.Load().Chain[0].Equal(own) {
		t.Error("the same SVID again")
	}
}

// lateAnswer holds the answer of RenewHost back.
type lateAnswer struct {
	symbolonv1connect.ProxyServiceClient
	asked, answer chan struct{}
}

func (l lateAnswer) RenewHost(ctx context.Context, r *connect.Request[symbolonv1.RenewHostRequest]) (*connect.Response[symbolonv1.RenewHostResponse], error) {
	res, err := l.ProxyServiceClient.RenewHost(ctx, r)
	close(l.asked)
	<-l.answer
	return res, err
}

// An answer that was under way while newer roots came does not take them back: they are
// acknowledged already.
func TestRenewalDoesNotTakeRootsBack(t *testing.T) {
	j := newJoined(t)
	j.host.changed = j.hostChanged
	own, was := j.host.cred.Load().Roots[0], j.host.cred.Load()
	late := lateAnswer{j.host.client(), make(chan struct{}), make(chan struct{})}
	var renewing sync.WaitGroup
	renewing.Go(func() {
		c, err := was.Renew(t.Context(), late)
		if err != nil {
			t.Error(err)
			return
		}
		j.host.use(c)
	})
	<-late.asked
	j.host.trust([]*x509.Certificate{own, another(t)}, 3)
	close(late.answer)
	renewing.Wait()
	if c := j.host.cred.Load(); len(c.Roots) != 2 || c.BundleVersion != 3 || c.Chain[0].Equal(was.Chain[0]) {
		t.Errorf("%d roots, version %d, a new SVID: %v", len(c.Roots), c.BundleVersion, !c.Chain[0].Equal(was.Chain[0]))
	}
	for place, roots := range j.believed(t) {
		if len(roots) != 2 && place != "workload" {
			t.Errorf("%s has %d roots", place, len(roots))
		}
	}
}
