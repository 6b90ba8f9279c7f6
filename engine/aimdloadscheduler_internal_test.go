package engine

import (
	"math"
	"testing"

	"github.com/headgate-go/headgate/policy"
)

func TestAIMD(t *testing.T) {
	nan := math.NaN()
	type step struct {
		signal, setpoint float64
		unconfirmed      bool
		admitted         float64
		want             float64 // NaN: everything
	}
	for _, tt := range []struct {
		name   string
		policy policy.AIMDLoadScheduler
		steps  []step
	}{
		{"no overload", policy.AIMDLoadScheduler{}, []step{{50, 100, false, 1, nan}, {100, 100, false, 1, nan}}},
		{"overload", policy.AIMDLoadScheduler{}, []step{{200, 100, false, 1, 0.5}}},
		{"overload of what was let in", policy.AIMDLoadScheduler{}, []step{{200, 100, false, 0.8, 0.4}}},
		{"held at the gradient's least", policy.AIMDLoadScheduler{}, []step{{1e6, 100, false, 1, 0.1}}},
		{"held at a least of its own", policy.AIMDLoadScheduler{Gradient: policy.Gradient{Min: 0.4}}, []step{
			{125, 100, false, 1, 0.8}, {1e6, 100, false, 1, 0.4},
		}},
		{"held at a most of its own", policy.AIMDLoadScheduler{Gradient: policy.Gradient{Max: 0.7}}, []step{
			{101, 100, false, 1, 0.7}, {1e6, 100, false, 1, 0.1},
		}},
		{"recovery in steps", policy.AIMDLoadScheduler{}, []step{
			{200, 100, false, 1, 0.5}, {90, 100, false, 0.5, 0.525}, {90, 100, false, 0.525, 0.575}, {200, 100, false, 0.5, 0.25}, {90, 100, false, 0.25, 0.275},
		}},
		{"recovered", policy.AIMDLoadScheduler{MaxLoadMultiplier: 1.01, LinearIncrement: 0.5}, []step{
			{200, 100, false, 1, 0.5}, {90, 100, false, 0.5, 1}, {90, 100, false, 1, nan},
		}},
		{"not confirmed", policy.AIMDLoadScheduler{}, []step{{200, 100, true, 1, nan}}},
		{"a low signal is the overload", policy.AIMDLoadScheduler{Gradient: policy.Gradient{Slope: 1, Min: 0.1, Max: 1}}, []step{
			{200, 100, false, 1, nan}, {50, 100, false, 1, 0.5},
		}},
		{"slope of 2", policy.AIMDLoadScheduler{Gradient: policy.Gradient{Slope: -2, Min: 0.1, Max: 1}}, []step{{200, 100, false, 1, 0.25}}},
		{"a signal that has no power", policy.AIMDLoadScheduler{Gradient: policy.Gradient{Slope: 0.5, Min: 0.2, Max: 1}}, []step{
			{-3, 10, false, 1, 0.2},
		}},
		{"setpoint 0", policy.AIMDLoadScheduler{}, []step{{200, 0, false, 1, nan}}},
		{"signal unknown", policy.AIMDLoadScheduler{}, []step{{nan, 100, false, 1, nan}}},
		{"setpoint unknown", policy.AIMDLoadScheduler{}, []step{{200, nan, false, 1, nan}}},
		{"no load", policy.AIMDLoadScheduler{}, []step{{200, 100, false, nan, nan}}},
		{"an unknown signal is no step", policy.AIMDLoadScheduler{}, []step{
			{200, 100, false, 1, 0.5}, {nan, 100, false, 0.5, nan}, {90, 100, false, 0.5, 0.525},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newAIMD(tt.policy)
			for i, s := range tt.steps {
				got := c.step(s.signal, s.setpoint, !s.unconfirmed, s.admitted)
				if math.Abs(got-s.want) > 1e-9 || math.IsNaN(got) != math.IsNaN(s.want) {
					t.Fatalf("step %d: multiplier %v want %v", i, got, s.want)
				}
			}
		})
	}
}
