package calendar

import (
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/headgate-go/headgate/engine/internal/source"
)

// What is left of 10 tokens an hour, after a flow that took 4 of them at the beginning. The first period ends after 600 s.
func TestSettle(t *testing.T) {
	for _, tt := range []struct {
		name     string
		debt     float64 // the most; 0: 10
		cost     float64
		at       int64 // seconds
		left     float64
		forgiven float64
		then     map[int64]float64 // what is left later
		wait     int64             // seconds, for one token; 0 if it is there
	}{
		{name: "less", cost: 1, at: 599, left: 9, then: map[int64]float64{600: 10}},
		{name: "nothing", cost: 0, left: 10},
		{name: "less, of a period that is over", cost: 1, at: 600, left: 10},
		{name: "more, which is there", cost: 9, left: 1, then: map[int64]float64{600: 10}},
		{name: "a debt", cost: 12, left: -2, wait: 600, then: map[int64]float64{599: -2, 600: 8, 4200: 10}},
		{name: "more, of a period that is over", cost: 12, at: 600, left: 2},
		{name: "at the bound", cost: 20, left: -10, wait: 4200, then: map[int64]float64{600: 0, 4199: 0, 4200: 10}},
		{name: "beyond the bound", cost: 27, left: -10, forgiven: 7, wait: 4200, then: map[int64]float64{600: 0, 4200: 10}},
		{name: "a bound of its own", debt: 3, cost: 27, left: -3, forgiven: 14, wait: 600, then: map[int64]float64{600: 7}},
		{name: "many periods", debt: -1, cost: 10 + 35, left: -35, wait: 600 + 3*3600, then: map[int64]float64{600: -25, 4200: -15, 11400: 5, 15000: 10}},
		{name: "nobody looks for many periods", debt: -1, cost: 10 + 35, left: -35, wait: 600 + 3*3600, then: map[int64]float64{11400: 5}},
		{name: "more periods than are looked at", debt: -1, cost: 10 + 1000, left: -1000, wait: 600 + 100*3600},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, q := hourly(t)
			r.MaxDebt = tt.debt
			taken := r.Take(q, 0, 4)
			forgiven := r.Settle(q, seconds(tt.at), 4, tt.cost, taken.Slot)
			left := r.Usage(q, seconds(tt.at)).Remaining
			if left != tt.left || forgiven != tt.forgiven {
				t.Errorf("%v left, %v forgiven want %v, %v", left, forgiven, tt.left, tt.forgiven)
			}
			if idle := r.Idle(q, seconds(tt.at)); idle != (tt.left == 10) {
				t.Errorf("idle = %v with %v left", idle, left)
			}
			if got := r.Take(q, seconds(tt.at), 0); !got.OK || got.Left != left {
				t.Errorf("take(0) = %+v want it free, with %v left", got, left)
			}
			if tt.wait > 0 {
				if got := r.Take(q, seconds(tt.at), 1); got.OK || got.Wait != seconds(tt.wait) {
					t.Errorf("take(1) = %+v want a wait of %v s", got, tt.wait)
				}
				if least, likely := r.Forecast(q, seconds(tt.at), source.Ahead{}, 1); least != seconds(tt.wait) || likely != least {
					t.Errorf("forecast = %v, %v want %v s", least, likely, tt.wait)
				}
			}
			for at := range int64(20000) {
				if want, ok := tt.then[at]; ok {
					if got := r.Usage(q, seconds(at)).Remaining; got != want {
						t.Errorf("at %d: %v left want %v", at, got, want)
					}
				}
			}
		})
	}
}

// A quota of nothing never pays a debt, and does not take long to find that out.
func TestSettleOfNothing(t *testing.T) {
	r, q := hourly(t)
	r.Amount, r.MaxDebt = 0, 5
	r.Fresh(q, 0)
	if forgiven := r.Settle(q, 0, 0, 7, r.Take(q, 0, 0).Slot); forgiven != 2 {
		t.Errorf("%v forgiven want 2", forgiven)
	}
	year := 365 * 24 * int64(time.Hour)
	if left := r.Usage(q, year).Remaining; left != -5 || r.Idle(q, year) {
		t.Errorf("%v left after a year want -5", left)
	}
	if got := r.Take(q, year, 1); got.OK || got.Wait != 0 {
		t.Errorf("take(1) = %+v want it refused, without a wait", got)
	}
}

// The wait for a debt that takes decades is as long, and a debt that is never paid has no wait.
func TestSettleHugeDebt(t *testing.T) {
	for _, cost := range []float64{1e9, 1e30, math.MaxFloat64} {
		r, q := hourly(t)
		r.MaxDebt = -1
		taken := r.Take(q, 0, 4)
		r.Settle(q, 0, 4, cost, taken.Slot)
		r.Settle(q, 0, 0, cost, taken.Slot)
		if got := r.Take(q, seconds(1), 1); got.OK || got.Wait < source.Century/2 || got.Wait > source.Century {
			t.Errorf("after a cost of %v: take(1) = %+v want a wait of a century", cost, got)
		}
		if got := r.Take(q, 1000*seconds(3600), 0); !got.OK || math.IsNaN(got.Left) || got.Left >= 0 {
			t.Errorf("after a cost of %v: take(0) = %+v want it free", cost, got)
		}
	}
}

// Whatever is taken and settled, what is left is the sum of all, by the periods one after the other.
func TestSettleByPeriods(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := &Rule{Amount: 10, Periods: Periods{Unit: Hour, Zone: time.UTC}, Epoch: time.Date(2024, 5, 1, 11, 50, 0, 0, time.UTC)}
		r.MaxDebt = rapid.SampledFrom([]float64{0, 4, 35, -1}).Draw(t, "max debt")
		lowest := source.Lowest(r.MaxDebt, r.Amount)
		q := new(State)
		r.Fresh(q, 0)
		type taken struct {
			tokens float64
			slot   uint64
			period int64
		}
		var flight []taken
		left, now, period := 10.0, int64(0), int64(0)
		amounts := []float64{0, 0.5, 1, 4, 9, 60}
		t.Repeat(map[string]func(*rapid.T){
			"wait": func(t *rapid.T) {
				now += seconds(rapid.Int64Range(0, 9000).Draw(t, "seconds"))
				for ; period < (now/1e9+3000)/3600; period++ {
					left = min(left, 0) + 10
				}
			},
			"take": func(t *rapid.T) {
				want := rapid.SampledFrom(amounts).Draw(t, "estimate")
				got := r.Take(q, now, want)
				if got.OK != (want == 0 || left >= want) {
					t.Fatalf("take(%v) = %+v with %v left", want, got, left)
				}
				if got.OK {
					left -= want
					flight = append(flight, taken{want, got.Slot, period})
				}
			},
			"settle": func(t *rapid.T) {
				if len(flight) == 0 {
					return
				}
				of, cost := flight[0], rapid.SampledFrom(amounts).Draw(t, "cost")
				flight = flight[1:]
				forgiven := r.Settle(q, now, of.tokens, cost, of.slot)
				want := 0.0
				switch {
				case cost > of.tokens:
					want = max(lowest-(left-(cost-of.tokens)), 0)
					left = max(left-(cost-of.tokens), lowest)
				case of.period == period:
					left = min(left+of.tokens-cost, 10)
				}
				if forgiven != want {
					t.Fatalf("%v forgiven want %v", forgiven, want)
				}
			},
			"": func(t *rapid.T) {
				if got := r.Usage(q, now).Remaining; got != left {
					t.Fatalf("%v left want %v", got, left)
				}
			},
		})
	})
}
