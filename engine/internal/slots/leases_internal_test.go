package slots

import (
	"math"
	"math/rand/v2"
	"testing"
)

// A slot runs out at the earlier of its age and the end of its session. A session that is renewed keeps it.
func TestSlotsOfSessions(t *testing.T) {
	a, b, unknown := [16]byte{1}, [16]byte{2}, [16]byte{3}
	for _, tt := range []struct {
		name    string
		session [16]byte
		renewed []int64 // at these times, for 10 each
		want    int64   // when the slot is free
	}{
		{"without a session", [16]byte{}, nil, 100},
		{"never renewed", a, nil, 10},
		{"renewed", a, []int64{5, 12, 20}, 30},
		{"for longer than a slot lasts", a, []int64{8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96}, 100},
		{"renewed too late", a, []int64{10, 11, 19}, 10},
		{"of another session's renewals", b, []int64{5}, 10},
		{"of a session that does not live", unknown, nil, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, f := newSlots(1, 100)
			r.Leases = new(Leases)
			r.Leases.Renew(a, 0, 10)
			r.Leases.Renew(b, 0, 10)
			first := r.Take(f, 0, 1)
			r.Bind(f, first.Slot, tt.session)
			for now := int64(0); now <= tt.want; now++ {
				for _, at := range tt.renewed {
					if at == now {
						r.Leases.Renew(a, now, now+10)
					}
				}
				if got := r.Take(f, now, 1); got.OK != (now == tt.want) {
					t.Fatalf("at %d a second flow got the slot: %v want it at %d", now, got.OK, tt.want)
				} else if !got.OK && got.Wait > tt.want-now {
					t.Fatalf("at %d it is to wait for %d want no longer than until %d", now, got.Wait, tt.want)
				}
			}
			if r.GiveBack(f, tt.want, 1, first.Slot, false) {
				t.Error("the slot was given back after it had run out")
			}
		})
	}
}

// A session that comes back does not bring slots back, even if nobody has asked for them meanwhile.
func TestSessionBeginsAnew(t *testing.T) {
	r, f := newSlots(2, math.MaxInt64)
	r.Leases = new(Leases)
	session := [16]byte{1}
	r.Leases.Renew(session, 0, 10)
	r.Bind(f, r.Take(f, 5, 1).Slot, session)
	r.Leases.Renew(session, 20, 30)
	r.Bind(f, r.Take(f, 20, 1).Slot, session)
	if got := r.Usage(f, 20).InFlight; got != 1 {
		t.Errorf("%d slots are held want 1, of the time since the session came back", got)
	}
	if got := r.Usage(f, 30).InFlight; got != 0 {
		t.Errorf("%d slots are held want none when the session has run out again", got)
	}
}

// Sessions that have run out are forgotten.
func TestLeasesAreForgotten(t *testing.T) {
	var l Leases
	for i := range int64(10_000) {
		l.Renew([16]byte{byte(i), byte(i >> 8)}, i, i+10)
		if len(l.by) > 2*fewest {
			t.Fatalf("%d sessions are kept, and 10 live", len(l.by))
		}
	}
}

// Names find their slots, in whatever order slots come and go.
func TestPlaces(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	r, f := newSlots(1e6, math.MaxInt64)
	var held []uint64
	for range 20_000 {
		if size := rng.IntN(200); len(held) > size {
			i := rng.IntN(len(held))
			if !r.GiveBack(f, 0, 1, held[i], false) {
				t.Fatalf("a slot of %d was not found", len(held))
			}
			if f.find(held[i]) != none {
				t.Fatal("a slot that was given back is still found")
			}
			held[i] = held[len(held)-1]
			held = held[:len(held)-1]
		} else {
			held = append(held, r.Take(f, 0, 1).Slot)
		}
	}
	for _, id := range held {
		if i := f.find(id); i == none || f.slots[i].id != id {
			t.Fatal("a slot that is held is not found")
		}
	}
	for _, id := range held {
		if !r.GiveBack(f, 0, 1, id, false) {
			t.Fatal("a slot was lost")
		}
	}
}
