package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv(serveVariable) == "" {
		goleak.VerifyTestMain(m)
		return
	}
	if err := serveAgent(context.Background(), os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// Every row measures something, and every target is judged; how fast things are is not a test's business.
func TestProcessRun(t *testing.T) {
	var out bytes.Buffer
	if err := run(t.Context(), []string{"-rounds", "1", "-time", "1ms", "-keys", "1000"}, &out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"Guard, one keyed rate limiter", "Guard, one keyed rate limiter, 10000 overrides", "local beside a store", "Guard, one keyed quota scheduler", "Guard, one concurrency scheduler", "Guard, one sampler", "Guard, one keyed circuit breaker", "failsafe-go circuit breaker", "Cached, a hit",
		"Guard, queue and wake, 1 waiter", "Guard, queue and wake, 10000 waiters", "failsafe-go bulkhead with queueing", "failsafe-go adaptive limiter", "Do, label maps in turn, 1000 keys", "gobreaker", "x/time/rate",
		"HTTP middleware on the engine", "failsafe-go HTTP handler", "gRPC interceptor on the engine",
		"a key for each caller", "parallel to alone", "floor: clock read", "16 MiB of live objects",
		"Do over gRPC, with a FlowEnd", "the agent breaker open", "checks a second", "slots busy", "bytes a key", "keys in debt",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the table does not have %q:\n%s", want, &out)
		}
	}
	if got, want := strings.Count(out.String(), ": met")+strings.Count(out.String(), ": missed"), 34; got != want {
		t.Errorf("%d targets judged want %d:\n%s", got, want, &out)
	}
}

// As many call at once as the row says, whatever the number of processors.
func TestInFlight(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(3))
	var callers atomic.Int64
	r := &row{inFlight: 64, call: func() func() error {
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
			if got := median(tt.values); got != tt.want {
				t.Errorf("median(%v) = %v want %v", tt.values, got, tt.want)
			}
		})
	}
}

// A ratio is the median of those of the rounds. The verdict tells whether the rounds agree.
func TestCompare(t *testing.T) {
	other := &row{name: "other", serial: []float64{100, 200, 300, 400}, parallel: []float64{50, 50, 60, 60}, allocs: []float64{0, 0, 0, 0}}
	busy := &row{name: "busy", serial: []float64{150, 190, 450, 380}, parallel: []float64{100, 100, 120, 120}, allocs: []float64{1, 1, 1, 1}} // ratios of 1.5, 0.95, 1.5, 0.95
	all := table{rows: []*row{other, busy}}
	for _, tt := range []struct {
		target target
		want   string
	}{
		{target{inTime, "other", 1.3, false}, "1.23×\ttime\tother\t≤ 1.3×: met, not clear: 0.95 to 1.50\t"},
		{target{inTime, "other", 1.05, false}, "1.23×\ttime\tother\t≤ 1.05×: missed, not clear: 0.95 to 1.50\t"},
		{target{inTime, "other", 0.9, false}, "1.23×\ttime\tother\t≤ 0.9×: missed\t"},
		{target{inTime, "other", 1.5, false}, "1.23×\ttime\tother\t≤ 1.5×: met\t"},
		{target{inTime, "other", 0, true}, "1.23×\ttime\tother\t\t"},
		{target{inParallel, "other", 1.9, false}, "2.00×\tin parallel\tother\t≤ 1.9×: missed\t"},
		{target{inAllocs, "", 1, false}, "1\tallocs\t\t≤ 1: met\t"},
		{target{moreAllocs, "other", 0, false}, "1\tallocs more\tother\t≤ 0: missed\t"},
	} {
		if got := all.compare(busy, tt.target); got != tt.want {
			t.Errorf("compare(%+v) = %q want %q", tt.target, got, tt.want)
		}
	}
}
