package controller

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/policydb"
)

// maxReportedEdges bounds one report.
const maxReportedEdges = 4096

// edgeEnd is one end of edges in its one form. Immutable.
type edgeEnd struct {
	id      [sha256.Size]byte
	message *symbolonv1.EdgeEnd
	// endpoint is what policy goes by; the zero value for a mere address or a host. Of a
	// workload of another trust domain, which foreign tells, the path is no namespace: who
	// judges it, if a host of ours does, is a matter of the record (edgeRecord.endpoints).
	endpoint policydb.Endpoint
	address  netip.Addr // of an end without identity or External
	foreign  bool
}

func (e *edgeEnd) proven() bool { return e.message.GetSpiffeId() != "" }

// newEdgeEnd takes what a host says of an end: a name and a namespace that are those
// of the SPIFFE ID, or an External, or an address.
func newEdgeEnd(e *symbolonv1.EdgeEnd, td spiffeid.TrustDomain) (*edgeEnd, error) {
	out := &edgeEnd{}
	attributes := identity.AttributesFromProto(e.GetAttributes())
	if len(attributes) > maxAttributes {
		return nil, fmt.Errorf("%d attributes, the limit is %d", len(attributes), maxAttributes)
	}
	switch {
	case e.GetSpiffeId() != "":
		id, err := spiffeid.FromString(e.GetSpiffeId())
		if err != nil {
			return nil, fmt.Errorf("%.200q: %w", e.GetSpiffeId(), err)
		}
		out.foreign = !id.MemberOf(td)
		out.message = &symbolonv1.EdgeEnd{SpiffeId: id.String()}
		if e.GetNamespace() == "" && e.GetWorkload() == "" { // a host
			break
		}
		p, err := identity.NewPrincipal(id, attributes)
		if err != nil {
			return nil, err
		}
		if p.Namespace != e.GetNamespace() || p.Name != e.GetWorkload() {
			return nil, fmt.Errorf("%.200q is not the SPIFFE ID of workload %.200q in namespace %.200q", e.GetSpiffeId(), e.GetWorkload(), e.GetNamespace())
		}
		out.message.Namespace, out.message.Workload, out.message.Attributes = p.Namespace, p.Name, p.Attributes.Proto()
		switch identity.Issuer(e.GetAttributesFrom()) {
		case identity.FromNobody, identity.FromExtension, identity.FromToken, identity.FromPolicy:
			out.message.AttributesFrom = e.GetAttributesFrom()
		default:
			return nil, fmt.Errorf("attributes_from %.200q", e.GetAttributesFrom())
		}
		out.endpoint = policydb.Endpoint{Namespace: p.Namespace, Attributes: p.Attributes}
		if out.foreign {
			out.endpoint = policydb.Endpoint{Foreign: true, Attributes: p.Attributes}
		}
	case e.GetNamespace() != "" || e.GetWorkload() != "":
		return nil, errors.New("a workload without a SPIFFE ID")
	case e.GetExternal() != "":
		out.message = &symbolonv1.EdgeEnd{External: e.GetExternal(), Attributes: attributes.Proto()}
		out.endpoint = policydb.Endpoint{External: e.GetExternal(), Attributes: attributes}
	default:
		addr, err := netip.ParseAddr(e.GetAddress())
		if err != nil {
			return nil, fmt.Errorf("address %.200q", e.GetAddress())
		}
		out.address = addr.Unmap().WithZone("")
		out.message = &symbolonv1.EdgeEnd{Address: out.address.String(), Service: e.GetService()}
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(out.message)
	if err != nil {
		return nil, err
	}
	if len(b) > maxRecordSize {
		return nil, fmt.Errorf("an end of %d bytes, the limit is %d", len(b), maxRecordSize)
	}
	out.id = sha256.Sum256(b)
	return out, nil
}

// takenEdge is an edge fit to be kept, under the namespace of the end that the
// reporting host answers for.
type takenEdge struct {
	namespace string
	host      string // that reports it
	from, to  *edgeEnd
	edge      *symbolonv1.Edge
}

// edgeIntake takes what one host reports.
type edgeIntake struct {
	host         *hostRecord
	td           spiffeid.TrustDomain
	now          time.Time
	retention    time.Duration
	hasNamespace func(string) bool
}

// take returns the edges that are kept, how many connections those stood for that are
// not, and why the last of them is not.
func (in *edgeIntake) take(set *symbolonv1.EdgeSet) (taken []takenEdge, refused uint64, why error) {
	if len(set.GetEdges()) > maxReportedEdges || len(set.GetEnds()) > 2*maxReportedEdges {
		return nil, 1, fmt.Errorf("%d edges with %d ends in one report, the limit is %d", len(set.GetEdges()), len(set.GetEnds()), maxReportedEdges)
	}
	cleanFlow(set.ProtoReflect())
	ends := make([]*edgeEnd, len(set.GetEnds()))
	for i, e := range set.GetEnds() {
		if ends[i], why = newEdgeEnd(e, in.td); why != nil {
			ends[i] = nil // edges that use it are refused
		}
	}
	for _, e := range set.GetEdges() {
		t, err := in.edge(e, ends)
		if err != nil {
			refused = saturated(refused, max(1, e.GetConnections()))
			why = err
			continue
		}
		taken = append(taken, t)
	}
	return taken, refused, why
}

func (in *edgeIntake) edge(e *symbolonv1.Edge, ends []*edgeEnd) (takenEdge, error) {
	var both [2]*edgeEnd
	for i, place := range []uint32{e.GetFrom(), e.GetTo()} {
		if int64(place) >= int64(len(ends)) || ends[place] == nil {
			return takenEdge{}, errors.New("an edge without both ends")
		}
		both[i] = ends[place]
	}
	t := takenEdge{namespace: in.host.Namespace, host: in.host.ID, from: both[0], to: both[1], edge: e}
	var own []*edgeEnd
	switch e.GetReporter() {
	case symbolonv1.Reporter_REPORTER_CLIENT:
		own = both[:1]
	case symbolonv1.Reporter_REPORTER_SERVER:
		own = both[1:]
	case symbolonv1.Reporter_REPORTER_LOCAL:
		own = both[:]
	default:
		return t, fmt.Errorf("reporter %v", e.GetReporter())
	}
	for _, end := range own {
		if err := in.own(end); err != nil {
			return t, err
		}
	}
	// A path of SPIRE's (identity.source) need not be one of our namespaces: what the
	// host says of it stands with the host.
	if ns := own[0].message.GetNamespace(); ns != "" && (!own[0].foreign || within(ns, in.host.Namespace) && in.hasNamespace(ns)) {
		t.namespace = ns
	}
	if !in.hasNamespace(t.namespace) {
		return t, fmt.Errorf("namespace %.200q does not exist", t.namespace)
	}
	return t, in.check(e)
}

// own: a host speaks for its own namespace, and an External has no host.
func (in *edgeIntake) own(e *edgeEnd) error {
	ns := e.message.GetNamespace()
	switch {
	case e.message.GetExternal() != "":
		return errors.New("an External has no proxy that could report")
	case e.proven() && (ns == "" || !e.foreign && !within(ns, in.host.Namespace)):
		return fmt.Errorf("%.200q is not of the host's namespace %s", e.message.GetSpiffeId(), in.host.Namespace)
	}
	return nil
}

// check bounds the rest, and puts the times where they can have been.
func (in *edgeIntake) check(e *symbolonv1.Edge) error {
	if e.GetProtocol() != "tcp" && e.GetProtocol() != "udp" || e.GetPort() == 0 || e.GetPort() > 65535 {
		return fmt.Errorf("port %.20q/%d", e.GetProtocol(), e.GetPort())
	}
	switch e.GetOutcome() {
	case symbolonv1.Outcome_OUTCOME_ALLOW, symbolonv1.Outcome_OUTCOME_DENY, symbolonv1.Outcome_OUTCOME_ERROR:
	default:
		return fmt.Errorf("outcome %v", e.GetOutcome())
	}
	if a, err := netip.ParseAddr(e.GetExternalAddress()); err != nil {
		e.ExternalAddress = ""
	} else {
		e.ExternalAddress = a.Unmap().WithZone("").String()
	}
	if !e.GetFirst().IsValid() || !e.GetLast().IsValid() {
		return errors.New("a time that is none")
	}
	first, last, oldest := e.GetFirst().AsTime(), e.GetLast().AsTime(), in.now.Add(-in.retention)
	if last.Before(oldest) {
		return errors.New("older than what is kept")
	}
	if last.After(in.now) {
		last = in.now
	}
	if first.After(last) {
		first = last
	}
	if first.Before(oldest) {
		first = oldest
	}
	e.First, e.Last = timestamppb.New(first), timestamppb.New(last)
	return nil
}
