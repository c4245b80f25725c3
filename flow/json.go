package flow

import (
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// Line is a record as written: JSON names are those of flow.proto, enums in kebab
// case, times in RFC 3339, durations in microseconds, sizes in bytes. Empty fields
// are left out.
type Line struct {
	FlowID          string    `json:"flow_id"`
	Reporter        string    `json:"reporter"`
	Host            string    `json:"host,omitempty"`
	Start           time.Time `json:"start,omitzero"`
	End             time.Time `json:"end,omitzero"`
	Source          Endpoint  `json:"source"`
	Destination     Endpoint  `json:"destination"`
	Outcome         string    `json:"outcome"`
	Reason          string    `json:"reason,omitempty"`
	PeerReason      string    `json:"peer_reason,omitempty"`
	ClientPolicy    string    `json:"client_policy,omitempty"`
	ServerPolicy    string    `json:"server_policy,omitempty"`
	WouldVerdict    string    `json:"would_verdict,omitempty"`
	WouldPolicy     string    `json:"would_policy,omitempty"`
	Protection      string    `json:"protection"`
	TLSVersion      string    `json:"tls_version,omitempty"`
	CipherSuite     string    `json:"cipher_suite,omitempty"`
	KeyExchange     string    `json:"key_exchange,omitempty"`
	Resumed         bool      `json:"resumed,omitempty"`
	Reused          bool      `json:"reused,omitempty"`
	Local           bool      `json:"local,omitempty"`
	BytesSent       uint64    `json:"bytes_sent"`
	BytesReceived   uint64    `json:"bytes_received"`
	FirstByteMicros uint64    `json:"first_byte_micros,omitempty"`
	Generation      uint64    `json:"generation,omitempty"`
	Detail          string    `json:"detail,omitempty"`
}

// Endpoint is one end of a Line.
type Endpoint struct {
	SPIFFEID   string              `json:"spiffe_id,omitempty"`
	Namespace  string              `json:"namespace,omitempty"`
	Workload   string              `json:"workload,omitempty"`
	Attributes map[string][]string `json:"attributes,omitempty"`
	Address    string              `json:"address,omitempty"`
	External   string              `json:"external,omitempty"`
	// AttributesFrom is "extension", "token" or "policy"; empty: nothing is known but the ID.
	AttributesFrom string `json:"attributes_from,omitempty"`
}

// NewLine converts a record.
func NewLine(r *symbolonv1.FlowRecord) *Line {
	return &Line{
		FlowID: r.GetFlowId(), Reporter: reporters.name(r.GetReporter()), Host: r.GetHost(),
		Start: asTime(r.GetStart()), End: asTime(r.GetEnd()),
		Source: endpoint(r.GetSource()), Destination: endpoint(r.GetDestination()),
		Outcome: outcomes.name(r.GetOutcome()),
		Reason:  ReasonName(r.GetReason()), PeerReason: ReasonName(r.GetPeerReason()),
		ClientPolicy: r.GetClientPolicy(), ServerPolicy: r.GetServerPolicy(),
		WouldVerdict: r.GetWouldVerdict(), WouldPolicy: r.GetWouldPolicy(),
		Protection: ProtectionName(r.GetProtection()),
		TLSVersion: r.GetTlsVersion(), CipherSuite: r.GetCipherSuite(), KeyExchange: r.GetKeyExchange(),
		Resumed: r.GetResumed(), Reused: r.GetReused(), Local: r.GetLocal(),
		BytesSent: r.GetBytesSent(), BytesReceived: r.GetBytesReceived(),
		FirstByteMicros: r.GetFirstByteMicros(), Generation: r.GetGeneration(), Detail: r.GetDetail(),
	}
}

// ReasonName is the reason's public name, "peer-unprotected"; "" for UNSPECIFIED.
func ReasonName(r symbolonv1.Reason) string {
	if r == symbolonv1.Reason_REASON_UNSPECIFIED {
		return ""
	}
	return reasons.name(r)
}

// ReporterName is "client" or "server".
func ReporterName(r symbolonv1.Reporter) string { return reporters.name(r) }

// OutcomeName is "allow", "deny" or "error".
func OutcomeName(o symbolonv1.Outcome) string { return outcomes.name(o) }

// ProtectionName is "encrypted", "authenticated" or "none".
func ProtectionName(p symbolonv1.Protection) string {
	if p == symbolonv1.Protection_PROTECTION_UNSPECIFIED {
		return "none"
	}
	return protections.name(p)
}

// enum is an enum's values by number, with their public names.
type enum[E number] struct {
	prefix string
	names  map[E]string
}

var (
	reasons     = enumOf[symbolonv1.Reason]("REASON_")
	protections = enumOf[symbolonv1.Protection]("PROTECTION_")
	reporters   = enumOf[symbolonv1.Reporter]("REPORTER_")
	outcomes    = enumOf[symbolonv1.Outcome]("OUTCOME_")
)

type number interface {
	protoreflect.Enum
	~int32
}

func enumOf[E number](prefix string) enum[E] {
	e := enum[E]{prefix, make(map[E]string)}
	values := E(0).Descriptor().Values()
	for i := range values.Len() {
		v := values.Get(i)
		e.names[E(v.Number())] = strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(string(v.Name()), prefix)), "_", "-")
	}
	return e
}

// name is a value's in kebab case, or its number.
func (e enum[E]) name(v E) string {
	if s, ok := e.names[v]; ok {
		return s
	}
	return strconv.Itoa(int(v))
}

func endpoint(e *symbolonv1.FlowEndpoint) Endpoint {
	out := Endpoint{
		SPIFFEID: e.GetSpiffeId(), Namespace: e.GetNamespace(), Workload: e.GetWorkload(),
		Address: e.GetAddress(), External: e.GetExternal(), AttributesFrom: e.GetAttributesFrom(),
	}
	for k, vs := range e.GetAttributes() {
		if out.Attributes == nil {
			out.Attributes = make(map[string][]string)
		}
		out.Attributes[k] = vs.GetValues()
	}
	return out
}

// asTime is zero for a moment that no calendar has: encoding/json would refuse the
// whole record for it.
func asTime(t *timestamppb.Timestamp) time.Time {
	if !t.IsValid() {
		return time.Time{}
	}
	return t.AsTime()
}
