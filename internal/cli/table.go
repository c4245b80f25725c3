package cli

import (
	"io"
	"strings"
	"unicode/utf8"
)

// style is an ANSI SGR parameter; empty: plain.
type style string

const (
	plain  style = ""
	bold   style = "1"
	faint  style = "2"
	red    style = "31"
	green  style = "32"
	yellow style = "33"
)

// cell is a text and how it looks. The text has to say it all: colour only helps.
type cell struct {
	text  string
	style style
}

func text(s string) cell { return cell{text: s} }

// yes, no and warn carry a symbol beside the word.
func yes(word string) cell  { return cell{"✓ " + word, green} }
func no(word string) cell   { return cell{"✗ " + word, red} }
func warn(word string) cell { return cell{"! " + word, yellow} }

// painter writes cells, coloured or not.
type painter struct{ color bool }

func (p painter) paint(c cell) string {
	s := sanitize(c.text, false)
	if !p.color || c.style == plain || s == "" {
		return s
	}
	return "\x1b[" + string(c.style) + "m" + s + "\x1b[0m"
}

// columnGap separates columns; there are no borders, so that cut and awk work.
const columnGap = "   "

// table aligns rows. Widths only ever grow: rows that are flushed as they come
// (flows --follow) stay aligned with most of those before them.
type table struct {
	w       io.Writer
	painter painter
	header  []string
	widths  []int
	rows    [][]cell
	started bool
}

func newTable(w io.Writer, p painter, header ...string) *table {
	return &table{w: w, painter: p, header: header, widths: make([]int, len(header))}
}

// add buffers a row; it has as many cells as the header.
func (t *table) add(cells ...cell) {
	for i := range cells {
		if cells[i].text == "" {
			cells[i].text = "-"
		}
	}
	t.rows = append(t.rows, cells)
}

// flush writes the buffered rows, the header first.
func (t *table) flush() error {
	if !t.started {
		t.started = true
		head := make([]cell, len(t.header))
		for i, h := range t.header {
			head[i] = cell{h, bold}
		}
		t.rows = append([][]cell{head}, t.rows...)
	}
	for _, row := range t.rows {
		for i, c := range row {
			t.widths[i] = max(t.widths[i], width(c))
		}
	}
	var b strings.Builder
	for _, row := range t.rows {
		for i, c := range row {
			b.WriteString(t.painter.paint(c))
			if i < len(row)-1 {
				b.WriteString(strings.Repeat(" ", t.widths[i]-width(c)))
				b.WriteString(columnGap)
			}
		}
		b.WriteByte('\n')
	}
	t.rows = t.rows[:0]
	_, err := io.WriteString(t.w, b.String())
	return err
}

// width is in terminal columns, taking every rune as one: names here are ASCII.
func width(c cell) int { return utf8.RuneCountInString(sanitize(c.text, false)) }
