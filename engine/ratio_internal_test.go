package engine

import (
	"math"
	"testing"
)

func TestRatio(t *testing.T) {
	type flow struct{ estimated, cost float64 }
	for _, tt := range []struct {
		name  string
		flows []flow
		want  float64
	}{
		{"no flows", nil, 1},
		{"one", []flow{{2, 6}}, 3},
		{"by the sums, not by the flows", []flow{{1, 4}, {3, 4}}, 2},
		{"half", []flow{{10, 5}}, 0.5},
		{"too cheap to count", []flow{{10, 0}}, 1.0 / 16},
		{"too dear to count", []flow{{1, 1e12}}, 16},
		{"one that is too dear", []flow{{1, 1}, {1, 1}, {1, 1}, {1, 1e12}}, 19.0 / 4},
		{"estimated at nothing", []flow{{0, 100}}, 1},
		{"as much as there is", []flow{{math.MaxFloat64, math.MaxFloat64}, {math.MaxFloat64, 0}}, 17.0 / 32},
		{"as little as there is", []flow{{math.SmallestNonzeroFloat64, 1}}, 16},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var r ratio
			for _, f := range tt.flows {
				r.learn(f.estimated, f.cost)
			}
			if got := r.of(2); math.Abs(got-2*tt.want) > 1e-9 {
				t.Errorf("2 count for %v want %v", got, 2*tt.want)
			}
		})
	}
}

// The ratio follows what flows cost now.
func TestRatioMoves(t *testing.T) {
	var r ratio
	for range 1000 {
		r.learn(1, 8)
	}
	if got := r.of(1); got != 8 {
		t.Errorf("1 counts for %v want 8", got)
	}
	for range 5 * settledFlows {
		r.learn(1, 2)
	}
	if got := r.of(1); math.Abs(got-2) > 0.05 {
		t.Errorf("1 counts for %v want 2", got)
	}
}
