package controller_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func readable(addresses [][]byte) []string {
	var out []string
	for _, b := range addresses {
		a, ok := netip.AddrFromSlice(b)
		if !ok {
			return []string{fmt.Sprintf("%x", b)}
		}
		out = append(out, a.String())
	}
	return out
}

// peers receives until the list is as wanted; what was gathered may come in steps.
func (s *session) peers(want ...string) {
	s.t.Helper()
	for {
		m := s.receive()
		if m.GetPeers() == nil {
			s.t.Fatalf("got %v, want peers", m)
		}
		if slices.Equal(readable(m.GetPeers().GetAddresses()), want) {
			return
		}
	}
}

var learnTree = strings.Replace(tree, "name: /acme/prod\nmode: enforce", "name: /acme/prod\nmode: learn", 1)

func TestHostsInLearnAreToldWhoHasAProxy(t *testing.T) {
	w := newWorld(t)
	w.apply(learnTree)
	if learnTree == tree {
		t.Fatal("the set-up is wrong: nothing is in learn")
	}
	prod, dev := w.enrol("/acme/prod", nil), w.enrol("/acme/dev", nil)
	// Neither names nor what only the host itself can reach, nor twice the same.
	d := dev.open(t, &symbolonv1.Hello{Addresses: []string{"10.0.0.2", "127.0.0.1", "fe80::1", "0.0.0.0", "224.0.0.1", "::ffff:10.0.0.2", "host", "fd00::2"}})
	g := d.generation()
	if len(g.GetPeers()) > 0 {
		t.Errorf("a host whose namespace enforces is told of %v", readable(g.GetPeers()))
	}
	d.ack(g.GetNumber(), "")

	s := prod.open(t, &symbolonv1.Hello{Addresses: []string{"10.0.0.1"}})
	g = s.generation()
	s.ack(g.GetNumber(), "")
	all := []string{"10.0.0.1", "10.0.0.2", "fd00::2"}
	if !slices.Equal(readable(g.GetPeers()), all) {
		s.peers(all...)
	}

	// Who is away stays known, also to a controller that has just started; who is removed does not.
	w.halt()
	w.start()
	prod.ProxyServiceClient = w.proxy(prod.TLS())
	s = prod.open(t, &symbolonv1.Hello{Generation: g.GetNumber(), Addresses: []string{"10.0.0.1"}})
	g = s.generation()
	if diff := cmp.Diff(all, readable(g.GetPeers())); diff != "" {
		t.Errorf("after a restart: %s", diff)
	}
	s.ack(g.GetNumber(), "")
	if _, err := w.admin().RemoveHost(t.Context(), connect.NewRequest(&symbolonv1.RemoveHostRequest{Id: dev.HostID})); err != nil {
		t.Fatal(err)
	}
	s.revocations() // at once; the addresses a little later
	s.peers("10.0.0.1")

	// An External by name must not be one of them; and without that and learn there is no list.
	const byName = "\n---\nkind: External\nnamespace: /acme\nname: api\naddresses: {fqdns: [api.example.com]}\n"
	w.apply(tree + byName)
	g = s.generation()
	if diff := cmp.Diff([]string{"10.0.0.1"}, readable(g.GetPeers())); diff != "" {
		t.Errorf("with an External by name: %s", diff)
	}
	s.ack(g.GetNumber(), "")
	w.apply(strings.Replace(byName, "fqdns: [api.example.com]", "cidrs: [192.0.2.0/24]", 1))
	if g := s.generation(); len(g.GetPeers()) > 0 {
		t.Errorf("told of %v", readable(g.GetPeers()))
	}
}
