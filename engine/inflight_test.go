package engine

import (
	"math/rand/v2"
	"testing"
)

func TestInflight(t *testing.T) {
	var f inflight
	freshInflight(&f)
	a, ok := f.take(2, 1, 0, 100)
	if !ok || a == 0 {
		t.Fatalf("take = %d, %v want a slot", a, ok)
	}
	b, _ := f.take(2, 1, 10, 110)
	if _, ok := f.take(2, 1, 20, 120); ok {
		t.Error("a third flow got one of two slots")
	}
	if !f.give(a) || f.give(a) {
		t.Error("a slot is given back once")
	}
	if f.give(0) || f.give(b+1) || f.give(1<<63) {
		t.Error("made-up ids gave slots back")
	}
	if _, ok := f.take(2, 5, 20, 120); !ok || f.used != 6 {
		t.Errorf("used = %v want an overshoot to 6 while a slot is free", f.used)
	}
	f.reclaim(110)
	if f.count != 1 || f.used != 5 {
		t.Errorf("count, used = %d, %v want the expired one taken back: 1, 5", f.count, f.used)
	}
	if f.give(b) {
		t.Error("an expired slot was given back")
	}
}

// A cost beyond all reason must not swallow the count of the others.
func TestInflightHugeCost(t *testing.T) {
	var f inflight
	freshInflight(&f)
	f.take(2, 1, 0, 100)
	huge, _ := f.take(2, 1e300, 0, 100)
	f.give(huge)
	f.take(2, 1, 0, 100)
	if _, ok := f.take(2, 1, 0, 100); ok || f.used != 2 {
		t.Errorf("used = %v want 2, and no room for a third flow", f.used)
	}
}

// The list and the count must agree with a plain map, whatever the order.
func TestInflightModel(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var f inflight
	freshInflight(&f)
	model := make(map[uint64]int64) // id → expiry
	for now := range int64(20_000) {
		switch rng.IntN(3) {
		case 0, 1:
			id, ok := f.take(100, 1, now, now+500)
			for old, expires := range model {
				if expires <= now {
					delete(model, old)
				}
			}
			if ok != (len(model) < 100) {
				t.Fatalf("at %d: take = %v with %d in flight", now, ok, len(model))
			}
			if ok {
				model[id] = now + 500
			}
		case 2:
			f.reclaim(now)
			for id, expires := range model {
				if got := f.give(id); got != (expires > now) {
					t.Fatalf("at %d: give = %v, expires %d", now, got, expires)
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
