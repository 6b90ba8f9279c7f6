package calendar_test

import (
	"testing"
	"time"

	"github.com/headgate-go/headgate/engine/internal/calendar"
	"github.com/headgate-go/headgate/engine/internal/source"
)

// What is left of a period counts in that period, whatever the clock of the process was set to since: in a later one the quota is
// whole, and where the clock went back, it counts in the present one.
func TestRestoreAcrossClocks(t *testing.T) {
	const hour = int64(time.Hour)
	written := time.Date(2026, 7, 1, 12, 30, 0, 0, time.UTC)
	ruleAt := func(epoch time.Time) *calendar.Rule {
		return &calendar.Rule{Amount: 10, Periods: calendar.Periods{Unit: calendar.Hour, Zone: time.UTC}, Epoch: epoch}
	}
	for _, tt := range []struct {
		name        string
		clock       time.Duration // from the writing to the reading
		left, later float64       // an hour later
	}{
		{"at once", 0, 7, 10},
		{"the same hour", 29 * time.Minute, 7, 10},
		{"the next hour", 31 * time.Minute, 10, 10},
		{"the next year", 366 * 24 * time.Hour, 10, 10},
		{"back within the hour", -29 * time.Minute, 7, 10},
		{"back by hours", -5 * time.Hour, 7, 10},
		{"back by a year", -366 * 24 * time.Hour, 7, 10},
	} {
		before, old := ruleAt(written.Add(-17*time.Minute)), new(calendar.State)
		before.Fresh(old, 0)
		before.Take(old, int64(17*time.Minute), 3)
		state := before.Append(nil, old, int64(17*time.Minute))
		now := int64(5 * time.Second)
		after, next := ruleAt(written.Add(tt.clock-5*time.Second)), new(calendar.State)
		after.Fresh(next, 0)
		at := source.Restoring{Now: now, Then: now - max(int64(tt.clock), 0)}
		if _, ok := after.Restore(next, state, at); !ok {
			t.Errorf("%s: not restored", tt.name)
		}
		if got := after.Usage(next, now).Remaining; got != tt.left {
			t.Errorf("%s: %v left want %v", tt.name, got, tt.left)
		}
		if got := after.Usage(next, now+hour).Remaining; got != tt.later {
			t.Errorf("%s: %v left an hour later want %v", tt.name, got, tt.later)
		}
	}
}

// Of what a process has used already and what was written, the smaller rest counts.
func TestRestoreIntoUsed(t *testing.T) {
	r := &calendar.Rule{Amount: 10, Periods: calendar.Periods{Unit: calendar.Day, Zone: time.UTC}, Epoch: time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)}
	for _, tt := range []struct{ written, used, want float64 }{{3, 0, 7}, {3, 2, 7}, {3, 6, 4}} {
		old, next := new(calendar.State), new(calendar.State)
		r.Fresh(old, 0)
		r.Fresh(next, 0)
		r.Take(old, 1, tt.written)
		r.Take(next, 1, tt.used)
		if _, ok := r.Restore(next, r.Append(nil, old, 2), source.Restoring{Now: 3, Then: 2}); !ok || r.Usage(next, 3).Remaining != tt.want {
			t.Errorf("%v written, %v used: %v, %v left want %v", tt.written, tt.used, ok, r.Usage(next, 3).Remaining, tt.want)
		}
	}
}
