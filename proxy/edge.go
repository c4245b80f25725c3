package proxy

import (
	"net/netip"
	"unsafe"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/policydb"
)

// edgeEnds are principals and Externals as ends of edges: every connection of one
// shares it.
var edgeEnds = func() *lru.Cache[endKey, keptEnd] {
	c, err := lru.New[endKey, keptEnd](4096)
	if err != nil {
		panic(err) // only for a size below one
	}
	return c
}()

type endKey struct {
	id         spiffeid.ID
	namespace  string
	external   string
	attributes labelKey
	issuer     identity.Issuer
}

// keptEnd holds the attributes whose place is in the key.
type keptEnd struct {
	attributes identity.Attributes
	end        *flow.End
}

func edgeEnd(id spiffeid.ID, namespace, external string, attributes identity.Attributes, issuer identity.Issuer, message func() *symbolonv1.EdgeEnd) *flow.End {
	k := endKey{id, namespace, external, labelKey{unsafe.SliceData(attributes), len(attributes)}, issuer}
	if e, ok := edgeEnds.Get(k); ok {
		return e.end
	}
	e := keptEnd{attributes, flow.NewEnd(message())}
	edgeEnds.Add(k, e)
	return e.end
}

// principalEnd has all attributes, unlike a record: policy goes by them.
func principalEnd(p *identity.Principal) *flow.End {
	return edgeEnd(p.ID, p.Namespace, "", p.Attributes, p.Issuer, func() *symbolonv1.EdgeEnd {
		return &symbolonv1.EdgeEnd{
			SpiffeId: p.ID.String(), Namespace: p.Namespace, Workload: p.Name, Attributes: p.Attributes.Proto(), AttributesFrom: string(p.Issuer),
		}
	})
}

func externalEnd(m *policydb.ExternalMatch) *flow.End {
	return edgeEnd(spiffeid.ID{}, "", m.Ref, m.Labels, identity.FromNobody, func() *symbolonv1.EdgeEnd {
		return &symbolonv1.EdgeEnd{External: m.Ref, Attributes: m.Labels.Proto()}
	})
}

// addressEnd is an end of which nothing is known but where it is. An IPv6 client can
// have as many addresses as it likes in its /64, which stands for all of them.
func addressEnd(e *symbolonv1.FlowEndpoint, client bool) *flow.End {
	a := addressOf(e)
	if client && a.Is6() {
		a = netip.PrefixFrom(a, 64).Masked().Addr()
	}
	text := ""
	if a.IsValid() {
		text = a.String()
	}
	return flow.NewEnd(&symbolonv1.EdgeEnd{Address: text, Service: e.GetExternal()})
}

func addressOf(e *symbolonv1.FlowEndpoint) netip.Addr {
	p, err := netip.ParseAddrPort(e.GetAddress())
	if err != nil {
		return netip.Addr{}
	}
	return p.Addr().Unmap().WithZone("")
}

// observed adds the connection, as its record stands, to its edge.
func (x *conn) observed(outcome symbolonv1.Outcome, n flow.Amount) {
	if x.p.edges == nil {
		return
	}
	from, to := x.ends[0], x.ends[1]
	port, err := netip.ParseAddrPort(x.rec.GetDestination().GetAddress())
	if from == nil && to == nil || err != nil {
		return // nobody was identified, or nothing is known of what was wanted
	}
	if from == nil {
		from = addressEnd(x.rec.GetSource(), true)
	}
	if to == nil {
		to = addressEnd(x.rec.GetDestination(), false)
	}
	var external netip.Addr
	for i, e := range []*symbolonv1.FlowEndpoint{x.rec.GetSource(), x.rec.GetDestination()} {
		if x.ends[i] != nil && e.GetSpiffeId() == "" {
			external = addressOf(e)
		}
	}
	before := x.rec.Outcome
	x.rec.Outcome = outcome
	x.p.edges.Observe(flow.Observation{
		From: from, To: to, Record: x.rec, Protocol: tcp, Port: port.Port(),
		ExternalAddress: external, Amount: n, At: x.p.now(),
	})
	x.rec.Outcome = before
}
