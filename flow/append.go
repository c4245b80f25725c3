package flow

import (
	"encoding/json"
	"maps"
	"slices"
	"strconv"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// appendLine appends r as one line of JSON, with its newline, whatever is in r: what is
// not UTF-8 becomes U+FFFD. It is what encoding/json makes of NewLine(r), at a fraction
// of the cost: a busy proxy writes thousands a second.
func appendLine(b []byte, r *symbolonv1.FlowRecord) []byte {
	o := object{append(b, '{')}
	o.always("flow_id", r.GetFlowId())
	o.always("reporter", reporters.name(r.GetReporter()))
	o.text("host", r.GetHost())
	o.time("start", asTime(r.GetStart()))
	o.time("end", asTime(r.GetEnd()))
	o.endpoint("source", r.GetSource())
	o.endpoint("destination", r.GetDestination())
	o.always("outcome", outcomes.name(r.GetOutcome()))
	o.text("reason", ReasonName(r.GetReason()))
	o.text("peer_reason", ReasonName(r.GetPeerReason()))
	o.text("client_policy", r.GetClientPolicy())
	o.text("server_policy", r.GetServerPolicy())
	o.text("would_verdict", r.GetWouldVerdict())
	o.text("would_policy", r.GetWouldPolicy())
	o.always("protection", ProtectionName(r.GetProtection()))
	o.text("tls_version", r.GetTlsVersion())
	o.text("cipher_suite", r.GetCipherSuite())
	o.text("key_exchange", r.GetKeyExchange())
	o.flag("resumed", r.GetResumed())
	o.flag("reused", r.GetReused())
	o.flag("local", r.GetLocal())
	o.number("bytes_sent", r.GetBytesSent())
	o.number("bytes_received", r.GetBytesReceived())
	if n := r.GetFirstByteMicros(); n != 0 {
		o.number("first_byte_micros", n)
	}
	if n := r.GetGeneration(); n != 0 {
		o.number("generation", n)
	}
	o.text("detail", r.GetDetail())
	return append(o.b, '}', '\n')
}

// object is a JSON object under way.
type object struct{ b []byte }

// key appends a member's name, which needs no escape.
func (o *object) key(name string) {
	if o.b[len(o.b)-1] != '{' {
		o.b = append(o.b, ',')
	}
	o.b = append(append(append(o.b, '"'), name...), '"', ':')
}

func (o *object) always(name, s string) {
	o.key(name)
	o.b = appendString(o.b, s)
}

func (o *object) text(name, s string) {
	if s != "" {
		o.always(name, s)
	}
}

func (o *object) flag(name string, set bool) {
	if set {
		o.key(name)
		o.b = append(o.b, "true"...)
	}
}

func (o *object) number(name string, n uint64) {
	o.key(name)
	o.b = strconv.AppendUint(o.b, n, 10)
}

func (o *object) time(name string, t time.Time) {
	if t.IsZero() {
		return
	}
	o.key(name)
	o.b = append(o.b, '"')
	o.b = append(t.AppendFormat(o.b, time.RFC3339Nano), '"')
}

func (o *object) endpoint(name string, e *symbolonv1.FlowEndpoint) {
	o.key(name)
	in := object{append(o.b, '{')}
	in.text("spiffe_id", e.GetSpiffeId())
	in.text("namespace", e.GetNamespace())
	in.text("workload", e.GetWorkload())
	if all := e.GetAttributes(); len(all) > 0 {
		in.key("attributes")
		in.b = appendAttributes(in.b, all)
	}
	in.text("address", e.GetAddress())
	in.text("external", e.GetExternal())
	in.text("attributes_from", e.GetAttributesFrom())
	o.b = append(in.b, '}')
}

func appendAttributes(b []byte, all map[string]*symbolonv1.LabelValues) []byte {
	var few [16]string
	keys := slices.AppendSeq(few[:0], maps.Keys(all))
	slices.Sort(keys)
	b = append(b, '{')
	for i, k := range keys {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(appendString(b, k), ':')
		values := all[k].GetValues()
		if values == nil {
			b = append(b, "null"...)
			continue
		}
		b = append(b, '[')
		for j, v := range values {
			if j > 0 {
				b = append(b, ',')
			}
			b = appendString(b, v)
		}
		b = append(b, ']')
	}
	return append(b, '}')
}

// appendString appends s quoted. What needs an escape is left to encoding/json.
func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		switch c := s[i]; {
		case c < ' ', c > '~', c == '"', c == '\\', c == '<', c == '>', c == '&':
			quoted, err := json.Marshal(s)
			if err != nil {
				panic(err) // a string always has a form
			}
			return append(b, quoted...)
		}
	}
	return append(append(append(b, '"'), s...), '"')
}
