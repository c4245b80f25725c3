package policydb

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// Bounds on what Parse reads. The YAML parser takes time that grows with the
// square of a document's size, so a document is bounded more tightly than a file.
const (
	maxFileBytes      = 8 << 20
	maxDocumentBytes  = 1 << 20
	maxDocumentTokens = 32768
	maxNesting        = 32
	// maxBlockColumn bounds nesting by indentation: each level takes a column.
	maxBlockColumn = 4 * maxNesting
)

// keyTwice is the parser's message on a repeated key; the place in it counts from
// the document's start, not the file's.
var keyTwice = regexp.MustCompile(`^mapping key (".*") already defined at \[\d+:\d+\]$`)

// Document is one resource and where it stood.
type Document struct {
	Resource *symbolonv1.Resource
	// File is as given to Parse; Line is where the document starts, from 1. Both
	// are empty for a resource that no file holds.
	File string
	Line int
	// text is the document's source, by which a later error finds its place.
	text string
}

// Parse reads the YAML documents of one file. It is strict: what it does not know
// is an error, and so are anchors, aliases, tags and merge keys. Empty documents
// are skipped. All mistakes found are reported together.
// Errors: *SyntaxErrors; then no documents are returned.
func Parse(file string, data []byte) ([]Document, error) {
	if len(data) > maxFileBytes {
		return nil, &SyntaxErrors{Errors: []*SyntaxError{{
			File:    file,
			Message: fmt.Sprintf("the file is %d MiB large, at most %d MiB are read", len(data)>>20, maxFileBytes>>20),
			Hint:    "divide it: an apply takes many files",
		}}}
	}
	var (
		docs []Document
		errs SyntaxErrors
	)
	z := make(zones)
	if e := checkText(file, data); e != nil {
		return nil, &SyntaxErrors{Errors: []*SyntaxError{e}}
	}
	for _, chunk := range splitDocuments(string(data)) {
		d := &decoder{file: file, line: chunk.line, text: chunk.text, zones: z}
		r := d.document()
		sortErrors(d.errs)
		for _, e := range d.errs {
			if len(errs.Errors) >= maxErrors {
				errs.Omitted++
				continue
			}
			errs.Errors = append(errs.Errors, e)
		}
		if r != nil {
			docs = append(docs, Document{Resource: r, File: file, Line: chunk.first(), text: chunk.text})
		}
	}
	if len(errs.Errors) > 0 {
		return nil, &errs
	}
	return docs, nil
}

// checkText refuses what is not text before the YAML parser sees it.
func checkText(file string, data []byte) *SyntaxError {
	line, column := 1, 1
	start := 0
	for i := 0; i < len(data); {
		r, size := utf8.DecodeRune(data[i:])
		var message string
		switch {
		case r == utf8.RuneError && size == 1:
			message = "the file is not valid UTF-8"
		case r < ' ' && r != '\n' && r != '\t' && (r != '\r' || i+1 >= len(data) || data[i+1] != '\n'), r == 0x7f:
			message = fmt.Sprintf("control character %#U", r)
		case r == '\uFEFF' && i > 0, r == '\u0085', r == '\u2028', r == '\u2029':
			// YAML versions disagree on whether these end a line.
			message = fmt.Sprintf("character %U is not allowed outside an escape", r)
		}
		if message != "" {
			end := len(data)
			if n := bytes.IndexByte(data[i:], '\n'); n >= 0 {
				end = i + n
			}
			return &SyntaxError{File: file, Line: line, Column: column, Message: message,
				Excerpt: excerpt(string(data[start:end]), line, column)}
		}
		i += size
		column++
		if r == '\n' {
			line, column, start = line+1, 1, i
		}
	}
	return nil
}

// chunk is one document's text, its "---" line included, and the number of its
// first line.
type chunk struct {
	text string
	line int
}

// first is the line of the first content: after "---", comments and empty lines.
func (c chunk) first() int {
	line := c.line
	for l := range strings.Lines(c.text) {
		t := strings.TrimSpace(l)
		if t != "" && t[0] != '#' && !isMarker(l) {
			break
		}
		line++
	}
	return line
}

// splitDocuments cuts at lines that start with "---": such a line starts a document
// wherever it stands, also within a quoted or a block scalar (YAML 1.2.2, rule 206
// c-forbidden). Each is then parsed alone, which keeps the parser's time in bounds.
func splitDocuments(text string) []chunk {
	text = strings.TrimPrefix(text, "\uFEFF")
	text = strings.ReplaceAll(text, "\r\n", "\n")
	var (
		chunks []chunk
		start  int
		at     int
		line   = 1
		first  = 1
	)
	for l := range strings.Lines(text) {
		if isMarker(l) && at > start {
			chunks = append(chunks, chunk{text[start:at], first})
			start, first = at, line
		}
		at += len(l)
		line++
	}
	return append(chunks, chunk{text[start:], first})
}

func isMarker(line string) bool {
	rest, ok := strings.CutPrefix(line, "---")
	return ok && (rest == "" || strings.IndexByte(" \t\n", rest[0]) >= 0)
}

// document parses and decodes the decoder's text; nil if there is nothing in it, or
// if there were errors.
func (d *decoder) document() *symbolonv1.Resource {
	body := d.parse()
	if body == nil {
		return nil
	}
	r := d.resource(body)
	if r == nil || len(d.errs) > 0 {
		return nil
	}
	for _, p := range checkResource(r, d.zones) {
		d.report(locate(body, p.path), p.hint, "%s", p.message)
	}
	if len(d.errs) > 0 {
		return nil
	}
	return r
}

// parse turns the text into a syntax tree, refusing beforehand what could make the
// parser work too hard; nil after an error, or if the document is empty.
func (d *decoder) parse() (body ast.Node) {
	if len(d.text) > maxDocumentBytes {
		d.reportAt(d.line, 1, "", "the document is larger than %d KiB", maxDocumentBytes>>10)
		return nil
	}
	if isBlank(d.text) {
		return nil
	}
	defer func() {
		// The parser is a library's, and has panicked on input that it should have
		// refused; this is the boundary where bytes come from outside.
		if p := recover(); p != nil {
			d.reportAt(d.line, 1, "", "the document cannot be read as YAML")
			body = nil
		}
	}()
	tokens := lexer.Tokenize(d.text)
	if !d.checkTokens(tokens) {
		return nil
	}
	file, err := parser.Parse(tokens, 0)
	if err != nil {
		var ye yaml.Error
		if errors.As(err, &ye) && ye.GetToken() != nil {
			message, hint := ye.GetMessage(), ""
			if m := keyTwice.FindStringSubmatch(message); m != nil {
				message, hint = "key "+m[1]+" is there twice", "a key can come once in a map"
			}
			d.report(ye.GetToken(), hint, "%s", message)
		} else {
			d.reportAt(d.line, 1, "", "%s", err.Error())
		}
		return nil
	}
	for _, doc := range file.Docs {
		if doc.Body == nil {
			continue
		}
		if body != nil {
			d.report(doc.Body.GetToken(), "start each document with a line \"---\"", "a second document in one")
			return nil
		}
		body = doc.Body
	}
	return body
}

// isBlank tells whether there are only comments, for which the parser wants no time.
func isBlank(text string) bool {
	for l := range strings.Lines(text) {
		if isMarker(l) {
			l = l[3:]
		}
		if t := strings.TrimSpace(l); t != "" && t[0] != '#' {
			return false
		}
	}
	return true
}

func (d *decoder) checkTokens(tokens token.Tokens) bool {
	flow := 0
	for i, t := range tokens {
		if i >= maxDocumentTokens {
			d.report(t, "divide it into several documents", "the document is too long")
			return false
		}
		switch t.Type {
		case token.AnchorType, token.AliasType:
			d.report(t, "write the value out where it is needed", "anchors and aliases are not allowed")
			return false
		case token.MergeKeyType:
			d.report(t, "write the keys out where they are needed", "merge keys are not allowed")
			return false
		case token.TagType:
			d.report(t, "leave the tag out; quote what should be a string", "tags are not allowed")
			return false
		case token.DirectiveType:
			d.report(t, "leave it out", "directives are not allowed")
			return false
		case token.MappingStartType, token.SequenceStartType:
			flow++
		case token.MappingEndType, token.SequenceEndType:
			flow--
		case token.SequenceEntryType, token.MappingKeyType, token.MappingValueType:
			if flow == 0 && t.Position.Column > maxBlockColumn && t.Type != token.MappingValueType {
				flow = maxNesting + 1
			}
		}
		if flow > maxNesting {
			d.report(t, "", "nested too deeply")
			return false
		}
	}
	return true
}
