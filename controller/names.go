package controller

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"connectrpc.com/connect"
	"github.com/symbolon/symbolon/identity"
)

// Bounds of what hosts and operators may name things.
const (
	maxLabels     = 32
	maxLabelKey   = 63
	maxLabelValue = 256

	maxAttributes     = 256
	maxAttributeKey   = 128
	maxAttributeValue = 1024
)

// assertable are the sources that a host may speak for, about its workloads.
var assertable = []string{"os.", "proc.", "container.", "k8s.", "image."}

// checkAttributes bounds what a host says, and refuses keys outside sources.
// Errors: permission_denied, invalid_argument.
func checkAttributes(attrs identity.Attributes, sources ...string) error {
	if len(attrs) > maxAttributes {
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%d attributes, the limit is %d", len(attrs), maxAttributes))
	}
	for _, a := range attrs {
		if len(a.Key) > maxAttributeKey || !printable(a.Key) || strings.ContainsAny(a.Key, " =") {
			return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("attribute key %.*q is malformed or longer than %d bytes", maxAttributeKey, a.Key, maxAttributeKey))
		}
		if !slices.ContainsFunc(sources, func(source string) bool { return strings.HasPrefix(a.Key, source) && len(a.Key) > len(source) }) {
			return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("attribute %s: a host may not assert it; only %s", a.Key, strings.Join(sources, "*, ")+"*"))
		}
		if len(a.Value) > maxAttributeValue || !printable(a.Value) {
			return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("attribute %s: a value is empty, malformed or longer than %d bytes", a.Key, maxAttributeValue))
		}
	}
	return nil
}

// checkLabels is for the labels of a join token, which become host.<key>.
func checkLabels(labels map[string]string) error {
	if len(labels) > maxLabels {
		return fmt.Errorf("%d labels, the limit is %d", len(labels), maxLabels)
	}
	for k, v := range labels {
		if len(k) > maxLabelKey || k == "" || strings.Trim(k, "abcdefghijklmnopqrstuvwxyz0123456789_-") != "" {
			return fmt.Errorf("label %q: a key has up to %d lower-case letters, digits, _ and -", k, maxLabelKey)
		}
		if k == hostIDLabel || k == spiffeIDLabel {
			return fmt.Errorf("label %q: host.%s is the host's own ID", k, k)
		}
		if len(v) > maxLabelValue || !printable(v) {
			return fmt.Errorf("label %s: the value is empty, malformed or longer than %d bytes", k, maxLabelValue)
		}
	}
	return nil
}

// printable also keeps terminal escapes out of what operators get to see.
func printable(s string) bool {
	return s != "" && utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
}

// validSAN tells whether a name can stand in a certificate: an address, or a DNS
// name of letters, digits and dashes.
func validSAN(name string) bool {
	if _, err := netip.ParseAddr(name); err == nil {
		return true
	}
	if len(name) > 253 {
		return false
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || strings.HasPrefix(label, "-") || strings.HasSuffix(label, "-") ||
			strings.Trim(strings.ToLower(label), "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			return false
		}
	}
	return true
}

// maxSANs bounds the addresses of a machine with very many interfaces.
const maxSANs = 64

// serverNames are the names and addresses that clients may dial: those advertised,
// the one listened on, or, where that is all of them, this machine's.
func serverNames(listen string, advertise []string) (names []string, addresses []net.IP) {
	add := func(name string) {
		if ip := net.ParseIP(name); ip != nil {
			if len(addresses) < maxSANs && !slices.ContainsFunc(addresses, ip.Equal) {
				addresses = append(addresses, ip)
			}
		} else if validSAN(name) && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	for _, name := range advertise {
		add(name)
	}
	add("localhost")
	add("127.0.0.1")
	add("::1")
	if hostname, err := os.Hostname(); err == nil {
		add(hostname)
	}
	host, _, _ := net.SplitHostPort(listen)
	if ip := net.ParseIP(host); host != "" && (ip == nil || !ip.IsUnspecified()) {
		add(host)
		return names, addresses
	}
	// Without the right to list interfaces, the certificate has the names above.
	all, _ := net.InterfaceAddrs()
	for _, a := range all {
		if n, ok := a.(*net.IPNet); ok {
			add(n.IP.String())
		}
	}
	return names, addresses
}
