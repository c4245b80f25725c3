package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/fleet"
	"github.com/symbolon/symbolon/internal/netlab"
	"github.com/symbolon/symbolon/internal/spirelab"
)

const federationPort = 8443

// federated is a controller of a trust domain, with a bundle endpoint, behind the
// router.
func (w *world) federated(name, trustDomain, subnet string) *fleet.Fleet {
	w.t.Helper()
	h := w.net.Host(name)
	w.net.Link(w.Router, h, []string{subnet + ".1/24"}, []string{subnet + ".2/24"})
	h.DefaultRoute(subnet + ".1")
	f, err := fleet.NewWith(w.ctx(), h, subnet+".2", fleet.Options{
		TrustDomain: trustDomain, Flags: []string{fmt.Sprintf("--federation-listen=[::]:%d", federationPort)},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := f.Forget(context.Background()); err != nil {
			w.t.Error(err)
		}
	})
	return f
}

// trusts applies a TrustDomain for other to f, and waits until its bundle was fetched.
func (w *world) trusts(f *fleet.Fleet, name, url, id, bundle string) {
	w.t.Helper()
	yaml := fmt.Sprintf("kind: TrustDomain\nnamespace: /\nname: %s\nendpoint: %s\nprofile: https_spiffe\nendpoint_id: %s\nbundle: |\n", name, url, id)
	for line := range strings.Lines(strings.TrimSpace(bundle)) {
		yaml += "  " + strings.TrimRight(line, "\n") + "\n"
	}
	if err := f.Apply(w.ctx(), yaml); err != nil {
		w.t.Fatal(err)
	}
	if _, err := f.Must(w.ctx(), "trust-domain", "refresh", name); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) must(f *fleet.Fleet, args ...string) string {
	w.t.Helper()
	out, err := f.Must(w.ctx(), args...)
	if err != nil {
		w.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func controllerID(trustDomain string) string {
	return "spiffe://" + trustDomain + "/symbolon/controller"
}

// Two companies, each with a controller of its own: one's curl reaches the other's web
// server by the name of its trust domain, and only while both sides say so.
func TestTwoControllersOfTwoTrustDomains(t *testing.T) {
	n := netlab.Test(t, "iptables", "ip6tables", "ipset", "nginx", "curl")
	w := &world{t: t, net: n, TwoHosts: n.TwoHosts()}
	t.Cleanup(func() {
		if t.Failed() {
			w.dump()
		}
	})
	ours, theirs := w.federated("ours", "acme.example", "10.9.0"), w.federated("theirs", "partner.example", "10.8.0")
	const base = "kind: Namespace\nname: /\nmode: enforce\ndefault: deny\nattributes: {app: {}}\n---\nkind: Namespace\nname: /prod\nmode: enforce\n---\n"
	apply := func(f *fleet.Fleet, yaml string) {
		t.Helper()
		if err := f.Apply(w.ctx(), yaml); err != nil {
			t.Fatal(err)
		}
	}
	apply(ours, base+"kind: Profile\nnamespace: /prod\nname: curl\nmatch: {proc.exe: /usr/bin/curl}\nworkload: curl\nlabels: {app: curl}\n")
	apply(theirs, base+"kind: Profile\nnamespace: /prod\nname: web\nmatch: {proc.unit: [nginx.service, slow.service]}\nworkload: web\nlabels: {app: web}\n")
	var err error
	if w.client, err = ours.Proxy(w.ctx(), w.Client, fleet.Enrolment{Namespace: "/prod"}); err != nil {
		t.Fatal(err)
	}
	if w.server, err = theirs.Proxy(w.ctx(), w.Server, fleet.Enrolment{Namespace: "/prod"}); err != nil {
		t.Fatal(err)
	}
	slow := strings.Repeat("slowly ", 500)
	for _, x := range []netlab.Nginx{
		{Port: 80, Body: "of the partner"}, {Port: 81, Body: slow, Unit: "slow.service", Directives: "limit_rate 50;"},
	} {
		if _, err := w.Server.Nginx(w.ctx(), x); err != nil {
			t.Fatal(err)
		}
	}
	curl := func(more ...string) netlab.Result {
		t.Helper()
		r, err := w.Client.Run(w.ctx(), "curl", append([]string{"-sS", "--max-time", "20", "http://10.2.0.2/"}, more...)...)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	const allowOut = "kind: Policy\nnamespace: /prod\nname: to-partner\nsubject: {app: curl}\nverb: allow\nobject: {spiffe.trust_domain: partner.example}\nports: [tcp/80-81]\n"
	apply(ours, allowOut)
	apply(theirs, "kind: Policy\nnamespace: /prod\nname: from-acme\nsubject: {spiffe.trust_domain: acme.example}\nverb: allow\nobject: {app: web}\nports: [tcp/80-81]\n")

	// Strangers to each other, whatever policy says.
	if r := curl(); r.ExitCode == 0 {
		t.Errorf("before they know each other: %q", r.Stdout)
	}
	w.recorded(w.client, "a stranger", func(l *flow.Line) bool { return l.Reason == "wrong-trust-domain" })

	oursBundle, theirsBundle := w.must(ours, "trust-domain", "bundle"), w.must(theirs, "trust-domain", "bundle")
	w.trusts(ours, "partner.example", fmt.Sprintf("https://10.8.0.2:%d/", federationPort), controllerID("partner.example"), theirsBundle)
	w.trusts(theirs, "acme.example", fmt.Sprintf("https://10.9.0.2:%d/", federationPort), controllerID("acme.example"), oursBundle)
	// They know each other, and neither may say a word of its workloads beyond their IDs.
	w.eventually("a claim is refused", func() bool {
		if r := curl(); r.ExitCode == 0 {
			t.Errorf("a claim that no TrustDomain allows: %q", r.Stdout)
		}
		ctx, cancel := context.WithTimeout(w.ctx(), time.Second)
		defer cancel()
		_, err := w.client.WaitFlow(ctx, func(l *flow.Line) bool { return l.Reason == "claim-not-allowed" })
		return err == nil
	})
	for f, name := range map[*fleet.Fleet]string{ours: "partner.example", theirs: "acme.example"} {
		apply(f, w.must(f, "policy", "get", "trustdomain:/"+name)+"\nclaims: [app, \"host.*\", os.user, os.group]\n")
	}
	w.eventually("curl is let in", func() bool { return strings.TrimSpace(curl().Stdout) == "of the partner" })
	l := w.recorded(w.server, "let in", to(80, "allow"))
	if l.Source.SPIFFEID != "spiffe://acme.example/prod/curl" || l.Protection != "encrypted" {
		t.Errorf("the server's record: %+v", l)
	}
	if out := w.must(ours, "trust-domain", "list"); !strings.Contains(out, "✓ fetched") {
		t.Errorf("trust-domain list:\n%s", out)
	}

	// Without the policy it is refused, by its own side.
	w.must(ours, "policy", "delete", "--yes", "/prod/to-partner")
	if err := ours.Settle(w.ctx()); err != nil {
		t.Fatal(err)
	}
	if r := curl(); r.ExitCode == 0 {
		t.Errorf("without the policy: %q", r.Stdout)
	}
	apply(ours, allowOut)

	// An open connection is cut when the other side's TrustDomain goes, and there is no
	// other.
	file := filepath.Join(t.TempDir(), "answer")
	ended := make(chan netlab.Result, 1)
	go func() {
		r, _ := w.Client.Run(w.ctx(), "curl", "-sS", "-N", "--max-time", "100", "-o", file, "http://10.2.0.2:81/")
		ended <- r
	}()
	w.eventually("the slow answer begins", func() bool {
		st, err := os.Stat(file)
		return err == nil && st.Size() > 0
	})
	w.must(theirs, "policy", "delete", "--yes", "trustdomain:/acme.example")
	r := <-ended
	if data, err := os.ReadFile(file); r.ExitCode == 0 || r.ExitCode == 28 || err != nil || len(data) == len(slow) {
		t.Errorf("the open connection: exit code %d, %d bytes, %v", r.ExitCode, len(data), err)
	}
	w.recorded(w.server, "cut", func(l *flow.Line) bool {
		return strings.HasSuffix(l.Destination.Address, ":81") && l.Outcome == "deny" && (l.Reason == "wrong-trust-domain" || l.Reason == "policy-changed")
	})
	if r := curl(); r.ExitCode == 0 {
		t.Errorf("without a TrustDomain there: %q", r.Stdout)
	}
	w.recorded(w.server, "a stranger again", func(l *flow.Line) bool { return l.Reason == "wrong-trust-domain" })
}

// A SPIRE server and a controller of ours federate: each fetches what the other serves.
func TestSPIREFetchesOurBundle(t *testing.T) {
	spirelab.Test(t)
	n := netlab.Test(t)
	w := &world{t: t, net: n, TwoHosts: n.TwoHosts()}
	ours := w.federated("ours", "acme.example", "10.9.0")
	h := n.Host("spire")
	n.Link(w.Router, h, []string{"10.8.1.1/24"}, []string{"10.8.1.2/24"})
	h.DefaultRoute("10.8.1.1")
	east, err := spirelab.StartServer(w.ctx(), h, spirelab.ServerConfig{TrustDomain: "east.example", Address: "10.8.1.2"})
	if err != nil {
		t.Fatal(err)
	}
	if err := east.FederateWith(w.ctx(), "acme.example", fmt.Sprintf("https://10.9.0.2:%d/", federationPort),
		controllerID("acme.example"), w.must(ours, "trust-domain", "bundle")); err != nil {
		t.Fatal(err)
	}
	out, err := east.CLI(w.ctx(), "federation", "refresh", "-id", "acme.example")
	if err != nil || !strings.Contains(out, "Bundle refreshed") {
		t.Errorf("SPIRE fetches ours: %q, %v", out, err)
	}
	bundle, err := east.BundleJSON(w.ctx())
	if err != nil {
		t.Fatal(err)
	}
	url, id := east.BundleEndpoint()
	w.trusts(ours, "east.example", url, id, bundle)
	if out := w.must(ours, "trust-domain", "show", "east.example"); !strings.Contains(out, "✓ fetched") || !strings.Contains(out, "refresh hint  10s") {
		t.Errorf("SPIRE's bundle:\n%s", out)
	}
}
