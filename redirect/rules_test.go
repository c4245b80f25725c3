package redirect

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func config(b Backend) Config {
	cfg := DefaultConfig()
	cfg.Backend = b
	return cfg
}

// Every way a connection can take on a host with rules and a proxy.
func TestConnectionsGoWhereTheyShould(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := twoHosts(t)
		linkLocal4(near, far)
		far.serve("[::]:8080", "far app", nil)
		near.serve("[::]:8080", "near app", nil)
		near.serve("[::]:22", "near ssh", nil)
		proxyIn(t, near)
		cfg := config(b)
		cfg.ExcludeOutbound = []netip.Prefix{netip.MustParsePrefix("10.77.1.3/32"), netip.MustParsePrefix("fd77:1::3/128")}
		r := near.rules(cfg)
		near.install(r)
		near.install(r) // installing twice is installing once
		if drift := near.verify(r); len(drift) > 0 {
			t.Fatalf("after Install: %q", drift)
		}
		if drift := near.verify(near.rules(cfg)); len(drift) > 0 {
			t.Fatalf("seen by another process: %q", drift)
		}

		for _, c := range []struct {
			name string
			from netNS
			mark int
			to   string
			want string
		}{
			{"app to remote", near, 0, "10.77.1.1:8080", "outbound 10.77.1.1:8080"},
			{"app to remote v6", near, 0, "[fd77:1::1]:8080", "outbound [fd77:1::1]:8080"},
			{"app to remote port that nobody serves", near, 0, "10.77.1.1:9", "outbound 10.77.1.1:9"},
			{"app to excluded", near, 0, "10.77.1.3:8080", "far app"},
			{"app to excluded v6", near, 0, "[fd77:1::3]:8080", "far app"},
			{"app to link-local", near, 0, "169.254.7.8:8080", "outbound 169.254.7.8:8080"},
			{"app to own link-local", near, 0, "169.254.7.7:8080", "outbound 169.254.7.7:8080"},
			{"app to cloud metadata behind a router", near, 0, "169.254.169.254:80", "outbound 169.254.169.254:80"},
			{"app to link-local v6", near, 0, "[fe80::b%eth0]:8080", "refused"},
			{"tunnel to link-local", near, MarkTunnel, "169.254.7.8:8080", "far app"},
			{"tunnel to link-local v6", near, MarkTunnel, "[fe80::b%eth0]:8080", "far app"},
			{"remote to protected link-local", far, 0, "169.254.7.7:8080", "inbound 169.254.7.7:8080"},
			{"remote to protected link-local v6", far, 0, "[fe80::a%eth0]:8080", "inbound [fe80::a]:8080"},
			{"app to loopback", near, 0, "127.0.0.1:8080", "outbound 127.0.0.1:8080"},
			{"app to loopback v6", near, 0, "[::1]:8080", "outbound [::1]:8080"},
			{"app to own address", near, 0, "10.77.1.2:8080", "outbound 10.77.1.2:8080"},
			{"app to own address v6", near, 0, "[fd77:1::2]:8080", "outbound [fd77:1::2]:8080"},
			{"tunnel to remote", near, MarkTunnel, "10.77.1.1:8080", "far app"},
			{"tunnel to remote v6", near, MarkTunnel, "[fd77:1::1]:8080", "far app"},
			{"tunnel to this host", near, MarkTunnel, "10.77.1.2:8080", "inbound 10.77.1.2:8080"},
			{"tunnel to this host v6", near, MarkTunnel, "[fd77:1::2]:8080", "inbound [fd77:1::2]:8080"},
			{"tunnel to loopback", near, MarkTunnel, "127.0.0.1:8080", "inbound 127.0.0.1:8080"},
			{"proxy to local app", near, MarkApp, "127.0.0.1:8080", "near app"},
			{"proxy to local app v6", near, MarkApp, "[fd77:1::2]:8080", "near app"},
			{"proxy to controller", near, MarkControl, "10.77.1.1:8080", "far app"},
			{"proxy to controller on this host", near, MarkControl, "10.77.1.2:8080", "near app"},
			{"remote to protected", far, 0, "10.77.1.2:8080", "inbound 10.77.1.2:8080"},
			{"remote to protected v6", far, 0, "[fd77:1::2]:8080", "inbound [fd77:1::2]:8080"},
			{"remote to excluded port", far, 0, "10.77.1.2:22", "near ssh"},
			{"remote to excluded port v6", far, 0, "[fd77:1::2]:22", "near ssh"},
		} {
			if got := c.from.reaches(c.mark, "", c.to); got != c.want {
				t.Errorf("%s: reached %q, want %q", c.name, got, c.want)
			}
		}
	})
}

// A source address that the application chose is kept.
func TestBoundSourceIsRedirected(t *testing.T) {
	near, _ := twoHosts(t)
	proxyIn(t, near)
	near.install(near.rules(config(BackendDefault)))
	for from, to := range map[string]string{"10.77.1.2:0": "10.77.1.1:8080", "[fd77:1::2]:0": "[fd77:1::1]:8080"} {
		if got := near.reaches(0, from, to); got != "outbound "+to {
			t.Errorf("from %s: reached %q", from, got)
		}
	}
}

func TestListenersRefuseDirectConnections(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := twoHosts(t)
		proxyIn(t, near)
		near.install(near.rules(config(b)))
		direct := []string{
			"127.0.0.1:15001", "127.0.0.1:15006", "127.8.8.8:15006", "10.77.1.2:15001", "10.77.1.2:15006",
			"[::1]:15001", "[::1]:15006", "[fd77:1::2]:15001", "[fd77:1::2]:15006",
		}
		for _, to := range direct {
			near.mustReach("refused", 0, to)
			if strings.HasPrefix(to, "10.") || strings.HasPrefix(to, "[fd") {
				far.mustReach("refused", 0, to)
			}
		}
		near.mustReach("refused", 0, "[fe80::a%eth0]:15006")
		far.mustReach("refused", 0, "[fe80::a%eth0]:15006")

		// Were the guard gone, the listener itself must know.
		near.sh(`iptables-` + string(b) + ` -F SYMBOLON_GIN; ip6tables-` + string(b) + ` -F SYMBOLON_GIN`)
		for _, to := range direct {
			if got := near.reaches(0, "", to); !strings.Contains(got, ErrNotRedirected.Error()) && got != "refused" {
				t.Errorf("without the guard, %s reached %q", to, got)
			}
		}
		far.mustReach("inbound: "+ErrNotRedirected.Error()+": it was made straight to 10.77.1.2:15006", 0, "10.77.1.2:15006")
	})
}

func TestDeadProxyFailsClosed(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := twoHosts(t)
		near.serve("[::]:8080", "near app", nil)
		far.serve("[::]:8080", "far app", nil)
		near.install(near.rules(config(b)))
		for _, to := range []string{"10.77.1.1:8080", "[fd77:1::1]:8080", "127.0.0.1:8080", "10.77.1.2:8080", "[::1]:8080"} {
			near.mustReach("refused", 0, to)
		}
		for _, to := range []string{"10.77.1.2:8080", "[fd77:1::2]:8080"} {
			far.mustReach("refused", 0, to)
		}
	})
}

// A host that fails open: the rules hold while Watch runs, and lapse when it does
// not any more.
func TestDeadProxyFailsOpenWhereWanted(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := twoHosts(t)
		near.serve("[::]:8080", "near app", nil)
		far.serve("[::]:8080", "far app", nil)
		cfg := config(b)
		cfg.FailClosed = false
		r := near.rules(cfg)
		near.install(r)
		ctx, stop := context.WithTimeout(context.Background(), 2*Lapse)
		defer stop()
		var watching sync.WaitGroup
		watching.Go(func() {
			near.do(func() {
				if err := r.Watch(ctx, time.Hour, func(d []string, err error) { t.Errorf("drift %q, %v", d, err) }); !errors.Is(err, context.DeadlineExceeded) {
					t.Error(err)
				}
			})
		})
		for ctx.Err() == nil {
			near.mustReach("refused", 0, "10.77.1.1:8080")
			near.mustReach("refused", 0, "[fd77:1::1]:8080")
			far.mustReach("refused", 0, "10.77.1.2:8080")
		}
		watching.Wait()
		start := time.Now()
		eventually(t, "the rules lapse", func() bool { return near.reaches(0, "", "10.77.1.1:8080") == "far app" })
		if took := time.Since(start); took > 2*Lapse {
			t.Errorf("lapsed after %v", took)
		}
		eventually(t, "the v6 rules lapse", func() bool { return near.reaches(0, "", "[fd77:1::1]:8080") == "far app" })
		eventually(t, "the inbound rules lapse", func() bool { return far.reaches(0, "", "10.77.1.2:8080") == "near app" })
		if drift := near.verify(r); len(drift) > 0 {
			t.Errorf("lapsing is no drift: %q", drift)
		}
	})
}

func TestDriftIsSeenAndRepaired(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := twoHosts(t)
		far.serve("[::]:8080", "far app", nil)
		near.serve("[::]:8080", "near app", nil)
		proxyIn(t, near)
		cfg := config(b)
		cfg.InboundPorts = Ports(PortRange{8080, 8081}, PortRange{9000, 9000})
		r := near.rules(cfg)
		near.install(r)
		for _, c := range []struct{ name, command, drift string }{
			{"nat flushed", "IPT -t nat -F", "chain SYMBOLON_OUT has 0 rules"},
			{"jump deleted", "IPT -t nat -D OUTPUT -j SYMBOLON_OUT", "OUTPUT does not jump to SYMBOLON_OUT"},
			{"guard deleted", "IPT -D INPUT -j SYMBOLON_GIN; IPT -F SYMBOLON_GIN; IPT -X SYMBOLON_GIN", "chain SYMBOLON_GIN is missing"},
			{"doubled jump", "IPT -t nat -A OUTPUT -j SYMBOLON_OUT; IPT -t nat -A OUTPUT -j SYMBOLON_OUT", "jumps to SYMBOLON_OUT 3 times"},
			{"narrowed jump", "IPT -t nat -D OUTPUT 1; IPT -t nat -I OUTPUT -p tcp -m tcp --dport 80 -j SYMBOLON_OUT", "first by"},
			{"another's rule first", "IPT -t nat -I OUTPUT -p tcp -m tcp --dport 9 -j RETURN", "SYMBOLON_OUT is not the first rule of OUTPUT"},
			{"zone flushed", "IPT -t raw -F", "chain SYMBOLON_ROUT has 0 rules"},
			{"rule replaced", "IPT -t nat -R SYMBOLON_OUT 1 -j RETURN", "rule 1 of chain SYMBOLON_OUT"},
			{"port deleted", "ipset del symbolon_in 8080", "ipset symbolon_in has 2 members, not 3"},
			{"port exchanged", "ipset del symbolon_in 8080; ipset add symbolon_in 22", "ipset symbolon_in has other members"},
			{"network deleted", "ipset del symbolon_out4 0.0.0.0/1", "ipset symbolon_out4 has 1 members, not 2"},
			{"v6 network deleted", "ipset del symbolon_out6 ::/1", "ipset symbolon_out6 has 1 members, not 2"},
		} {
			for _, tool := range []string{"iptables-", "ip6tables-"} {
				if tool == "ip6tables-" && !strings.Contains(c.command, "IPT") {
					continue
				}
				near.sh(strings.ReplaceAll(c.command, "IPT", tool+string(b)))
				if drift := strings.Join(near.verify(r), "; "); !strings.Contains(drift, c.drift) {
					t.Errorf("%s, %s: drift %q, want %q", tool, c.name, drift, c.drift)
				}
				near.do(func() { check(t, r.Repair(context.Background())) })
				if drift := near.verify(r); len(drift) > 0 {
					t.Errorf("%s, %s: after repair %q", tool, c.name, drift)
				}
			}
		}
		near.mustReach("outbound 10.77.1.1:8080", 0, "10.77.1.1:8080")
		far.mustReach("inbound [fd77:1::2]:8080", 0, "[fd77:1::2]:8080")
	})
}

// A DNAT before ours (kube-proxy does that) must not carry connections around the
// proxy: the guard refuses them until Watch has put ours first again.
func TestForeignDNATDoesNotBypass(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := twoHosts(t)
		far.serve("[::]:8080", "far app", nil)
		near.serve("[::]:8080", "near app", nil)
		proxyIn(t, near)
		r := near.rules(config(b))
		near.install(r)
		near.mustReach("outbound 10.77.1.9:80", 0, "10.77.1.9:80")
		ipt := "iptables-" + string(b)
		near.sh(ipt + " -t nat -N KUBE; " + ipt + " -t nat -A KUBE -p tcp -m tcp -d 10.77.1.9 --dport 80 -j DNAT --to-destination 10.77.1.1:8080;" +
			ipt + " -t nat -A KUBE -p tcp -m tcp -d 10.77.1.8 --dport 80 -j DNAT --to-destination 10.77.1.2:8080;" +
			ipt + " -t nat -I OUTPUT -j KUBE;" +
			ipt + " -t nat -I PREROUTING -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 8080")
		near.mustReach("refused", 0, "10.77.1.9:80") // to another host
		near.mustReach("refused", 0, "10.77.1.8:80") // to this one
		far.mustReach("refused", 0, "10.77.1.2:80")

		ctx, stop := context.WithCancel(context.Background())
		defer stop()
		drifts := make(chan []string, 10)
		var watching sync.WaitGroup
		watching.Go(func() {
			near.do(func() {
				_ = r.Watch(ctx, 20*time.Millisecond, func(d []string, err error) {
					if err != nil {
						t.Error(err)
					}
					drifts <- d
				})
			})
		})
		drift := <-drifts
		stop()
		watching.Wait()
		if s := strings.Join(drift, "; "); !strings.Contains(s, "SYMBOLON_OUT is not the first rule of OUTPUT") || !strings.Contains(s, "SYMBOLON_PRE is not the first") {
			t.Errorf("drift: %q", drift)
		}
		near.mustReach("outbound 10.77.1.9:80", 0, "10.77.1.9:80")
		far.mustReach("inbound 10.77.1.2:80", 0, "10.77.1.2:80")
		// The foreign rules are still there: only ours have moved.
		if out := near.sh(ipt + "-save -t nat"); strings.Count(out, "KUBE") != 4 || strings.Count(out, "-j SYMBOLON_OUT") != 1 {
			t.Errorf("nat table after repair:\n%s", out)
		}
	})
}

// While rules are applied again and again, no connection goes around the proxy and
// none fails.
func TestReapplyingUnderLoadLetsNothingPass(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := twoHosts(t)
		far.serve("[::]:8080", "far app", nil)
		proxyIn(t, near)
		r := near.rules(config(b))
		near.install(r)
		var stop atomic.Bool
		var total atomic.Int64
		var load sync.WaitGroup
		for _, to := range []string{"10.77.1.1:8080", "[fd77:1::1]:8080"} {
			load.Go(func() {
				for !stop.Load() {
					total.Add(1)
					if got := near.reaches(0, "", to); got != "outbound "+to {
						t.Errorf("during re-application %s reached %q", to, got)
						return
					}
				}
			})
		}
		for range 100 {
			near.do(func() { check(t, r.Repair(context.Background())) })
		}
		stop.Store(true)
		load.Wait()
		if total.Load() < 100 {
			t.Errorf("only %d connections in 100 re-applications", total.Load())
		}
		t.Logf("%d connections, 100 re-applications", total.Load())
		if drift := near.verify(r); len(drift) > 0 {
			t.Error(drift)
		}
	})
}

// Connections that are open when the rules come live on, whichever rules.
func TestExistingConnectionsSurviveInstall(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		all := transparentConfig(b)
		all.PreserveSource = true
		for _, cfg := range []Config{config(b), transparentConfig(b), all} {
			near, far := twoHosts(t)
			far.serve("[::]:8080", "far app", nil)
			near.serve("[::]:8080", "near app", nil)
			var open []*net.TCPConn
			for _, c := range []struct {
				from netNS
				to   string
			}{{near, "10.77.1.1:8080"}, {near, "[fd77:1::1]:8080"}, {far, "10.77.1.2:8080"}, {far, "[fd77:1::2]:8080"}, {near, "127.0.0.1:8080"}} {
				conn, err := c.from.dial(0, "", c.to)
				check(t, err)
				defer conn.Close()
				greeting(t, conn)
				open = append(open, conn)
			}
			near.install(near.rules(cfg))
			for _, conn := range open {
				echoes(t, conn)
			}
		}
	})
}

// The uninstallation in its two phases.
func TestRemoveKeepsConnectionsInFlightUntilDrained(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		near, far := twoHosts(t)
		far.serve("[::]:8080", "far app", nil)
		near.serve("[::]:8080", "near app", nil)
		proxyIn(t, near)
		r := near.rules(config(b))
		near.install(r)
		type flow struct {
			from netNS
			to   string
		}
		flows := []flow{{near, "10.77.1.1:8080"}, {near, "[fd77:1::1]:8080"}, {far, "10.77.1.2:8080"}, {far, "[fd77:1::2]:8080"}, {near, "127.0.0.1:8080"}}
		drained := false
		ctx, cancel := context.WithCancel(context.Background())
		var open []io.Closer
		drain := func(context.Context) error {
			drained = true
			cancel() // what remains must go all the same
			for _, f := range flows {
				if got := f.from.reaches(0, "", f.to); !strings.HasSuffix(got, "app") {
					t.Errorf("new connection to %s after phase 1 reached %q", f.to, got)
				}
			}
			return errors.New("two connections cut")
		}
		for _, f := range flows {
			conn, err := f.from.dial(0, "", f.to)
			check(t, err)
			open = append(open, conn)
			if got := greeting(t, conn); !strings.Contains(got, "bound "+f.to) {
				t.Fatalf("connection to %s reached %q", f.to, got)
			}
			next := drain
			drain = func(ctx context.Context) error {
				defer echoes(t, conn)
				return next(ctx)
			}
		}
		near.do(func() {
			if err := r.Remove(ctx, drain); err == nil || err.Error() != "drain: two connections cut" {
				t.Errorf("Remove: %v", err)
			}
		})
		for _, c := range open {
			c.Close()
		}
		if !drained {
			t.Error("drain was not called")
		}
		near.leftNothing()
		near.mustReach("far app", 0, "10.77.1.1:8080")
		near.do(func() { check(t, r.Remove(context.Background(), nil)) }) // again: nothing to do
	})
}

func (n netNS) leftNothing() {
	n.t.Helper()
	out := n.sh(`for t in nat filter mangle raw; do for b in nft legacy; do iptables-$b-save -t $t; ip6tables-$b-save -t $t; done; done; ipset list -name
		ip rule; ip -6 rule; ip route show table all; ip -6 route show table all`)
	if strings.Contains(strings.ToLower(out), "symbolon") || strings.Contains(out, "19712") {
		n.t.Errorf("left behind:\n%s", out)
	}
}

func TestCleanupLeavesNothing(t *testing.T) {
	n := newNS(t)
	clean := func() {
		t.Helper()
		n.do(func() { check(t, Cleanup(context.Background())) })
	}
	clean() // nothing there
	if tables := n.sh("cat /proc/thread-self/net/ip_tables_names"); tables != "" {
		t.Errorf("Cleanup created the legacy tables %q", tables)
	}
	for _, b := range []Backend{BackendNFT, BackendLegacy, BackendDefault} {
		for _, closed := range []bool{true, false} {
			cfg := config(b)
			cfg.FailClosed = closed
			n.install(n.rules(cfg))
		}
	}
	// What older versions or half-finished work could have left, and what is not ours.
	n.sh(`iptables-nft -t mangle -N SYMBOLON_MOUT; iptables-nft -t mangle -A OUTPUT -p tcp -m comment --comment "-j X" -j SYMBOLON_MOUT
		iptables-nft -t nat -N OTHER; iptables-nft -t nat -A OTHER -j SYMBOLON_OUT; iptables-nft -t nat -A OUTPUT -j OTHER
		iptables-legacy -t nat -A OUTPUT -j SYMBOLON_OUT; ipset create symbolon_in_new bitmap:port range 0-65535; ipset create others hash:ip`)
	clean()
	n.leftNothing()
	if out := n.sh("iptables-nft-save -t nat; ipset list -name"); !strings.Contains(out, "-A OUTPUT -j OTHER") || !strings.Contains(out, "others") {
		t.Errorf("what is not ours is gone:\n%s", out)
	}
	clean()
}

func init() {
	helpers["install"] = func() {
		r, err := NewRules(config(Backend(os.Getenv("REDIRECT_TEST_BACKEND"))))
		for err == nil {
			err = r.Repair(context.Background())
		}
		panic(err)
	}
}

// A proxy killed at any point of installing leaves what the next one can install
// over, and what fails closed.
func TestInstallAfterKill(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		n := newNS(t)
		r := n.rules(config(b))
		for i := range 12 {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), "REDIRECT_TEST_HELPER=install", "REDIRECT_TEST_BACKEND="+string(b))
			var stderr strings.Builder
			cmd.Stderr = &stderr
			n.do(func() { check(t, cmd.Start()) })
			time.Sleep(time.Duration(20+17*i) * time.Millisecond)
			check(t, cmd.Process.Kill())
			_ = cmd.Wait() // killed
			if stderr.Len() > 0 {
				t.Fatalf("helper: %s", stderr.String())
			}
			n.install(r)
			if drift := n.verify(r); len(drift) > 0 {
				// A tool that the killed process had started may still have been at it.
				n.install(r)
				if drift := n.verify(r); len(drift) > 0 {
					t.Errorf("after kill %d: %q", i, drift)
				}
			}
		}
		n.do(func() { check(t, Cleanup(context.Background())) })
		n.leftNothing()
	})
}

// Another program changes the table between reading and committing: the script's
// deletions no longer fit, and it is made anew.
func TestConcurrentChangeIsOvercome(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		n := newNS(t)
		r := n.rules(config(b))
		n.install(r)
		ctx, f, want := context.Background(), r.families[0], r.chains(r.families[0], "nat")
		reads := 0
		n.do(func() {
			check(t, commitSaved(ctx, f, "nat", func(saved savedTable) string {
				if reads++; reads == 1 {
					n.sh("iptables-" + string(b) + " -t nat -D OUTPUT -j SYMBOLON_OUT")
				}
				return installScript("nat", saved, want)
			}))
		})
		if drift := n.verify(r); reads != 2 || len(drift) > 0 {
			t.Errorf("%d readings, drift %q", reads, drift)
		}
		// A script that can never be committed is not tried for ever.
		reads = 0
		n.do(func() {
			err := commitSaved(ctx, f, "nat", func(savedTable) string { reads++; return "*nat\n-D OUTPUT -j ABSENT\nCOMMIT\n" })
			if err == nil || reads > 2 {
				t.Errorf("%d readings, error %v", reads, err)
			}
		})
	})
}

// What the tool prints after loading is what Verify compares with: another version
// of it may print a rule otherwise than we write it.
func TestVerifyKeepsToTheToolsOwnForm(t *testing.T) {
	n := newNS(t)
	r := n.rules(config(BackendDefault))
	n.install(r)
	loaded := r.loaded[tableKey{"IPv4", "nat"}]
	out := n.sh("iptables-save -t nat")
	for _, c := range loaded {
		for _, rule := range c.rules {
			if !strings.Contains(out, "-A "+c.name+" "+rule+"\n") {
				t.Errorf("rule %q of %s is not in\n%s", rule, c.name, out)
			}
		}
	}
}

func TestErrorsNameTheRule(t *testing.T) {
	backends(t, func(t *testing.T, b Backend) {
		n := newNS(t)
		f, err := newFamily(true, b)
		check(t, err)
		n.do(func() {
			err = f.commit(context.Background(), "*nat\n:SYMBOLON_OUT - [0:0]\n-A SYMBOLON_OUT -m set --match-set symbolon_absent dst -j RETURN\nCOMMIT\n")
		})
		var te *ToolError
		if !errors.As(err, &te) || !strings.Contains(err.Error(), "symbolon_absent") || te.Line == 0 {
			t.Errorf("error %v does not name the rule", err)
		}
	})
}

func TestMissingToolNamesThePackage(t *testing.T) {
	_, err := findTool("symbolon-no-such-tool", "iptables")
	want := &MissingToolError{"symbolon-no-such-tool", "iptables"}
	var got *MissingToolError
	if !errors.As(err, &got) || !cmp.Equal(got, want) || !strings.Contains(err.Error(), "apt-get install iptables") {
		t.Errorf("error %v", err)
	}
}

// Without IPv6 in the configuration, IPv6 is left alone.
func TestIPv6Off(t *testing.T) {
	near, far := twoHosts(t)
	far.serve("[::]:8080", "far app", nil)
	cfg := config(BackendDefault)
	cfg.IPv6 = IPv6Off
	near.install(near.rules(cfg))
	near.mustReach("refused", 0, "10.77.1.1:8080")
	near.mustReach("far app", 0, "[fd77:1::1]:8080")
	if out := near.sh("ip6tables-save; ipset list -name"); strings.Contains(out, "SYMBOLON") || strings.Contains(out, "out6") {
		t.Errorf("IPv6 rules:\n%s", out)
	}
}
