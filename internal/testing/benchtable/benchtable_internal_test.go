package benchtable

import (
	"flag"
	"regexp"
	"runtime"
	"sync/atomic"
	"testing"
	"time"
)

// As many call at once as the row says, whatever the number of processors.
func TestInFlight(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(3))
	var callers atomic.Int64
	r := &Row{InFlight: 64, Call: func() func() error {
		callers.Add(1)
		return func() error { return nil }
	}}
	if err := flag.Set("test.benchtime", "1x"); err != nil { // one round: each makes its callers
		t.Fatal(err)
	}
	if err := r.measure(); err != nil {
		t.Fatal(err)
	}
	if got := callers.Load(); got != 1+64 { // one of them in serial
		t.Errorf("%d callers want 1 and 64", got)
	}
}

// Rows that take turns by single calls call once each, and then once more. Every row has one figure in each column.
func TestByTurns(t *testing.T) {
	var order []string
	row := func(name string, byTurns bool) *Row {
		return &Row{Name: name, ByTurns: byTurns, InFlight: 1, Call: func() func() error {
			return func() error {
				order = append(order, name)
				return nil
			}
		}}
	}
	rows := []*Row{row("a", true), row("b", true), row("block", false)}
	table := Table{Only: regexp.MustCompile("")}
	if err := table.Measure(t.Context(), 1, time.Microsecond, rows); err != nil {
		t.Fatal(err)
	}
	if turn := order[2*allocCalls:][:2]; turn[0] == turn[1] {
		t.Errorf("the first turn has %v want a call of each", turn)
	}
	for _, r := range rows {
		if len(r.Serial) != 1 || len(r.Parallel) != 1 || len(r.Allocs) != 1 || len(r.Bytes) != 1 {
			t.Errorf("%s has %d figures in serial, %d in parallel, and %d and %d of what it allocates, want one of each",
				r.Name, len(r.Serial), len(r.Parallel), len(r.Allocs), len(r.Bytes))
		}
	}
}

func TestMedian(t *testing.T) {
	for _, tt := range []struct {
		name   string
		values []float64
		want   float64
	}{
		{"none", nil, 0},
		{"one", []float64{3}, 3},
		{"odd", []float64{9, 1, 3}, 3},
		{"even", []float64{9, 1, 3, 5}, 4},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := Median(tt.values); got != tt.want {
				t.Errorf("Median(%v) = %v want %v", tt.values, got, tt.want)
			}
		})
	}
}

// A ratio is the median of those of the rounds. The verdict tells whether the rounds agree.
func TestCompare(t *testing.T) {
	other := &Row{Name: "other", Serial: []float64{100, 200, 300, 400}, Parallel: []float64{50, 50, 60, 60}, Allocs: []float64{0, 0, 0, 0}}
	busy := &Row{Name: "busy", Serial: []float64{150, 190, 450, 380}, Parallel: []float64{100, 100, 120, 120}, Allocs: []float64{1, 1, 1, 1}} // ratios of 1.5, 0.95, 1.5, 0.95
	all := Table{rows: []*Row{other, busy}}
	for _, tt := range []struct {
		target Target
		want   string
	}{
		{AtMost(InTime, "other", 1.3), "1.23×\ttime\tother\t≤ 1.3×: met, not clear: 0.95 to 1.50\t"},
		{AtMost(InTime, "other", 1.05), "1.23×\ttime\tother\t≤ 1.05×: missed, not clear: 0.95 to 1.50\t"},
		{AtMost(InTime, "other", 0.9), "1.23×\ttime\tother\t≤ 0.9×: missed\t"},
		{AtMost(InTime, "other", 1.5), "1.23×\ttime\tother\t≤ 1.5×: met\t"},
		{Beside(InTime, "other"), "1.23×\ttime\tother\t\t"},
		{AtMost(InParallel, "other", 1.9), "2.00×\tin parallel\tother\t≤ 1.9×: missed\t"},
		{AtMost(InAllocs, "", 1), "1\tallocs\t\t≤ 1: met\t"},
		{AtMost(MoreTime, "other", 100), "20\tns more\tother\t≤ 100: met\t"},
		{AtMost(MoreAllocs, "other", 0), "1\tallocs more\tother\t≤ 0: missed\t"},
	} {
		if got := all.compare(busy, tt.target); got != tt.want {
			t.Errorf("compare(%+v) = %q want %q", tt.target, got, tt.want)
		}
	}
}
