// Package benchtable measures rows beside each other in one run, and prints a table of them with the ratios that are targets.
//
// All rows take turns, for several rounds. Serially, rows can also take turns by single calls. The table shows the median over the rounds. A ratio is the median of the ratios of the
// rounds, which is another number than the ratio of two medians.
package benchtable

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"
)

// A Row is one thing to measure: by one goroutine, and by many.
type Row struct {
	Name string

	// Call makes the function to measure, one for each goroutine.
	Call func() func() error

	// InFlight is how many goroutines call at once in parallel; 0 is one for each processor.
	InFlight int

	// ByTurns has calls by one goroutine take turns with those of the other rows that have it, one call at a time and in a random order.
	// Their time is then the median of single calls. Calls that wake up processors take as long as what ran just before them lets them,
	// so a row that runs by itself for a while is not comparable with others. The time has two reads of the clock in it.
	ByTurns bool

	Targets []Target

	// What Table.Measure has found, for each round.
	Serial, Parallel []float64 // ns per call
	Allocs, Bytes    []float64 // per call, in serial
}

// A Target bounds the ratio of a row to another in one column, or how much more it has there.
type Target struct {
	Column Column
	Than   string // name of the other row
	Most   float64

	// Aside marks a ratio that is shown and has no bound.
	Aside bool
}

// AtMost bounds the row in the column: what it is there if than is empty, else its ratio to that other row.
func AtMost(column Column, than string, most float64) Target {
	return Target{Column: column, Than: than, Most: most}
}

// Beside has the table show the row's ratio to another, without a bound.
func Beside(column Column, than string) Target {
	return Target{Column: column, Than: than, Aside: true}
}

// A Column is what a target is about, as the table names it.
type Column string

// The columns.
const (
	InTime     Column = "time"
	InParallel Column = "in parallel"
	InAllocs   Column = "allocs"

	// MoreTime is a bound on the difference, in ns.
	MoreTime Column = "ns more"

	// MoreAllocs is a bound on the difference, where the other row may have none.
	MoreAllocs Column = "allocs more"

	// InScaling is the time of a call in parallel over that of one by itself. Two processors that do not hinder each
	// other halve it.
	InScaling Column = "parallel to alone"
)

// in gives the row's figures in the column, one for each round.
func (r *Row) in(c Column) []float64 {
	switch c {
	case InParallel:
		return r.Parallel
	case InAllocs, MoreAllocs:
		return r.Allocs
	case InScaling:
		scaling := make([]float64, len(r.Parallel))
		for k := range scaling {
			scaling[k] = r.Parallel[k] / r.Serial[k]
		}
		return scaling
	default:
		return r.Serial
	}
}

// A Table is the rows that have been measured.
type Table struct {
	Only *regexp.Regexp // of names; the other rows are left out

	rows []*Row
}

// Measure adds rows, which take turns, of that time each.
func (t *Table) Measure(ctx context.Context, rounds int, each time.Duration, rows []*Row) error {
	if err := flag.Set("test.benchtime", each.String()); err != nil {
		return err
	}
	rows = slices.DeleteFunc(slices.Clone(rows), func(r *Row) bool { return !t.Only.MatchString(r.Name) })
	t.rows = append(t.rows, rows...)
	turning := slices.DeleteFunc(slices.Clone(rows), func(r *Row) bool { return !r.ByTurns })
	for range rounds {
		if err := measureTurns(ctx, each, turning); err != nil {
			return err
		}
		for _, r := range rows {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err := r.measure(); err != nil {
				return fmt.Errorf("%s: %w", r.Name, err)
			}
		}
	}
	return nil
}

// measure measures the row once: serially if it does not do so by turns, and in parallel.
func (r *Row) measure() error {
	if !r.ByTurns {
		if err := r.measureSerial(); err != nil {
			return err
		}
	}
	return r.measureParallel()
}

func (r *Row) measureSerial() error {
	var failed error
	serial := testing.Benchmark(func(b *testing.B) {
		call := r.Call()
		for b.Loop() {
			if err := call(); err != nil {
				failed = err
				b.FailNow()
			}
		}
	})
	if failed != nil {
		return failed
	}
	r.Serial = append(r.Serial, nsPerOp(serial))
	r.Allocs = append(r.Allocs, float64(serial.AllocsPerOp()))
	r.Bytes = append(r.Bytes, float64(serial.AllocedBytesPerOp()))
	return nil
}

// A turn is a row that takes turns.
type turn struct {
	row  *Row
	call func() error
	took []float64 // ns, for each call
}

// measureTurns measures rows serially, by turns, for as long as if each was measured for that time.
func measureTurns(ctx context.Context, each time.Duration, rows []*Row) error {
	turns := make([]*turn, len(rows))
	for i, r := range rows {
		turns[i] = &turn{row: r, call: r.Call()}
		if err := turns[i].allocations(); err != nil {
			return fmt.Errorf("%s: %w", r.Name, err)
		}
	}
	for begin := time.Now(); len(turns) > 0; {
		rand.Shuffle(len(turns), func(i, j int) { turns[i], turns[j] = turns[j], turns[i] })
		for _, t := range turns {
			began := time.Now()
			err := t.call()
			t.took = append(t.took, float64(time.Since(began)))
			if err != nil {
				return fmt.Errorf("%s: %w", t.row.Name, err)
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Since(begin) >= each*time.Duration(len(turns)) {
			break
		}
	}
	for _, t := range turns {
		t.row.Serial = append(t.row.Serial, Median(t.took))
	}
	return nil
}

// allocCalls is how many calls of a row in a round show what it allocates, before it takes turns.
const allocCalls = 50

// allocations measures what calls allocate.
func (t *turn) allocations() error {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range allocCalls {
		if err := t.call(); err != nil {
			return err
		}
	}
	runtime.ReadMemStats(&after)
	t.row.Allocs = append(t.row.Allocs, float64((after.Mallocs-before.Mallocs)/allocCalls))
	t.row.Bytes = append(t.row.Bytes, float64((after.TotalAlloc-before.TotalAlloc)/allocCalls))
	return nil
}

func (r *Row) measureParallel() error {
	failures := make(chan error, 1)
	parallel := testing.Benchmark(func(b *testing.B) {
		var begun atomic.Int64
		if procs := runtime.GOMAXPROCS(0); r.InFlight > 0 {
			b.SetParallelism((r.InFlight + procs - 1) / procs)
		}
		b.RunParallel(func(pb *testing.PB) {
			if r.InFlight > 0 && begun.Add(1) > int64(r.InFlight) {
				return // the processors do not divide it
			}
			call := r.Call()
			for pb.Next() {
				if err := call(); err != nil {
					select {
					case failures <- err:
					default:
					}
					return
				}
			}
		})
	})
	select {
	case err := <-failures:
		return err
	default:
	}
	r.Parallel = append(r.Parallel, nsPerOp(parallel))
	return nil
}

func nsPerOp(r testing.BenchmarkResult) float64 { return float64(r.T) / float64(max(r.N, 1)) }

// Print writes the table: a line for each row, and one more for each further target.
func (t *Table) Print(w io.Writer) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "\tns/op\tin parallel\tB/op\tallocs/op\tratio\tin\tto\ttarget\t")
	for _, r := range t.rows {
		line := fmt.Sprintf("%s\t%.0f\t%.0f\t%.0f\t%.0f", r.Name,
			Median(r.Serial), Median(r.Parallel), Median(r.Bytes), Median(r.Allocs))
		alone := true
		for _, target := range r.Targets {
			if target.Than != "" && t.Row(target.Than) == nil {
				continue
			}
			fmt.Fprintf(tw, "%s\t%s\n", line, t.compare(r, target))
			line, alone = "\t\t\t\t", false
		}
		if alone {
			fmt.Fprintf(tw, "%s\t\t\t\t\t\n", line)
		}
	}
	_ = tw.Flush() // w reports its own errors
}

// Row finds a row that was measured; nil when it was left out.
func (t *Table) Row(name string) *Row {
	for _, r := range t.rows {
		if r.Name == name {
			return r
		}
	}
	return nil
}

// compare gives the columns on a target. A target without another row is a bound on the column itself.
//
// A ratio is the median of the ratios of the rounds. Rows of one round share what the machine is busy with, so this varies less from
// run to run than the ratio of the two medians, which the table shows beside it, and may be on the other side of a bound. A verdict
// is marked if the rounds differ by more than what is left to the bound.
func (t *Table) compare(r *Row, target Target) string {
	unit := ""
	ours := r.in(target.Column)
	if target.Column == InScaling {
		unit = "×"
	}
	if target.Than != "" {
		theirs := t.Row(target.Than).in(target.Column)
		compared := make([]float64, len(ours))
		for k := range ours {
			if target.Column == MoreAllocs || target.Column == MoreTime {
				compared[k] = ours[k] - theirs[k]
			} else {
				compared[k], unit = ours[k]/theirs[k], "×"
			}
		}
		ours = compared
	}
	value := Median(ours)
	text := strconv.FormatFloat(value, 'f', 2, 64)
	if unit == "" {
		text = strconv.FormatFloat(value, 'f', 0, 64)
	}
	bound := ""
	if !target.Aside {
		bound = fmt.Sprintf("≤ %s%s: %s", strconv.FormatFloat(target.Most, 'g', 3, 64), unit, Verdict(value <= target.Most))
		if low, high := middle(ours); low <= target.Most && target.Most < high {
			bound += fmt.Sprintf(", not clear: %.2f to %.2f", low, high)
		}
	}
	return fmt.Sprintf("%s%s\t%s\t%s\t%s\t", text, unit, target.Column, target.Than, bound)
}

// Verdict is what the table has beside a target.
func Verdict(met bool) string {
	if met {
		return "met"
	}
	return "missed"
}

// middle returns the bounds of the middle half of the values.
func middle(values []float64) (low, high float64) {
	sorted := slices.Sorted(slices.Values(values))
	if len(sorted) == 0 {
		return 0, 0
	}
	n := len(sorted) / 4
	return sorted[n], sorted[len(sorted)-1-n]
}

// Median returns the median, 0 of none.
func Median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	if len(sorted) == 0 {
		return 0
	}
	if n := len(sorted); n%2 == 0 {
		return (sorted[n/2-1] + sorted[n/2]) / 2
	}
	return sorted[len(sorted)/2]
}

// Processor names the machine's processor, where the system tells.
func Processor() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "unknown processor"
	}
	defer func() { _ = f.Close() }()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if key, value, ok := strings.Cut(lines.Text(), ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "unknown processor"
}
