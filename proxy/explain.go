package proxy

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/policydb"
)

// explanation is what the policy in force on this host says of a connection that need
// not exist, and why.
type explanation struct {
	Generation uint64          `json:"generation"`
	Allow      bool            `json:"allow"`
	From       string          `json:"from"`
	To         string          `json:"to"`
	Port       string          `json:"port"`
	Names      []string        `json:"names,omitempty"` // that the destination's address has, as this host resolves them
	Note       string          `json:"note,omitempty"`
	Sides      []explainedSide `json:"sides"`
}

type explainedSide struct {
	Side       string               `json:"side"`
	Allow      bool                 `json:"allow"`
	Reason     string               `json:"reason"`
	Policy     string               `json:"policy,omitempty"`
	Protection string               `json:"protection,omitempty"`
	Chain      []string             `json:"chain,omitempty"` // from leaf to root
	Candidates []explainedCandidate `json:"candidates,omitempty"`
}

type explainedCandidate struct {
	Policy  string `json:"policy"`
	Matches bool   `json:"matches"`
	Failed  string `json:"failed,omitempty"` // the first condition that does not hold
}

// explain decides between two ends as `symbolon explain` has them, by what this host has
// in force: policy, and for a destination outside the addresses of names.
func (p *Proxy) explain(from, to, port string) (*explanation, error) {
	c := p.policy.Load()
	if c == nil {
		return nil, errNoPolicy
	}
	q := &policydb.Query{Protocol: tcp}
	number := port
	if protocol, n, ok := strings.Cut(port, "/"); ok {
		q.Protocol, number = protocol, n
	}
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil || n == 0 || q.Protocol != tcp && q.Protocol != "udp" {
		return nil, fmt.Errorf("port %q: want such as 443, tcp/443 or udp/53", port)
	}
	q.Port = uint16(n)
	x := &explanation{Generation: c.Generation(), From: from, To: to, Port: fmt.Sprintf("%s/%d", q.Protocol, q.Port), Sides: []explainedSide{}}
	client, fromOutside := netip.ParseAddr(from)
	server, toOutside := netip.ParseAddr(to)
	byName := policydb.IsName(to)
	if fromOutside != nil {
		if q.From, err = p.describedEnd(c, from); err != nil {
			return nil, fmt.Errorf("from: %w", err)
		}
	}
	if toOutside != nil && !byName {
		if q.To, err = p.describedEnd(c, to); err != nil {
			return nil, fmt.Errorf("to: %w", err)
		}
	}
	switch {
	case fromOutside == nil && (toOutside == nil || byName):
		return nil, errors.New("both ends are outside: one of them must be a workload")
	case fromOutside == nil:
		m, ok := c.Source(q.To.Namespace, client)
		if !ok {
			x.Note = fmt.Sprintf("no External that %s sees has %s: a client there must come through a proxy, or is refused", q.To.Namespace, client)
			return x, nil
		}
		q.From = m.Endpoint()
	case byName:
		x.Names = []string{to}
	case toOutside == nil && p.names != nil && !p.peers.has(server):
		x.Names = p.names.Of(server)
	}
	if byName || toOutside == nil {
		ext, service := c.Destination(q.From.Namespace, server, q.Protocol, q.Port, x.Names...)
		switch {
		case service != "":
			x.Note = fmt.Sprintf("it is in Service %s: which of the protected workloads behind it answers decides", service)
			return x, nil
		case ext == nil:
			x.Note = fmt.Sprintf("no External that %s sees has it: what is there must answer as a protected workload, or is refused", q.From.Namespace)
			if c.NameMayOpen(q.From.Namespace, server, q.Protocol, q.Port, x.Names...) {
				x.Note += "; an External may have it by a name that the client asks for"
			}
			if public := c.PublicOnly(q.From.Namespace, server, q.Protocol, q.Port, x.Names...); public != "" {
				x.Note += fmt.Sprintf("; External %s has its name, but no private address by name (private: true)", public)
			}
			return x, nil
		}
		q.To = ext.Endpoint()
		if d := c.DecideExternal(&q.From, ext, q.Protocol, q.Port, p.now()); !d.Allow {
			x.Note = "denied by " + describe(&d)
		}
	}
	x.Allow = x.Note == ""
	for _, side := range q.Judges() {
		e := c.Explain(side, q, p.now())
		x.Allow = x.Allow && e.Decision.Allow
		x.Sides = append(x.Sides, explained(&e))
	}
	return x, nil
}

func explained(e *policydb.Explanation) explainedSide {
	d := &e.Decision
	s := explainedSide{Side: e.Side.String(), Allow: d.Allow, Reason: flow.ReasonName(d.Reason), Policy: d.Policy, Chain: e.Chain}
	switch d.Protection {
	case symbolonv1.Protection_PROTECTION_ENCRYPTED:
		s.Protection = "encrypted"
	case symbolonv1.Protection_PROTECTION_AUTHENTICATED:
		s.Protection = "authenticated"
	}
	for _, k := range e.Candidates {
		s.Candidates = append(s.Candidates, explainedCandidate{k.Policy, k.Matches, k.Failed})
	}
	return s
}

// describedEnd is a workload that this host has seen, by its SPIFFE ID, or one described
// as key=value,...@/namespace.
func (p *Proxy) describedEnd(c *policydb.Compiled, text string) (policydb.Endpoint, error) {
	if strings.HasPrefix(text, "spiffe://") {
		return p.seenWorkload(c, text)
	}
	i := strings.LastIndex(text, "@/") // a value may hold one too
	if i < 0 {
		return policydb.Endpoint{}, fmt.Errorf("%q: want a SPIFFE ID, an address, or key=value,...@/namespace", text)
	}
	attributes := make(map[string][]string)
	for pair := range strings.SplitSeq(text[:i], ",") {
		k, v, ok := strings.Cut(pair, "=")
		if (!ok || k == "") && text[:i] != "" {
			return policydb.Endpoint{}, fmt.Errorf("%q: %q is not key=value", text, pair)
		}
		if ok {
			attributes[k] = append(attributes[k], v)
		}
	}
	return policydb.Endpoint{Namespace: text[i+1:], Attributes: identity.NewAttributes(attributes)}, nil
}

// seenWorkload is one of this host's. What others are, only their own hosts know whole.
func (p *Proxy) seenWorkload(c *policydb.Compiled, id string) (policydb.Endpoint, error) {
	p.parties.mu.Lock()
	defer p.parties.mu.Unlock()
	var newest *party
	for _, w := range p.parties.byKey {
		if w.principal().ID.String() == id && (newest == nil || w.lastUsed.Load() > newest.lastUsed.Load()) {
			newest = w
		}
	}
	if newest != nil {
		return newest.endpoint(c), nil
	}
	return policydb.Endpoint{}, fmt.Errorf("no workload of this host has been %s lately; describe it as key=value,...@/namespace", id)
}
