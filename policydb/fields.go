package policydb

import (
	"slices"
	"strconv"
	"strings"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// FieldChange is one field that differs between two forms of a resource. Values are
// canonical YAML; empty where the field is not there.
type FieldChange struct {
	// Path is a key of the schema, below it an element: "ports", "attributes.env",
	// "subject[1]" (from 0), "tests[web reaches api]".
	Path          string
	Before, After string
}

// FieldChanges compares two forms of a resource of one kind, in the order of the
// schema; nil if they say the same.
func FieldChanges(before, after *symbolonv1.Resource) []FieldChange {
	a, b := fieldsOf(before), fieldsOf(after)
	values := func(fs []field) map[string]string {
		m := make(map[string]string, len(fs))
		for _, f := range fs {
			m[f.path] = f.value
		}
		return m
	}
	was, is := values(a), values(b)
	var out []FieldChange
	// In the order of the new form; what went stands where it stood, behind what was
	// before it.
	i := 0
	gone := func(until string) {
		for ; i < len(a) && a[i].path != until; i++ {
			if _, ok := is[a[i].path]; !ok {
				out = append(out, FieldChange{a[i].path, a[i].value, ""})
			}
		}
	}
	for _, f := range b {
		old, ok := was[f.path]
		if ok && i < len(a) {
			gone(f.path)
		}
		if old != f.value {
			out = append(out, FieldChange{f.path, old, f.value})
		}
	}
	gone("")
	return out
}

type field struct{ path, value string }

// fieldsOf reads what FormatYAML writes, which is one field a line: "key: value", and
// under a key alone "  key: value" or "- value".
func fieldsOf(r *symbolonv1.Resource) []field {
	var (
		out    []field
		parent string
		n      int
	)
	tests := r.GetPolicyTest().GetTests()
	for line := range strings.Lines(string(FormatYAML(r))) {
		line = strings.TrimSuffix(line, "\n")
		if item, ok := strings.CutPrefix(line, "- "); ok {
			name := strconv.Itoa(n)
			if n < len(tests) {
				name = tests[n].GetName()
			}
			path := parent + "[" + name + "]"
			if slices.ContainsFunc(out, func(f field) bool { return f.path == path }) {
				path += "#" + strconv.Itoa(n) // two tests of one name
			}
			out = append(out, field{path, item})
			n++
			continue
		}
		inner, nested := strings.CutPrefix(line, "  ")
		key, value, _ := strings.Cut(inner, ": ")
		switch {
		case nested:
			out = append(out, field{parent + "." + key, value})
		case value == "":
			parent, n = strings.TrimSuffix(key, ":"), 0
		default:
			out = append(out, field{key, value})
		}
	}
	return out
}
