package cli

import (
	"net/netip"
	"strconv"
	"strings"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// parseEndpoint reads one end of a question to explain: a SPIFFE ID, an address,
// or "key=value,key=value@/namespace". A key may be given several times.
func parseEndpoint(flag, s string) (*symbolonv1.ExplainEndpoint, error) {
	if s == "" {
		return nil, usagef("--%s is needed: a SPIFFE ID, an address, or key=value,...@/namespace", flag)
	}
	if strings.HasPrefix(s, "spiffe://") {
		return &symbolonv1.ExplainEndpoint{SpiffeId: s}, nil
	}
	if addr, err := netip.ParseAddr(s); err == nil {
		return &symbolonv1.ExplainEndpoint{Address: addr.Unmap().String()}, nil
	}
	// The last "@/": a value may hold one too.
	i := strings.LastIndex(s, "@/")
	if i < 0 && flag == "to" && strings.Contains(s, ".") && strings.Trim(strings.ToLower(s), "*-.0123456789abcdefghijklmnopqrstuvwxyz") == "" {
		return &symbolonv1.ExplainEndpoint{Address: strings.ToLower(s)}, nil // a DNS name
	}
	if i < 0 {
		return nil, usagef("--%s %q: want a SPIFFE ID, an address, or key=value,...@/namespace", flag, s)
	}
	e := &symbolonv1.ExplainEndpoint{Namespace: s[i+1:]}
	if err := checkNamespace(e.GetNamespace()); err != nil {
		return nil, err
	}
	if s[:i] == "" {
		return e, nil
	}
	e.Attributes = map[string]*symbolonv1.LabelValues{}
	for pair := range strings.SplitSeq(s[:i], ",") {
		k, v, ok := strings.Cut(pair, "=")
		if !ok || k == "" {
			return nil, usagef("--%s %q: %q is not key=value", flag, s, pair)
		}
		if e.Attributes[k] == nil {
			e.Attributes[k] = &symbolonv1.LabelValues{}
		}
		e.Attributes[k].Values = append(e.Attributes[k].Values, v)
	}
	return e, nil
}

// endpointText is how a question is repeated to the person.
func endpointText(e *symbolonv1.ExplainEndpoint) string {
	switch {
	case e.GetSpiffeId() != "":
		return e.GetSpiffeId()
	case e.GetAddress() != "":
		return e.GetAddress()
	}
	if len(e.GetAttributes()) == 0 {
		return "anything in " + e.GetNamespace()
	}
	return "[" + attributes(e.GetAttributes()) + "] in " + e.GetNamespace()
}

// parsePort reads "443", "tcp/443" or "udp/53".
func parsePort(s string) (protocol string, port uint32, err error) {
	protocol, number := "tcp", s
	if p, n, ok := strings.Cut(s, "/"); ok {
		protocol, number = p, n
	}
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil || n == 0 || protocol != "tcp" && protocol != "udp" {
		return "", 0, usagef("--port %q: want a port such as 443 or tcp/443", s)
	}
	return protocol, uint32(n), nil
}
