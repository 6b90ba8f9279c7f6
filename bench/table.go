package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
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

// A row is one thing to measure: by one goroutine, and by many.
type row struct {
	name string

	// call makes the function to measure, one for each goroutine.
	call func() func() error

	// inFlight is how many goroutines call at once in parallel; 0 is one for each processor.
	inFlight int

	targets []target

	serial, parallel []float64 // ns per call, for each round
	allocs, bytes    []float64 // per call, in serial
}

// A target bounds the ratio of a row to another in one column, or how much more it has there.
type target struct {
	column column
	than   string // name of the other row
	most   float64

	// aside marks a ratio that is shown and has no bound.
	aside bool
}

// A column is what a target is about, as the table names it.
type column string

const (
	inTime     column = "time"
	inParallel column = "in parallel"
	inAllocs   column = "allocs"

	// moreAllocs is a bound on the difference, where the other row may have none.
	moreAllocs column = "allocs more"

	// inScaling is the time of a call in parallel over that of one by itself. Two processors that do not hinder each
	// other halve it.
	inScaling column = "parallel to alone"
)

// in gives the row's figures in the column, one for each round.
func (r *row) in(c column) []float64 {
	switch c {
	case inParallel:
		return r.parallel
	case inAllocs, moreAllocs:
		return r.allocs
	case inScaling:
		scaling := make([]float64, len(r.parallel))
		for k := range scaling {
			scaling[k] = r.parallel[k] / r.serial[k]
		}
		return scaling
	default:
		return r.serial
	}
}

// table is the rows that have been measured.
type table struct {
	rows []*row
	only *regexp.Regexp // of names; the other rows are left out
}

// measure adds rows, which take turns, of that time each.
func (t *table) measure(ctx context.Context, rounds int, each time.Duration, rows []*row) error {
	if err := flag.Set("test.benchtime", each.String()); err != nil {
		return err
	}
	rows = slices.DeleteFunc(slices.Clone(rows), func(r *row) bool { return !t.only.MatchString(r.name) })
	t.rows = append(t.rows, rows...)
	for range rounds {
		for _, r := range rows {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err := r.measure(); err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
		}
	}
	return nil
}

func (r *row) measure() error {
	var failed error
	serial := testing.Benchmark(func(b *testing.B) {
		call := r.call()
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
	failures := make(chan error, 1)
	parallel := testing.Benchmark(func(b *testing.B) {
		var begun atomic.Int64
		if procs := runtime.GOMAXPROCS(0); r.inFlight > 0 {
			b.SetParallelism((r.inFlight + procs - 1) / procs)
		}
		b.RunParallel(func(pb *testing.PB) {
			if r.inFlight > 0 && begun.Add(1) > int64(r.inFlight) {
				return // the processors do not divide it
			}
			call := r.call()
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
	r.serial = append(r.serial, nsPerOp(serial))
	r.parallel = append(r.parallel, nsPerOp(parallel))
	r.allocs = append(r.allocs, float64(serial.AllocsPerOp()))
	r.bytes = append(r.bytes, float64(serial.AllocedBytesPerOp()))
	return nil
}

func nsPerOp(r testing.BenchmarkResult) float64 { return float64(r.T) / float64(max(r.N, 1)) }

// print writes the table: a line for each row, and one more for each further target.
func (t *table) print(w io.Writer) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "\tns/op\tin parallel\tB/op\tallocs/op\tratio\tin\tto\ttarget\t")
	for _, r := range t.rows {
		line := fmt.Sprintf("%s\t%.0f\t%.0f\t%.0f\t%.0f", r.name,
			median(r.serial), median(r.parallel), median(r.bytes), median(r.allocs))
		alone := true
		for _, target := range r.targets {
			if target.than != "" && t.row(target.than) == nil {
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

// row finds a row that was measured; nil when it was left out.
func (t *table) row(name string) *row {
	for _, r := range t.rows {
		if r.name == name {
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
func (t *table) compare(r *row, target target) string {
	unit := ""
	ours := r.in(target.column)
	if target.column == inScaling {
		unit = "×"
	}
	if target.than != "" {
		theirs := t.row(target.than).in(target.column)
		compared := make([]float64, len(ours))
		for k := range ours {
			if target.column == moreAllocs {
				compared[k] = ours[k] - theirs[k]
			} else {
				compared[k], unit = ours[k]/theirs[k], "×"
			}
		}
		ours = compared
	}
	value := median(ours)
	text := strconv.FormatFloat(value, 'f', 2, 64)
	if unit == "" {
		text = strconv.FormatFloat(value, 'f', 0, 64)
	}
	bound := ""
	if !target.aside {
		bound = fmt.Sprintf("≤ %s%s: %s", strconv.FormatFloat(target.most, 'g', 3, 64), unit, verdict(value <= target.most))
		if low, high := middle(ours); low <= target.most && target.most < high {
			bound += fmt.Sprintf(", not clear: %.2f to %.2f", low, high)
		}
	}
	return fmt.Sprintf("%s%s\t%s\t%s\t%s\t", text, unit, target.column, target.than, bound)
}

func verdict(met bool) string {
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

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	if len(sorted) == 0 {
		return 0
	}
	if n := len(sorted); n%2 == 0 {
		return (sorted[n/2-1] + sorted[n/2]) / 2
	}
	return sorted[len(sorted)/2]
}

// processor names the machine's processor, where the system tells.
func processor() string {
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
