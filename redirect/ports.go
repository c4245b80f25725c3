package redirect

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// PortRange is a range of TCP ports, both ends included.
type PortRange struct{ First, Last uint16 }

// String gives the form that ParsePorts reads: 5432 or 8000-8100.
func (r PortRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// PortSet is a set of TCP ports. The zero value is empty. It reads and writes the
// configuration's forms: the word all, one port, one range, or a list of these.
type PortSet struct{ ranges []PortRange } // sorted, disjoint, not adjacent

// AllPorts is every port that a connection can name: 1 to 65535.
func AllPorts() PortSet { return PortSet{[]PortRange{{1, 65535}}} }

// Ports is the set of the given ranges. A range whose First is greater than its
// Last is empty.
func Ports(ranges ...PortRange) PortSet {
	rs := slices.DeleteFunc(slices.Clone(ranges), func(r PortRange) bool { return r.First > r.Last })
	slices.SortFunc(rs, func(a, b PortRange) int { return cmp.Compare(a.First, b.First) })
	var out []PortRange
	for _, r := range rs {
		if n := len(out); n > 0 && int(r.First) <= int(out[n-1].Last)+1 {
			out[n-1].Last = max(out[n-1].Last, r.Last)
			continue
		}
		out = append(out, r)
	}
	return PortSet{out}
}

// Ranges gives the set as sorted ranges that neither overlap nor touch.
func (s PortSet) Ranges() []PortRange { return slices.Clone(s.ranges) }

// Len is the number of ports in the set.
func (s PortSet) Len() int {
	n := 0
	for _, r := range s.ranges {
		n += int(r.Last) - int(r.First) + 1
	}
	return n
}

// Contains says whether port is in the set.
func (s PortSet) Contains(port uint16) bool {
	return slices.ContainsFunc(s.ranges, func(r PortRange) bool { return r.First <= port && port <= r.Last })
}

// Minus is the set without the ports of other.
func (s PortSet) Minus(other PortSet) PortSet {
	var out []PortRange
	for _, r := range s.ranges {
		next := int(r.First) // int: may step past 65535
		for _, o := range other.ranges {
			if int(o.Last) < next || o.First > r.Last {
				continue
			}
			if int(o.First) > next {
				out = append(out, PortRange{uint16(next), o.First - 1})
			}
			next = int(o.Last) + 1
		}
		if next <= int(r.Last) {
			out = append(out, PortRange{uint16(next), r.Last})
		}
	}
	return PortSet{out}
}

// Equal says whether both sets hold the same ports.
func (s PortSet) Equal(other PortSet) bool { return slices.Equal(s.ranges, other.ranges) }

// String gives the set in the form that ParsePorts reads, separated by commas.
func (s PortSet) String() string {
	if s.Equal(AllPorts()) {
		return "all"
	}
	parts := make([]string, len(s.ranges))
	for i, r := range s.ranges {
		parts[i] = r.String()
	}
	return strings.Join(parts, ",")
}

// MarshalText writes the form of String, for flags.
func (s PortSet) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads "all" or ports and ranges separated by commas; empty text is
// the empty set.
func (s *PortSet) UnmarshalText(text []byte) error {
	var values []string
	if len(text) > 0 {
		values = strings.Split(string(text), ",")
	}
	set, err := ParsePorts("ports", values...)
	if err == nil {
		*s = set
	}
	return err
}

// UnmarshalYAML reads the configuration file's forms: all, 5432, 8000-8100, or a
// list of the latter two.
func (s *PortSet) UnmarshalYAML(unmarshal func(any) error) error {
	var values []string
	if err := unmarshal(&values); err != nil {
		var one string
		if unmarshal(&one) != nil {
			return fmt.Errorf("ports: want all or a list such as [5432, 8000-8100]: %w", err)
		}
		values = []string{one}
	}
	set, err := ParsePorts("ports", values...)
	if err == nil {
		*s = set
	}
	return err
}

// ParsePorts reads ports as the configuration writes them: the single value "all",
// or any number of ports (5432) and ranges (8000-8100). The place, for example
// "redirect.inbound_ports", begins every error.
func ParsePorts(place string, values ...string) (PortSet, error) {
	if len(values) == 1 && values[0] == "all" {
		return AllPorts(), nil
	}
	ranges := make([]PortRange, 0, len(values))
	for _, v := range values {
		v = strings.TrimSpace(v)
		if v == "all" {
			return PortSet{}, fmt.Errorf("%s: all stands alone: write %q, or list the ports without it", place, "all")
		}
		first, last, isRange := strings.Cut(v, "-")
		if !isRange {
			last = first
		}
		a, err := parsePort(place, v, first)
		if err != nil {
			return PortSet{}, err
		}
		b, err := parsePort(place, v, last)
		if err != nil {
			return PortSet{}, err
		}
		if a > b {
			return PortSet{}, fmt.Errorf("%s: %q runs backwards: write %d-%d", place, v, b, a)
		}
		ranges = append(ranges, PortRange{a, b})
	}
	return Ports(ranges...), nil
}

func parsePort(place, value, digits string) (uint16, error) {
	for _, c := range digits {
		if c < '0' || c > '9' { // ParseUint would take a sign or an underscore
			return 0, fmt.Errorf("%s: %q is no port: write a number from 1 to 65535, a range such as 8000-8100, or all", place, value)
		}
	}
	n, err := strconv.ParseUint(digits, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%s: %q is no port: write a number from 1 to 65535, a range such as 8000-8100, or all", place, value)
	}
	return uint16(n), nil
}
