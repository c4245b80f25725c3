package redirect

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Where the answers to a preserved client address go: by their mark into a table of
// our own, which says that every address is here.
const (
	answerTable    = 0x4d00 // 19712
	answerPriority = 77     // behind the local table, before everybody else's
)

// answerRoute is what the table holds for one family.
func answerRoute(f family, lo int) *netlink.Route {
	everything := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if f.inet == "inet6" {
		everything = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return &netlink.Route{
		LinkIndex: lo, Dst: everything, Table: answerTable,
		Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST, Family: f.netlink(),
	}
}

func answerRule(f family) *netlink.Rule {
	rule := netlink.NewRule()
	mask := ^uint32(0)
	rule.Family, rule.Table, rule.Priority = f.netlink(), answerTable, answerPriority
	rule.Mark, rule.Mask = markAnswer, &mask
	return rule
}

func (f family) netlink() int {
	if f.inet == "inet6" {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// applyRoutes loads rules and routes where PreserveSource asks for them, and takes
// them out where it does not. The route is there before the rule.
func (r *Rules) applyRoutes() error {
	if !r.cfg.PreserveSource {
		return removeRoutes()
	}
	drift, err := r.routeDrift()
	if err != nil || len(drift) == 0 {
		return err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("policy routing: %w", err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("policy routing: find the loopback interface: %w", err)
	}
	for _, f := range r.families {
		if err := h.RouteReplace(answerRoute(f, lo.Attrs().Index)); err != nil {
			return fmt.Errorf("redirect.preserve_source: add the %s route 'local default dev lo table %d' (is the interface lo up?): %w", f.name, answerTable, err)
		}
		rules, err := answerRules(h, f)
		if err != nil {
			return err
		}
		right := false
		for i := range rules {
			if right = right || isAnswerRule(&rules[i]); !isAnswerRule(&rules[i]) {
				if err := h.RuleDel(&rules[i]); err != nil && !errors.Is(err, unix.ENOENT) {
					return fmt.Errorf("policy routing: remove %s rule %v: %w", f.name, rules[i], err)
				}
			}
		}
		if right {
			continue
		}
		if err := h.RuleAdd(answerRule(f)); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("redirect.preserve_source: add %s rule 'fwmark %#x lookup %d': %w", f.name, markAnswer, answerTable, err)
		}
	}
	return nil
}

// answerRules are all that lead into our table, whoever made them.
func answerRules(h *netlink.Handle, f family) ([]netlink.Rule, error) {
	rules, err := h.RuleListFiltered(f.netlink(), &netlink.Rule{Table: answerTable}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("policy routing: list %s rules: %w", f.name, err)
	}
	return rules, nil
}

func isAnswerRule(rule *netlink.Rule) bool {
	return rule.Mark == markAnswer && (rule.Mask == nil || *rule.Mask == ^uint32(0)) && rule.Priority == answerPriority &&
		rule.Src == nil && rule.Dst == nil && rule.IifName == "" && rule.OifName == "" && !rule.Invert && rule.IPProto == 0
}

// routeDrift says how policy routing differs from what PreserveSource needs.
func (r *Rules) routeDrift() ([]string, error) {
	if !r.cfg.PreserveSource {
		return nil, nil
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("policy routing: %w", err)
	}
	defer h.Close()
	var found []string
	for _, f := range r.families {
		rules, err := answerRules(h, f)
		if err != nil {
			return nil, err
		}
		if len(rules) != 1 || !isAnswerRule(&rules[0]) {
			found = append(found, fmt.Sprintf("%s routing: there is no single rule 'fwmark %#x lookup %d' of priority %d, but %d others", f.name, markAnswer, answerTable, answerPriority, len(rules)))
		}
		routes, err := h.RouteListFiltered(f.netlink(), &netlink.Route{Table: answerTable}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, fmt.Errorf("policy routing: list %s routes: %w", f.name, err)
		}
		if len(routes) != 1 || routes[0].Type != unix.RTN_LOCAL || !isDefault(routes[0].Dst) {
			found = append(found, fmt.Sprintf("%s routing: table %d is not 'local default dev lo'", f.name, answerTable))
		}
	}
	return found, nil
}

// isDefault: the kernel says nothing of a destination that is everything.
func isDefault(dst *net.IPNet) bool {
	if dst == nil {
		return true
	}
	ones, _ := dst.Mask.Size()
	return ones == 0
}

// removeRoutes takes out the rules, then the table, of both families.
func removeRoutes() error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("policy routing: %w", err)
	}
	defer h.Close()
	var errs []error
	for _, f := range []family{{name: "IPv4", inet: "inet"}, {name: "IPv6", inet: "inet6"}} {
		rules, err := answerRules(h, f)
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
			continue // no such family in this kernel
		}
		if err != nil {
			return err
		}
		for i := range rules {
			if err := h.RuleDel(&rules[i]); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("policy routing: remove %s rule: %w", f.name, err))
			}
		}
		routes, err := h.RouteListFiltered(f.netlink(), &netlink.Route{Table: answerTable}, netlink.RT_FILTER_TABLE)
		if err != nil {
			errs = append(errs, fmt.Errorf("policy routing: list %s routes: %w", f.name, err))
		}
		for i := range routes {
			if err := h.RouteDel(&routes[i]); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, fmt.Errorf("policy routing: remove %s route: %w", f.name, err))
			}
		}
	}
	return errors.Join(errs...)
}
