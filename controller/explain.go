package controller

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"connectrpc.com/connect"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/policydb"
)

// Explain judges a connection that need not exist, by the policy in force, and says
// what every policy on both chains made of it.
func (s adminService) Explain(ctx context.Context, req *connect.Request[symbolonv1.ExplainRequest]) (*connect.Response[symbolonv1.ExplainResponse], error) {
	m := req.Msg
	var records []*symbolonv1.FlowRecord
	var recorded *flowQuestion
	if m.GetFlow() != "" {
		var err error
		if records, err = s.flows.byID(m.GetFlow()); err != nil {
			return nil, err
		}
		if recorded, err = questionOf(m, records); err != nil {
			return nil, err
		}
		m = recorded.ExplainRequest
	}
	protocol := strings.ToLower(m.GetProtocol())
	if protocol == "" {
		protocol = "tcp"
	}
	if protocol != "tcp" && protocol != "udp" {
		return nil, invalidf("protocol %q: want tcp or udp", m.GetProtocol())
	}
	if m.GetPort() == 0 || m.GetPort() > 65535 {
		return nil, invalidf("port %d: want 1 to 65535", m.GetPort())
	}
	if m.GetFrom().GetAddress() != "" && m.GetTo().GetAddress() != "" {
		return nil, invalidf("both ends are addresses: one of them must be a workload")
	}
	compiled, err := s.policies.forExplain()
	if err != nil {
		return nil, s.internal("compile", err)
	}
	q := &policydb.Query{Protocol: protocol, Port: uint16(m.GetPort())}
	// The workloads first: an address means something only as seen from them.
	for _, end := range []struct {
		what string
		in   *symbolonv1.ExplainEndpoint
		out  *policydb.Endpoint
	}{{"from", m.GetFrom(), &q.From}, {"to", m.GetTo(), &q.To}} {
		if end.in.GetAddress() != "" {
			continue
		}
		switch {
		case recorded == nil:
			*end.out, err = s.explainWorkload(end.in)
		case end.out == &q.From:
			*end.out, err = s.recordedWorkload(ctx, compiled, end.in, recorded.fromHost)
		default:
			*end.out, err = s.recordedWorkload(ctx, compiled, end.in, recorded.toHost)
		}
		if err != nil {
			return nil, prefixed(end.what, err)
		}
	}
	if q.From.Foreign && q.To.Foreign {
		return nil, invalidf("both ends are of other trust domains: one of them must be a workload that is judged here")
	}
	if recorded == nil {
		s.knownByID(compiled, &q.From, q.To.Namespace)
		s.knownByID(compiled, &q.To, q.From.Namespace)
	}
	if text := m.GetFrom().GetAddress(); text != "" {
		if q.From, err = explainSource(compiled, text, q.To.Namespace); err != nil {
			return nil, prefixed("from", err)
		}
	}
	if text := m.GetTo().GetAddress(); text != "" {
		if q.To, err = explainDestination(compiled, text, q.From.Namespace, protocol, q.Port); err != nil {
			return nil, prefixed("to", err)
		}
	}

	res := &symbolonv1.ExplainResponse{Allow: true, Generation: compiled.Generation()}
	if records != nil {
		res.From, res.To, res.Protocol, res.Port, res.Records = m.GetFrom(), m.GetTo(), m.GetProtocol(), m.GetPort(), records
	}
	for _, side := range q.Judges() {
		e := compiled.Explain(side, q, s.opts.Now())
		res.Sides = append(res.Sides, explainSide(e))
		res.Allow = res.Allow && e.Decision.Allow
		res.Protection = max(res.Protection, e.Decision.Protection)
	}
	return connect.NewResponse(res), nil
}

// explainWorkload is a known workload by its SPIFFE ID, or one described by
// namespace and attributes.
func (s *Server) explainWorkload(in *symbolonv1.ExplainEndpoint) (policydb.Endpoint, error) {
	if in.GetSpiffeId() != "" {
		id, err := spiffeid.FromString(in.GetSpiffeId())
		if err != nil {
			return policydb.Endpoint{}, invalidf("%v", err)
		}
		known, ok := s.inventory.find(id.String())
		if !ok && !id.MemberOf(s.cfg.trustDomain()) {
			// Of a partner's workload nothing is known but the ID, before it shows a certificate.
			p, err := identity.NewPrincipal(id, nil)
			if err != nil {
				return policydb.Endpoint{}, invalidf("%v", err)
			}
			return policydb.Endpoint{Foreign: true, Attributes: p.Attributes}, nil
		}
		if !ok {
			return policydb.Endpoint{}, connect.NewError(connect.CodeNotFound,
				fmt.Errorf("no workload has a valid SVID of %s; describe it by namespace and attributes", id))
		}
		p, err := identity.NewPrincipal(id, known.Claims)
		if err != nil {
			return policydb.Endpoint{}, invalidf("%v", err)
		}
		return policydb.Endpoint{Namespace: p.Namespace, Attributes: p.Attributes}, nil
	}
	if in.GetNamespace() == "" {
		return policydb.Endpoint{}, invalidf("give a SPIFFE ID, an address, or a namespace with attributes")
	}
	if err := s.namespaceError(in.GetNamespace()); err != nil {
		return policydb.Endpoint{}, err
	}
	return policydb.Endpoint{Namespace: in.GetNamespace(), Attributes: identity.AttributesFromProto(in.GetAttributes())}, nil
}

// knownByID adds to a foreign workload what Profiles say of its SPIFFE ID to who is judged
// in a namespace.
func (s *Server) knownByID(c *policydb.Compiled, e *policydb.Endpoint, namespace string) {
	if id, err := spiffeid.FromString(e.Attributes.Get("spiffe.id")); err == nil && e.Foreign {
		e.Attributes = c.About(&identity.Principal{ID: id, Attributes: e.Attributes}, namespace, s.cfg.trustDomain()).Attributes
	}
}

// explainSource is the External that a client without a proxy belongs to, as seen
// from the namespace of the server.
func explainSource(c *policydb.Compiled, text, namespace string) (policydb.Endpoint, error) {
	addr, err := parseAddress(text)
	if err != nil {
		return policydb.Endpoint{}, err
	}
	if m, ok := c.Source(namespace, addr); ok {
		return policydb.Endpoint{External: m.Ref, Attributes: m.Labels}, nil
	}
	return policydb.Endpoint{}, connect.NewError(connect.CodeNotFound,
		fmt.Errorf("no External that %s sees has %s: a client there must come through a proxy, or is refused", namespace, addr))
}

// explainDestination is the External that an address is part of, as seen from the
// namespace of the client.
func explainDestination(c *policydb.Compiled, text, namespace, protocol string, port uint16) (policydb.Endpoint, error) {
	var names []string
	addr, err := parseAddress(text)
	if policydb.IsName(text) {
		names = append(names, text) // which addresses it has, each host finds out for itself
	} else if err != nil {
		return policydb.Endpoint{}, err
	}
	m, service := c.Destination(namespace, addr, protocol, port, names...)
	switch {
	case m != nil:
		return m.Endpoint(), nil
	case service != "":
		return policydb.Endpoint{}, connect.NewError(connect.CodeFailedPrecondition,
			fmt.Errorf("%s belongs to Service %s: protected workloads are behind it, and which of them answers decides; ask for one of those", text, service))
	case names == nil && c.NamesMatter(namespace):
		return policydb.Endpoint{}, connect.NewError(connect.CodeNotFound,
			fmt.Errorf("no External that %s sees has %s, %s/%d by its network. One may have it by a name, which hosts resolve: ask for the name, or 'symbolon-proxy debug policies --from .. --to %s' on the host", namespace, addr, protocol, port, addr))
	}
	return policydb.Endpoint{}, connect.NewError(connect.CodeNotFound,
		fmt.Errorf("no External that %s sees has %s, %s/%d: what is there must answer as a protected workload, or is refused", namespace, text, protocol, port))
}

func parseAddress(text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	if err != nil {
		return addr, invalidf("%q: want an IP address without a port, or as a destination a DNS name", text)
	}
	return addr.Unmap(), nil
}

func explainSide(e policydb.Explanation) *symbolonv1.ExplainSide {
	out := &symbolonv1.ExplainSide{
		Side: "client", Allow: e.Decision.Allow, Reason: e.Decision.Reason, Policy: e.Decision.Policy,
		Protection: e.Decision.Protection, Log: e.Decision.Log, Chain: e.Chain,
	}
	if e.Side == policydb.Server {
		out.Side = "server"
	}
	for _, c := range e.Candidates {
		out.Candidates = append(out.Candidates, &symbolonv1.Candidate{
			Policy: c.Policy, Matches: c.Matches, Failed: c.Failed, Verb: c.Verb, Mode: c.Mode,
		})
	}
	return out
}

func invalidf(format string, args ...any) error {
	return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf(format, args...))
}

// prefixed says which end an error is about, and keeps its code.
func prefixed(what string, err error) error {
	var coded *connect.Error
	if errors.As(err, &coded) {
		return connect.NewError(coded.Code(), fmt.Errorf("%s: %s", what, coded.Message()))
	}
	return fmt.Errorf("%s: %w", what, err)
}
