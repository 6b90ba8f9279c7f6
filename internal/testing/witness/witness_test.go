package witness_test

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/headgate-go/headgate/internal/testing/witness"
)

func TestWorst(t *testing.T) {
	const s = time.Second
	bound := witness.Bound{Capacity: 10, Rate: 5}
	for _, tt := range []struct {
		name       string
		admissions []witness.Admission
		want       witness.Span
		broken     bool
	}{
		{"none", nil, witness.Span{}, false},
		{"one", []witness.Admission{{1 * s, 2 * s, 3}}, witness.Span{From: 1 * s, To: 2 * s, Tokens: 3, Allowed: 15}, false},
		{"at once", []witness.Admission{{1 * s, 1 * s, 8}, {1 * s, 1 * s, 3}}, witness.Span{From: 1 * s, To: 1 * s, Tokens: 11, Allowed: 10}, true},
		{"as much as there is", []witness.Admission{{1 * s, 1 * s, 10}, {2 * s, 2 * s, 5}}, witness.Span{From: 1 * s, To: 1 * s, Tokens: 10, Allowed: 10}, false},
		{"too soon", []witness.Admission{{1 * s, 1 * s, 10}, {2 * s, 2 * s, 6}}, witness.Span{From: 1 * s, To: 2 * s, Tokens: 16, Allowed: 15}, true},
		{"perhaps too soon", []witness.Admission{{1 * s, 1 * s, 10}, {2 * s, 3 * s, 6}}, witness.Span{From: 1 * s, To: 1 * s, Tokens: 10, Allowed: 10}, false},
		{"long after a burst", []witness.Admission{{1 * s, 1 * s, 10}, {100 * s, 100 * s, 6}, {101 * s, 101 * s, 10}}, witness.Span{From: 100 * s, To: 101 * s, Tokens: 16, Allowed: 15}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := bound.Worst(tt.admissions); got != tt.want || got.Broken() != tt.broken {
				t.Errorf("Worst() = %+v, broken %v want %+v, broken %v", got, got.Broken(), tt.want, tt.broken)
			}
		})
	}
}

// The worst of all spans is as bad as the one that a look at each of them finds.
func TestWorstOfAll(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bound := witness.Bound{Capacity: rapid.Float64Range(1, 10).Draw(t, "capacity"), Rate: rapid.Float64Range(0, 10).Draw(t, "rate")}
		admissions := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) witness.Admission {
			asked := time.Duration(rapid.IntRange(0, 20).Draw(t, "asked")) * 100 * time.Millisecond
			return witness.Admission{
				Asked: asked, Told: asked + time.Duration(rapid.IntRange(0, 5).Draw(t, "took"))*100*time.Millisecond,
				Tokens: rapid.Float64Range(0, 5).Draw(t, "tokens"),
			}
		}), 1, 30).Draw(t, "admissions")
		most := math.Inf(-1)
		for _, first := range admissions {
			for _, last := range admissions {
				if first.Asked > last.Told {
					continue
				}
				tokens := 0.0
				for _, a := range admissions {
					if a.Asked >= first.Asked && a.Told <= last.Told {
						tokens += a.Tokens
					}
				}
				most = max(most, tokens-bound.Capacity-bound.Rate*(last.Told-first.Asked).Seconds())
			}
		}
		got := bound.Worst(admissions)
		if beyond := got.Tokens - got.Allowed; math.Abs(beyond-most) > 1e-6 {
			t.Errorf("Worst() = %+v, %v beyond the bound; want %v", got, beyond, most)
		}
	})
}

func TestSince(t *testing.T) {
	const s = time.Second
	bound := witness.Bound{Capacity: 10, Rate: 5}
	for _, tt := range []struct {
		name       string
		admissions []witness.Admission
		want       witness.Span
		broken     bool
	}{
		{"none", nil, witness.Span{}, false},
		{"as much as there is", []witness.Admission{{1 * s, 1 * s, 10}, {2 * s, 3 * s, 10}}, witness.Span{From: 1 * s, To: 1 * s, Tokens: 10, Allowed: 10}, false},
		{"too much", []witness.Admission{{2 * s, 3 * s, 11}, {1 * s, 1 * s, 10}}, witness.Span{From: 1 * s, To: 3 * s, Tokens: 21, Allowed: 20}, true},
		{"a burst that was saved for", []witness.Admission{{1 * s, 1 * s, 1}, {9 * s, 9 * s, 40}}, witness.Span{From: 1 * s, To: 1 * s, Tokens: 1, Allowed: 10}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := bound.Since(tt.admissions); got != tt.want || got.Broken() != tt.broken {
				t.Errorf("Since() = %+v, broken %v want %+v, broken %v", got, got.Broken(), tt.want, tt.broken)
			}
		})
	}
}

// The witness believes a bucket that is one, whatever the delays, and finds out one that gives a tenth too much.
func TestBuckets(t *testing.T) {
	bound := witness.Bound{Capacity: 20, Rate: 100}
	for _, tt := range []struct {
		name   string
		rate   float64
		broken bool
	}{
		{"as it should be", 100, false},
		{"too much", 110, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(1, 2))
			tokens, last := bound.Capacity, time.Duration(0)
			var admissions []witness.Admission
			for now := time.Duration(0); now < time.Minute; now += time.Duration(r.IntN(int(10 * time.Millisecond))) {
				tokens, last = min(bound.Capacity, tokens+tt.rate*(now-last).Seconds()), now
				if tokens < 1 {
					continue
				}
				tokens--
				admissions = append(admissions, witness.Admission{
					Asked: now - time.Duration(r.IntN(int(20*time.Millisecond))), Told: now + time.Duration(r.IntN(int(20*time.Millisecond))), Tokens: 1,
				})
			}
			r.Shuffle(len(admissions), func(i, j int) { admissions[i], admissions[j] = admissions[j], admissions[i] })
			before := slices.Clone(admissions)
			if got := bound.Worst(admissions); got.Broken() != tt.broken {
				t.Errorf("Worst() = %+v, broken %v want %v", got, got.Broken(), tt.broken)
			}
			if !slices.Equal(admissions, before) {
				t.Error("the admissions are in another order than before")
			}
		})
	}
}

func TestAtOnce(t *testing.T) {
	for _, tt := range []struct {
		name  string
		holds []witness.Hold
		most  int
		at    time.Duration
	}{
		{"none", nil, 0, 0},
		{"one", []witness.Hold{{1, 2}}, 1, 1},
		{"one after another", []witness.Hold{{2, 3}, {1, 2}, {3, 4}}, 1, 1},
		{"two", []witness.Hold{{2, 4}, {1, 3}, {3, 4}}, 2, 2},
		{"all", []witness.Hold{{1, 9}, {3, 9}, {2, 9}}, 3, 3},
		{"given back before it was told", []witness.Hold{{3, 2}, {2, 2}}, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if most, at := witness.AtOnce(tt.holds); most != tt.most || at != tt.at {
				t.Errorf("AtOnce() = %d at %v want %d at %v", most, at, tt.most, tt.at)
			}
		})
	}
}
