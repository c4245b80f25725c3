package redirect

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"
)

func TestParsePorts(t *testing.T) {
	for _, c := range []struct {
		values []string
		want   string // of String
		err    string
	}{
		{[]string{"all"}, "all", ""},
		{nil, "", ""},
		{[]string{"5432", "8000-8100"}, "5432,8000-8100", ""},
		{[]string{"8100", " 1-65535 "}, "all", ""},
		{[]string{"80", "81", "79-80", "65535"}, "79-81,65535", ""},
		{[]string{"all", "22"}, "", "all stands alone"},
		{[]string{"0"}, "", `"0" is no port`},
		{[]string{"65536"}, "", `"65536" is no port`},
		{[]string{"1-70000"}, "", `"1-70000" is no port`},
		{[]string{""}, "", `"" is no port`},
		{[]string{"-5"}, "", `"-5" is no port`},
		{[]string{"5-"}, "", `"5-" is no port`},
		{[]string{"+5"}, "", `"+5" is no port`},
		{[]string{"1_0"}, "", `"1_0" is no port`},
		{[]string{"http"}, "", `"http" is no port`},
		{[]string{"9-8"}, "", `"9-8" runs backwards: write 8-9`},
		{[]string{"1-2-3"}, "", `"1-2-3" is no port`},
	} {
		got, err := ParsePorts("redirect.inbound_ports", c.values...)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) || !strings.HasPrefix(err.Error(), "redirect.inbound_ports: ") {
				t.Errorf("%q: error %v, want %q", c.values, err, c.err)
			}
			continue
		}
		if err != nil || got.String() != c.want {
			t.Errorf("%q: %q, %v; want %q", c.values, got, err, c.want)
		}
		var again PortSet
		if err := again.UnmarshalText([]byte(got.String())); err != nil || !again.Equal(got) {
			t.Errorf("%q is not read back: %v", got, err)
		}
	}
}

func TestPortsInYAML(t *testing.T) {
	for text, want := range map[string]string{
		"ports: all": "all", "ports: [5432, 8000-8100]": "5432,8000-8100", "ports: 22": "22", "ports: []": "", `ports: ["80"]`: "80",
	} {
		var got struct{ Ports PortSet }
		if err := yaml.Unmarshal([]byte(text), &got); err != nil || got.Ports.String() != want {
			t.Errorf("%s: %q, %v; want %q", text, got.Ports, err, want)
		}
	}
	for _, text := range []string{"ports: {a: 1}", "ports: [[1]]", "ports: some", "ports: [1.5]"} {
		var got struct{ Ports PortSet }
		if err := yaml.Unmarshal([]byte(text), &got); err == nil {
			t.Errorf("%s: read as %q", text, got.Ports)
		}
	}
}

func TestPortSetArithmetic(t *testing.T) {
	random := func() PortSet {
		var rs []PortRange
		for range rand.IntN(6) {
			first := uint16(rand.IntN(1 << 16))
			rs = append(rs, PortRange{first, first + uint16(rand.IntN(20000))}) // may wrap: empty
		}
		return Ports(append(rs, PortRange{65000, 65535}, PortRange{0, uint16(rand.IntN(3))})...)
	}
	for range 200 {
		a, b := random(), random()
		d, n := a.Minus(b), 0
		for p := range 1 << 16 {
			port := uint16(p)
			want := a.Contains(port) && !b.Contains(port)
			if d.Contains(port) != want {
				t.Fatalf("port %d in %v minus %v: %v", p, a, b, !want)
			}
			if want {
				n++
			}
		}
		if d.Len() != n {
			t.Fatalf("%v has length %d, not %d", d, d.Len(), n)
		}
	}
}

func TestParsePrefixes(t *testing.T) {
	got, err := ParsePrefixes("redirect.outbound", "0.0.0.0/0", " ::/0", "10.1.2.3/32")
	want := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0"), netip.MustParsePrefix("10.1.2.3/32")}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	for value, remedy := range map[string]string{
		"10.0.0.1":         "write 10.0.0.1/32",
		"fd00::1":          "write fd00::1/128",
		"10.0.0.1/8":       "write 10.0.0.0/8",
		"::ffff:1.2.3.0/8": "IPv4 form",
		"10.0.0.0/33":      "write it as address/length",
		"example.com":      "write it as address/length",
		"fe80::%eth0/10":   "write it as address/length",
		"":                 "write it as address/length",
	} {
		if _, err := ParsePrefixes("redirect.outbound", value); err == nil || !strings.Contains(err.Error(), remedy) || !strings.HasPrefix(err.Error(), "redirect.outbound: ") {
			t.Errorf("%q: error %v, want %q", value, err, remedy)
		}
	}
}

// An exclusion wins whatever the lengths, and the rest stays.
func TestSubtract(t *testing.T) {
	prefixes := func(s string) (ps []netip.Prefix) {
		for f := range strings.FieldsSeq(s) {
			ps = append(ps, netip.MustParsePrefix(f))
		}
		return ps
	}
	for _, c := range []struct{ from, minus, want string }{
		{"0.0.0.0/0", "", "0.0.0.0/0"},
		{"0.0.0.0/0", "128.0.0.0/1", "0.0.0.0/1"},
		{"10.0.0.0/30", "10.0.0.1/32", "10.0.0.0/32 10.0.0.2/31"},
		{"10.1.0.0/16", "10.0.0.0/8", ""},
		{"10.1.0.0/16 10.0.0.0/8 10.0.0.0/8", "", "10.0.0.0/8"},
		{"::/0", "8000::/1 ::/2", "4000::/2"},
		{"fd00::/127", "fd00::1/128", "fd00::/128"},
	} {
		if diff := cmp.Diff(prefixes(c.want), subtract(prefixes(c.from), prefixes(c.minus)), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
			t.Errorf("%s minus %s: %s", c.from, c.minus, diff)
		}
	}
	// Against the definition, on random networks of a small space.
	random := func(n int) (ps []netip.Prefix) {
		for range rand.IntN(n) {
			ps = append(ps, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(rand.IntN(4)), byte(rand.IntN(256))}), 20+rand.IntN(13)).Masked())
		}
		return ps
	}
	in := func(ps []netip.Prefix, a netip.Addr) int {
		n := 0
		for _, p := range ps {
			if p.Contains(a) {
				n++
			}
		}
		return n
	}
	for range 300 {
		from, minus := random(5), random(6)
		got := subtract(from, minus)
		for i := range 1 << 12 {
			a := netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
			want := 0
			if in(from, a) > 0 && in(minus, a) == 0 {
				want = 1
			}
			if in(got, a) != want {
				t.Fatalf("%v minus %v = %v: holds %v %d times, not %d", from, minus, got, a, in(got, a), want)
			}
		}
	}
}

func TestConfigValidate(t *testing.T) {
	bad := DefaultConfig()
	bad.InboundPort = bad.OutboundPort
	bad.Backend = "ebtables"
	bad.Outbound = []netip.Prefix{netip.MustParsePrefix("10.0.0.1/8"), {}}
	err := bad.Validate()
	for _, part := range []string{"both listeners have port 15001", `redirect.backend: "ebtables"`, "redirect.outbound: 10.0.0.1/8 has bits set beyond its length: write 10.0.0.0/8", "redirect.outbound: invalid network"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("error %v lacks %q", err, part)
		}
	}
	if err := DefaultConfig().Validate(); err != nil {
		t.Error(err)
	}
	if _, err := NewRules(bad); err == nil {
		t.Error("NewRules took a bad configuration")
	}
}

func TestListenersAreNeverProtectedPorts(t *testing.T) {
	cfg := DefaultConfig()
	cfg.OutboundPort = 4000
	got := cfg.withDefaults().protectedPorts()
	if want := "1-21,23-3999,4001-15005,15007-65535"; got.String() != want {
		t.Errorf("protected %v, want %v", got, want)
	}
	if got := cfg.intercepted(true); len(got) != 2 || got[0].String() != "0.0.0.0/1" || got[1].String() != "128.0.0.0/1" {
		t.Errorf("0.0.0.0/0 becomes %v: hash:net holds no /0", got)
	}
}

func TestGoesTo(t *testing.T) {
	for rule, want := range map[string]bool{
		"-j SYMBOLON_OUT": true, "-p tcp -g SYMBOLON_OUT": true, "-j RETURN": false, "-j SYMBOLON_OUT2": false,
		`-m comment --comment "-j SYMBOLON_OUT" -j RETURN`: false, "": false, "SYMBOLON_OUT": false,
	} {
		if goesTo(rule, "SYMBOLON_OUT") != want {
			t.Errorf("%q: %v", rule, !want)
		}
	}
}
