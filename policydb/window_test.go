package policydb

import (
	"testing"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// TestWindowsOverAYear holds active to the slow reading of the reference at every
// quarter of an hour of a year, in zones with odd clocks, and next to active: between
// now and next nothing changes.
func TestWindowsOverAYear(t *testing.T) {
	z := make(zones)
	for _, w := range []*symbolonv1.Window{
		{Days: 0b0011111, StartMinute: 480, EndMinute: 720, Timezone: "Europe/Oslo"},
		{Days: 0b1000000, StartMinute: 22 * 60, EndMinute: 6 * 60, Timezone: "America/New_York"},
		{StartMinute: 150, EndMinute: 180, Timezone: "Europe/Oslo"},                       // in the hour that comes twice, or not at all
		{StartMinute: 110, EndMinute: 130, Timezone: "Australia/Lord_Howe"},               // clocks move by half an hour
		{Days: 1, Timezone: "Pacific/Apia"},                                               // whole Mondays
		{Days: 0b0100000, StartMinute: 0, EndMinute: 1440, Timezone: "America/Sao_Paulo"}, // written out
	} {
		c, err := compileWindow(w, z)
		if err != nil {
			t.Fatal(err)
		}
		at := time.Date(2026, 1, 1, 0, 7, 13, 5, time.UTC)
		quiet, was := at, false
		opened := 0
		for ; at.Year() == 2026; at = at.Add(15 * time.Minute) {
			active := c.active(at)
			if active != referenceOpen(w, at) {
				t.Fatalf("%s at %s: active is %t", formatWindow(w), at, active)
			}
			if at.Before(quiet) && active != was {
				t.Fatalf("%s changes at or before %s, which was to be quiet until %s", formatWindow(w), at, quiet)
			}
			if active && !was {
				opened++
			}
			was = active
			quiet = c.next(at)
			if !quiet.After(at) || quiet.Sub(at) > 24*time.Hour {
				t.Fatalf("%s at %s: next is %s", formatWindow(w), at, quiet)
			}
		}
		if opened < 50 {
			t.Errorf("%s opened %d times in a year", formatWindow(w), opened)
		}
	}
}

func TestDaysAndHoursAsWritten(t *testing.T) {
	for in, want := range map[string]string{
		"mon-fri": "mon-fri", "sat,sun": "sat,sun", "fri-mon": "mon,fri-sun", "mon,tue,wed": "mon-wed", "sun": "sun", "mon-sun": "", "tue, thu": "tue,thu",
	} {
		days, message, _ := parseDays(in)
		if message != "" || formatDays(days) != want {
			t.Errorf("%q: %q %s, want %q", in, formatDays(days), message, want)
		}
	}
	for _, in := range []string{"", "mon-", "-fri", "monday", "Mon", "mon,,tue"} {
		if _, message, _ := parseDays(in); message == "" {
			t.Errorf("days %q were read", in)
		}
	}
	for _, in := range []string{"", "8:00-12:00", "08:00", "08:00-25:00", "24:00-08:00", "08:60-09:00", "08:00-08:00", "08:00-12:00-13:00", "0800-1200", "+8:00-12:00"} {
		if _, _, message, _ := parseHours(in); message == "" {
			t.Errorf("hours %q were read", in)
		}
	}
	if s, e, message, _ := parseHours("22:00-24:00"); s != 1320 || e != 1440 || message != "" {
		t.Errorf("22:00-24:00: %d, %d, %s", s, e, message)
	}
}
