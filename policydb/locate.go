package policydb

import (
	"cmp"
	"slices"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/token"
)

// locate finds the place in the syntax tree that a problem's path names, or the
// nearest place above it that exists. A step into a list that was written without
// one (a single term, a single value) stays where it is.
func locate(body ast.Node, path []any) *token.Token {
	at := start(body)
	node := body
	for _, step := range path {
		switch s := step.(type) {
		case int:
			if seq, ok := node.(*ast.SequenceNode); ok && s < len(seq.Values) {
				node = seq.Values[s]
				at = start(node)
			}
		case string:
			next, t := child(node, s)
			if t == nil {
				return at
			}
			node, at = next, t
		case theValue:
			if node != nil {
				at = start(node)
			}
		}
	}
	return at
}

// theValue is the step from a key to what is written behind it.
type theValue struct{}

// child is a key of a mapping, an element of a list by its text, or a lone value
// itself.
func child(node ast.Node, name string) (ast.Node, *token.Token) {
	if scalar, ok := node.(ast.ScalarNode); ok && scalar.GetToken().Value == name {
		return node, node.GetToken()
	}
	if seq, ok := node.(*ast.SequenceNode); ok {
		for _, v := range seq.Values {
			if t := v.GetToken(); t.Value == name {
				return v, t
			}
		}
		return nil, nil
	}
	all, _ := entries(node)
	for _, e := range all {
		if e.key == name {
			return e.value, e.token
		}
	}
	return nil, nil
}

// at makes an error of a problem of the document's resource, with its place where
// the source is known.
func (doc *Document) at(p problem) *ValidationError {
	e := &ValidationError{
		Resource:    KeyOf(doc.Resource).String(),
		SyntaxError: SyntaxError{File: doc.File, Message: p.message, Hint: p.hint},
	}
	if doc.text == "" {
		return e
	}
	// Line is the first line with content; the text may start with others.
	d := &decoder{file: doc.File, text: doc.text}
	d.line = doc.Line - (chunk{text: doc.text, line: 1}.first() - 1)
	body := d.parse()
	if body == nil {
		return e
	}
	d.report(locate(body, p.path), p.hint, "%s", p.message)
	e.SyntaxError = *d.errs[len(d.errs)-1]
	return e
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

func sortErrors(errs []*SyntaxError) {
	slices.SortStableFunc(errs, func(a, b *SyntaxError) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
}
