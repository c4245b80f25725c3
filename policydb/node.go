package policydb

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/token"
)

// decoder reads one document. It goes on after a mistake, to report them all.
type decoder struct {
	file  string
	line  int // of the text's first line in the file
	text  string
	errs  []*SyntaxError
	zones zones
	// lines is the text cut up, at the first error.
	lines []string
}

// report adds an error at t.
func (d *decoder) report(t *token.Token, hint, format string, args ...any) {
	line, column := 1, 1
	if t != nil && t.Position != nil {
		line, column = max(t.Position.Line, 1), max(t.Position.Column, 1)
	}
	d.reportAt(d.line+line-1, column, hint, format, args...)
}

func (d *decoder) reportAt(line, column int, hint, format string, args ...any) {
	if len(d.errs) > maxErrors {
		return
	}
	if d.lines == nil {
		d.lines = strings.Split(d.text, "\n")
	}
	var text string
	if i := line - d.line; i >= 0 && i < len(d.lines) {
		text = d.lines[i]
	}
	d.errs = append(d.errs, &SyntaxError{
		File: d.file, Line: line, Column: column,
		Message: fmt.Sprintf(format, args...), Hint: hint,
		Excerpt: excerpt(text, line, column),
	})
}

// entry is one key of a mapping.
type entry struct {
	key   string
	token *token.Token // the key's
	value ast.Node     // nil: nothing written
}

// entries lists a mapping's keys; false if n is not a mapping with plain keys. The
// parser itself refuses a key that comes twice.
func entries(n ast.Node) ([]entry, bool) {
	var values []*ast.MappingValueNode
	switch v := n.(type) {
	case *ast.MappingNode:
		values = v.Values
	case *ast.MappingValueNode:
		values = []*ast.MappingValueNode{v}
	default:
		return nil, false
	}
	out := make([]entry, 0, len(values))
	for _, v := range values {
		e := entry{token: v.Key.GetToken(), value: v.Value}
		switch k := v.Key.(type) {
		case *ast.StringNode:
			e.key = k.Value
		case ast.ScalarNode:
			e.key = k.GetToken().Value
		default:
			return nil, false
		}
		if _, null := e.value.(*ast.NullNode); null {
			e.value = nil
		}
		out = append(out, e)
	}
	return out, true
}

// start is where n begins to the reader's eye: for a block mapping its first key.
func start(n ast.Node) *token.Token {
	switch v := n.(type) {
	case *ast.MappingNode:
		if !v.IsFlowStyle && len(v.Values) > 0 {
			return start(v.Values[0])
		}
	case *ast.MappingValueNode:
		return v.Key.GetToken()
	}
	return n.GetToken()
}

// describe names what n is, for messages of the form "want X, not Y".
func describe(n ast.Node) string {
	switch n.(type) {
	case nil, *ast.NullNode:
		return "nothing"
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a map"
	case *ast.SequenceNode:
		return "a list"
	case *ast.BoolNode:
		return "a boolean"
	}
	return printable(n.GetToken().Value)
}

// known picks the entries that are in want; the others are errors, each an unknown
// "what" in a larger thing. hints holds words for keys that people write by mistake.
func (d *decoder) known(all []entry, what, in string, want []string, hints map[string]string) map[string]entry {
	out := make(map[string]entry, len(all))
	for _, e := range all {
		switch {
		case slices.Contains(want, e.key):
			if e.value == nil {
				d.report(e.token, "", "%s has no value", e.key)
				continue
			}
			out[e.key] = e
		case hints[e.key] != "":
			d.report(e.token, hints[e.key], "unknown %s %s in %s", what, printable(e.key), in)
		default:
			d.report(e.token, didYouMean(e.key, want), "unknown %s %s in %s", what, printable(e.key), in)
		}
	}
	return out
}

var (
	decimal = regexp.MustCompile(`^(0|-?[1-9][0-9]*)$`)
	// ambiguous words are booleans in YAML 1.1 and strings in 1.2.
	ambiguous = regexp.MustCompile(`^(?i:y|n|yes|no|on|off)$`)
)

// str reads a scalar that is meant as a string. Unquoted words that some YAML
// version takes for a boolean, null or a number other than a plain integer are
// refused: what was meant cannot be known.
func (d *decoder) str(n ast.Node, what string) (string, bool) {
	switch v := n.(type) {
	case *ast.StringNode:
		if v.Token.Type == token.StringType && ambiguous.MatchString(v.Value) {
			d.report(v.Token, "quote it: "+strconv.Quote(v.Value), "%s %s is a boolean to some readers of YAML", what, v.Value)
			return "", false
		}
		return v.Value, true
	case *ast.LiteralNode:
		d.report(v.GetToken(), "write it on one line, in quotes if need be", "%s is a block of text", what)
		return "", false
	case *ast.IntegerNode:
		if s := v.Token.Value; decimal.MatchString(s) {
			return s, true
		}
		d.report(v.Token, "quote it: "+strconv.Quote(v.Token.Value), "%s %s is a number in a form that is easily misread", what, v.Token.Value)
		return "", false
	case *ast.BoolNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		t := n.GetToken()
		d.report(t, "quote it: "+strconv.Quote(t.Value), "%s %s is %s, not a string", what, t.Value, scalarType(n))
		return "", false
	case nil, *ast.NullNode:
		var t *token.Token
		if n != nil {
			t = n.GetToken()
		}
		d.report(t, "quote it if the word is meant", "%s is null", what)
		return "", false
	}
	d.report(start(n), "", "%s is %s, want a string", what, describe(n))
	return "", false
}

// block is str for what may be written as a block of lines, such as a document in
// another language.
func (d *decoder) block(e entry) (string, bool) {
	if v, ok := e.value.(*ast.LiteralNode); ok {
		return v.Value.Value, true
	}
	return d.str(e.value, e.key)
}

func scalarType(n ast.Node) string {
	if _, ok := n.(*ast.BoolNode); ok {
		return "a boolean"
	}
	return "a number"
}

// boolean reads true or false, nothing else.
func (d *decoder) boolean(e entry) bool {
	b, ok := e.value.(*ast.BoolNode)
	if !ok || b.Token.Value != "true" && b.Token.Value != "false" {
		d.report(start(e.value), "", "%s is %s, want true or false", e.key, describe(e.value))
		return false
	}
	return b.Value
}

// list reads a sequence's elements. A scalar is a list of one where lone is true.
func (d *decoder) list(e entry, lone bool) []ast.Node {
	switch v := e.value.(type) {
	case *ast.SequenceNode:
		if len(v.Values) == 0 {
			d.report(v.GetToken(), "leave the key out if nothing is meant", "%s is an empty list", e.key)
		}
		return v.Values
	case *ast.MappingNode, *ast.MappingValueNode:
	default:
		if lone {
			return []ast.Node{v}
		}
	}
	d.report(start(e.value), "write ["+strings.Trim(describe(e.value), `"`)+"]", "%s is %s, want a list", e.key, describe(e.value))
	return nil
}

// strs reads a list of strings, or a lone one.
func (d *decoder) strs(e entry, what string) []string {
	var out []string
	for _, n := range d.list(e, true) {
		if s, ok := d.str(n, what); ok {
			out = append(out, s)
		}
	}
	return out
}

// word reads one of a closed set.
func word[T any](d *decoder, e entry, set map[string]T) T {
	var zero T
	s, ok := d.str(e.value, e.key)
	if !ok {
		return zero
	}
	v, ok := set[s]
	if !ok {
		names := make([]string, 0, len(set))
		for k := range set {
			names = append(names, k)
		}
		d.report(start(e.value), didYouMean(s, names), "unknown %s %s", e.key, printable(s))
	}
	return v
}
