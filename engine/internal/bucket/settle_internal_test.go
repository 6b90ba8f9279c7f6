package bucket

import (
	"math"
	"math/big"
	"testing"

	"pgregory.net/rapid"

	"github.com/headgate-go/headgate/engine/internal/source"
)

func TestBucketSettle(t *testing.T) {
	// The bucket holds 10 tokens and gets 5 a second. The flow takes its tokens at 0.
	for _, tt := range []struct {
		name        string
		step, delay bool
		debt        float64
		took, cost  float64
		at          float64 // seconds
		left        float64
		forgiven    float64
		wait        float64 // seconds, for one token; 0 if it is there
	}{
		{name: "as estimated", took: 4, cost: 4, left: 6},
		{name: "less", took: 4, cost: 1, left: 9},
		{name: "nothing", took: 4, cost: 0, left: 10},
		{name: "a refund above the capacity", took: 4, cost: 1, at: 1, left: 10},
		{name: "more, which is there", took: 4, cost: 9, left: 1},
		{name: "more than is there", took: 4, cost: 12, left: -2, wait: 0.6},
		{name: "at the bound", took: 4, cost: 20, left: -10, wait: 2.2},
		{name: "beyond the bound", took: 4, cost: 27, left: -10, forgiven: 7, wait: 2.2},
		{name: "a bound of its own", debt: 3, took: 4, cost: 20, left: -3, forgiven: 7, wait: 0.8},
		{name: "no debt at all", debt: math.SmallestNonzeroFloat64, took: 4, cost: 20, left: 0, forgiven: 10, wait: 0.2},
		{name: "no bound", debt: -1, took: 4, cost: 1e6, left: 10 - 1e6, wait: (1e6 - 9) / 5},
		{name: "later, when the bucket is full", took: 4, cost: 12, at: 9, left: 2},
		{name: "steps", step: true, took: 4, cost: 12, left: -2, wait: 1},
		{name: "several steps", step: true, took: 4, cost: 20, left: -10, wait: 3},
		{name: "during the delay", delay: true, took: 4, cost: 12, at: 1, left: -2, wait: 1 + 0.6},
		{name: "steps and a delay", step: true, delay: true, took: 4, cost: 12, at: 1, left: -2, wait: 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := &Rule{Capacity: 10, Fill: 5, Interval: 1e9, Step: tt.step, Delay: tt.delay, MaxDebt: tt.debt}
			b := new(State)
			r.Fresh(b, 0)
			if got := r.Take(b, 0, tt.took); !got.OK {
				t.Fatal("there are no tokens")
			}
			now := seconds(tt.at)
			forgiven := r.Settle(b, now, tt.took, tt.cost, 0)
			left := r.Usage(b, now).Remaining
			if math.Abs(left-tt.left) > source.Slack || math.Abs(forgiven-tt.forgiven) > source.Slack {
				t.Errorf("%v left, %v forgiven want %v, %v", left, forgiven, tt.left, tt.forgiven)
			}
			if idle := r.Idle(b, now); idle != (tt.left == 10) {
				t.Errorf("idle = %v with %v left", idle, left)
			}
			least, likely := r.Forecast(b, now, source.Ahead{}, 1)
			if tt.wait == 0 {
				likely = least // callers use likely only after a Take has failed
			}
			if math.Abs(float64(likely)-tt.wait*1e9) > 2 {
				t.Errorf("a token in %v s want %v", float64(likely)/1e9, tt.wait)
			}
			if got := r.Take(b, now, 0); !got.OK || got.Left != left {
				t.Errorf("take(0) = %+v want it free, with %v left", got, left)
			}
			if tt.wait > 0 {
				if got := r.Take(b, now+likely, 1); !got.OK {
					t.Errorf("after the wait there is no token, but in %v", got.Wait)
				}
			}
		})
	}
}

// A step may pay a debt and bring more than the bucket holds.
func TestBucketDebtOfLargeSteps(t *testing.T) {
	r := &Rule{Capacity: 2, Fill: 10, Interval: 1e9, Step: true, MaxDebt: -1}
	for _, tt := range []struct{ debt, ahead, want, wait float64 }{
		{5, 0, 1, 1}, {8, 0, 2, 1}, {9, 0, 2, 2}, {10, 0, 1, 2}, {19, 0, 1, 2}, {5, 1, 1, 1}, {5, 2, 1, 2}, {5, 5, 1, 3},
	} {
		b := new(State)
		r.Fresh(b, 0)
		r.Settle(b, 0, 0, 2+tt.debt, 0)
		if least, likely := r.Forecast(b, 0, source.Ahead{Least: tt.ahead, Likely: tt.ahead}, tt.want); least != seconds(tt.wait) || likely != least {
			t.Errorf("debt of %v: %v behind %v in %v, %v want %v s", tt.debt, tt.want, tt.ahead, least, likely, tt.wait)
		}
	}
}

// An exact bucket has the history of all that was taken from it, and computes its balance from that each time.
type exact struct {
	rule   *Rule
	events []event
}

// An event takes what is there, or settles.
type event struct {
	at       int64
	tokens   *big.Rat // below 0 for a refund
	settling bool
}

// balance is what the bucket has, and what it has forgiven.
func (e *exact) balance(now int64) (tokens, forgiven *big.Rat) {
	capacity, last := rat(e.rule.Capacity), int64(0)
	tokens, forgiven = rat(e.rule.Capacity), new(big.Rat)
	lowest := rat(source.Lowest(e.rule.MaxDebt, e.rule.Capacity))
	fill := func(to int64) {
		units := new(big.Rat).Quo(new(big.Rat).SetInt64(to-last), rat(e.rule.Interval))
		last = to
		if e.rule.Step {
			whole := new(big.Int).Quo(units.Num(), units.Denom())
			last = to - new(big.Int).Mod(big.NewInt(to), big.NewInt(int64(e.rule.Interval))).Int64()
			units = new(big.Rat).SetInt(whole)
		}
		tokens = tokens.Add(tokens, units.Mul(units, rat(e.rule.Fill)))
		if tokens.Cmp(capacity) > 0 {
			tokens.Set(capacity)
		}
	}
	for _, ev := range e.events {
		fill(ev.at)
		tokens.Sub(tokens, ev.tokens)
		if tokens.Cmp(capacity) > 0 {
			tokens.Set(capacity)
		}
		if ev.settling && tokens.Cmp(lowest) < 0 {
			forgiven.Add(forgiven, new(big.Rat).Sub(lowest, tokens))
			tokens.Set(lowest)
		}
	}
	fill(now)
	return tokens, forgiven
}

// Whatever is taken and settled, in any order, the bucket has what the exact one has.
func TestBucketSettleIsExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := &Rule{
			Capacity: rapid.SampledFrom([]float64{1, 4, 16, 100}).Draw(t, "capacity"),
			Fill:     rapid.SampledFrom([]float64{0, 0.5, 2, 8}).Draw(t, "fill"),
			Interval: 1e9,
			Step:     rapid.Bool().Draw(t, "step"),
			MaxDebt:  rapid.SampledFrom([]float64{0, 0.25, 3, 50, -1}).Draw(t, "max debt"),
		}
		b, model := new(State), &exact{rule: r}
		r.Fresh(b, 0)
		amounts := []float64{0, 0.25, 0.5, 1, 3, 8, 40, 1000}
		now, forgiven := int64(0), 0.0
		var flight []float64
		check := func(t *rapid.T) {
			want, wantForgiven := model.balance(now)
			left, _ := want.Float64()
			if got := r.Usage(b, now).Remaining; math.Abs(got-left) > 1e-9 {
				t.Fatalf("%v left want %v", got, left)
			}
			if f, _ := wantForgiven.Float64(); math.Abs(forgiven-f) > 1e-9 {
				t.Fatalf("%v forgiven want %v", forgiven, f)
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"wait": func(t *rapid.T) { now += rapid.Int64Range(0, 64).Draw(t, "quarters") * 250_000_000 },
			"take": func(t *rapid.T) {
				want := rapid.SampledFrom(amounts).Draw(t, "estimate")
				left, _ := model.balance(now)
				ok := want == 0 || left.Cmp(rat(want)) >= 0
				if got := r.Take(b, now, want); got.OK != ok {
					t.Fatalf("take(%v) = %+v want %v with %v left", want, got, ok, left)
				}
				if ok {
					flight = append(flight, want)
					model.events = append(model.events, event{now, rat(want), false})
				}
			},
			"settle": func(t *rapid.T) {
				if len(flight) == 0 {
					return
				}
				took, cost := flight[0], rapid.SampledFrom(amounts).Draw(t, "cost")
				flight = flight[1:]
				forgiven += r.Settle(b, now, took, cost, 0)
				model.events = append(model.events, event{now, new(big.Rat).Sub(rat(cost), rat(took)), true})
			},
			"": check,
		})
	})
}
