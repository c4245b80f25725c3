package redirect

import (
	"fmt"
	"slices"
	"strings"
)

// savedTable is one table in iptables-save's form.
type savedTable struct {
	chains []string            // in order
	rules  map[string][]string // by chain: the rule's text behind "-A CHAIN "
}

// parseSaved reads the output of iptables-save for one table. Comments, counters
// and policies are dropped.
func parseSaved(out string) savedTable {
	t := savedTable{rules: map[string][]string{}}
	for line := range strings.Lines(out) {
		line = strings.TrimRight(line, "\n")
		switch {
		case strings.HasPrefix(line, ":"):
			name, _, _ := strings.Cut(line[1:], " ")
			t.chains = append(t.chains, name)
		case strings.HasPrefix(line, "-A "):
			chain, rule, _ := strings.Cut(line[len("-A "):], " ")
			t.rules[chain] = append(t.rules[chain], rule)
		}
	}
	return t
}

func (t savedTable) has(chain string) bool { return slices.Contains(t.chains, chain) }

// goesTo says whether a rule's target is the given chain. Ours never carries
// options behind the target, but somebody else's comment may.
func goesTo(rule, chain string) bool {
	fields := strings.Fields(rule)
	for i := len(fields) - 2; i >= 0; i-- {
		if fields[i] == "-j" || fields[i] == "-g" {
			return fields[i+1] == chain
		}
	}
	return false
}

// jumps are the restore lines that delete every rule, in whatever foreign chain,
// that leads into chain: exactly as many as there are, since a deletion that finds
// nothing aborts the whole table.
func (t savedTable) deleteJumps(chain string) []string {
	var lines []string
	for _, from := range t.chains {
		for _, rule := range t.rules[from] {
			if !isOurs(from) && goesTo(rule, chain) {
				lines = append(lines, "-D "+from+" "+rule)
			}
		}
	}
	return lines
}

// drift says how the table differs from what was loaded: a chain with other
// rules, a jump that is missing, doubled, or not the first rule of its chain.
func (t savedTable) drift(family, table string, want []chain) []string {
	var found []string
	say := func(format string, args ...any) {
		found = append(found, fmt.Sprintf("%s %s: ", family, table)+fmt.Sprintf(format, args...))
	}
	for _, c := range want {
		if !t.has(c.name) {
			say("chain %s is missing", c.name)
			continue
		}
		have := t.rules[c.name]
		if n := len(have); n != len(c.rules) {
			say("chain %s has %d rules, not %d", c.name, n, len(c.rules))
		} else {
			for i, rule := range c.rules {
				if canonical(have[i]) != canonical(rule) {
					say("rule %d of chain %s is %q, not %q", i+1, c.name, have[i], rule)
				}
			}
		}
		first, count := -1, 0
		for i, rule := range t.rules[c.hook] {
			if goesTo(rule, c.name) {
				if count++; first < 0 {
					first = i
				}
			}
		}
		switch {
		case count == 0:
			say("%s does not jump to %s", c.hook, c.name)
		case first > 0:
			say("%s is not the first rule of %s: %q comes before it", c.name, c.hook, t.rules[c.hook][0])
		case count > 1 || t.rules[c.hook][0] != "-j "+c.name:
			say("%s jumps to %s %d times, first by %q", c.hook, c.name, count, t.rules[c.hook][0])
		}
	}
	return found
}

// canonical evens out how a rule is written by us and printed by iptables-save.
func canonical(rule string) string {
	return strings.ReplaceAll(rule, "--tcp-flags FIN,SYN,RST,ACK SYN", "--syn")
}
