package names

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/symbolon/symbolon/internal/netlab"
)

// server is a DNS server on loopback, and a client of it.
func server(t *testing.T) (*netlab.DNS, *client) {
	t.Helper()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", udp.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	d := netlab.ServeDNS(udp, tcp)
	t.Cleanup(func() { d.Close() })
	var dialer net.Dialer
	conf := settings{servers: []string{udp.LocalAddr().String()}, timeout: 2 * time.Second, attempts: 2}
	return d, &client{dial: dialer.DialContext, conf: func() settings { return conf }}
}

func describe(a answer) string {
	if a.err != nil {
		return a.err.Error()
	}
	return fmt.Sprint(a.addrs, " ", a.ttl)
}

func TestLookup(t *testing.T) {
	d, c := server(t)
	d.Set("both.example.com", 300, "192.0.2.1", "192.0.2.2", "2001:db8::1")
	d.Set("six.example.com", 300, "2001:db8::1")
	d.Set("short.example.com", 0, "192.0.2.1")
	d.Set("long.example.com", 1<<30, "192.0.2.1")
	// An address that a name must not have: this host's, its neighbours', everybody's.
	d.Set("evil.example.com", 300, "127.0.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "fe80::1", "::ffff:127.0.0.1", "192.0.2.66")
	d.Script("alias.example.com", func(q netlab.DNSQuestion) netlab.DNSReply {
		return netlab.DNSReply{Records: []dnsmessage.Resource{
			netlab.DNSAlias("alias.example.com", 60, "b.example.com"), netlab.DNSAlias("b.example.com", 20, "C.example.com"),
			netlab.DNSAddress("c.example.com", 300, "192.0.2.9"), netlab.DNSAddress("other.example.com", 300, "192.0.2.66"),
		}}
	})
	d.Script("half.example.com", func(q netlab.DNSQuestion) netlab.DNSReply {
		return netlab.DNSReply{Records: []dnsmessage.Resource{netlab.DNSAlias("half.example.com", 60, "both.example.com")}}
	})
	d.Script("loop.example.com", func(q netlab.DNSQuestion) netlab.DNSReply {
		return netlab.DNSReply{Records: []dnsmessage.Resource{
			netlab.DNSAlias("loop.example.com", 60, "pool.example.com"), netlab.DNSAlias("pool.example.com", 60, "loop.example.com"),
		}}
	})
	for i := range 10 { // each leads to the next, and says no more
		name := fmt.Sprintf("chain%d.example.com", i)
		d.Script(name, func(q netlab.DNSQuestion) netlab.DNSReply {
			return netlab.DNSReply{Records: []dnsmessage.Resource{netlab.DNSAlias(name, 60, fmt.Sprintf("chain%d.example.com", i+1))}}
		})
	}
	d.Script("broken.example.com", func(netlab.DNSQuestion) netlab.DNSReply {
		return netlab.DNSReply{Code: dnsmessage.RCodeServerFailure}
	})
	many := make([]string, 300)
	for i := range many {
		many[i] = fmt.Sprintf("198.51.%d.%d", i/200, i%200+1)
	}
	d.Set("tcp.example.com", 300)
	d.Script("tcp.example.com", func(q netlab.DNSQuestion) netlab.DNSReply {
		r := netlab.DNSReply{Truncated: true}
		for _, a := range many {
			r.Records = append(r.Records, netlab.DNSAddress(q.Name, 300, a))
		}
		return r
	})
	for _, x := range []struct{ name, four, six string }{
		{"both.example.com", "[192.0.2.1 192.0.2.2] 5m0s", "[2001:db8::1] 5m0s"},
		{"six.example.com", errNone.Error(), "[2001:db8::1] 5m0s"},
		{"short.example.com", "[192.0.2.1] 1s", errNone.Error()},
		{"long.example.com", "[192.0.2.1] 1h0m0s", errNone.Error()},
		{"evil.example.com", "[192.0.2.66] 5m0s", errNone.Error()},
		{"nowhere.example.com", errNone.Error(), errNone.Error()},
		{"alias.example.com", "[192.0.2.9] 20s", errNone.Error()},
		{"half.example.com", "[192.0.2.1 192.0.2.2] 1m0s", "[2001:db8::1] 1m0s"},
		{"loop.example.com", errAliases.Error(), errAliases.Error()},
		{"chain0.example.com", errAliases.Error(), errAliases.Error()},
		{"broken.example.com", "RCodeServerFailure", "RCodeServerFailure"},
	} {
		got := c.lookup(context.Background(), x.name)
		for i, want := range []string{x.four, x.six} {
			if s := describe(got[i]); s != want && !strings.Contains(s, "answered "+want) {
				t.Errorf("%s: %s, want %s", x.name, s, want)
			}
		}
	}
	if got := c.lookup(context.Background(), "tcp.example.com")[0]; got.err != nil || len(got.addrs) != maxAddresses {
		t.Errorf("a huge answer: %d addresses, %v", len(got.addrs), got.err)
	}
}

// The attack: somebody who does not see the question sends answers to it.
func TestSpoofedAnswersAreNotTaken(t *testing.T) {
	d, c := server(t)
	const name = "api.example.com"
	evil := func(q netlab.DNSQuestion, change func(*netlab.DNSQuestion)) []byte {
		change(&q)
		b, err := netlab.PackDNS(q, netlab.DNSReply{Records: []dnsmessage.Resource{netlab.DNSAddress(q.Name, 300, "192.0.2.66")}})
		if err != nil {
			t.Error(err)
		}
		return b
	}
	var strays atomic.Int64
	d.Script(name, func(q netlab.DNSQuestion) netlab.DNSReply {
		r := netlab.DNSReply{Before: [][]byte{
			evil(q, func(q *netlab.DNSQuestion) { q.ID++ }),
			evil(q, func(q *netlab.DNSQuestion) { q.Name = "www.example.com" }),
			evil(q, func(q *netlab.DNSQuestion) { q.Type = dnsmessage.TypeTXT }),
			{}, {1}, []byte("no message at all, and longer than the header of one"),
		}}
		for range strays.Load() {
			r.Before = append(r.Before, r.Before[0])
		}
		if q.Type == dnsmessage.TypeA {
			r.Records = append(r.Records, netlab.DNSAddress(name, 300, "192.0.2.1"))
		}
		return r
	})
	if got := describe(c.lookup(context.Background(), name)[0]); got != "[192.0.2.1] 5m0s" {
		t.Errorf("got %s", got)
	}
	strays.Store(maxStrays)
	if got := c.lookup(context.Background(), name)[0]; !errors.Is(got.err, errStrays) {
		t.Errorf("a flood: %s", describe(got))
	}

	// From another port than the one that was asked: the kernel keeps those out.
	thief, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer thief.Close()
	c.dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
		if err == nil && network == "udp" {
			for id := range 200 { // even with the right number among these
				b := evil(netlab.DNSQuestion{ID: uint16(id), Name: "quiet.example.com", Type: dnsmessage.TypeA}, func(*netlab.DNSQuestion) {})
				_, _ = thief.WriteTo(b, conn.LocalAddr())
			}
		}
		return conn, err
	}
	d.Script("quiet.example.com", func(netlab.DNSQuestion) netlab.DNSReply { return netlab.DNSReply{} })
	if got := c.lookup(context.Background(), "quiet.example.com")[0]; !errors.Is(got.err, errNone) {
		t.Errorf("from another port: %s", describe(got))
	}
}

// A server that is not there, or does not answer, has its turn, and the next one is asked.
func TestTheNextServerIsAsked(t *testing.T) {
	d, c := server(t)
	d.Set("api.example.com", 300, "192.0.2.1")
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	s := c.conf()
	s.servers = append([]string{"127.0.0.1:1", silent.LocalAddr().String()}, s.servers...)
	s.timeout = 50 * time.Millisecond
	c.conf = func() settings { return s }
	if got := describe(c.lookup(context.Background(), "api.example.com")[0]); got != "[192.0.2.1] 5m0s" {
		t.Errorf("got %s", got)
	}
	s.servers = s.servers[:2]
	if got := c.lookup(context.Background(), "api.example.com")[0]; got.err == nil || errors.Is(got.err, errNone) {
		t.Errorf("without any: %s", describe(got))
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if got := c.lookup(ctx, "api.example.com")[0]; !errors.Is(got.err, context.Canceled) {
		t.Errorf("after the end: %s", describe(got))
	}
}

func TestConf(t *testing.T) {
	for text, want := range map[string]string{
		"": "{[127.0.0.1:53] 2s 2}",
		"# c\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\nsearch a b\noptions timeout:1 attempts:3 rotate\n": "{[192.0.2.1:53 [fe80::1%eth0]:53] 1s 3}",
		"nameserver x\nnameserver 1.1.1.1\nnameserver 1.1.1.2\nnameserver 1.1.1.3\nnameserver 1.1.1.4\n":        "{[1.1.1.1:53 1.1.1.2:53 1.1.1.3:53] 2s 2}",
		"options timeout:900 attempts:0 timeout:x\nnameserver":                                                  "{[127.0.0.1:53] 10s 1}",
	} {
		s := parseConf([]byte(text))
		if got := fmt.Sprintf("{%v %v %d}", s.servers, s.timeout, s.attempts); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
	path := filepath.Join(t.TempDir(), "resolv.conf")
	c := &conf{path: path}
	if got := fmt.Sprint(c.now().servers); got != "[127.0.0.1:53]" {
		t.Errorf("without a file: %s", got)
	}
	for _, a := range []string{"192.0.2.1", "192.0.2.22"} {
		if err := os.WriteFile(path, []byte("nameserver "+a+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(c.now().servers); got != "["+a+":53]" {
			t.Errorf("changed to %s: %s", a, got)
		}
	}
}

// FuzzAnswer: whatever a server sends, it is an answer to the question or none, and no
// address of another name comes of it.
func FuzzAnswer(f *testing.F) {
	q := &question{id: 7, name: "api.example.com", kind: dnsmessage.TypeA}
	pack := func(records ...dnsmessage.Resource) []byte {
		b, err := netlab.PackDNS(netlab.DNSQuestion{ID: 7, Name: q.name, Type: q.kind}, netlab.DNSReply{Records: records})
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	f.Add(pack(netlab.DNSAddress(q.name, 1, "192.0.2.1")))
	f.Add(pack(netlab.DNSAlias(q.name, 1, "b.example.com"), netlab.DNSAddress("b.example.com", 1, "192.0.2.1")))
	f.Add(pack(netlab.DNSAlias(q.name, 1, q.name)))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := q.read(b)
		if m == nil || err != nil {
			return
		}
		addrs, _, ttl, err := m.follow(q.name)
		if len(addrs) > maxAddresses || ttl < 0 {
			t.Errorf("%d addresses for %v", len(addrs), ttl)
		}
		for _, a := range addrs {
			if err != nil || !usable(a) || a == (netip.Addr{}) {
				t.Errorf("%s, %v", a, err)
			}
		}
	})
}
