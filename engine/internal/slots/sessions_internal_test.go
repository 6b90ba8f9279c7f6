package slots

import (
	"math/rand/v2"
	"testing"

	"github.com/headgate-go/headgate/engine/internal/source"
)

// Slots, sessions, other numbers and restarts must agree with a plain map, whatever the order. The map knows for each flow until
// when its client takes its slot for held.
func TestSessionsModel(t *testing.T) {
	const (
		second  = 1_000_000_000
		lasts   = 10 * second
		clients = 4
	)
	type flow struct {
		taken   int64 // by the clock of the process
		ends    int64 // by MaxInflight
		client  int
		stretch int // of the client's session, from one renewal to its running out
	}
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 7))
		rule := func() *Rule {
			return &Rule{Limit: float64(rng.IntN(12)), MaxInflight: (5 + rng.Int64N(40)) * second, Leases: new(Leases)}
		}
		r, f := newSlots(5, 20*second)
		r.Leases = new(Leases)
		now := int64(second)
		model := make(map[uint64]flow)
		var until [clients]int64
		var stretch [clients]int
		held := func(id uint64) bool {
			m := model[id]
			return now < m.ends && (m.client < 0 || stretch[m.client] == m.stretch && now < until[m.client])
		}
		inflight := func() (n int) {
			for id := range model {
				if held(id) {
					n++
				} else {
					delete(model, id)
				}
			}
			return n
		}
		session := func(client int) (s [16]byte) {
			s[0] = byte(client + 1)
			return s
		}
		renew := func(client int) {
			if until[client] <= now {
				stretch[client]++
			}
			r.Leases.Renew(session(client), now, now+lasts)
			until[client] = now + lasts
		}
		for step := range 3000 {
			now += rng.Int64N(second / 2)
			switch kind := rng.IntN(100); {
			case kind < 50: // a check
				client := rng.IntN(clients+1) - 1
				if client >= 0 && rng.IntN(4) > 0 {
					renew(client)
				}
				n := inflight()
				d := r.Take(f, now, 1)
				if want := float64(n) < r.Limit; d.OK != want {
					t.Fatalf("seed %d, step %d: Take = %+v with %d flows of %v", seed, step, d, n, r.Limit)
				}
				if !d.OK {
					if r.Limit > 0 && d.Wait <= 0 {
						t.Fatalf("seed %d, step %d: Take = %+v says not when to come back", seed, step, d)
					}
					continue
				}
				m := flow{taken: now, ends: now + r.MaxInflight, client: client}
				if client >= 0 {
					r.Bind(f, d.Slot, session(client))
					m.stretch = stretch[client]
				}
				model[d.Slot] = m
			case kind < 75: // an end
				for id := range model {
					want := held(id)
					if got := r.GiveBack(f, now, 1, id, false); got != want {
						t.Fatalf("seed %d, step %d: GiveBack = %v want %v", seed, step, got, want)
					}
					delete(model, id)
					break
				}
			case kind < 93:
				renew(rng.IntN(clients))
			case kind < 98: // other numbers
				next := rule()
				next.Leases = r.Leases
				next.Inherit(f, r, now)
				for id, m := range model {
					if !held(id) {
						delete(model, id)
						continue
					}
					m.ends = m.taken + next.MaxInflight
					model[id] = m
				}
				r = next
			default: // a restart in good order
				written := r.Append(nil, f, now)
				inflight()
				next := &Rule{Limit: r.Limit, MaxInflight: r.MaxInflight, Leases: new(Leases)}
				fresh := new(State)
				next.Fresh(fresh, 0)
				away := rng.Int64N(3 * second)
				after := rng.Int64N(second)
				taken, ok := next.Restore(fresh, written, source.Restoring{Now: after, Then: after - away})
				shift := after - away - now
				for c := range clients { // each has revival for its slots
					until[c] = after + int64(revival)
				}
				now = after
				for id, m := range model {
					m.taken = min(m.taken+shift, -1)
					m.ends = m.taken + r.MaxInflight
					model[id] = m
				}
				bound := [clients]bool{}
				for _, m := range model {
					if m.client >= 0 && now < m.ends {
						bound[m.client] = true
					}
				}
				for c := range clients {
					if !bound[c] { // the new process has never heard of it
						until[c] = 0
					}
				}
				if n := inflight(); !ok || taken != n {
					t.Fatalf("seed %d, step %d: Restore = %d, %v want %d", seed, step, taken, ok, n)
				}
				r, f = next, fresh
			}
			if n, got := inflight(), r.Usage(f, now); got.InFlight != n {
				t.Fatalf("seed %d, step %d: %d flows are in flight want %d", seed, step, got.InFlight, n)
			}
		}
	}
}
