package engine

import (
	"math/rand/v2"
	"sync/atomic"
	"testing"
)

func newInflight(limit float64, maxInflight int64) (*slotRule, *inflight) {
	r, f := &slotRule{limit: limit, maxInflight: maxInflight}, new(inflight)
	r.fresh(f, 0)
	return r, f
}

func TestSlots(t *testing.T) {
	r, f := newInflight(2, 100)
	a := r.take(f, 0, 1)
	if !a.ok || a.slot == 0 || a.left != 2 {
		t.Fatalf("draw = %+v want a slot of 2", a)
	}
	b := r.take(f, 10, 1)
	if got := r.take(f, 20, 1); got.ok || got.wait != 80 {
		t.Errorf("draw = %+v want none of two slots left, until the first is taken back in 80", got)
	}
	if !r.giveBack(f, 20, 1, a.slot, false) || r.giveBack(f, 20, 1, a.slot, false) {
		t.Error("a slot is given back once")
	}
	if r.giveBack(f, 20, 1, 0, false) || r.giveBack(f, 20, 1, b.slot+1, false) || r.giveBack(f, 20, 1, 1<<63, false) {
		t.Error("made-up ids gave slots back")
	}
	if !r.take(f, 20, 5).ok || f.used != 6 || r.usage(f, 20).Remaining != -4 {
		t.Errorf("used = %v want an overshoot to 6 while a slot is free", f.used)
	}
	if free := r.take(f, 20, 0); !free.ok || free.slot != 0 {
		t.Errorf("draw of nothing = %+v want nothing", free)
	}
	r.reclaim(f, 110)
	if f.count != 1 || f.used != 5 {
		t.Errorf("count, used = %d, %v want the expired one taken back: 1, 5", f.count, f.used)
	}
	if r.giveBack(f, 110, 1, b.slot, false) {
		t.Error("an expired slot was given back")
	}
}

// A cost beyond all reason must not swallow the count of the others.
func TestSlotsHugeCost(t *testing.T) {
	r, f := newInflight(2, 100)
	r.take(f, 0, 1)
	huge := r.take(f, 0, 1e300)
	r.giveBack(f, 0, 1e300, huge.slot, false)
	r.take(f, 0, 1)
	if r.take(f, 0, 1).ok || f.used != 2 {
		t.Errorf("used = %v want 2, and no room for a third flow", f.used)
	}
}

// Fractions that fill the slots leave no room, though their sum as a float may be less.
func TestSlotsOfFractions(t *testing.T) {
	for n := 2; n <= 100; n++ {
		r, f := newInflight(3, 100)
		for range 3 * n {
			if !r.take(f, 0, 1/float64(n)).ok {
				t.Fatalf("%d flows of 1/%d are all there is room for in 3 slots", f.count, n)
			}
		}
		if r.take(f, 0, 1/float64(n)).ok {
			t.Errorf("%d flows of 1/%d have 3 slots", f.count, n)
		}
	}
	if r, f := newInflight(1e-12, 100); !r.take(f, 0, 1).ok {
		t.Error("a limit that is not 0 admits nobody")
	}
}

// The list and the count must agree with a plain map, whatever the order.
func TestSlotsModel(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	r, f := newInflight(100, 500)
	model := make(map[uint64]int64) // id → expiry
	for now := range int64(20_000) {
		switch rng.IntN(3) {
		case 0, 1:
			got := r.take(f, now, 1)
			for old, expires := range model {
				if expires <= now {
					delete(model, old)
				}
			}
			if got.ok != (len(model) < 100) {
				t.Fatalf("at %d: draw = %+v with %d in flight", now, got, len(model))
			}
			if got.ok {
				model[got.slot] = now + 500
			}
		case 2:
			for id, expires := range model {
				if got := r.giveBack(f, now, 1, id, false); got != (expires > now) {
					t.Fatalf("at %d: giveBack = %v, expires %d", now, got, expires)
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
	r, f := newInflight(2, 1000)
	a, b := r.take(f, 0, 1), r.take(f, 0, 1)
	if least, likely := r.forecast(f, 0, backlog{least: 5, likely: 5}, 1); least != 0 || likely != 0 {
		t.Errorf("forecast = %d, %d want unknown before the first return", least, likely)
	}
	r.giveBack(f, 100, 1, a.slot, false)
	a = r.take(f, 100, 1)
	if least, likely := r.forecast(f, 100, backlog{least: 0, likely: 0}, 1); least != 0 || likely != 50 {
		t.Errorf("forecast of the first = %d, %d want 0, 50", least, likely)
	}
	if least, likely := r.forecast(f, 100, backlog{least: 1, likely: 1}, 1); least != 0 || likely != 100 {
		t.Errorf("forecast behind 1 = %d, %d want 0, for two may end at once, and 100", least, likely)
	}
	if least, likely := r.forecast(f, 100, backlog{least: 3, likely: 3}, 1); least != 100 || likely != 200 {
		t.Errorf("forecast behind 3 = %d, %d want 100, a round, and 200", least, likely)
	}
	r.giveBack(f, 101, 1, a.slot, true) // what was not used tells nothing
	r.take(f, 100, 9)
	if least, likely := r.forecast(f, 100, backlog{least: 0, likely: 0}, 1); least != 0 || likely != 130 {
		t.Errorf("forecast of an overshoot = %d, %d want 8 of 10 tokens and one of two flows to return: 0, 130", least, likely)
	}
	r.giveBack(f, 400, 1, b.slot, false)
	if f.hold != 250 {
		t.Errorf("mean = %v want that of 100 and 400", f.hold)
	}
	for now := int64(1000); now < 100_000; now += 1000 {
		r.reclaim(f, now)
		r.take(f, now, 1)
	}
	if f.hold < 990 || f.hold > 1000 {
		t.Errorf("mean = %v want that of slots that are taken back, after a while", f.hold)
	}
	wide, two := newInflight(3, 1000) // of flows that want two slots each, two are let in at once
	a = wide.take(two, 0, 2)
	wide.giveBack(two, 100, 2, a.slot, false)
	for flows, want := range []int64{0, 0, 100, 100, 200} {
		if least, _ := wide.forecast(two, 100, backlog{least: 2 * float64(flows)}, 2); least != want {
			t.Errorf("forecast behind %d that want two of three slots = %d want %d", flows, least, want)
		}
	}
	if least, _ := wide.forecast(two, 100, backlog{least: 5, largest: 2}, 1); least != 100 {
		t.Errorf("forecast behind flows of several costs = %d want 100: as much as 5 may be let in at once", least)
	}
	none, empty := newInflight(0, 1)
	if least, likely := none.forecast(empty, 0, backlog{least: 0, likely: 0}, 1); least != never || likely != never {
		t.Errorf("forecast of no slots = %d, %d want never", least, likely)
	}
}

// One flow that held its slot for long, or never gave it back, does not have the next ones sent away.
func TestSlotsForecastOfAnOutlier(t *testing.T) {
	const ms, minute = 1_000_000, 60_000_000_000
	for name, row := range map[string]struct{ first, then, reclaimed int64 }{
		"a slow one":             {first: 10 * ms, then: minute},
		"one that was lost":      {first: 10 * ms, reclaimed: 10 * minute},
		"one that was lost, new": {reclaimed: 10 * minute},
	} {
		r, f := newInflight(4, 10*minute)
		now := int64(0)
		hold := func(held int64) {
			d := r.take(f, now, 1)
			now += held
			r.giveBack(f, now, 1, d.slot, false)
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
			r.take(f, now, 1)
			now += row.reclaimed
			r.reclaim(f, now)
		}
		least, likely := r.forecast(f, now, backlog{least: 80, likely: 80}, 1)
		if most := int64(300 * ms); least > most || row.first > 0 && likely > most {
			t.Errorf("%s: forecast = %d, %d want at most %d ms, for 200", name, least/ms, likely/ms, most/ms)
		}
	}
}

// Flows that want more than all slots are let in one after the other, and no slower.
func TestSlotsForecastOverLimit(t *testing.T) {
	r, f := newInflight(2, 1000)
	a := r.take(f, 0, 50)
	r.giveBack(f, 100, 50, a.slot, false)
	r.take(f, 100, 50)
	q, c := newQueue(new(atomic.Int64), nil), claim{priority: 1}
	for range 3 {
		q.push(&waiter{tokens: 50, cost: r.cost(50)}, c)
	}
	if least, _ := r.forecast(f, 100, q.ahead(c, r.cost(50)), 50); least != 300 {
		t.Errorf("forecast behind 3 = %d at least want 300", least)
	}
}
