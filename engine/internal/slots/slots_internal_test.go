package slots

import (
	"math/rand/v2"
	"testing"

	"github.com/headgate-go/headgate/engine/internal/source"
)

func newSlots(limit float64, maxInflight int64) (*Rule, *State) {
	r, f := &Rule{Limit: limit, MaxInflight: maxInflight}, new(State)
	r.Fresh(f, 0)
	return r, f
}

func TestSlots(t *testing.T) {
	r, f := newSlots(2, 100)
	a := r.Take(f, 0, 1)
	if !a.OK || a.Slot == 0 || a.Left != 2 {
		t.Fatalf("Take = %+v want a slot of 2", a)
	}
	b := r.Take(f, 10, 1)
	if got := r.Take(f, 20, 1); got.OK || got.Wait != 80 {
		t.Errorf("Take = %+v want none of two slots left, until the first is taken back in 80", got)
	}
	if !r.GiveBack(f, 20, 1, a.Slot, false) || r.GiveBack(f, 20, 1, a.Slot, false) {
		t.Error("a slot is given back once")
	}
	if r.GiveBack(f, 20, 1, 0, false) || r.GiveBack(f, 20, 1, b.Slot+1, false) || r.GiveBack(f, 20, 1, 1<<63, false) {
		t.Error("made-up ids gave slots back")
	}
	if !r.Take(f, 20, 5).OK || f.used != 6 || r.Usage(f, 20).Remaining != -4 {
		t.Errorf("used = %v want an overshoot to 6 while a slot is free", f.used)
	}
	if free := r.Take(f, 20, 0); !free.OK || free.Slot != 0 {
		t.Errorf("Take of nothing = %+v want nothing", free)
	}
	r.reclaim(f, 110)
	if f.count != 1 || f.used != 5 {
		t.Errorf("count, used = %d, %v want the expired one taken back: 1, 5", f.count, f.used)
	}
	if r.GiveBack(f, 110, 1, b.Slot, false) {
		t.Error("an expired slot was given back")
	}
}

// A cost beyond all reason must not swallow the count of the others.
func TestSlotsHugeCost(t *testing.T) {
	r, f := newSlots(2, 100)
	r.Take(f, 0, 1)
	huge := r.Take(f, 0, 1e300)
	r.GiveBack(f, 0, 1e300, huge.Slot, false)
	r.Take(f, 0, 1)
	if r.Take(f, 0, 1).OK || f.used != 2 {
		t.Errorf("used = %v want 2, and no room for a third flow", f.used)
	}
}

// Fractions that fill the slots leave no room, though their sum as a float may be less.
func TestSlotsOfFractions(t *testing.T) {
	for n := 2; n <= 100; n++ {
		r, f := newSlots(3, 100)
		for range 3 * n {
			if !r.Take(f, 0, 1/float64(n)).OK {
				t.Fatalf("%d flows of 1/%d are all there is room for in 3 slots", f.count, n)
			}
		}
		if r.Take(f, 0, 1/float64(n)).OK {
			t.Errorf("%d flows of 1/%d have 3 slots", f.count, n)
		}
	}
	if r, f := newSlots(1e-12, 100); !r.Take(f, 0, 1).OK {
		t.Error("a limit that is not 0 admits nobody")
	}
}

// The list and the count must agree with a plain map, whatever the order.
func TestSlotsModel(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	r, f := newSlots(100, 500)
	model := make(map[uint64]int64) // id → expiry
	for now := range int64(20_000) {
		switch rng.IntN(3) {
		case 0, 1:
			got := r.Take(f, now, 1)
			for old, expires := range model {
				if expires <= now {
					delete(model, old)
				}
			}
			if got.OK != (len(model) < 100) {
				t.Fatalf("at %d: Take = %+v with %d in flight", now, got, len(model))
			}
			if got.OK {
				model[got.Slot] = now + 500
			}
		case 2:
			for id, expires := range model {
				if got := r.GiveBack(f, now, 1, id, false); got != (expires > now) {
					t.Fatalf("at %d: GiveBack = %v, expires %d", now, got, expires)
				}
				delete(model, id)
				break
			}
		}
	}
	if len(f.slots) > 101 {
		t.Errorf("%d slots for 100 in flight", len(f.slots))
	}
}

func TestSlotsForecast(t *testing.T) {
	r, f := newSlots(2, 1000)
	a, b := r.Take(f, 0, 1), r.Take(f, 0, 1)
	if least, likely := r.Forecast(f, 0, source.Ahead{Least: 5, Likely: 5}, 1); least != 0 || likely != 0 {
		t.Errorf("forecast = %d, %d want unknown before the first return", least, likely)
	}
	r.GiveBack(f, 100, 1, a.Slot, false)
	a = r.Take(f, 100, 1)
	if least, likely := r.Forecast(f, 100, source.Ahead{Least: 0, Likely: 0}, 1); least != 0 || likely != 50 {
		t.Errorf("forecast of the first = %d, %d want 0, 50", least, likely)
	}
	if least, likely := r.Forecast(f, 100, source.Ahead{Least: 1, Likely: 1}, 1); least != 0 || likely != 100 {
		t.Errorf("forecast behind 1 = %d, %d want 0, for two may end at once, and 100", least, likely)
	}
	if least, likely := r.Forecast(f, 100, source.Ahead{Least: 3, Likely: 3}, 1); least != 100 || likely != 200 {
		t.Errorf("forecast behind 3 = %d, %d want 100, a round, and 200", least, likely)
	}
	r.GiveBack(f, 101, 1, a.Slot, true) // what was not used tells nothing
	r.Take(f, 100, 9)
	if least, likely := r.Forecast(f, 100, source.Ahead{Least: 0, Likely: 0}, 1); least != 0 || likely != 130 {
		t.Errorf("forecast of an overshoot = %d, %d want 8 of 10 tokens and one of two flows to return: 0, 130", least, likely)
	}
	r.GiveBack(f, 400, 1, b.Slot, false)
	if f.hold != 250 {
		t.Errorf("mean = %v want that of 100 and 400", f.hold)
	}
	for now := int64(1000); now < 100_000; now += 1000 {
		r.reclaim(f, now)
		r.Take(f, now, 1)
	}
	if f.hold < 990 || f.hold > 1000 {
		t.Errorf("mean = %v want that of slots that are taken back, after a while", f.hold)
	}
	wide, two := newSlots(3, 1000) // of flows that want two slots each, two are let in at once
	a = wide.Take(two, 0, 2)
	wide.GiveBack(two, 100, 2, a.Slot, false)
	for flows, want := range []int64{0, 0, 100, 100, 200} {
		if least, _ := wide.Forecast(two, 100, source.Ahead{Least: 2 * float64(flows)}, 2); least != want {
			t.Errorf("forecast behind %d that want two of three slots = %d want %d", flows, least, want)
		}
	}
	if least, _ := wide.Forecast(two, 100, source.Ahead{Least: 5, Largest: 2}, 1); least != 100 {
		t.Errorf("forecast behind flows of several costs = %d want 100: as much as 5 may be let in at once", least)
	}
	none, empty := newSlots(0, 1)
	if least, likely := none.Forecast(empty, 0, source.Ahead{Least: 0, Likely: 0}, 1); least != source.Never || likely != source.Never {
		t.Errorf("forecast of no slots = %d, %d want never", least, likely)
	}
}

// The example of Forecast's comment.
func TestForecastExample(t *testing.T) {
	const ms = 1_000_000
	r, f := newSlots(2, 1000*ms)
	for _, held := range []int64{80 * ms, 120 * ms} {
		d := r.Take(f, 0, 1)
		r.GiveBack(f, held, 1, d.Slot, false)
	}
	f.shortest = 80 * ms // it grows a little with each flow that held its slot for longer
	r.Take(f, 0, 1)
	r.Take(f, 0, 1)
	if least, likely := r.Forecast(f, 0, source.Ahead{Least: 3, Likely: 3}, 1); least != 80*ms || likely != 200*ms {
		t.Errorf("forecast = %d, %d ms want 80, 200", least/ms, likely/ms)
	}
}

// One flow that held its slot for long, or never gave it back, does not get the next ones rejected.
func TestSlotsForecastOfAnOutlier(t *testing.T) {
	const ms, minute = 1_000_000, 60_000_000_000
	for name, row := range map[string]struct{ first, then, reclaimed int64 }{
		"a slow one":             {first: 10 * ms, then: minute},
		"one that was lost":      {first: 10 * ms, reclaimed: 10 * minute},
		"one that was lost, new": {reclaimed: 10 * minute},
	} {
		r, f := newSlots(4, 10*minute)
		now := int64(0)
		hold := func(held int64) {
			d := r.Take(f, now, 1)
			now += held
			r.GiveBack(f, now, 1, d.Slot, false)
		}
		for range 100 {
			if row.first > 0 {
				hold(row.first)
			}
		}
		if row.then > 0 {
			hold(row.then)
		}
		if row.reclaimed > 0 {
			r.Take(f, now, 1)
			now += row.reclaimed
			r.reclaim(f, now)
		}
		least, likely := r.Forecast(f, now, source.Ahead{Least: 80, Likely: 80}, 1)
		if most := int64(300 * ms); least > most || row.first > 0 && likely > most {
			t.Errorf("%s: forecast = %d, %d want at most %d ms, for 200", name, least/ms, likely/ms, most/ms)
		}
	}
}
