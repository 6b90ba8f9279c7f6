package engine

import (
	"math"
	"testing"
	"time"

	"github.com/headgate-go/headgate/policy"
)

func TestRamp(t *testing.T) {
	stairs := policy.LoadRamp{Start: true, Steps: []policy.RampStep{
		{Target: 1, Duration: 10 * time.Second},
		{Target: 50, Duration: 10 * time.Second},
		{Target: 50, Duration: 10 * time.Second},
		{Target: 100},
	}}
	straight := policy.LoadRamp{Start: true, Steps: []policy.RampStep{{Target: 1}, {Target: 100, Duration: 300 * time.Second}}}
	down := policy.LoadRamp{Start: true, Steps: []policy.RampStep{{Target: 100}, {Target: 0, Duration: 100 * time.Second}}}
	still := straight
	still.Start = false
	jump := policy.LoadRamp{Steps: []policy.RampStep{{Target: 0}, {Target: 50}, {Target: 100, Duration: time.Minute}}}
	begun := jump
	begun.Start = true
	ages := policy.LoadRamp{Start: true, Steps: []policy.RampStep{
		{Target: 1}, {Target: 50, Duration: math.MaxInt64}, {Target: 100, Duration: math.MaxInt64},
	}}
	for _, tt := range []struct {
		name string
		ramp policy.LoadRamp
		at   time.Duration
		want float64
	}{
		{"first step, begin", stairs, 0, 1},
		{"first step, end", stairs, 10*time.Second - 1, 1},
		{"second step, begin", stairs, 10 * time.Second, 1},
		{"second step, half way", stairs, 15 * time.Second, 25.5},
		{"flat step", stairs, 25 * time.Second, 50},
		{"jump", stairs, 30 * time.Second, 100},
		{"after the end", stairs, time.Hour, 100},
		{"straight, begin", straight, 0, 1},
		{"straight, a third", straight, 100 * time.Second, 34},
		{"straight ends on its target", straight, 300 * time.Second, 100},
		{"down", down, 25 * time.Second, 75},
		{"down, at the end", down, time.Hour, 0},
		{"steps beyond all time", ages, math.MaxInt64 / 49 / 1000, 1 + 1e-3},
		{"not started", still, time.Hour, 1},
		{"not started, a first step without length", jump, time.Hour, 0},
		{"a first step without length", begun, 0, 50},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRamp(tt.ramp, 0)
			if got := r.percentage(int64(tt.at)); math.Abs(got-tt.want) > 1e-6 {
				t.Errorf("percentage(%v) = %v want %v", tt.at, got, tt.want)
			}
		})
	}
}

// A ramp whose steps have no length is a switch, which is off until it is turned on.
func TestRampSwitch(t *testing.T) {
	r := newRamp(policy.LoadRamp{Steps: []policy.RampStep{{Target: 0}, {Target: 100}}}, 0)
	for i, turn := range []struct {
		name string
		do   func()
		want float64
	}{
		{"not started", func() {}, 0},
		{"hold", func() { r.move(1, 0) }, 0},
		{"forward", func() { r.move(2, 1) }, 100},
		{"hold", func() { r.move(3, 0) }, 100},
		{"backward", func() { r.move(4, -1) }, 0},
		{"hold", func() { r.move(5, 0) }, 0},
		{"forward", func() { r.move(6, 1) }, 100},
		{"reset", func() { r.reset(7) }, 0},
	} {
		if turn.do(); r.percentage(8) != turn.want {
			t.Errorf("%d, %s: percentage = %v want %v", i, turn.name, r.percentage(8), turn.want)
		}
	}
}

func TestRampMoves(t *testing.T) {
	s := int64(time.Second)
	r := newRamp(policy.LoadRamp{Steps: []policy.RampStep{{Target: 0}, {Target: 100, Duration: 100 * time.Second}}}, 5*s)
	want := func(when string, now int64, percentage float64) {
		t.Helper()
		if got := r.percentage(now); math.Abs(got-percentage) > 1e-6 {
			t.Errorf("%s: percentage = %v want %v", when, got, percentage)
		}
	}
	want("not started", 50*s, 0)
	r.move(50*s, 1)
	want("forward", 80*s, 30)
	r.move(80*s, 1)
	want("forward again changes nothing", 90*s, 40)
	r.move(90*s, -1)
	want("backward", 100*s, 30)
	want("backward to the beginning", 1000*s, 0)
	r.move(1000*s, 1)
	want("forward from there, not from before it", 1010*s, 10)
	r.move(1010*s, 0)
	want("still", 2000*s, 10)
	r.move(2000*s, 1)
	r.reset(2010 * s)
	want("reset", 2050*s, 0)
	r.move(2050*s, 1)
	want("a clock that steps back", 2040*s, 0)
}
