package policydb

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

var (
	// ErrConflict: the working set has moved since the plan was made. Plan again.
	ErrConflict = errors.New("the policy has changed since the plan was made")
	// ErrUnreadable: a resource holds something that this version does not know. It
	// is refused whole: a policy that is half understood would allow too much.
	ErrUnreadable = errors.New("unreadable resource")
)

// excerptWidth is how much of a long source line an Excerpt shows, in runes.
const excerptWidth = 120

// maxErrors bounds the errors listed one by one; the rest is counted.
const maxErrors = 50

// SyntaxError is one mistake at one place.
type SyntaxError struct {
	File string
	// Line and Column count from 1; Column in runes. Line 0: the place is not known.
	Line, Column int
	Message      string
	// Hint is what to do instead; empty: nothing better is known.
	Hint string
	// Excerpt is the source line and, under it, a caret; no newline at the end.
	Excerpt string
}

// Error has several lines:
//
//	web.yaml:3:1: unknown key "subjct" of a Policy
//	  3 | subjct: {app: web}
//	    | ^
//	  did you mean "subject"?
func (e *SyntaxError) Error() string {
	var b strings.Builder
	switch {
	case e.File != "" && e.Line > 0:
		fmt.Fprintf(&b, "%s:%d:%d: ", e.File, e.Line, e.Column)
	case e.File != "":
		b.WriteString(e.File + ": ")
	case e.Line > 0:
		fmt.Fprintf(&b, "%d:%d: ", e.Line, e.Column)
	}
	b.WriteString(e.Message)
	if e.Excerpt != "" {
		b.WriteString("\n" + e.Excerpt)
	}
	if e.Hint != "" {
		b.WriteString("\n  " + e.Hint)
	}
	return b.String()
}

// SyntaxErrors are all the mistakes found, in the order of the file.
type SyntaxErrors struct {
	Errors []*SyntaxError
	// Omitted counts those beyond the first 50.
	Omitted int
}

func (e *SyntaxErrors) Error() string {
	parts := make([]string, 0, len(e.Errors)+1)
	for _, x := range e.Errors {
		parts = append(parts, x.Error())
	}
	if e.Omitted > 0 {
		parts = append(parts, fmt.Sprintf("and %d more errors", e.Omitted))
	}
	return strings.Join(parts, "\n")
}

// Unwrap lets errors.As find each of them.
func (e *SyntaxErrors) Unwrap() []error { return unwrapAll(e.Errors) }

// ValidationError is a resource that is well formed but cannot be applied.
type ValidationError struct {
	// Resource is kind and name: `Policy /acme/prod/web-may-call-api`.
	Resource string
	// The place and the words; the place is known where the resource came from a file.
	SyntaxError
}

// Error is SyntaxError's, with the resource named where no file is.
func (e *ValidationError) Error() string {
	if e.Line > 0 || e.Resource == "" {
		return e.SyntaxError.Error()
	}
	s := e.SyntaxError
	s.Message = e.Resource + ": " + s.Message
	return s.Error()
}

// ValidationErrors are all the reasons why a plan is refused.
type ValidationErrors struct {
	Errors []*ValidationError
	// Omitted counts those beyond the first 50.
	Omitted int
	// TestResults are of the PolicyTests, if it came to running them.
	TestResults []*symbolonv1.TestResult
}

func (e *ValidationErrors) Error() string {
	parts := make([]string, 0, len(e.Errors)+1)
	for _, x := range e.Errors {
		parts = append(parts, x.Error())
	}
	if e.Omitted > 0 {
		parts = append(parts, fmt.Sprintf("and %d more errors", e.Omitted))
	}
	return strings.Join(parts, "\n")
}

// Unwrap lets errors.As find each of them.
func (e *ValidationErrors) Unwrap() []error { return unwrapAll(e.Errors) }

func (e *ValidationErrors) add(x *ValidationError) {
	if len(e.Errors) >= maxErrors {
		e.Omitted++
		return
	}
	e.Errors = append(e.Errors, x)
}

func unwrapAll[E error](xs []E) []error {
	out := make([]error, len(xs))
	for i, x := range xs {
		out[i] = x
	}
	return out
}

// excerpt shows text with a caret under column. The caret's line repeats tabs, so
// that it stands right at any tab width. What could steer a terminal is replaced.
func excerpt(text string, line, column int) string {
	runes := []rune(strings.TrimRight(text, "\r\n"))
	at := min(max(column-1, 0), len(runes))
	from := 0
	if len(runes) > excerptWidth {
		from = max(0, min(at-excerptWidth/2, len(runes)-excerptWidth))
	}
	to := min(len(runes), from+excerptWidth)
	shown, pad := make([]rune, 0, to-from), make([]rune, 0, at-from)
	for i := from; i < to; i++ {
		r := runes[i]
		if r != '\t' && !unicode.IsPrint(r) {
			r = utf8.RuneError
		}
		shown = append(shown, r)
		if i < at {
			if r != '\t' {
				r = ' '
			}
			pad = append(pad, r)
		}
	}
	number := fmt.Sprint(line)
	return fmt.Sprintf("  %s | %s\n  %*s | %s^", number, string(shown), len(number), "", string(pad))
}

// printable is s as it may stand in a message: quoted, and not too long.
func printable(s string) string {
	const most = 80
	if utf8.RuneCountInString(s) > most {
		s = string([]rune(s)[:most]) + "…"
	}
	return fmt.Sprintf("%q", s)
}
