package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// results are a whole run, as saved.
type results struct {
	Started   time.Time
	Took      float64 // seconds
	Machine   facts
	Rounds    int
	Duration  float64 // of one measurement, seconds
	Noise     noise   // of other processes
	Steal     noise   // of other machines
	Systems   []systemInfo
	Workloads []*table
	Decisions []decided `json:",omitempty"`
	Notes     []string
}

type systemInfo struct {
	Name, About string
	Peer        bool
	// Handshakes says how many of those that were watched at the start were resumed.
	Handshakes string
}

// table is a workload and what was measured, by system.
type table struct {
	workload    `json:"-"`
	Name, Title string
	Samples     map[string][]*sample
	// Medians are by system and metric. NaN is left out.
	Medians map[string]map[string]float64
}

// good are the samples that are results.
func good(all []*sample) []*sample {
	return slices.DeleteFunc(slices.Clone(all), func(s *sample) bool { return s.Failed != "" })
}

// values are a metric's, one from each sample that has it.
func values(m metric, samples []*sample) []float64 {
	var all []float64
	for _, s := range good(samples) {
		if v := m.of(s); !math.IsNaN(v) && !math.IsInf(v, 0) {
			all = append(all, v)
		}
	}
	slices.Sort(all)
	return all
}

// median of sorted values; NaN if there are none.
func median(sorted []float64) float64 {
	n := len(sorted)
	if n == 0 {
		return math.NaN()
	}
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// spread is how far the values lie from their median at most, in percent.
func spread(sorted []float64) float64 {
	m := median(sorted)
	if math.IsNaN(m) || m == 0 {
		return 0
	}
	return 100 * max(sorted[len(sorted)-1]-m, m-sorted[0]) / m
}

// best is the best median among the peers; NaN if none was measured.
func (t *table) best(m metric, systems []systemInfo) float64 {
	best := math.NaN()
	for _, s := range systems {
		v := median(values(m, t.Samples[s.Name]))
		if s.Peer && !math.IsNaN(v) && (math.IsNaN(best) || m.lower == (v < best)) {
			best = v
		}
	}
	return best
}

// write prints the tables, in Markdown, so that they can be pasted.
func (r *results) write(w io.Writer) {
	m := &r.Machine
	fmt.Fprintf(w, "\n%s; %s, %d cores, %d GB; Linux %s, TCP %s; %s; %d rounds of %.1f s; took %.0f s.\n",
		r.Started.Format("2006-01-02 15:04"), m.CPU, m.Cores, (m.MemoryMB+512)>>10, m.Kernel, m.CongestionControl, m.Go, r.Rounds, r.Duration, r.Took)
	for _, name := range slices.Sorted(maps.Keys(m.Versions)) {
		fmt.Fprintf(w, "%s: %s.\n", name, m.Versions[name])
	}
	fmt.Fprintf(w, "Noise, in cores: processes that are not ours used %.2f in the median measurement, %.2f or more in a tenth of them, %.2f at most; the hypervisor took %.2f, %.2f, %.2f.\n",
		r.Noise.Median, r.Noise.P90, r.Noise.Max, r.Steal.Median, r.Steal.P90, r.Steal.Max)
	fmt.Fprintln(w, "Medians; in parentheses the ratio to the best of the peers; ± is the largest distance of a round from the first column's median.")
	fmt.Fprintln(w)
	for _, s := range r.Systems {
		fmt.Fprintf(w, "- `%s`: %s. Handshakes: %s.\n", s.Name, s.About, s.Handshakes)
	}
	for _, t := range r.Workloads {
		r.writeTable(w, t)
	}
	writeDecisions(w, r.Decisions)
	for _, note := range r.Notes {
		fmt.Fprintf(w, "\n%s\n", note)
	}
}

func (r *results) writeTable(w io.Writer, t *table) {
	rows := [][]string{{""}}
	for _, m := range t.metrics {
		rows[0] = append(rows[0], m.name)
	}
	rows[0] = append(rows[0], "±")
	var remarks []string
	for _, s := range r.Systems {
		samples := t.Samples[s.Name]
		if len(samples) == 0 {
			continue
		}
		row := []string{s.Name}
		for _, m := range t.metrics {
			row = append(row, cellText(m, median(values(m, samples)), t.best(m, r.Systems)))
		}
		rows = append(rows, append(row, fmt.Sprintf("%.0f %%", spread(values(t.metrics[0], samples)))))
		remarks = append(remarks, failures(s.Name, samples)...)
	}
	fmt.Fprintf(w, "\n### %s (`%s`)\n\n", t.Title, t.Name)
	writeRows(w, rows)
	for _, remark := range remarks {
		fmt.Fprintf(w, "\n%s\n", remark)
	}
}

func cellText(m metric, v, best float64) string {
	if math.IsNaN(v) || v == 0 {
		return "–" // no proxy, no CPU
	}
	text := fmt.Sprintf("%.*f", m.digits, v)
	if best > 0 {
		text += fmt.Sprintf(" (%.2f)", v/best)
	}
	return text
}

// failures says what went wrong in a system's measurements.
func failures(name string, samples []*sample) []string {
	var all []string
	for _, s := range samples {
		switch {
		case s.Failed != "":
			all = append(all, fmt.Sprintf("%s, round %d: failed: %s", name, s.Round, s.Failed))
		case s.Load.Errors > 0:
			all = append(all, fmt.Sprintf("%s, round %d: %d errors beside %d answers; the first: %s", name, s.Round, s.Load.Errors, s.Load.Requests, s.Load.FirstError))
		}
	}
	return all
}

// writeRows aligns: names to the left, figures to the right.
func writeRows(w io.Writer, rows [][]string) {
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, text := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(text))
		}
	}
	for n, row := range rows {
		for i, text := range row {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(text))
			if i == 0 {
				fmt.Fprintf(w, "| %s%s |", text, pad)
			} else {
				fmt.Fprintf(w, " %s%s |", pad, text)
			}
		}
		fmt.Fprintln(w)
		if n == 0 {
			fmt.Fprintf(w, "|%s|", strings.Repeat("-", widths[0]+2))
			for _, width := range widths[1:] {
				fmt.Fprintf(w, "%s:|", strings.Repeat("-", width+1))
			}
			fmt.Fprintln(w)
		}
	}
}

// finish saves the results, if they are to be.
func (r *results) finish(o *options) error {
	if o.out == "" {
		return nil
	}
	return r.save(o.out)
}

// save writes everything, samples included, as JSON.
func (r *results) save(file string) error {
	for _, t := range r.Workloads {
		t.Medians = make(map[string]map[string]float64)
		for name, samples := range t.Samples {
			t.Medians[name] = make(map[string]float64)
			for _, m := range t.metrics {
				if v := median(values(m, samples)); !math.IsNaN(v) {
					t.Medians[name][m.name] = v
				}
			}
		}
	}
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, append(data, '\n'), 0o644)
}
