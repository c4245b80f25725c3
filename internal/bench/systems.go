package main

import (
	"context"
	"strings"
)

// system is something to measure: a pair of proxies, or none.
type system struct {
	name, about string
	// target is what the load generator connects to.
	target string
	// encrypted: bytes must not be readable on the wire. Checked before measuring.
	encrypted bool
	// bare: its proxies speak no TLS.
	bare bool
	// peer: results are held against the best of these.
	peer bool
	// only are the workloads in which it tells more than another system does; nil: all.
	only []string
	// start starts the proxies, first or again, and fills in pair's daemons. nil:
	// there are none.
	start func(context.Context, *lab, *pair) error
}

const (
	nameSymbolon      = "symbolon"
	nameAuthenticated = "symbolon-auth"
	nameSingle        = "symbolon-single"
	nameX25519        = "symbolon-x25519"
	nameStock         = "symbolon-stock"
)

func allSystems() []system {
	return []system{
		{name: "direct", about: "no proxy, no encryption", target: remote},
		{name: nameBare, about: "the floor: a transparent pair by iptables on connections that are reused, without TLS, identity, policy and records (in this program)", target: remote, bare: true, only: bareWorkloads, start: startBare},
		{name: "haproxy", about: "HAProxy pair, mode tcp, 64 KB buffers, sessions resumed", target: near, encrypted: true, peer: true, start: startHAProxy},
		{name: "nginx", about: "nginx stream pair, 16 KB buffers (its default), sessions resumed", target: near, encrypted: true, peer: true, start: nginxStream("16k")},
		{name: "nginx-64k", about: "the same with 64 KB buffers", target: near, encrypted: true, peer: true, start: nginxStream("64k")},
		{name: "stunnel", about: "stunnel pair, sessions resumed", target: near, encrypted: true, peer: true, start: startStunnel},
		{name: "go", about: "io.Copy over crypto/tls (ghostunnel's technique; in this program), X25519, sessions resumed", target: near, encrypted: true, start: startGo},
		{name: nameSymbolon, about: "transparent by iptables; identity, policy, records; encrypted; tunnels reused, sessions resumed", target: remote, encrypted: true, start: startSymbolon("encrypted", "")},
		{name: nameSingle, about: "the same without reuse, as behind a balancer: a tunnel for each connection", target: remote, encrypted: true, only: []string{"connect", "far"}, start: startSymbolon("encrypted", "tunnel: {reuse: false}")},
		{name: nameX25519, about: "symbolon-single with the peers' key exchange in place of X25519MLKEM768 (tunnel.key_exchange: [X25519])", target: remote, encrypted: true, only: []string{"connect", "far"}, start: startSymbolon("encrypted", "tunnel: {reuse: false, key_exchange: [X25519]}")},
		{name: nameStock, about: "symbolon with crypto/tls in the data phase, too (tunnel.record_layer: stock)", target: remote, encrypted: true, start: startSymbolon("encrypted", "tunnel: {record_layer: stock}")},
		{name: nameAuthenticated, about: "transparent, with identity, policy and records, too; authenticated: TLS proves both ends of each connection, then its bytes pass in the clear", target: remote, start: startSymbolon("authenticated", "")},
	}
}

// ours: Symbolon's proxies take part.
func (s *system) ours() bool { return strings.HasPrefix(s.name, nameSymbolon) }

// quickSystems leaves out what others stand for.
func quickSystems() []system {
	var quick []system
	for _, s := range allSystems() {
		switch s.name {
		case nameBare, "nginx", "stunnel", nameX25519, nameStock:
		default:
			quick = append(quick, s)
		}
	}
	return quick
}

func names(systems []system) []string {
	var all []string
	for _, s := range systems {
		all = append(all, s.name)
	}
	return all
}
