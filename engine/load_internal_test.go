package engine

import (
	"math"
	"testing"
	"time"

	"github.com/headgate-go/headgate/engine/internal/source"
)

// learned is a load of so many tokens each second, of which a share is let in, at the time when it has learned its
// rate.
func learned(rate, multiplier float64) (l *load, now int64) {
	l = new(load)
	rule := new(loadRule)
	rule.Fresh(l, 0)
	for now <= learnSeconds*int64(time.Second) {
		l.steer(now, multiplier)
		rule.meet(l, now, demand{tokens: rate})
		rule.Take(l, now, rate)
		rule.gave(l, now, demand{tokens: rate})
		now += int64(time.Second)
	}
	now -= int64(time.Second)
	l.tokens = l.rate // the last flow took some
	return l, now
}

func TestLoadLearns(t *testing.T) {
	const s = int64(time.Second)
	l, rule := new(load), new(loadRule)
	rule.Fresh(l, 0)
	l.steer(0, 0.5)
	now := 1000*s + s/2
	visit := func(tokens float64) source.Taken {
		rule.meet(l, now, demand{tokens: tokens})
		return rule.Take(l, now, tokens)
	}
	for ; now < 1031*s; now += s {
		if !visit(10).OK {
			t.Fatalf("rejected after %v", time.Duration(now-1000*s))
		}
	}
	// 10 each second, of which 5 are let in; the bucket is full.
	for i, want := range []source.Taken{{OK: true, Left: 2}, {Left: 2, Wait: s / 5}} {
		if got := visit(3); got != want {
			t.Errorf("flow %d = %+v want %+v", i, got, want)
		}
	}
	now += 30 * s // a short silence changes nothing
	if got := visit(3); got != (source.Taken{OK: true, Left: 2}) {
		t.Errorf("after a short silence = %+v", got)
	}
	now += 31 * s
	for range 10 {
		if got := visit(100); got != (source.Taken{OK: true}) {
			t.Errorf("after a long silence = %+v want everything let in", got)
		}
	}
	if now += 30 * s; !visit(100).OK {
		t.Error("rejected while it learns anew")
	}
}

func TestLoadDraw(t *testing.T) {
	nan := math.NaN()
	for _, tt := range []struct {
		name       string
		rate       float64
		multiplier float64
		tokens     []float64
		want       []source.Taken
	}{
		{"half", 10, 0.5, []float64{4, 1, 1, 0}, []source.Taken{{OK: true, Left: 1}, {OK: true}, {Wait: 200e6}, {OK: true}}},
		{"more than there is", 10, 0.5, []float64{4, 3, 1}, []source.Taken{{OK: true, Left: 1}, {Left: 1, Wait: 400e6}, {OK: true}}},
		{"more than it holds", 10, 0.5, []float64{20, 1, 6}, []source.Taken{{OK: true}, {Wait: 3200e6}, {Wait: 4000e6}}},
		{"more than it holds, when it is not full", 10, 0.5, []float64{1, 20}, []source.Taken{{OK: true, Left: 4}, {Left: 4, Wait: 200e6}}},
		{"a rare flow", 0.1, 0.5, []float64{1, 1}, []source.Taken{{OK: true}, {Wait: 20e9}}},
		{"nothing", 10, 0, []float64{1, 0}, []source.Taken{{}, {OK: true}}},
		{"less than nothing", 10, -1, []float64{1, 0}, []source.Taken{{}, {OK: true}}},
		{"everything", 10, nan, []float64{1000, 1000}, []source.Taken{{OK: true}, {OK: true}}},
		{"without bounds", 10, math.Inf(1), []float64{1000, 1000}, []source.Taken{{OK: true}, {OK: true}}},
		{"more than comes", 10, 2, []float64{20, 1}, []source.Taken{{OK: true}, {Wait: 50e6}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, now := learned(tt.rate, tt.multiplier)
			for i, tokens := range tt.tokens {
				got := new(loadRule).Take(l, now, tokens)
				if want := tt.want[i]; got.OK != want.OK || math.Abs(got.Left-want.Left) > 1e-6 || math.Abs(float64(got.Wait-want.Wait)) > 10 {
					t.Errorf("draw %d = %+v want %+v", i, got, want)
				}
				if got.OK || got.Wait == 0 {
					continue
				}
				least, likely := new(loadRule).Forecast(l, now, source.Ahead{}, tokens)
				if least != got.Wait || likely != got.Wait {
					t.Errorf("forecast %d = %d, %d want %d", i, least, likely, got.Wait)
				}
				early, late := *l, *l
				if new(loadRule).Take(&early, now+got.Wait-1000, tokens).OK || !new(loadRule).Take(&late, now+got.Wait, tokens).OK {
					t.Errorf("draw %d: told to wait for %v, which is not when the tokens are there", i, time.Duration(got.Wait))
				}
			}
		})
	}
}

// What comes back is there for the next, and no more than the bucket holds.
func TestLoadGiveBack(t *testing.T) {
	l, now := learned(10, 0.5)
	rule := new(loadRule)
	rule.Take(l, now, 5)
	rule.gave(l, now, demand{tokens: 5})
	rule.GiveBack(l, now, 3, 0, false)
	if got := rule.Usage(l, now).Remaining; got != 3 {
		t.Errorf("%v tokens want 3", got)
	}
	rule.GiveBack(l, now, 100, 0, false)
	if got := rule.Usage(l, now).Remaining; got != 5 {
		t.Errorf("%v tokens want 5", got)
	}
	if got := l.admitted(now); got != 1 {
		t.Errorf("admitted = %v want 1", got)
	}
}

func TestLoadForecast(t *testing.T) {
	l, now := learned(10, 0.5)
	rule := new(loadRule)
	rule.Take(l, now, 5)
	for _, tt := range []struct {
		name          string
		ahead, tokens float64
		want          time.Duration
	}{
		{"first", 0, 1, 200 * time.Millisecond},
		{"behind others", 9, 1, 2 * time.Second},
		{"behind others, more than the bucket holds", 10, 50, 3 * time.Second},
	} {
		if least, likely := rule.Forecast(l, now, source.Ahead{Least: tt.ahead, Likely: tt.ahead}, tt.tokens); least != int64(tt.want) || likely != int64(tt.want) {
			t.Errorf("%s: forecast = %d, %d want %v", tt.name, least, likely, tt.want)
		}
	}
	l.steer(now, 0)
	if least, likely := rule.Forecast(l, now, source.Ahead{}, 1); least != source.Never || likely != source.Never {
		t.Errorf("nothing is let in: forecast = %d, %d want source.Never", least, likely)
	}
	l.steer(now, math.NaN())
	if least, likely := rule.Forecast(l, now, source.Ahead{Least: 10, Likely: 10}, 1); least != 0 || likely != 0 {
		t.Errorf("everything is let in: forecast = %d, %d want 0", least, likely)
	}
}

// In the long run the share is what it is set to, and follows what comes.
func TestLoadShare(t *testing.T) {
	for _, multiplier := range []float64{0.03, 0.3, 0.9} {
		l, now := learned(10, multiplier)
		rule := new(loadRule)
		asked, given := 0.0, 0.0
		for i := range 100_000 { // 100 of them each second
			now += int64(10 * time.Millisecond)
			tokens := float64(1 + i%3)
			rule.meet(l, now, demand{tokens: tokens})
			if rule.Take(l, now, tokens).OK {
				rule.gave(l, now, demand{tokens: tokens})
				given += tokens
			}
			asked += tokens
			if i%1000 == 0 {
				l.steer(now, multiplier)
			}
			if i == 4000 { // it has seen them for long enough
				asked, given = 0, 0
			}
		}
		if got := given / asked; math.Abs(got-multiplier) > 0.01 {
			t.Errorf("%v of the tokens were given want %v", got, multiplier)
		}
		if got := l.admitted(now); math.Abs(got-multiplier) > 0.03 {
			t.Errorf("admitted = %v want %v", got, multiplier)
		}
	}
}

// One flow that costs beyond all reason keeps the others out for a while, not for good.
func TestLoadHugeCost(t *testing.T) {
	for _, huge := range []float64{1e12, 1e20, math.MaxFloat64} {
		l, now := learned(10, 0.5)
		rule := new(loadRule)
		for range 2 { // the sum of two may be beyond a float
			rule.meet(l, now, demand{tokens: huge})
			rule.Take(l, now, huge)
		}
		given := 0.0
		for i := range 200 {
			now += int64(time.Second)
			l.steer(now, 0.5)
			for range 10 {
				rule.meet(l, now, demand{tokens: 1})
				if rule.Take(l, now, 1).OK && i >= 100 {
					given++
				}
			}
		}
		if given < 490 || given > 510 {
			t.Errorf("after a flow of %v: %v tokens in 100 s want 500", huge, given)
		}
	}
}

// What comes, what was let in and what is owed count at the prices of now.
func TestLoadPrices(t *testing.T) {
	heavy := &latencyCost{unknown: 1, noted: 1}
	of := new(workload)
	rule := &loadRule{prices: []*latencyCost{heavy}, priced: []*latencyCost{heavy}}
	l, now := new(load), int64(0)
	rule.Fresh(l, 0)
	for now <= learnSeconds*int64(time.Second) {
		l.steer(now, math.NaN())
		for _, by := range []*workload{of, nil} { // one of each, each second
			rule.meet(l, now, demand{1, by})
			if by == nil || now/int64(time.Second)%2 == 0 { // of the heavy ones every other is let in
				rule.gave(l, now, demand{1, by})
			}
		}
		now += int64(time.Second)
	}
	now -= int64(time.Second)
	l.steer(now, 0.5)
	l.tokens = -1 // two flows that were let in before their time
	if got := l.admitted(now); math.Abs(got-0.75) > 0.02 || l.rate != 1 {
		t.Errorf("at a token each: admitted %v, rate %v want 0.75, 1", got, l.rate)
	}
	heavy.bits.Store(math.Float64bits(99))
	l.steer(now, 0.5)
	if got := l.admitted(now); math.Abs(got-0.505) > 0.02 || l.rate != 50 || math.Abs(l.tokens+50) > 1 {
		t.Errorf("at 99 tokens: admitted %v, rate %v, tokens %v want 0.505, 50, and -50", got, l.rate, l.tokens)
	}
	heavy.bits.Store(0)
	l.steer(now, 0.5)
	if l.rate != 1 || math.Abs(l.tokens+1) > 0.02 {
		t.Errorf("when the price is not known any more: rate %v, tokens %v want 1, and -1", l.rate, l.tokens)
	}
	rule.Fresh(l, now)
	rule.meet(l, now, demand{1, of})
	rule.gave(l, now, demand{1, of})
	if got := l.admitted(now); got != 1 {
		t.Errorf("after a reset: admitted %v want 1", got)
	}
}
