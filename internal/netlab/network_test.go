package netlab_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/symbolon/symbolon/internal/netlab"
)

// whoami answers each connection with the address it came from.
func whoami(t *testing.T, h *netlab.Host, address string) {
	t.Helper()
	ln, err := h.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(conn, conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap())
			conn.Close()
		}
	}()
	t.Cleanup(func() { ln.Close(); <-done })
}

// ask dials and returns what the other side says until it closes.
func ask(t *testing.T, h *netlab.Host, address string) string {
	t.Helper()
	answer, err := tryAsk(t.Context(), h, address)
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

func tryAsk(ctx context.Context, h *netlab.Host, address string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := h.Dial(ctx, "tcp", address)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return "", err
	}
	b, err := io.ReadAll(conn)
	return string(b), err
}

func TestTwoHostsReachEachOtherThroughTheRouter(t *testing.T) {
	w := netlab.Test(t)
	n := w.TwoHosts()
	whoami(t, n.Server, ":7")
	for _, server := range []netip.Addr{n.Server.V4(), n.Server.V6()} {
		want := n.Client.V4()
		if server.Is6() {
			want = n.Client.V6()
		}
		if got := ask(t, n.Client, netip.AddrPortFrom(server, 7).String()); got != want.String() {
			t.Errorf("server at %s saw %s, want %s", server, got, want)
		}
	}
	// The way leads through the router, not around it.
	n.Router.Sysctl("net.ipv4.ip_forward", "0")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if answer, err := tryAsk(ctx, n.Client, "10.2.0.2:7"); err == nil {
		t.Errorf("got %q past a router that does not forward", answer)
	}
}

func TestAThousandDialAtOnce(t *testing.T) {
	w := netlab.Test(t)
	n := w.TwoHosts()
	whoami(t, n.Server, ":7")
	var g errgroup.Group
	for range 1000 {
		g.Go(func() error {
			got, err := tryAsk(t.Context(), n.Client, "10.2.0.2:7")
			if err == nil && got != "10.1.0.2" {
				err = fmt.Errorf("server saw %q", got)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

func TestHostsAreApartFromTheMachine(t *testing.T) {
	before := interfaces(t)
	w := netlab.Test(t)
	n := w.TwoHosts()
	whoami(t, n.Server, "127.0.0.1:7")
	if conn, err := net.DialTimeout("tcp", "127.0.0.1:7", time.Second); err == nil {
		conn.Close()
		t.Error("a host's loopback is reachable from the machine")
	}
	if _, err := tryAsk(t.Context(), n.Client, "127.0.0.1:7"); err == nil {
		t.Error("a host's loopback is reachable from another host")
	}
	if got := ask(t, n.Server, "127.0.0.1:7"); got != "127.0.0.1" {
		t.Errorf("loopback answered %q", got)
	}
	if after := interfaces(t); !slices.Equal(before, after) {
		t.Errorf("the machine's interfaces went from %v to %v", before, after)
	}
}

// interfaces names the machine's own interfaces.
func interfaces(t *testing.T) []string {
	t.Helper()
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range links {
		names = append(names, l.Name)
	}
	return names
}

func TestDoRestoresTheThread(t *testing.T) {
	w := netlab.Test(t)
	h := w.Host("a")
	machine, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	boom := errors.New("boom")
	var inside, nested string
	err = h.Do(func() error {
		if err := h.Do(func() (err error) {
			nested, err = os.Readlink("/proc/thread-self/ns/net")
			return err
		}); err != nil {
			return err
		}
		if inside, err = os.Readlink("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		return boom
	})
	if !errors.Is(err, boom) {
		t.Errorf("Do returned %v, want %v", err, boom)
	}
	if inside == machine || inside != nested {
		t.Errorf("machine %s, inside %s, nested %s", machine, inside, nested)
	}
	for range 100 {
		after, err := os.Readlink("/proc/thread-self/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		if after != machine {
			t.Fatalf("thread left in %s, want %s", after, machine)
		}
	}
}

func TestSNATHidesTheClient(t *testing.T) {
	w := netlab.Test(t, "iptables", "ip6tables")
	n := w.TwoHosts()
	whoami(t, n.Server, ":7")
	n.Router.SNAT(n.RouterToServer)
	for server, want := range map[string]string{"10.2.0.2:7": "10.2.0.1", "[fd00:2::2]:7": "fd00:2::1"} {
		if got := ask(t, n.Client, server); got != want {
			t.Errorf("%s saw %s, want the router's %s", server, got, want)
		}
	}
}

func TestSNATToAGivenAddress(t *testing.T) {
	w := netlab.Test(t, "iptables", "ip6tables")
	n := w.TwoHosts()
	whoami(t, n.Server, ":7")
	n.RouterToServer.AddAddress("10.2.0.77/24")
	n.Router.SNAT(n.RouterToServer, netip.MustParseAddr("10.2.0.77"))
	for server, want := range map[string]string{"10.2.0.2:7": "10.2.0.77", "[fd00:2::2]:7": "fd00:1::2"} {
		if got := ask(t, n.Client, server); got != want {
			t.Errorf("%s saw %s, want %s", server, got, want)
		}
	}
}

func TestDNATForwardsAPort(t *testing.T) {
	w := netlab.Test(t, "iptables", "ip6tables")
	n := w.TwoHosts()
	whoami(t, n.Server, ":7")
	for outside, inside := range map[string]string{"10.1.0.1:8080": "10.2.0.2:7", "[fd00:1::1]:8080": "[fd00:2::2]:7"} {
		n.Router.DNAT(netip.MustParseAddrPort(outside), netip.MustParseAddrPort(inside))
		want := n.Client.V4()
		if strings.HasPrefix(outside, "[") {
			want = n.Client.V6()
		}
		if got := ask(t, n.Client, outside); got != want.String() {
			t.Errorf("through %s the server saw %q, want %s", outside, got, want)
		}
	}
}

func TestPartitionHoldsBackStandingConnections(t *testing.T) {
	w := netlab.Test(t, "iptables", "ip6tables")
	n := w.TwoHosts()
	ln, err := n.Server.Listen("tcp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client, err := n.Client.Dial(t.Context(), "tcp", "10.2.0.2:7")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()

	heal := n.Router.Partition()
	if _, err := client.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if err := server.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Read(b); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("read across the partition: %v, want a timeout", err)
	}
	heal()
	if err := server.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Read(b); err != nil {
		t.Errorf("after healing: %v", err)
	}
	n.Router.Loss(0.05)()
}

func TestSwitchJoinsHosts(t *testing.T) {
	w := netlab.Test(t)
	s := w.Switch("lan")
	var hosts []*netlab.Host
	for i := range 3 {
		h := w.Host(fmt.Sprintf("h%d", i))
		s.Attach(h, fmt.Sprintf("192.0.2.%d/24", i+1), fmt.Sprintf("2001:db8::%d/64", i+1))
		whoami(t, h, ":7")
		hosts = append(hosts, h)
	}
	for _, from := range hosts {
		for _, to := range hosts {
			for _, a := range []netip.Addr{to.V4(), to.V6()} {
				want := from.V4()
				if a.Is6() {
					want = from.V6()
				}
				if got := ask(t, from, netip.AddrPortFrom(a, 7).String()); got != want.String() {
					t.Errorf("%s to %s: saw %s, want %s", from.Name(), a, got, want)
				}
			}
		}
	}
}

func TestBalancerSpreadsAndChecks(t *testing.T) {
	w := netlab.Test(t, "haproxy", "nginx")
	lan := w.Switch("lan")
	client, lb := w.Host("client"), w.Host("lb")
	lan.Attach(client, "192.0.2.1/24", "2001:db8::1/64")
	lan.Attach(lb, "192.0.2.2/24", "2001:db8::2/64")
	var backends []netip.AddrPort
	var daemons []*netlab.Daemon
	for i := range 2 {
		h := w.Host(fmt.Sprintf("backend%d", i))
		lan.Attach(h, fmt.Sprintf("192.0.2.1%d/24", i), fmt.Sprintf("2001:db8::1%d/64", i))
		d, err := h.Nginx(t.Context(), netlab.Nginx{Port: 80, Body: h.Name()})
		if err != nil {
			t.Fatal(err)
		}
		daemons = append(daemons, d)
		backends = append(backends, netip.AddrPortFrom([]netip.Addr{h.V4(), h.V6()}[i], 80))
	}
	if _, err := lb.Balancer(t.Context(), netlab.Balancer{Port: 8080, Backends: backends, Check: true}); err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{"192.0.2.2:8080", "[2001:db8::2]:8080"} {
		seen := make(map[string]int)
		for range 10 {
			seen[get(t, client, address).body]++
		}
		if seen["backend0"] != 5 || seen["backend1"] != 5 {
			t.Errorf("%s: answers %v, want 5 of each backend", address, seen)
		}
	}
	// The backend sees the balancer, not the client.
	for range 2 {
		r := get(t, client, "192.0.2.2:8080")
		if want := map[string]string{"backend0": "192.0.2.2", "backend1": "2001:db8::2"}[r.body]; r.client != want {
			t.Errorf("%s saw %s, want the balancer's %s", r.body, r.client, want)
		}
	}
	if err := daemons[0].Stop(); err != nil {
		t.Error(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for streak := 0; streak < 6; {
		if r, err := tryGet(t.Context(), client, "192.0.2.2:8080"); err == nil && r.body == "backend1" {
			streak++
		} else {
			streak = 0
		}
		if time.Now().After(deadline) {
			t.Fatal("the balancer never took the stopped backend out")
		}
	}
}
