package controller

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/reflect/protoreflect"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// Bounds of the texts in a flow record, bytes. The longest that means something is a
// SPIFFE ID.
const (
	maxFlowText   = 2048
	maxFlowDetail = 512
)

// takeFlow makes a record that a host sent fit to be shown, or says why it is
// refused: a host is no witness of what happens outside of its namespace. Its own end
// must stand there, or have no identity at all; the other end is what it says it
// verified.
func takeFlow(r *symbolonv1.FlowRecord, host *hostRecord, td spiffeid.TrustDomain) error {
	ends := []*symbolonv1.FlowEndpoint{r.GetSource(), r.GetDestination()}
	var own []*symbolonv1.FlowEndpoint
	switch r.GetReporter() {
	case symbolonv1.Reporter_REPORTER_CLIENT:
		own = ends[:1]
	case symbolonv1.Reporter_REPORTER_SERVER:
		own = ends[1:]
	case symbolonv1.Reporter_REPORTER_LOCAL:
		own = ends
	default:
		return fmt.Errorf("reporter %v", r.GetReporter())
	}
	for _, e := range ends {
		if err := checkFlowEnd(e); err != nil {
			return err
		}
	}
	for _, e := range own {
		if err := checkOwnEnd(e, host, td); err != nil {
			return err
		}
	}
	// One that protojson cannot write would end every watch that is in JSON.
	if t := r.GetStart(); t != nil && !t.IsValid() {
		return errors.New("start is no time")
	}
	if t := r.GetEnd(); t != nil && !t.IsValid() {
		return errors.New("end is no time")
	}
	r.Host = host.ID // whatever it says: a host reports as itself
	if !plainFlow(r) {
		cleanFlow(r.ProtoReflect())
	}
	return nil
}

// checkFlowEnd: namespace and workload are the two halves of the SPIFFE ID's path.
// An end without them is a host, or nobody known.
func checkFlowEnd(e *symbolonv1.FlowEndpoint) error {
	if e.GetNamespace() == "" && e.GetWorkload() == "" {
		return nil
	}
	id, err := spiffeid.FromString(e.GetSpiffeId())
	if err != nil || id.Path() != strings.TrimSuffix(e.GetNamespace(), "/")+"/"+e.GetWorkload() {
		return fmt.Errorf("%.200q is not the SPIFFE ID of workload %.200q in namespace %.200q", e.GetSpiffeId(), e.GetWorkload(), e.GetNamespace())
	}
	return nil
}

func checkOwnEnd(e *symbolonv1.FlowEndpoint, host *hostRecord, td spiffeid.TrustDomain) error {
	if e.GetSpiffeId() == "" {
		return nil
	}
	id, err := spiffeid.FromString(e.GetSpiffeId())
	switch {
	case err != nil || e.GetNamespace() == "":
	case within(e.GetNamespace(), host.Namespace):
		return nil
	case !id.MemberOf(td):
		// A path of SPIRE's (identity.source) need not be one of our namespaces: its
		// records are the host's, and stand with it.
		e.Namespace = host.Namespace
		return nil
	}
	return fmt.Errorf("%.200q is not of the host's namespace %s", e.GetSpiffeId(), host.Namespace)
}

// cleanFlow clips every text in a message, and takes out what could steer a
// terminal: a stranger may have chosen it.
func cleanFlow(m protoreflect.Message) {
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		most := maxFlowText
		if fd.Name() == "detail" {
			most = maxFlowDetail
		}
		switch {
		case fd.IsMap():
			cleanMap(fd, v.Map())
		case fd.IsList() && fd.Kind() == protoreflect.StringKind:
			l := v.List()
			for i := range l.Len() {
				cleaned(l.Get(i), most, func(v protoreflect.Value) { l.Set(i, v) })
			}
		case fd.IsList() && fd.Message() != nil:
			for i := range v.List().Len() {
				cleanFlow(v.List().Get(i).Message())
			}
		case fd.IsList():
		case fd.Kind() == protoreflect.StringKind:
			cleaned(v, most, func(v protoreflect.Value) { m.Set(fd, v) })
		case fd.Message() != nil:
			cleanFlow(v.Message())
		}
		return true
	})
}

// cleanMap drops what has a key that is not clean: made clean, it might be another's.
func cleanMap(fd protoreflect.FieldDescriptor, m protoreflect.Map) {
	m.Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
		switch {
		case fd.MapKey().Kind() == protoreflect.StringKind && cleanText(k.String(), maxFlowText) != k.String():
			m.Clear(k)
		case fd.MapValue().Kind() == protoreflect.StringKind:
			cleaned(v, maxFlowText, func(v protoreflect.Value) { m.Set(k, v) })
		case fd.MapValue().Message() != nil:
			cleanFlow(v.Message())
		}
		return true
	})
}

// cleaned sets a text again only if it was not clean: most are, and setting allocates.
func cleaned(v protoreflect.Value, most int, set func(protoreflect.Value)) {
	if clean := cleanText(v.String(), most); clean != v.String() {
		set(protoreflect.ValueOfString(clean))
	}
}

// cleanText is s in UTF-8, printable, and of most bytes.
func cleanText(s string, most int) string {
	const more = "…"
	if len(s) > most {
		end := most - len(more)
		for end > 0 && !utf8.RuneStart(s[end]) {
			end--
		}
		s = s[:end] + more
	}
	if s == "" || printable(s) {
		return s
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?' // not longer than what it replaces
	}, strings.ToValidUTF8(s, "?"))
}
