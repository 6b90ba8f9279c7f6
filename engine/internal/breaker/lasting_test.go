package breaker_test

import (
	"testing"
	"time"

	"github.com/headgate-go/headgate/engine/internal/breaker"
	"github.com/headgate-go/headgate/engine/internal/source"
)

// A circuit that another process has written opens as it would have: by the flows of both processes that count still.
func TestRestoredWindow(t *testing.T) {
	const s = int64(time.Second)
	for _, tt := range []struct {
		name  string
		early int // flows that fail at 3 s
		late  int // at 5 s
		down  int64
		count uint64 // that opens it
		want  int    // flows that fail before it opens
	}{
		{"few", 7, 3, 0, 30, 20},
		{"more than 16 bits count", 70_000, 10, 0, 70_030, 20},
		{"some are too old", 7, 3, 3 * s, 30, 27},
		{"all are too old", 7, 3, 6 * s, 30, 30},
	} {
		r := &breaker.Rule{Count: tt.count, Least: 1, Step: s, Open: 60 * s, Probes: 1, Successes: 1, Timeout: 60 * s}
		old, next := new(breaker.State), new(breaker.State)
		for i := range tt.early + tt.late {
			at := 3*s + 1
			if i >= tt.early {
				at = 5*s + 1
			}
			ticket, _ := old.Pass(at)
			r.End(old, at, ticket, breaker.Failure, 0)
		}
		// The writing at 5.5 s is at -0.5 s - down of the next process's time, so that steps begin at the same times.
		written := r.Append(nil, old, 5*s+s/2)
		now := s / 4
		if opened, ok := r.Restore(next, written, source.Restoring{Now: now, Then: -s/2 - tt.down}); opened || !ok {
			t.Errorf("%s: Restore = %v, %v", tt.name, opened, ok)
		}
		n := 0
		for ; next.Phase() == breaker.Closed && n < 100; n++ {
			ticket, _ := next.Pass(now)
			r.End(next, now, ticket, breaker.Failure, 0)
		}
		if n != tt.want {
			t.Errorf("%s: it opened after %d flows want %d", tt.name, n, tt.want)
		}
	}
}

// A half-open circuit is one again. Its probes are forgotten: the next flow is one. No circuit is open for longer than the rule says.
func TestRestoredPhases(t *testing.T) {
	const s = int64(time.Second)
	rule := func(open int64) *breaker.Rule {
		return &breaker.Rule{Count: 1, Least: 1, Step: s, Open: open, Probes: 1, Successes: 1, Timeout: 60 * s}
	}
	for _, tt := range []struct {
		name   string
		at     int64 // when it is written; it opened at 0, and lets a probe through 10 s later
		down   int64
		open   int64         // as the rule of the reader has it
		want   breaker.Phase // at once
		closes bool          // the next flow is a probe that closes it
	}{
		{"open", 4 * s, s, 10 * s, breaker.Open, false},
		{"open until now", 4 * s, 6 * s, 10 * s, breaker.HalfOpen, true},
		{"open for longer than the rule says", 4 * s, 0, 0, breaker.HalfOpen, true},
		{"half-open", 11 * s, 0, 10 * s, breaker.HalfOpen, true},
	} {
		r, old, next := rule(10*s), new(breaker.State), new(breaker.State)
		ticket, _ := old.Pass(0)
		r.End(old, 0, ticket, breaker.Failure, 0)
		if tt.at > 10*s {
			r.Admit(old, 10*s)
		}
		reader := rule(tt.open)
		if opened, ok := reader.Restore(next, r.Append(nil, old, tt.at), source.Restoring{Now: s, Then: s - tt.down}); !opened || !ok {
			t.Errorf("%s: Restore = %v, %v want it opened", tt.name, opened, ok)
		}
		if got, _, _ := reader.Usage(next, s); got != tt.want {
			t.Errorf("%s: %v want %v", tt.name, got, tt.want)
		}
		got := reader.Admit(next, s)
		if (got.Ticket != 0) != tt.closes {
			t.Errorf("%s: a flow passes: %v want %v", tt.name, got.Ticket != 0, tt.closes)
		}
		if got.Ticket != 0 {
			if _, change := reader.End(next, s, got.Ticket, breaker.Success, 0); change != breaker.Recovered {
				t.Errorf("%s: a probe that ended well changed %v want it closed", tt.name, change)
			}
		}
	}
}
