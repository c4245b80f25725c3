package policydb

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	_ "time/tzdata" // the same zones on every host, installed there or not

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

const (
	minutesPerDay = 24 * 60
	everyDay      = 1<<7 - 1
)

var dayNames = []string{"mon", "tue", "wed", "thu", "fri", "sat", "sun"}

// parseDays reads "mon-fri", "sat,sun" or "fri-mon" into bits, Monday first. All
// seven days are 0, as in Window.days.
func parseDays(s string) (days uint32, message, hint string) {
	for part := range strings.SplitSeq(s, ",") {
		first, last, isRange := strings.Cut(strings.TrimSpace(part), "-")
		if !isRange {
			last = first
		}
		a, b := dayIndex(first), dayIndex(last)
		for _, d := range []struct {
			name  string
			index int
		}{{first, a}, {last, b}} {
			if d.index < 0 {
				return 0, fmt.Sprintf("unknown day %s", printable(d.name)), didYouMean(d.name, dayNames)
			}
		}
		for i := a; ; i = (i + 1) % 7 {
			days |= 1 << i
			if i == b {
				break
			}
		}
	}
	if days == everyDay {
		days = 0
	}
	return days, "", ""
}

func dayIndex(s string) int {
	for i, d := range dayNames {
		if d == s {
			return i
		}
	}
	return -1
}

// formatDays is the canonical form: runs of three and more as ranges.
func formatDays(days uint32) string {
	var parts []string
	for i := 0; i < 7; {
		if days&(1<<i) == 0 {
			i++
			continue
		}
		j := i
		for j+1 < 7 && days&(1<<(j+1)) != 0 {
			j++
		}
		switch {
		case j-i >= 2:
			parts = append(parts, dayNames[i]+"-"+dayNames[j])
		default:
			parts = append(parts, dayNames[i:j+1]...)
		}
		i = j + 1
	}
	return strings.Join(parts, ",")
}

// parseHours reads "08:00-12:00". The end may be 24:00, and may be before the
// start: over midnight.
func parseHours(s string) (start, end uint32, message, hint string) {
	const want = `write "hh:mm-hh:mm": "08:00-12:00", over midnight "22:00-06:00"`
	first, last, ok := strings.Cut(s, "-")
	if !ok {
		return 0, 0, fmt.Sprintf("%s is not a span of hours", printable(s)), want
	}
	a, okA := parseMinute(first)
	b, okB := parseMinute(last)
	switch {
	case !okA || !okB || a == minutesPerDay:
		return 0, 0, fmt.Sprintf("%s is not a span of hours", printable(s)), want
	case a == b:
		return 0, 0, fmt.Sprintf("the hours %s are empty", printable(s)), "leave hours out for the whole day"
	}
	return a, b, "", ""
}

func parseMinute(s string) (uint32, bool) {
	if len(s) != 5 || s[2] != ':' || strings.Trim(s[:2]+s[3:], "0123456789") != "" {
		return 0, false
	}
	h, errH := strconv.Atoi(s[:2])
	m, errM := strconv.Atoi(s[3:])
	n := h*60 + m
	return uint32(n), errH == nil && errM == nil && m < 60 && n <= minutesPerDay
}

func formatMinute(m uint32) string { return fmt.Sprintf("%02d:%02d", m/60, m%60) }

func formatHours(w *symbolonv1.Window) string {
	return formatMinute(w.GetStartMinute()) + "-" + formatMinute(w.GetEndMinute())
}

// formatWindow is for people: "mon-fri 08:00-12:00 Europe/Oslo".
func formatWindow(w *symbolonv1.Window) string {
	var parts []string
	if w.GetDays() != 0 {
		parts = append(parts, formatDays(w.GetDays()))
	}
	if w.GetStartMinute() != 0 || w.GetEndMinute() != 0 {
		parts = append(parts, formatHours(w))
	}
	return strings.Join(append(parts, w.GetTimezone()), " ")
}

// zones keeps the zones of one batch of resources: loading one takes a file's
// parsing. Not for concurrent use.
type zones map[string]*time.Location

// load refuses what depends on the host: "Local", "" and files.
func (z zones) load(name string) (*time.Location, error) {
	if loc := z[name]; loc != nil {
		return loc, nil
	}
	if name == "" || name == "Local" {
		return nil, fmt.Errorf("%s is not a time zone", printable(name))
	}
	loc, err := time.LoadLocation(name)
	if err != nil {
		return nil, fmt.Errorf("%s is not a time zone", printable(name))
	}
	z[name] = loc
	return loc, nil
}

// window is a compiled symbolonv1.Window: a pure function of the wall clock.
type window struct {
	days       uint32 // never 0: all days are everyDay
	start, end int    // minutes; start < end, or over midnight
	location   *time.Location
}

func checkWindow(w *symbolonv1.Window) error {
	s, e := w.GetStartMinute(), w.GetEndMinute()
	switch {
	case w.GetDays() >= everyDay:
		return fmt.Errorf("days %#x are not days of the week", w.GetDays())
	case s >= minutesPerDay || e > minutesPerDay || s == e && s != 0:
		return fmt.Errorf("minutes %d to %d are not a span of hours", s, e)
	}
	return nil
}

func compileWindow(w *symbolonv1.Window, z zones) (*window, error) {
	if err := checkWindow(w); err != nil {
		return nil, err
	}
	loc, err := z.load(w.GetTimezone())
	if err != nil {
		return nil, err
	}
	out := &window{days: w.GetDays(), start: int(w.GetStartMinute()), end: int(w.GetEndMinute()), location: loc}
	if out.days == 0 {
		out.days = everyDay
	}
	if out.start == 0 && out.end == 0 {
		out.end = minutesPerDay
	}
	return out, nil
}

// active tells whether the wall clock shows a time in the window. A window over
// midnight belongs to the day on which it starts.
func (w *window) active(now time.Time) bool {
	t := now.In(w.location)
	today := (int(t.Weekday()) + 6) % 7
	minute := t.Hour()*60 + t.Minute()
	if w.start < w.end {
		return w.on(today) && minute >= w.start && minute < w.end
	}
	return w.on(today) && minute >= w.start || w.on((today+6)%7) && minute < w.end
}

func (w *window) on(day int) bool { return w.days&(1<<day) != 0 }

// next is the next moment at which active may change: never later than the next
// change, sometimes earlier (each edge of each day, and each change of the clocks).
func (w *window) next(now time.Time) time.Time {
	t := now.In(w.location)
	const day = 24 * time.Hour
	since := time.Duration(t.Hour())*time.Hour + time.Duration(t.Minute())*time.Minute +
		time.Duration(t.Second())*time.Second + time.Duration(t.Nanosecond())
	wait := day - since // midnight: another day of the week
	for _, edge := range [...]int{w.start, w.end} {
		if d := time.Duration(edge)*time.Minute - since; d > 0 && d < wait {
			wait = d
		}
	}
	at := now.Add(wait)
	// Until the clocks change, wall time and real time run side by side; beyond,
	// the sum above means nothing.
	if _, end := t.ZoneBounds(); !end.IsZero() && end.Before(at) {
		return end
	}
	return at
}
