package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ANSI styles (ECMA-48, SGR).
const (
	bold   = "1"
	faint  = "2"
	red    = "31"
	green  = "32"
	yellow = "33"
	cyan   = "36"
)

// screen is where the demo talks. Each kind of line has its own look, so that what
// was run, what came out, and what it means are told apart at a glance.
type screen struct {
	w      io.Writer
	color  bool
	step   int
	claims int
}

// newScreen has colours on a terminal, unless NO_COLOR is set (no-color.org).
func newScreen(f *os.File) *screen {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return &screen{w: f, color: err == nil && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
}

func (s *screen) paint(style, text string) string {
	if !s.color {
		return text
	}
	return "\x1b[" + style + "m" + text + "\x1b[0m"
}

// heading begins a step: its title, and a line of what is about to happen.
func (s *screen) heading(title, about string) {
	s.step++
	fmt.Fprintf(s.w, "\n%s\n", s.paint(bold, fmt.Sprintf("%d. %s", s.step, title)))
	s.say(about)
}

func (s *screen) say(text string) {
	s.indent(3, text)
}

// indent keeps empty lines empty.
func (s *screen) indent(by int, text string) {
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if line != "" {
			line = strings.Repeat(" ", by) + line
		}
		fmt.Fprintln(s.w, line)
	}
}

// command is what is run next, and where.
func (s *screen) command(line, host string) {
	fmt.Fprintf(s.w, "\n   %s %s\n", s.paint(cyan, "$ "+line), s.paint(faint, "# on "+host))
}

// output is what a program wrote.
func (s *screen) output(text string) {
	if text = strings.TrimRight(text, "\n"); text != "" {
		s.indent(5, text)
	}
}

// beginning is the first lines of an output, and says how many more there are.
func beginning(text string, lines int) string {
	all := strings.SplitAfter(strings.TrimRight(text, "\n"), "\n")
	if len(all) <= lines {
		return text
	}
	return strings.Join(all[:lines], "") + fmt.Sprintf("[... %d lines more]", len(all)-lines)
}

// field is a name and what it is.
func (s *screen) field(name, format string, args ...any) {
	fmt.Fprintf(s.w, "     %s %s\n", s.paint(faint, fmt.Sprintf("%-13s", name)), fmt.Sprintf(format, args...))
}

// claimError says that what the demo is there to show is not so.
type claimError struct{ claim, evidence string }

func (e *claimError) Error() string {
	return fmt.Sprintf("this does not hold: %s\n%s", e.claim, e.evidence)
}

// claim prints a sentence if it holds. If not, it is the error, with what was seen
// instead.
func (s *screen) claim(holds bool, sentence string, evidence any) error {
	if !holds {
		fmt.Fprintf(s.w, "   %s\n", s.paint(red, "✗ NOT SO: "+sentence))
		return &claimError{sentence, fmt.Sprintf("seen: %+v", evidence)}
	}
	s.claims++
	fmt.Fprintf(s.w, "   %s\n", s.paint(green, "✓ "+sentence))
	return nil
}

// meaning is what to take home from a step.
func (s *screen) meaning(text string) {
	fmt.Fprintln(s.w)
	for line := range strings.Lines(text) {
		fmt.Fprintf(s.w, "   %s\n", s.paint(yellow, "→ "+strings.TrimRight(line, "\n")))
	}
}

func (s *screen) end(took time.Duration) {
	fmt.Fprintf(s.w, "\n%s\n", s.paint(bold, fmt.Sprintf("Shown in %.0f seconds: %d statements (✓), each checked against this run's exit codes, records and captures.", took.Seconds(), s.claims)))
}
