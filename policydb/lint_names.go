package policydb

import (
	"fmt"
	"slices"
	"strings"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

// privateZones are ends of names that public DNS does not have (RFC 6762, RFC 8375, ICANN's
// .internal, and what companies use without asking): their addresses are private.
var privateZones = []string{"internal", "local", "localdomain", "lan", "intranet", "corp", "home", "private", "home.arpa"}

// written is an address of an External or a Service that lint holds against others: a
// network or a name, as it is written.
type written struct {
	by    *symbolonv1.Resource
	text  string
	path  []any
	ports portSet
}

// places are all of the set, by what is written; those with broken ports are left out,
// since the checks of an apply tell of them.
func (l *linter) places(kind string) map[string][]written {
	out := make(map[string][]written)
	for _, r := range l.snapshot.List(kind, "/") {
		a := addressesOf(r)
		ports, err := compilePorts(a.GetPorts())
		if err != nil {
			continue
		}
		for key, texts := range map[string][]string{"cidrs": a.GetCidrs(), "fqdns": a.GetFqdns()} {
			for _, text := range texts {
				same := text
				if p, m := parsePrefix(text); m == nil {
					same = p.String()
				}
				out[same] = append(out[same], written{r, text, []any{"addresses", key, text}, ports})
			}
		}
	}
	return out
}

// outside looks at the Externals, and at what each takes from another.
func (l *linter) outside() {
	externals, services := l.places(KindExternal), l.places(KindService)
	for _, text := range sortedKeys(externals) {
		for _, x := range externals[text] {
			if !within(x.by.GetNamespace(), l.namespace) {
				continue
			}
			l.taken(x, externals[text], services[text])
			if !strings.Contains(text, "/") {
				l.name(x)
				l.overlap(x, externals)
			}
		}
	}
}

// taken tells of an address that another resource always comes before: the same one of a
// namespace above, or of a Service.
func (l *linter) taken(x written, externals, services []written) {
	for _, o := range slices.Concat(services, externals) {
		ns, above := x.by.GetNamespace(), o.by.GetNamespace()
		service := o.by.GetService() != nil
		if !within(ns, above) || ns == above && !service || !o.ports.covers(x.ports) {
			continue
		}
		why := "which is nearer to the root"
		if service {
			why = "and a Service comes before an External"
		}
		l.add(LintShadowed, lintWarning, x.by, KeyOf(o.by), x.path, "take it out of one of them",
			"%s is never this External's: %s has it too, on all of its ports, %s", x.text, KeyOf(o.by), why)
		return
	}
}

// covers tells whether every port of o is one of s, range by range.
func (s portSet) covers(o portSet) bool {
	if len(s) == 0 {
		return true
	}
	return len(o) > 0 && !slices.ContainsFunc(o, func(r portRange) bool {
		return !slices.ContainsFunc(s, func(x portRange) bool { return x.protocol == r.protocol && x.first <= r.first && r.last <= x.last })
	})
}

// name looks at a name by itself.
func (l *linter) name(x written) {
	suffix, wild := strings.CutPrefix(x.text, "*.")
	onTCP := len(x.ports) == 0 || slices.ContainsFunc(x.ports, func(r portRange) bool { return r.protocol == tcp })
	switch expects := addressesOf(x.by).GetPrivate(); {
	case wild && !onTCP:
		l.add(LintNeverMatches, lintError, x.by, Key{}, x.path, "name each name, or add TCP ports",
			"%s can never match: a wildcard goes by the name that a TLS client asks for, and there are UDP ports only", x.text)
	case wild && expects:
		l.add(LintPrivateName, lintWarning, x.by, Key{}, x.path, "name each name, or write the networks under cidrs",
			"whoever answers for any name below %s can lead to any private address that is no host's and no Service's", suffix)
	case !wild && !strings.Contains(x.text, "."):
		l.add(LintBareName, lintWarning, x.by, Key{}, x.path, "write the whole name",
			"%s is looked up as it stands: search domains and /etc/hosts do not count", printable(x.text))
	case !expects && slices.ContainsFunc(privateZones, func(zone string) bool { return strings.HasSuffix(suffix, "."+zone) }):
		l.add(LintPrivateName, lintWarning, x.by, Key{}, x.path, `add "private: true" to addresses, if that is meant`,
			"names such as %s have private addresses, for which it does not count", x.text)
	}
}

// overlap tells of a name that is below another External's wildcard and takes its place:
// policies on the other's labels do not speak of it.
func (l *linter) overlap(x written, externals map[string][]written) {
	for suffix := strings.TrimPrefix(x.text, "*."); ; {
		var ok bool
		if _, suffix, ok = strings.Cut(suffix, "."); !ok {
			return
		}
		for _, o := range externals["*."+suffix] {
			ns, other := x.by.GetNamespace(), o.by.GetNamespace()
			if x.by == o.by || !within(ns, other) && !within(other, ns) || !o.ports.overlaps(x.ports) {
				continue
			}
			if lost := labelsBeyond(o.by, x.by); lost != "" {
				l.add(LintOverlappingNames, lintWarning, x.by, KeyOf(o.by), x.path, "give both the labels that are meant for both",
					"it takes %s out of %s, which has *.%s: policies on %s do not speak of it", x.text, KeyOf(o.by), suffix, lost)
				return
			}
		}
	}
}

// labelsBeyond is the first label of one External that another does not have.
func labelsBeyond(one, other *symbolonv1.Resource) string {
	has := identity.AttributesFromProto(other.GetExternal().GetLabels())
	for _, a := range identity.AttributesFromProto(one.GetExternal().GetLabels()) {
		if !slices.Contains(has, a) {
			return fmt.Sprintf("%s: %s", a.Key, printable(a.Value))
		}
	}
	return ""
}
