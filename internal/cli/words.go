package cli

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// word writes an enum value as people do: REASON_PEER_UNPROTECTED is
// "peer-unprotected", UNSPECIFIED is "". A value that this build does not know is
// its number.
func word(e protoreflect.Enum) string {
	values := e.Descriptor().Values()
	v := values.ByNumber(e.Number())
	if v == nil {
		return strconv.Itoa(int(e.Number()))
	}
	prefix := strings.TrimSuffix(string(values.ByNumber(0).Name()), "UNSPECIFIED")
	name := strings.TrimPrefix(string(v.Name()), prefix)
	if name == "UNSPECIFIED" {
		return ""
	}
	return strings.ToLower(strings.ReplaceAll(name, "_", "-"))
}

// attributes writes "k=v k=v1,v2", sorted by key.
func attributes(m map[string]*symbolonv1.LabelValues) string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		parts = append(parts, k+"="+strings.Join(m[k].GetValues(), ","))
	}
	return strings.Join(parts, " ")
}

// labels keeps of attributes what Profiles gave: the keys without a source.
func labels(m map[string]*symbolonv1.LabelValues) map[string]*symbolonv1.LabelValues {
	out := map[string]*symbolonv1.LabelValues{}
	for k, v := range m {
		if !strings.Contains(k, ".") {
			out[k] = v
		}
	}
	return out
}

// ago is a distance in time as people say it: "3m ago", "in 23h".
func ago(now time.Time, ts *timestamppb.Timestamp) string {
	if ts == nil {
		return ""
	}
	d := now.Sub(ts.AsTime())
	if d < 0 {
		return "in " + span(-d)
	}
	if d < time.Second {
		return "now"
	}
	return span(d) + " ago"
}

// span keeps one unit: nobody needs the seconds of days.
func span(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	case d < 2*365*24*time.Hour:
		return fmt.Sprintf("%dd", int(d.Hours()/24))
	default:
		return fmt.Sprintf("%dy", int(d.Hours()/24/365))
	}
}

// absolute is RFC 3339 in the operator's time zone.
func absolute(loc *time.Location, ts *timestamppb.Timestamp) string {
	if ts == nil {
		return ""
	}
	return ts.AsTime().In(loc).Format(time.RFC3339)
}

// size is in bytes, with binary units.
func size(n uint64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return strconv.FormatUint(n, 10) + "B"
	}
	f, i := float64(n)/1024, 0
	for f >= 1024 && i < len(units)-1 {
		f /= 1024
		i++
	}
	return fmt.Sprintf("%.1f%ciB", f, units[i])
}

// shortID drops scheme and trust domain: what is left is namespace and workload.
func shortID(id string) string {
	rest, ok := strings.CutPrefix(id, "spiffe://")
	if !ok {
		return id
	}
	if i := strings.IndexByte(rest, '/'); i >= 0 {
		return rest[i:]
	}
	return id
}
