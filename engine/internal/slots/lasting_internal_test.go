package slots

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/headgate-go/headgate/engine/internal/source"
)

// Whatever was in use where slots are restored, all slots count, expire in order, and end once each by the names that they had.
func TestRestoredSlots(t *testing.T) {
	const ms = int64(time.Millisecond)
	for seed := range uint64(100) {
		random := rand.New(rand.NewPCG(seed, 0))
		r, old := newSlots(50, 100*ms)
		ids := make(map[uint64]int64) // the slots that are held, with the times when they expire
		for i := range int64(30) {
			if id := r.Take(old, i*ms, 1).Slot; random.IntN(3) > 0 {
				ids[id] = i*ms + 100*ms
			} else {
				r.GiveBack(old, i*ms, 1, id, false)
			}
		}
		written := r.Append(nil, old, 30*ms)

		const shift = 1000 * ms // of the new process's time, which began later
		_, next := newSlots(50, 0)
		now := int64(0)
		for range random.IntN(5) {
			r.Take(next, now, 1)
		}
		own := next.count
		at := source.Restoring{Now: 5 * ms, Then: 0}
		if n, ok := r.Restore(next, written, at); !ok || n != len(ids) || next.count != own+len(ids) || next.used != float64(next.count) {
			t.Fatalf("Restore = %d, %v and %d in flight want %d more than %d", n, ok, next.count, len(ids), own)
		}
		since := -shift
		for i := next.oldest; i != none; i = next.slots[i].next {
			if next.slots[i].since < since {
				t.Fatalf("slots are out of order")
			}
			since = next.slots[i].since
		}
		order := slices.Collect(func(yield func(uint64) bool) {
			for id := range ids {
				if !yield(id) {
					return
				}
			}
		})
		for i, id := range order {
			if i%2 == 0 && (!r.GiveBack(next, 5*ms, 1, id, false) || r.GiveBack(next, 5*ms, 1, id, false)) {
				t.Error("a restored slot is given back once")
			}
		}
		if next.hold != 0 {
			t.Errorf("flows hold slots for %v want nothing learned of flows that another process admitted", next.hold)
		}
		for i, id := range order {
			if i%2 == 1 && r.GiveBack(next, ids[id]-30*ms, 1, id, false) { // in its time, the writing was at 0
				t.Error("a restored slot was given back after its time")
			}
		}
		if got := r.Usage(next, 99*ms).InFlight; got != own {
			t.Errorf("%d in flight want the %d that are not restored", got, own)
		}
	}
}

// What does not look like slots is refused as a whole. A session's ID is skipped.
func TestRestoreOfOddSlots(t *testing.T) {
	r, f := newSlots(5, 1000)
	r.Take(f, 0, 1)
	good := r.Append(nil, f, 10)
	flags := len(good) - 1
	withSession := append(slices.Clone(good), make([]byte, 16)...)
	withSession[flags] = 1
	longName := slices.Clone(good)
	longName[0] = 9
	for _, tt := range []struct {
		name    string
		written []byte
		want    int
		ok      bool
	}{
		{"nothing", nil, 0, true},
		{"one", good, 1, true},
		{"with a session", withSession, 1, true},
		{"two with sessions", slices.Concat(withSession, withSession), 2, true},
		{"half a session", withSession[:len(withSession)-1], 0, false},
		{"cut", good[:flags], 0, false},
		{"the second is cut", slices.Concat(good, good[:5]), 0, false},
		{"a name of another length", longName, 0, false},
		{"no tokens", slices.Concat(good[:9], make([]byte, 8), good[17:]), 0, false},
	} {
		_, next := newSlots(5, 1000)
		if n, ok := r.Restore(next, tt.written, source.Restoring{Now: 10, Then: 10}); n != tt.want || ok != tt.ok || next.count != tt.want {
			t.Errorf("%s: Restore = %d, %v, %d in flight want %d, %v", tt.name, n, ok, next.count, tt.want, tt.ok)
		}
	}
}

// A restored slot keeps its session, and runs out with it unless the client renews it.
func TestRestoreOfSessions(t *testing.T) {
	session := [16]byte{1}
	for _, tt := range []struct {
		name    string
		renewed bool
		after   time.Duration
		want    int
	}{
		{"the client comes back", true, 15 * time.Second, 1},
		{"the client has not come back yet", false, 9 * time.Second, 1},
		{"the client is gone", false, 11 * time.Second, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := &Rule{Limit: 3, MaxInflight: int64(time.Hour), Leases: new(Leases)}
			before.Leases.Renew(session, 0, int64(10*time.Second))
			var old State
			before.Fresh(&old, 0)
			slot := before.Take(&old, int64(time.Second), 1).Slot
			before.Bind(&old, slot, session)
			written := before.Append(nil, &old, int64(2*time.Second))

			r := &Rule{Limit: 3, MaxInflight: int64(time.Hour), Leases: new(Leases)}
			var state State
			r.Fresh(&state, 0)
			now := int64(time.Minute)
			if n, ok := r.Restore(&state, written, source.Restoring{Now: now, Then: now}); n != 1 || !ok {
				t.Fatalf("Restore() = %d, %v", n, ok)
			}
			later := now + int64(tt.after)
			if tt.renewed {
				r.Leases.Renew(session, now+int64(5*time.Second), later+1)
			}
			if got := r.Usage(&state, later).InFlight; got != tt.want {
				t.Errorf("%d in flight after %v want %d", got, tt.after, tt.want)
			}
			if got := r.GiveBack(&state, later, 1, slot, false); got != (tt.want == 1) {
				t.Errorf("GiveBack() = %v", got)
			}
		})
	}
}
