package controller

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"connectrpc.com/connect"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/policydb"
)

// minFlowID is how many digits of a flow id are enough to ask, if no other flow has
// the same.
const minFlowID = 8

// byID finds what was recorded of a flow: one record of each proxy that had a part in
// it. Errors are Connect's.
func (r *flowRing) byID(id string) ([]*symbolonv1.FlowRecord, error) {
	id = strings.ToLower(id)
	if len(id) < minFlowID || strings.Trim(id, "0123456789abcdef") != "" {
		return nil, invalidf("flow %q: want a flow id, or %d or more of its first hexadecimal digits ('symbolon flows -o wide' shows them)", id, minFlowID)
	}
	all, _, _, _ := r.since(0)
	var found []*symbolonv1.FlowRecord
	for _, f := range all {
		if !strings.HasPrefix(f.GetFlowId(), id) {
			continue
		}
		if len(found) > 0 && found[0].GetFlowId() != f.GetFlowId() {
			return nil, invalidf("several flows begin with %s; give more digits", id)
		}
		found = append(found, f)
	}
	if found == nil {
		return nil, connect.NewError(connect.CodeNotFound,
			fmt.Errorf("no record of flow %s is left: the controller keeps the newest only, and a proxy writes a flow's record at its end", id))
	}
	return found, nil
}

// flowQuestion is what is asked of a recorded connection.
type flowQuestion struct {
	*symbolonv1.ExplainRequest
	fromHost, toHost string // that answer for the ends; empty: none of ours is known to
}

// questionOf asks what policy says of a recorded connection now. Each end is as the
// proxy saw it that knows it best: its own.
func questionOf(m *symbolonv1.ExplainRequest, records []*symbolonv1.FlowRecord) (*flowQuestion, error) {
	if m.GetFrom() != nil || m.GetTo() != nil || m.GetPort() != 0 || m.GetProtocol() != "" {
		return nil, invalidf("a flow says from, to and port itself: give either")
	}
	q := &flowQuestion{ExplainRequest: &symbolonv1.ExplainRequest{Protocol: "tcp"}}
	// The client's proxy first: it knows where the application wanted to go.
	client, server := records[0], records[0]
	for _, f := range records {
		switch f.GetReporter() {
		case symbolonv1.Reporter_REPORTER_CLIENT:
			client = f
		case symbolonv1.Reporter_REPORTER_SERVER:
			server = f
		}
	}
	var err error
	if q.From, err = endOf(client.GetSource(), server.GetSource()); err != nil {
		return nil, prefixed("the flow's client", err)
	}
	if q.To, err = endOf(server.GetDestination(), client.GetDestination()); err != nil {
		return nil, prefixed("the flow's server", err)
	}
	// The port that policy goes by is that of the side which listens.
	address, err := netip.ParseAddrPort(server.GetDestination().GetAddress())
	if err != nil {
		return nil, prefixed("the flow's server", connect.NewError(connect.CodeFailedPrecondition, errors.New("its address is not known")))
	}
	q.Port = uint32(address.Port())
	if client.GetReporter() != symbolonv1.Reporter_REPORTER_SERVER {
		q.fromHost = client.GetHost()
	}
	if server.GetReporter() != symbolonv1.Reporter_REPORTER_CLIENT {
		q.toHost = server.GetHost()
	}
	return q, nil
}

// recordedWorkload is an end of a recorded connection as policy goes by it. Records have
// labels only: the other claims are those of the ID's SVID. A workload of another trust
// domain is judged by the host that answers for it, if that is one of ours.
func (s *Server) recordedWorkload(ctx context.Context, c *policydb.Compiled, in *symbolonv1.ExplainEndpoint, host string) (policydb.Endpoint, error) {
	id, err := spiffeid.FromString(in.GetSpiffeId())
	if err != nil {
		return policydb.Endpoint{}, invalidf("%v", err)
	}
	claims := identity.AttributesFromProto(in.GetAttributes())
	if known, ok := s.inventory.find(id.String()); ok {
		claims = claims.Union(known.Claims.Filter(func(key string) bool { return strings.Contains(key, ".") }))
	}
	p, err := identity.NewPrincipal(id, claims)
	if err != nil {
		return policydb.Endpoint{}, invalidf("%v", err)
	}
	if id.MemberOf(s.cfg.trustDomain()) {
		return policydb.Endpoint{Namespace: p.Namespace, Attributes: p.Attributes}, nil
	}
	if r, _, err := s.hosts.get(ctx, host); host != "" && err == nil {
		return policydb.Endpoint{Namespace: c.LocalNamespace(id, r.Namespace), Attributes: p.Attributes}, nil
	}
	return policydb.Endpoint{Foreign: true, Attributes: p.Attributes}, nil
}

// endOf is one end by the first of the views that has an identity; otherwise by its
// address.
func endOf(views ...*symbolonv1.FlowEndpoint) (*symbolonv1.ExplainEndpoint, error) {
	for _, e := range views {
		if e.GetSpiffeId() != "" && e.GetNamespace() != "" {
			return &symbolonv1.ExplainEndpoint{SpiffeId: e.GetSpiffeId(), Namespace: e.GetNamespace(), Attributes: proto.CloneOf(e).GetAttributes()}, nil
		}
	}
	for _, e := range views {
		if a, err := netip.ParseAddrPort(e.GetAddress()); err == nil {
			return &symbolonv1.ExplainEndpoint{Address: a.Addr().Unmap().String()}, nil
		}
	}
	return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("neither an identity nor an address was recorded of it"))
}
