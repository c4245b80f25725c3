package netlab

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// dnsPatience bounds how long a client's TCP connection to a DNS server lives.
const dnsPatience = 10 * time.Second

// DNS is a name server whose answers a test makes up, faults included. It serves
// listeners that the caller has opened, in whatever namespace. Safe for concurrent use.
type DNS struct {
	udp  net.PacketConn
	tcp  net.Listener
	done sync.WaitGroup

	mu      sync.Mutex
	reply   map[string]func(DNSQuestion) DNSReply
	queries map[string]int
}

// DNSQuestion is what a client asks.
type DNSQuestion struct {
	ID   uint16
	Name string // lower case, without the dot at the end
	Type dnsmessage.Type
	TCP  bool
}

// DNSReply is what it gets.
type DNSReply struct {
	Records []dnsmessage.Resource
	Code    dnsmessage.RCode
	// Drop: no answer at all.
	Drop bool
	// Before are datagrams sent ahead of the answer, as they are.
	Before [][]byte
	// Truncated: by UDP there are no records, and the client has to come again by TCP.
	Truncated bool
}

// ServeDNS starts a server; tcp may be nil. Close ends it. A name that nobody has Set
// does not exist.
func ServeDNS(udp net.PacketConn, tcp net.Listener) *DNS {
	d := &DNS{udp: udp, tcp: tcp, reply: make(map[string]func(DNSQuestion) DNSReply), queries: make(map[string]int)}
	d.done.Go(d.serveUDP)
	if tcp != nil {
		d.done.Go(d.serveTCP)
	}
	return d
}

// Close ends the server and its listeners.
func (d *DNS) Close() error {
	err := d.udp.Close()
	if d.tcp != nil {
		err = errors.Join(err, d.tcp.Close())
	}
	d.done.Wait()
	return err
}

// Set gives a name addresses, both families, with a TTL in seconds.
func (d *DNS) Set(name string, ttl uint32, addresses ...string) {
	d.Script(name, func(q DNSQuestion) DNSReply {
		var r DNSReply
		for _, a := range addresses {
			if x := DNSAddress(name, ttl, a); x.Header.Type == q.Type {
				r.Records = append(r.Records, x)
			}
		}
		return r
	})
}

// Script answers questions for a name by f.
func (d *DNS) Script(name string, f func(DNSQuestion) DNSReply) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.reply[name] = f
}

// Queries counts the questions that came for a name.
func (d *DNS) Queries(name string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.queries[name]
}

// DNSAddress is an A or AAAA record. It panics on what is no name or no address.
func DNSAddress(name string, ttl uint32, address string) dnsmessage.Resource {
	h := dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(name + "."), Class: dnsmessage.ClassINET, TTL: ttl}
	a := netip.MustParseAddr(address)
	if a.Is4() {
		h.Type = dnsmessage.TypeA
		return dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: a.As4()}}
	}
	h.Type = dnsmessage.TypeAAAA
	return dnsmessage.Resource{Header: h, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}}
}

// DNSAlias is a CNAME record. It panics on what is no name.
func DNSAlias(name string, ttl uint32, to string) dnsmessage.Resource {
	return dnsmessage.Resource{
		Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(name + "."), Type: dnsmessage.TypeCNAME, Class: dnsmessage.ClassINET, TTL: ttl},
		Body:   &dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName(to + ".")},
	}
}

func (d *DNS) serveUDP() {
	buf := make([]byte, 4096)
	for {
		n, from, err := d.udp.ReadFrom(buf)
		if err != nil {
			return
		}
		q, r, ok := d.answer(buf[:n], false)
		if !ok || r.Drop {
			continue
		}
		for _, b := range r.Before {
			_, _ = d.udp.WriteTo(b, from)
		}
		if b, err := PackDNS(q, r); err == nil {
			_, _ = d.udp.WriteTo(b, from)
		}
	}
}

func (d *DNS) serveTCP() {
	for {
		c, err := d.tcp.Accept()
		if err != nil {
			return
		}
		d.done.Go(func() {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(dnsPatience))
			var size [2]byte
			if _, err := io.ReadFull(c, size[:]); err != nil {
				return
			}
			buf := make([]byte, binary.BigEndian.Uint16(size[:]))
			if _, err := io.ReadFull(c, buf); err != nil {
				return
			}
			q, r, ok := d.answer(buf, true)
			if !ok || r.Drop {
				return
			}
			if b, err := PackDNS(q, r); err == nil {
				_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
			}
		})
	}
}

func (d *DNS) answer(b []byte, tcp bool) (q DNSQuestion, r DNSReply, ok bool) {
	var p dnsmessage.Parser
	h, err := p.Start(b)
	if err != nil {
		return q, r, false
	}
	asked, err := p.Question()
	if err != nil {
		return q, r, false
	}
	q = DNSQuestion{ID: h.ID, Name: strings.ToLower(strings.TrimSuffix(asked.Name.String(), ".")), Type: asked.Type, TCP: tcp}
	d.mu.Lock()
	d.queries[q.Name]++
	f := d.reply[q.Name]
	d.mu.Unlock()
	if f == nil {
		return q, DNSReply{Code: dnsmessage.RCodeNameError}, true
	}
	return q, f(q), true
}

// PackDNS is the message that answers a question.
func PackDNS(q DNSQuestion, r DNSReply) ([]byte, error) {
	name, err := dnsmessage.NewName(q.Name + ".")
	if err != nil {
		return nil, err
	}
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: q.ID, Response: true, RCode: r.Code, Truncated: r.Truncated && !q.TCP, RecursionAvailable: true},
		Questions: []dnsmessage.Question{{Name: name, Type: q.Type, Class: dnsmessage.ClassINET}},
	}
	if !m.Truncated {
		m.Answers = r.Records
	}
	return m.Pack()
}
