package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/flow"
)

// edgeLine is an edge as printed: names are those of edge.proto, enums in kebab case,
// times in RFC 3339, sizes in bytes.
type edgeLine struct {
	From          flow.Endpoint `json:"from"`
	To            flow.Endpoint `json:"to"`
	Protocol      string        `json:"protocol"`
	Port          uint32        `json:"port"`
	Outcome       string        `json:"outcome"`
	Reason        string        `json:"reason,omitempty"`
	PeerReason    string        `json:"peer_reason,omitempty"`
	ClientPolicy  string        `json:"client_policy,omitempty"`
	ServerPolicy  string        `json:"server_policy,omitempty"`
	WouldVerdict  string        `json:"would_verdict,omitempty"`
	WouldPolicy   string        `json:"would_policy,omitempty"`
	Protection    string        `json:"protection"`
	Local         bool          `json:"local,omitempty"`
	Reporter      string        `json:"reporter"`
	AddressOnly   bool          `json:"address_only,omitempty"`
	Connections   uint64        `json:"connections"`
	BytesSent     uint64        `json:"bytes_sent"`
	BytesReceived uint64        `json:"bytes_received"`
	First         time.Time     `json:"first"`
	Last          time.Time     `json:"last"`
}

// edge is one edge of a set with its two ends.
type edge struct {
	*symbolonv1.Edge
	from, to *symbolonv1.EdgeEnd
}

// edgesOf leaves out what the answer does not have the ends of.
func edgesOf(set *symbolonv1.EdgeSet) (out []edge) {
	ends := uint32(len(set.GetEnds()))
	for _, e := range set.GetEdges() {
		if e.GetFrom() < ends && e.GetTo() < ends {
			out = append(out, edge{e, set.GetEnds()[e.GetFrom()], set.GetEnds()[e.GetTo()]})
		}
	}
	return out
}

func (a *app) listEdges(ctx context.Context, req *symbolonv1.WatchFlowsRequest, since time.Duration) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	ask := &symbolonv1.ListEdgesRequest{Namespace: req.GetNamespace(), Outcome: req.GetOutcome(), Last: req.GetLast()}
	if since > 0 {
		ask.Since = durationpb.New(since)
	}
	resp, err := call(ctx, a, c.ListEdges, ask)
	if err != nil {
		return err
	}
	if resp.GetLost() > 0 {
		a.warning("%d connections are in no edge: a proxy or the controller had no room for them, or refused them", resp.GetLost())
	}
	if resp.GetLeftOff() > 0 {
		a.warning("%d edges are too many for one answer: use --namespace, --since or --last", resp.GetLeftOff())
	}
	edges := edgesOf(resp.GetEdges())
	switch a.output {
	case "json", "yaml":
		return a.edgeDocuments(edges)
	case "name":
		for _, e := range edges {
			if err := a.write([]byte(sanitize(fmt.Sprintf("%s %s %s/%d", edgeEndName(e.from), edgeEndName(e.to), e.GetProtocol(), e.GetPort()), false) + "\n")); err != nil {
				return err
			}
		}
		return nil
	}
	if len(edges) == 0 {
		a.say("no such edges")
		return nil
	}
	return a.edgeTable(edges).flush()
}

func (a *app) edgeDocuments(edges []edge) error {
	for _, e := range edges {
		doc, err := json.Marshal(newEdgeLine(e))
		if err != nil {
			return fmt.Errorf("format JSON: %w", err)
		}
		doc = escapeJSON(doc)
		if a.output == "json" {
			err = a.write(append(doc, '\n'))
		} else if err = a.write([]byte("---\n")); err == nil {
			err = a.writeYAML(doc)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func newEdgeLine(e edge) edgeLine {
	return edgeLine{
		From: edgeEndLine(e.from, e.Edge), To: edgeEndLine(e.to, e.Edge), Protocol: e.GetProtocol(), Port: e.GetPort(),
		Outcome: word(e.GetOutcome()), Reason: word(e.GetReason()), PeerReason: word(e.GetPeerReason()),
		ClientPolicy: e.GetClientPolicy(), ServerPolicy: e.GetServerPolicy(),
		WouldVerdict: e.GetWouldVerdict(), WouldPolicy: e.GetWouldPolicy(),
		Protection: flow.ProtectionName(e.GetProtection()), Local: e.GetLocal(), Reporter: word(e.GetReporter()),
		AddressOnly: e.GetAddressOnly(), Connections: e.GetConnections(),
		BytesSent: e.GetBytesSent(), BytesReceived: e.GetBytesReceived(),
		First: e.GetFirst().AsTime(), Last: e.GetLast().AsTime(),
	}
}

func edgeEndLine(e *symbolonv1.EdgeEnd, of *symbolonv1.Edge) flow.Endpoint {
	out := flow.Endpoint{
		SPIFFEID: e.GetSpiffeId(), Namespace: e.GetNamespace(), Workload: e.GetWorkload(),
		Address: e.GetAddress(), External: e.GetExternal(), AttributesFrom: e.GetAttributesFrom(),
	}
	if e.GetExternal() != "" {
		out.Address = of.GetExternalAddress()
	}
	for k, vs := range e.GetAttributes() {
		if out.Attributes == nil {
			out.Attributes = make(map[string][]string)
		}
		out.Attributes[k] = vs.GetValues()
	}
	return out
}

// edgeEndName is the shortest true name of an end.
func edgeEndName(e *symbolonv1.EdgeEnd) string {
	switch {
	case e.GetSpiffeId() != "":
		return shortID(e.GetSpiffeId())
	case e.GetExternal() != "":
		return e.GetExternal()
	case e.GetService() != "":
		return fmt.Sprintf("%s (%s)", e.GetService(), e.GetAddress())
	}
	return e.GetAddress()
}

func (a *app) edgeTable(edges []edge) *table {
	t := a.newTable(a.output == "wide", "FROM", "TO", "PORT", "VERDICT", "REASON", "POLICY", "PROTECTION", "CONNECTIONS", "FIRST", "LAST",
		"|", "BYTES", "REPORTER", "WOULD", "FROM LABELS", "TO LABELS")
	for _, e := range edges {
		// An edge is told like a record of one of its connections.
		r := &symbolonv1.FlowRecord{
			Reason: e.GetReason(), PeerReason: e.GetPeerReason(), ClientPolicy: e.GetClientPolicy(), ServerPolicy: e.GetServerPolicy(),
			Protection: e.GetProtection(), Local: e.GetLocal(), Outcome: e.GetOutcome(),
		}
		would := e.GetWouldVerdict()
		if e.GetWouldPolicy() != "" {
			would += " " + e.GetWouldPolicy()
		}
		t.row(text(edgeEndName(e.from)), text(edgeEndName(e.to)), text(fmt.Sprintf("%s/%d", e.GetProtocol(), e.GetPort())),
			outcomeCell(e.GetOutcome()), text(flowReason(r)), text(flowPolicy(r)), protectionCell(r),
			text(fmt.Sprint(e.GetConnections())), text(ago(a.Now(), e.GetFirst())), text(ago(a.Now(), e.GetLast())),
			text(size(e.GetBytesSent())+"/"+size(e.GetBytesReceived())), text(word(e.GetReporter())), text(would),
			text(attributes(labels(e.from.GetAttributes()))), text(attributes(labels(e.to.GetAttributes()))))
	}
	return t
}
