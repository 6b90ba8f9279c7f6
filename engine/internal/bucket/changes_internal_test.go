package bucket

import (
	"math"
	"testing"

	"pgregory.net/rapid"
)

// changing is a rule of capacity 10 and 1 token a second, and of a capacity of 4 and 2 tokens a second at other times.
func changing(step, delay bool) *Rule {
	r := &Rule{Capacity: 10, Fill: 1, Interval: 1e9, Step: step, Delay: delay, Changes: new(Changes)}
	r.Other = &Rule{Capacity: 4, Fill: 2, Interval: 1e9, Step: step, Delay: delay, MaxDebt: 10}
	return r
}

func TestChanges(t *testing.T) {
	at := seconds
	for _, tt := range []struct {
		name    string
		changes map[float64]bool
		took    float64 // at 0
		at      float64
		want    float64
	}{
		{"none", nil, 10, 3, 3},
		{"in force", map[float64]bool{1: true}, 10, 2, 3},
		{"no more than the other capacity", map[float64]bool{1: true}, 10, 5, 4},
		{"what is beyond is lost", map[float64]bool{1: true}, 0, 1, 4},
		{"and does not come back", map[float64]bool{1: true, 2: false}, 0, 3, 5},
		{"over and again", map[float64]bool{1: true, 2: false, 3: true}, 10, 3.25, 4},
		{"long ago", map[float64]bool{1: true, 2: false}, 10, 100, 10},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, b := changing(false, false), new(State)
			r.Fresh(b, 0)
			r.Take(b, 0, tt.took)
			for s := range 10 {
				if other, ok := tt.changes[float64(s)]; ok {
					r.Changes.Set(at(float64(s)), other)
				}
			}
			if got := r.Usage(b, at(tt.at)); math.Abs(got.Remaining-tt.want) > 1e-6 {
				t.Errorf("Usage = %+v, want %v tokens", got, tt.want)
			}
		})
	}
}

// A bucket that nobody has used for some changes has what one has that was looked at each time, or less if its fill is
// delayed. It never has more than the numbers in force allow.
func TestChangesOfUnusedBuckets(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		step, delay := rapid.Bool().Draw(t, "step"), rapid.Bool().Draw(t, "delay")
		r := changing(step, delay)
		r.Other.Capacity, r.Other.Fill = rapid.SampledFrom([]float64{0, 4, 20}).Draw(t, "capacity"), rapid.SampledFrom([]float64{0, 2}).Draw(t, "fill")
		var watched, unused State
		r.Fresh(&watched, 0)
		r.Fresh(&unused, 0)
		now, other := int64(0), false
		for range rapid.IntRange(1, 30).Draw(t, "events") {
			now += rapid.Int64Range(0, 5e9).Draw(t, "time")
			if changes := rapid.IntRange(0, 3).Draw(t, "changes"); changes == 0 {
				want := rapid.Float64Range(0, 12).Draw(t, "tokens")
				took := r.Take(&unused, now, want)
				watched = unused
				if most := max(r.Capacity, r.Other.Capacity); took.OK && want > most+1e-6 || took.Left > most {
					t.Fatalf("Take(%v) = %+v", want, took)
				}
				continue
			}
			other = !other
			r.Changes.Set(now, other)
			left := r.Usage(&watched, now).Remaining
			is := r
			if other {
				is = r.Other
			}
			if left > is.Capacity+1e-6 {
				t.Fatalf("%v tokens, and a capacity of %v", left, is.Capacity)
			}
		}
		seen, is := r.Usage(&watched, now).Remaining, r.Usage(&unused, now).Remaining
		if latest := r.Changes.latest.Load(); latest != nil && len(*latest) == mostChanges {
			return // it may not know of all that the other one has seen
		}
		if is > seen+1e-6 || !delay && is < seen-1e-6 {
			t.Fatalf("%v tokens, %v in a bucket that was looked at", is, seen)
		}
	})
}

// A bucket that is empty is not as good as new when other numbers let it hold nothing.
func TestChangesAndIdleBuckets(t *testing.T) {
	r, b := changing(false, false), new(State)
	r.Other.Capacity, r.Other.Fill = 0, 0
	r.Fresh(b, 0)
	r.Take(b, 0, 10)
	r.Changes.Set(seconds(1), true)
	for _, tt := range []struct {
		at   float64
		want bool
	}{{2, false}, {9, false}, {11.1, true}} {
		if got := r.Idle(b, seconds(tt.at)); got != tt.want {
			t.Errorf("at %v: Idle = %t", tt.at, got)
		}
	}
}

// Tokens that the other numbers never bring come later if the own ones bring them.
func TestChangesAndTokensThatComeLater(t *testing.T) {
	for _, tt := range []struct {
		name   string
		other  bool
		tokens float64
		change func(*Rule)
		want   bool
	}{
		{"own numbers, some time", false, 5, nil, false},
		{"own numbers, never", false, 11, nil, false},
		{"others, some time", true, 3, nil, false},
		{"others, never", true, 5, nil, true},
		{"others without a fill", true, 3, func(r *Rule) { r.Other.Fill = 0 }, true},
		{"neither", true, 11, nil, false},
		{"neither fills", true, 3, func(r *Rule) { r.Fill, r.Other.Fill = 0, 0 }, false},
	} {
		r, b := changing(false, false), new(State)
		if tt.change != nil {
			tt.change(r)
		}
		r.Fresh(b, 0)
		r.Take(b, 0, 10)
		r.Changes.Set(0, tt.other)
		if got := r.Take(b, 0, tt.tokens); got.OK || got.Later != tt.want {
			t.Errorf("%s: Take = %+v", tt.name, got)
		}
	}
}
