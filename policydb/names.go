package policydb

import (
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/symbolon/symbolon/identity"
)

// Limits on names. A SPIFFE ID is at most 2048 bytes (SPIFFE-ID section 2.4); the
// path is the namespace and the workload's name.
const (
	maxNamespaceDepth = 10
	maxNamespaceBytes = 255
	maxNameBytes      = 128
	maxKeyBytes       = 128
	// maxValueBytes bounds one attribute value; all claims together are 4 KiB.
	maxValueBytes = 1024
)

// UnprofiledPrefix starts the names of workloads that no Profile names; no
// Profile may use it.
const UnprofiledPrefix = "unprofiled."

// sources are the first elements of dotted keys: who vouches for the value.
var sources = []string{"host", "cloud", "os", "proc", "container", "k8s", "image", "vuln", "spiffe"}

// mistake is what is wrong and what to write instead.
type mistake struct{ message, hint string }

func wrong(hint, format string, args ...any) *mistake {
	return &mistake{fmt.Sprintf(format, args...), hint}
}

// checkNamespacePath: absolute, elements of [a-z0-9][a-z0-9._-]*, at most 10 deep
// and 255 bytes, not below /symbolon, which is for hosts and controllers.
func checkNamespacePath(path string) *mistake {
	if path == "/" {
		return nil
	}
	if !strings.HasPrefix(path, "/") {
		return wrong("write \"/"+strings.Trim(path, "/")+"\"", "namespace %s does not start with /", printable(path))
	}
	if strings.HasSuffix(path, "/") {
		return wrong("write \""+strings.TrimRight(path, "/")+"\"", "namespace %s ends in /", printable(path))
	}
	if len(path) > maxNamespaceBytes {
		return wrong("", "namespace is %d bytes long, at most %d are allowed", len(path), maxNamespaceBytes)
	}
	elements := strings.Split(path[1:], "/")
	if len(elements) > maxNamespaceDepth {
		return wrong("", "namespace %s is %d deep, at most %d are allowed", printable(path), len(elements), maxNamespaceDepth)
	}
	for _, e := range elements {
		if !isName(e) {
			return wrong("elements are of lower case letters, digits, '.', '_' and '-', and start with a letter or digit",
				"namespace element %s has a form that is not allowed", printable(e))
		}
	}
	if elements[0] == identity.ReservedPath {
		return wrong("", "/%s is reserved for hosts and controllers", identity.ReservedPath)
	}
	return nil
}

func checkName(name string) *mistake {
	switch {
	case name == "":
		return wrong("", "the name is empty")
	case len(name) > maxNameBytes:
		return wrong("", "the name is %d bytes long, at most %d are allowed", len(name), maxNameBytes)
	case !isName(name):
		return wrong("names are of lower case letters, digits, '.', '_' and '-', and start with a letter or digit",
			"name %s has a form that is not allowed", printable(name))
	}
	return nil
}

// isName tells whether s is [a-z0-9][a-z0-9._-]*.
func isName(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		alnum := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || c != '.' && c != '_' && c != '-') {
			return false
		}
	}
	return s != ""
}

// checkWorkloadName: one segment of a SPIFFE ID's path (SPIFFE-ID section 2.2).
func checkWorkloadName(name string) *mistake {
	switch {
	case len(name) > maxNameBytes:
		return wrong("", "workload is %d bytes long, at most %d are allowed", len(name), maxNameBytes)
	case name == "." || name == ".." || !isSegment(name):
		return wrong("letters, digits, '.', '_' and '-'", "workload %s cannot be part of a SPIFFE ID", printable(name))
	case strings.HasPrefix(name, UnprofiledPrefix):
		return wrong("", "workload names that start with %q are for workloads without a profile", UnprofiledPrefix)
	}
	return nil
}

func isSegment(s string) bool {
	for i := 0; i < len(s); i++ {
		if !isSegmentByte(s[i]) {
			return false
		}
	}
	return s != ""
}

func isSegmentByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-'
}

// isLabel tells plain keys, which Profiles give, from dotted ones, which have a
// source.
func isLabel(key string) bool { return !strings.Contains(key, ".") }

// checkAttributeKey checks the form, and the source of a dotted key. Whether a
// label is in the vocabulary is another question (vocabulary.go).
func checkAttributeKey(key string) *mistake {
	switch {
	case key == "":
		return wrong("", "the attribute key is empty")
	case len(key) > maxKeyBytes:
		return wrong("", "the attribute key is %d bytes long, at most %d are allowed", len(key), maxKeyBytes)
	}
	source, rest, dotted := strings.Cut(key, ".")
	if !dotted {
		return checkLabelKey(key)
	}
	if !slices.Contains(sources, source) {
		return wrong(didYouMeanKey(source, rest), "unknown attribute source %s in key %s", printable(source), printable(key))
	}
	if rest == "" || strings.Trim(rest, keyBytes) != "" {
		return wrong("after the source: letters, digits, '.', '_', '-' and '/'", "attribute key %s has a form that is not allowed", printable(key))
	}
	return nil
}

const keyBytes = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-/"

func didYouMeanKey(source, rest string) string {
	if n := nearest(source, sources); n != "" {
		return "did you mean \"" + n + "." + rest + "\"?"
	}
	return "labels have no dot; dotted keys start with one of " + strings.Join(sources, ", ")
}

func checkLabelKey(key string) *mistake {
	first := key[0]
	letter := first >= 'a' && first <= 'z' || first >= 'A' && first <= 'Z'
	if !letter || len(key) > maxKeyBytes || !isSegment(key) || strings.Contains(key, ".") {
		return wrong("labels are of letters, digits, '_' and '-', and start with a letter",
			"label %s has a form that is not allowed", printable(key))
	}
	return nil
}

// checkValue: what a claim and a log line can carry.
func checkValue(value string) *mistake {
	switch {
	case len(value) > maxValueBytes:
		return wrong("", "the value is %d bytes long, at most %d are allowed", len(value), maxValueBytes)
	case !utf8.ValidString(value) || strings.ContainsFunc(value, unicode.IsControl):
		return wrong("", "value %s holds control characters", printable(value))
	}
	return nil
}
