package policydb

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// maxPort is the largest TCP or UDP port.
const maxPort = 65535

var protocols = []string{"tcp", "udp"}

// parsePorts reads "tcp/443" or "tcp/8000-8100". The hint says what was meant.
func parsePorts(s string) (r *symbolonv1.PortRange, message, hint string) {
	protocol, ports, ok := strings.Cut(s, "/")
	if !ok {
		if _, err := strconv.ParseUint(s, 10, 16); err == nil {
			return nil, fmt.Sprintf("port %s names no protocol", printable(s)), fmt.Sprintf("write tcp/%s or udp/%s", s, s)
		}
		return nil, fmt.Sprintf("%s is not a port", printable(s)), "write protocol/port or protocol/first-last: tcp/443, tcp/8000-8100"
	}
	if !slices.Contains(protocols, protocol) {
		return nil, fmt.Sprintf("unknown protocol %s", printable(protocol)), didYouMean(protocol, protocols)
	}
	first, last, isRange := strings.Cut(ports, "-")
	if !isRange {
		last = first
	}
	a, okA := parsePort(first)
	b, okB := parsePort(last)
	switch {
	case !okA || !okB:
		return nil, fmt.Sprintf("%s is not a port", printable(s)), "ports are numbers from 1 to 65535, ranges are first-last: tcp/8000-8100"
	case a > b:
		return nil, fmt.Sprintf("port range %s ends before it starts", printable(s)), fmt.Sprintf("write %s/%d-%d", protocol, b, a)
	}
	return &symbolonv1.PortRange{Protocol: protocol, First: a, Last: b}, "", ""
}

// parsePort takes plain decimals only: ParseUint alone would take "+1".
func parsePort(s string) (uint32, bool) {
	if s == "" || len(s) > 5 || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil && n >= 1 && n <= maxPort
}

// formatPorts is the inverse of parsePorts.
func formatPorts(r *symbolonv1.PortRange) string {
	if r.GetFirst() == r.GetLast() {
		return fmt.Sprintf("%s/%d", r.GetProtocol(), r.GetFirst())
	}
	return fmt.Sprintf("%s/%d-%d", r.GetProtocol(), r.GetFirst(), r.GetLast())
}

func formatPortList(rs []*symbolonv1.PortRange) string {
	out := make([]string, len(rs))
	for i, r := range rs {
		out[i] = formatPorts(r)
	}
	return strings.Join(out, ", ")
}

func comparePorts(a, b *symbolonv1.PortRange) int {
	return cmp.Or(
		cmp.Compare(a.GetProtocol(), b.GetProtocol()),
		cmp.Compare(a.GetFirst(), b.GetFirst()),
		cmp.Compare(a.GetLast(), b.GetLast()),
	)
}

// sortPorts brings a list into its canonical order, without repetitions.
func sortPorts(rs []*symbolonv1.PortRange) []*symbolonv1.PortRange {
	slices.SortFunc(rs, comparePorts)
	return slices.CompactFunc(rs, func(a, b *symbolonv1.PortRange) bool { return comparePorts(a, b) == 0 })
}

func checkPorts(r *symbolonv1.PortRange) error {
	if !slices.Contains(protocols, r.GetProtocol()) || r.GetFirst() < 1 || r.GetFirst() > r.GetLast() || r.GetLast() > maxPort {
		return fmt.Errorf("%s is not a range of ports", printable(formatPorts(r)))
	}
	return nil
}

// portSet is a compiled list of ranges; empty means all ports of all protocols.
type portSet []portRange

type portRange struct {
	protocol    transport
	first, last uint16
}

// transport is a protocol that ports belong to, small and quick to compare.
type transport uint8

const (
	noTransport transport = iota // one without ports that policy knows
	tcp
	udp
)

func transportOf(protocol string) transport {
	switch protocol {
	case "tcp":
		return tcp
	case "udp":
		return udp
	}
	return noTransport
}

func compilePorts(rs []*symbolonv1.PortRange) (portSet, error) {
	var out portSet
	for _, r := range rs {
		if err := checkPorts(r); err != nil {
			return nil, err
		}
		out = append(out, portRange{transportOf(r.GetProtocol()), uint16(r.GetFirst()), uint16(r.GetLast())})
	}
	return out, nil
}

func (s portSet) contains(protocol transport, port uint16) bool {
	if len(s) == 0 {
		return true
	}
	for i := range s {
		if r := &s[i]; port >= r.first && port <= r.last && r.protocol == protocol {
			return true
		}
	}
	return false
}

// overlaps tells whether some port is in both.
func (s portSet) overlaps(t portSet) bool {
	if len(s) == 0 || len(t) == 0 {
		return true
	}
	for _, a := range s {
		for _, b := range t {
			if a.protocol == b.protocol && a.first <= b.last && b.first <= a.last {
				return true
			}
		}
	}
	return false
}
