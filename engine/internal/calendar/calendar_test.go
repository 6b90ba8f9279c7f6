package calendar

import (
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/headgate-go/headgate/engine/internal/source"
)

// seconds is so many, in nanoseconds.
func seconds(n int64) int64 { return n * int64(time.Second) }

// hourly has 10 tokens an hour, and the first one ends 600 s after the epoch.
func hourly(tb testing.TB) (*Rule, *State) {
	tb.Helper()
	r := &Rule{Amount: 10, Periods: Periods{Unit: Hour, Zone: time.UTC}, Epoch: at(tb, "2024-05-01 11:50:00")}
	q := new(State)
	r.Fresh(q, 0)
	return r, q
}

func TestTake(t *testing.T) {
	type take struct {
		at     int64 // seconds
		tokens float64
		ok     bool
		left   float64
		wait   int64 // seconds
	}
	for _, tt := range []struct {
		name  string
		takes []take
	}{
		{"all", []take{{0, 10, true, 0, 0}, {0, 1, false, 0, 600}}},
		{"until the boundary", []take{{0, 10, true, 0, 0}, {599, 1, false, 0, 1}, {600, 1, true, 9, 0}, {600, 10, false, 9, 3600}}},
		{"nothing is carried over", []take{{0, 1, true, 9, 0}, {600, 10, true, 0, 0}, {600, 1, false, 0, 3600}}},
		{"over an hour without flows", []take{{0, 10, true, 0, 0}, {10_000, 10, true, 0, 0}, {10_000, 1, false, 0, 1400}}},
		{"a clock that steps back", []take{{600, 10, true, 0, 0}, {0, 1, false, 0, 4200}, {600, 1, false, 0, 3600}, {4200, 1, true, 9, 0}}},
		{"more than there ever is", []take{{0, 11, false, 10, 0}}},
		{"nothing", []take{{0, 10, true, 0, 0}, {0, 0, true, 0, 0}}},
		{"fractions", []take{{0, 0.1, true, 9.9, 0}, {0, 9.9, true, 0, 0}, {0, 0.1, false, 0, 600}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, q := hourly(t)
			for i, want := range tt.takes {
				got := r.Take(q, seconds(want.at), want.tokens)
				if got.OK != want.ok || math.Abs(got.Left-want.left) > source.Slack || got.Wait != seconds(want.wait) {
					t.Errorf("take %d = %+v want %+v", i, got, want)
				}
			}
		})
	}
}

// A flow that did not run gives back what it took, in the same period only, and once it has run it gives nothing.
func TestGiveBack(t *testing.T) {
	for _, tt := range []struct {
		name   string
		at     int64 // seconds
		unused bool
		ok     bool
		left   float64
	}{
		{"same period", 599, true, true, 10},
		{"next period", 600, true, false, 8}, // whose own 2 are taken
		{"it ran", 0, false, false, 8},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, q := hourly(t)
			first := r.Take(q, 0, 2)
			if tt.at == 600 {
				r.Take(q, seconds(tt.at), 2)
			}
			ok := r.GiveBack(q, seconds(tt.at), 2, first.Slot, tt.unused)
			if left := r.Usage(q, seconds(tt.at)).Remaining; ok != tt.ok || left != tt.left {
				t.Errorf("GiveBack = %v, with %v left want %v, %v", ok, left, tt.ok, tt.left)
			}
		})
	}
}

// A quota is idle when it is whole, or its period has ended: then a fresh one is no other.
func TestIdle(t *testing.T) {
	r, q := hourly(t)
	taken := r.Take(q, 0, 1)
	if r.Idle(q, seconds(599)) || !r.Idle(q, seconds(600)) {
		t.Errorf("idle = %v before the end of the period, %v at it want false, true", r.Idle(q, seconds(599)), r.Idle(q, seconds(600)))
	}
	r.GiveBack(q, 0, 1, taken.Slot, true)
	if !r.Idle(q, 0) {
		t.Error("not idle with all tokens back")
	}
}

func TestForecast(t *testing.T) {
	for _, tt := range []struct {
		name          string
		ahead, tokens float64
		least, likely int64 // seconds
	}{
		{"next period", 0, 6, 600, 600},
		{"behind others", 5, 1, 600, 600},
		{"those ahead leave enough", 4, 1, 0, 600},
		{"more than there ever is", 0, 11, source.Never, source.Never},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, q := hourly(t)
			r.Take(q, 0, 5)
			least, likely := r.Forecast(q, 0, source.Ahead{Least: tt.ahead, Likely: tt.ahead}, tt.tokens)
			if want := []int64{tt.least, tt.likely}; least != scaled(want[0]) || likely != scaled(want[1]) {
				t.Errorf("forecast = %d, %d want %v s", least, likely, want)
			}
		})
	}
}

func scaled(s int64) int64 {
	if s == source.Never {
		return s
	}
	return seconds(s)
}

// Whatever flows take and give back, at whatever times, in no period of the calendar more than the amount is used. A
// flow that retries after its wait gets its tokens.
func TestNeverMoreThanTheAmount(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		r := &Rule{Amount: float64(rapid.IntRange(0, 20).Draw(rt, "amount")), Periods: drawPeriods(t, rt)}
		r.Epoch = drawTime(rt, r.Periods.Zone)
		type taken struct {
			period int64 // when it ends, by the model
			tokens float64
			slot   uint64
		}
		used := make(map[int64]float64)
		var flows []taken
		q := new(State)
		r.Fresh(q, 0)
		var now, latest, made int64 // a key is not asked about times before it was made
		period := func() int64 { return int64(r.Periods.End(r.Epoch.Add(time.Duration(latest))).Sub(r.Epoch)) }
		rt.Repeat(map[string]func(*rapid.T){
			"later": func(rt *rapid.T) {
				most := map[Unit]time.Duration{Hour: 3 * time.Hour, Day: 50 * time.Hour, Week: 400 * time.Hour, Month: 2000 * time.Hour}[r.Periods.Unit]
				now = latest + rapid.Int64Range(0, int64(most)).Draw(rt, "time")
			},
			"earlier": func(rt *rapid.T) { now = max(now-rapid.Int64Range(0, int64(2*time.Hour)).Draw(rt, "time"), made) },
			"forgotten": func(*rapid.T) {
				if now == latest && r.Idle(q, now) {
					r.Fresh(q, now)
					made = now
				}
			},
			"take": func(rt *rapid.T) {
				latest = max(latest, now)
				want := float64(rapid.IntRange(0, 22).Draw(rt, "tokens"))
				got := r.Take(q, now, want)
				if there := want == 0 || used[period()]+want <= r.Amount; got.OK != there {
					rt.Fatalf("Take(%v) = %+v with %v used of %v", want, got, used[period()], r.Amount)
				}
				switch {
				case got.OK:
					used[period()] += want
					flows = append(flows, taken{period(), want, got.Slot})
				case want > r.Amount && got.Wait != 0, want <= r.Amount && got.Wait != period()-now:
					rt.Fatalf("Take(%v) at %d waits %d; the period ends at %d", want, now, got.Wait, period())
				}
			},
			"give back": func(*rapid.T) {
				if len(flows) == 0 {
					return
				}
				latest = max(latest, now)
				f := flows[len(flows)-1]
				flows = flows[:len(flows)-1]
				same := f.period == period()
				if ok := r.GiveBack(q, now, f.tokens, f.slot, true); ok != same {
					rt.Fatalf("GiveBack = %v want %v", ok, same)
				}
				if same {
					used[f.period] -= f.tokens
				}
			},
			"": func(rt *rapid.T) {
				if used[period()] > r.Amount {
					rt.Fatalf("%v used of %v", used[period()], r.Amount)
				}
			},
		})
	})
}

func TestTakeAllocatesNothing(t *testing.T) {
	r, q := hourly(t)
	var now int64
	if got := testing.AllocsPerRun(100, func() {
		r.Take(q, now, 1)
		now += seconds(1000) // over boundaries
	}); got != 0 {
		t.Errorf("%v allocations want 0", got)
	}
}

// A quota keeps what it has used in its period when the amount changes.
func TestInherit(t *testing.T) {
	for _, tt := range []struct {
		name                     string
		used, amount, left, next float64
	}{
		{"more", 4, 20, 16, 20},
		{"less", 4, 7, 3, 7},
		{"less than is used", 9, 7, 0, 7},
		{"unused", 0, 5, 5, 5},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before, q := hourly(t)
			before.Take(q, 0, tt.used)
			after := *before
			after.Amount = tt.amount
			after.Inherit(q, before, seconds(10))
			if got := after.Usage(q, seconds(10)); got.Remaining != tt.left || got.Capacity != tt.amount {
				t.Errorf("Usage = %+v want %v of %v", got, tt.left, tt.amount)
			}
			if got := after.Usage(q, seconds(600)).Remaining; got != tt.next {
				t.Errorf("the next period has %v want %v", got, tt.next)
			}
		})
	}
}
