package bucket

import (
	"math"
	"testing"
	"time"

	"github.com/headgate-go/headgate/engine/internal/source"
)

// A bucket keeps what it has used when its numbers change, after what has come by the old ones.
func TestInherit(t *testing.T) {
	const s = int64(time.Second)
	rule := func(capacity, fill float64, interval int64) *Rule {
		return &Rule{Capacity: capacity, Fill: fill, Interval: float64(interval)}
	}
	step := func(r *Rule) *Rule { r.Step = true; return r }
	delay := func(r *Rule) *Rule { r.Delay = true; return r }
	for _, tt := range []struct {
		name          string
		before, after *Rule
		used          float64
		at            int64   // of the change
		is            float64 // then
		later         int64   // after the change
		then          float64
	}{
		{"more", rule(10, 1, s), rule(20, 1, s), 6, 0, 14, s, 15},
		{"less", rule(10, 1, s), rule(5, 1, s), 3, 0, 2, s, 3},
		{"less than is used", rule(10, 1, s), rule(5, 1, s), 6, 0, 0, s, 1},
		{"full stays full", rule(10, 1, s), rule(5, 1, s), 0, 0, 5, s, 5},
		{"what has come by the old rate", rule(10, 1, s), rule(10, 5, s), 9, 2 * s, 3, s, 8},
		{"no more than the old capacity", rule(10, 1, s), rule(20, 1, s), 2, 100 * s, 20, s, 20},
		{"debt stays", rule(10, 1, s), rule(5, 1, s), 13, 0, -3, s, -2},
		{"debt is paid by more capacity", rule(10, 1, s), rule(20, 1, s), 13, 0, 7, s, 8},
		{"a refusal", rule(10, 1, s), rule(0, 0, s), 6, 0, 0, s, 0},
		{"a step that is under way", step(rule(10, 1, 10*s)), step(rule(10, 2, 10*s)), 6, 9 * s, 4, s, 6},
		{"longer steps", step(rule(10, 1, 10*s)), step(rule(10, 1, 20*s)), 6, 9 * s, 4, 11 * s, 5},
		{"shorter steps", step(rule(10, 1, 3600*s)), step(rule(10, 1, s)), 6, 3000 * s, 4, 2 * s, 6},
		{"a delay that would be over", delay(rule(10, 0.001, s)), delay(rule(10, 1, s)), 6, s, 4, 12 * s, 6},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := new(State)
			tt.before.Fresh(b, 0)
			tt.before.Take(b, 0, min(tt.used, tt.before.Capacity))
			tt.before.MaxDebt = -1
			tt.before.Settle(b, 0, 0, max(tt.used-tt.before.Capacity, 0), 0)
			tt.after.Inherit(b, tt.before, tt.at)
			if got := tt.after.Usage(b, tt.at); math.Abs(got.Remaining-tt.is) > source.Slack || got.Capacity != tt.after.Capacity {
				t.Errorf("after the change %+v want %v", got, tt.is)
			}
			if got := tt.after.Usage(b, tt.at+tt.later).Remaining; math.Abs(got-tt.then) > source.Slack {
				t.Errorf("later %v want %v", got, tt.then)
			}
		})
	}
}

// Other numbers that come into force with a change of the numbers, or go with it, bring no tokens.
func TestInheritOfOtherNumbers(t *testing.T) {
	const s = int64(time.Second)
	rule := func(capacity float64, other bool, otherCapacity float64) *Rule {
		r := &Rule{Capacity: capacity, Fill: 1, Interval: float64(s), Changes: new(Changes)}
		r.Other = &Rule{Capacity: otherCapacity, Fill: 1, Interval: float64(s)}
		if other {
			r.Changes.Set(0, true)
		}
		return r
	}
	for _, tt := range []struct {
		name          string
		before, after *Rule
		used          float64
		is, later     float64 // at once, and when the own numbers are in force
	}{
		{"none", rule(10, false, 0), rule(20, false, 0), 6, 14, 14},
		{"both, the same", rule(10, true, 4), rule(20, true, 4), 3, 1, 1},
		{"both, more", rule(10, true, 4), rule(10, true, 6), 3, 3, 3},
		{"both, less", rule(10, true, 4), rule(10, true, 2), 1, 1, 1},
		{"they go", rule(10, true, 4), rule(10, false, 4), 4, 0, 0},
		{"they go, with more", rule(10, true, 4), rule(12, false, 4), 4, 2, 2},
		{"they go, of a larger capacity", rule(10, true, 40), rule(10, false, 40), 0, 10, 10},
		{"they come", rule(10, false, 4), rule(10, true, 4), 2, 4, 4},
		{"they come, of a larger capacity", rule(10, false, 40), rule(10, true, 40), 2, 8, 8},
		{"they come, to a debt", rule(10, false, 0), rule(10, true, 0), 12, -2, -2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := new(State)
			tt.before.Fresh(b, 0)
			tt.before.Take(b, 0, min(tt.used, tt.before.Current().Capacity))
			tt.before.MaxDebt = -1
			tt.before.Settle(b, 0, 0, max(tt.used-tt.before.Current().Capacity, 0), 0)
			tt.after.Inherit(b, tt.before, 0)
			if got := tt.after.Usage(b, 0).Remaining; got != tt.is {
				t.Errorf("%v tokens want %v", got, tt.is)
			}
			tt.after.Changes.Set(0, false)
			if got := tt.after.Usage(b, 0).Remaining; got != tt.later {
				t.Errorf("%v tokens by the own numbers want %v", got, tt.later)
			}
		})
	}
}
