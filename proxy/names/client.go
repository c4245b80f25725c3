package names

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	// udpSize is what a server may send in a datagram: what fits every path (DNS Flag
	// Day 2020).
	udpSize = 1232
	maxUDP  = 4096
	// maxStrays bounds the datagrams that answer another question, or none.
	maxStrays = 64
	// maxRecords and maxAddresses bound what is taken of one answer.
	maxRecords   = 1024
	maxAddresses = 128
	// maxAliases bounds a chain of CNAMEs, maxQuestions the questions that it costs.
	maxAliases   = 16
	maxQuestions = 4

	ttlMin = time.Second
	ttlMax = time.Hour
)

var (
	// errNone: the answer is that there are no addresses.
	errNone = errors.New("the name has no addresses")
	// errStrays: more datagrams came than an honest server sends.
	errStrays  = errors.New("too many datagrams that do not answer the question")
	errAliases = errors.New("the name is an alias of too many others")
	errAnswer  = errors.New("the answer cannot be read")
)

// Dial opens a connection to a DNS server: "udp" or "tcp".
type Dial func(ctx context.Context, network, address string) (net.Conn, error)

// client asks DNS servers. Safe for concurrent use.
type client struct {
	dial Dial
	conf func() settings
}

// answer is what one type of record got. err nil: addresses came, with their TTL;
// errNone: there are none.
type answer struct {
	addrs []netip.Addr
	ttl   time.Duration
	err   error
}

// lookup asks for IPv4 and IPv6 addresses at once.
func (c *client) lookup(ctx context.Context, name string) (out [2]answer) {
	var both sync.WaitGroup
	for i, kind := range []dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA} {
		both.Go(func() {
			addrs, ttl, err := c.resolve(ctx, name, kind)
			out[i] = answer{addrs, min(max(ttl, ttlMin), ttlMax), err}
		})
	}
	both.Wait()
	return out
}

// resolve follows aliases; the TTL is the least on the way.
func (c *client) resolve(ctx context.Context, name string, kind dnsmessage.Type) ([]netip.Addr, time.Duration, error) {
	ttl := ttlMax
	for range maxQuestions {
		m, err := c.exchange(ctx, name, kind)
		if err != nil {
			return nil, 0, err
		}
		addrs, end, t, err := m.follow(name)
		ttl = min(ttl, t)
		switch {
		case err != nil:
			return nil, 0, err
		case len(addrs) > 0:
			return addrs, ttl, nil
		case end == name:
			return nil, 0, errNone
		}
		name = end // the server has not looked further itself
	}
	return nil, 0, errAliases
}

// exchange asks one server after the other, until one answers.
func (c *client) exchange(ctx context.Context, name string, kind dnsmessage.Type) (*message, error) {
	s := c.conf()
	var last error
	for range s.attempts {
		for _, server := range s.servers {
			if ctx.Err() != nil {
				return nil, errors.Join(last, ctx.Err())
			}
			m, err := c.ask(ctx, server, s.timeout, name, kind)
			if err == nil || errors.Is(err, errNone) {
				return m, err
			}
			last = fmt.Errorf("%s: %w", server, err)
		}
	}
	return nil, last
}

// ask puts a question to a server: by UDP, and by TCP if the answer does not fit.
func (c *client) ask(ctx context.Context, server string, timeout time.Duration, name string, kind dnsmessage.Type) (*message, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	q, err := newQuestion(name, kind)
	if err != nil {
		return nil, err
	}
	m, err := c.over(ctx, "udp", server, q)
	if err == nil && m.truncated {
		m, err = c.over(ctx, "tcp", server, q)
	}
	if err != nil {
		return nil, err
	}
	switch m.code {
	case dnsmessage.RCodeSuccess:
		return m, nil
	case dnsmessage.RCodeNameError:
		// An alias may lead to a name that is not there.
		return nil, errNone
	}
	return nil, fmt.Errorf("answered %s", m.code)
}

func (c *client) over(ctx context.Context, network, server string, q *question) (*message, error) {
	conn, err := c.dial(ctx, network, server)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	if network == "tcp" {
		return q.overTCP(conn)
	}
	return q.overUDP(conn)
}

// question is one, packed. Its number is not to be guessed.
type question struct {
	id     uint16
	name   string
	kind   dnsmessage.Type
	packed []byte // behind two bytes for TCP's length
}

func newQuestion(name string, kind dnsmessage.Type) (*question, error) {
	var number [2]byte
	_, _ = rand.Read(number[:]) // never fails
	q := &question{id: binary.BigEndian.Uint16(number[:]), name: name, kind: kind}
	n, err := dnsmessage.NewName(name + ".")
	if err != nil {
		return nil, err
	}
	b := dnsmessage.NewBuilder(make([]byte, 2, 512), dnsmessage.Header{ID: q.id, RecursionDesired: true})
	var opt dnsmessage.ResourceHeader
	err = errors.Join(
		opt.SetEDNS0(udpSize, dnsmessage.RCodeSuccess, false),
		b.StartQuestions(), b.Question(dnsmessage.Question{Name: n, Type: kind, Class: dnsmessage.ClassINET}),
		b.StartAdditionals(), b.OPTResource(opt, dnsmessage.OPTResource{}),
	)
	if err != nil {
		return nil, err
	}
	if q.packed, err = b.Finish(); err != nil {
		return nil, err
	}
	binary.BigEndian.PutUint16(q.packed, uint16(len(q.packed)-2))
	return q, nil
}

// overUDP waits for the answer to this question: others are no reason to stop, or
// whoever can send datagrams could.
func (q *question) overUDP(conn net.Conn) (*message, error) {
	if _, err := conn.Write(q.packed[2:]); err != nil {
		return nil, err
	}
	buf := make([]byte, maxUDP)
	for range maxStrays {
		n, err := conn.Read(buf)
		if err != nil {
			return nil, err
		}
		m, err := q.read(buf[:n])
		if m == nil {
			continue // not an answer to this question
		}
		return m, err
	}
	return nil, errStrays
}

func (q *question) overTCP(conn net.Conn) (*message, error) {
	if _, err := conn.Write(q.packed); err != nil {
		return nil, err
	}
	var size [2]byte
	if _, err := io.ReadFull(conn, size[:]); err != nil {
		return nil, err
	}
	buf := make([]byte, binary.BigEndian.Uint16(size[:])) // 64 KiB at most
	if _, err := io.ReadFull(conn, buf); err != nil {
		return nil, err
	}
	m, err := q.read(buf)
	if m == nil {
		return nil, errAnswer
	}
	return m, err
}

// message is an answer, as far as it counts.
type message struct {
	code      dnsmessage.RCode
	truncated bool
	aliases   map[string]alias
	addrs     map[string][]alias // to holds the address
}

type alias struct {
	to   string
	addr netip.Addr
	ttl  time.Duration
}

// read is nil where b is no answer to q; with an error where it is one that cannot be
// read.
func (q *question) read(b []byte) (*message, error) {
	var p dnsmessage.Parser
	h, err := p.Start(b)
	if err != nil || h.ID != q.id || !h.Response {
		return nil, nil
	}
	asked, err := p.Question()
	if err != nil || asked.Type != q.kind || asked.Class != dnsmessage.ClassINET || lower(asked.Name) != q.name {
		return nil, nil
	}
	if _, err := p.Question(); !errors.Is(err, dnsmessage.ErrSectionDone) {
		return nil, nil
	}
	m := &message{code: h.RCode, truncated: h.Truncated, aliases: make(map[string]alias), addrs: make(map[string][]alias)}
	if m.truncated {
		return m, nil
	}
	for range maxRecords {
		r, err := p.AnswerHeader()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			return m, nil
		}
		if err == nil {
			err = m.take(&p, r, q.kind)
		}
		if err != nil {
			return m, fmt.Errorf("%w: %w", errAnswer, err)
		}
	}
	return m, nil
}

func (m *message) take(p *dnsmessage.Parser, r dnsmessage.ResourceHeader, kind dnsmessage.Type) error {
	owner, ttl := lower(r.Name), time.Duration(r.TTL)*time.Second
	var a netip.Addr
	switch {
	case r.Class != dnsmessage.ClassINET, r.Type != kind && r.Type != dnsmessage.TypeCNAME:
		return p.SkipAnswer()
	case r.Type == dnsmessage.TypeCNAME:
		x, err := p.CNAMEResource()
		if _, again := m.aliases[owner]; err == nil && !again {
			m.aliases[owner] = alias{to: lower(x.CNAME), ttl: ttl}
		}
		return err
	case kind == dnsmessage.TypeA:
		x, err := p.AResource()
		if err != nil {
			return err
		}
		a = netip.AddrFrom4(x.A)
	default:
		x, err := p.AAAAResource()
		if err != nil {
			return err
		}
		a = netip.AddrFrom16(x.AAAA).Unmap()
	}
	if usable(a) {
		m.addrs[owner] = append(m.addrs[owner], alias{addr: a, ttl: ttl})
	}
	return nil
}

// usable leaves out what is nobody's address on a network: who answers for a name must
// not be able to make this host's own an External.
func usable(a netip.Addr) bool {
	return a.IsGlobalUnicast() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// follow goes from name along the aliases. end is where they lead.
func (m *message) follow(name string) (addrs []netip.Addr, end string, ttl time.Duration, err error) {
	ttl, end = ttlMax, name
	for range maxAliases {
		next, ok := m.aliases[end]
		if !ok {
			for _, a := range m.addrs[end] {
				if len(addrs) == maxAddresses {
					break
				}
				addrs, ttl = append(addrs, a.addr), min(ttl, a.ttl)
			}
			return addrs, end, ttl, nil
		}
		end, ttl = next.to, min(ttl, next.ttl)
	}
	return nil, "", 0, errAliases
}

func lower(n dnsmessage.Name) string { return strings.ToLower(strings.TrimSuffix(n.String(), ".")) }
