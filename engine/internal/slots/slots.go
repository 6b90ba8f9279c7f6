// Package slots is the concurrency slots of concurrency limiters and concurrency schedulers, and the sessions that such
// slots run out with.
package slots

import (
	"math"
	"math/rand/v2"

	"github.com/headgate-go/headgate/engine/internal/source"
)

// A Rule is what the slots of one component have in common. It is a [source.Source], and does not change.
type Rule struct {
	Limit       float64 // how many slots a key has
	MaxInflight int64   // nanoseconds after which a slot is taken back

	// Leases are those of the sessions that slots are bound to; nil if there are no sessions.
	Leases *Leases

	// Hold is until when no flow is admitted; nil for none.
	Hold *Hold
}

// A State is what one key has in flight: the slots in order of admission. They live in one slice and link by index, so
// that taking and giving back allocate nothing once the slice has grown to the limit. Its zero value is not ready; see
// [Rule.Fresh].
type State struct {
	used   float64
	count  int
	slots  []slot
	places places
	free   int32 // first of the unused slots
	oldest int32
	newest int32

	// due is when a session of one of the slots may have run out. Sessions are renewed every second, and the slots are
	// looked at only then.
	due int64

	// How long slots have been held lately, in nanoseconds: a moving average over the latest returns, and the shortest.
	hold     float64
	returns  int32
	shortest float32 // of flows that have ended; 0 if none has
}

type slot struct {
	id      uint64 // a random number, by which peers name the slot; 0: unused
	tokens  float64
	since   int64    // below 0 for one of another process
	session [16]byte // zero: none
	prev    int32
	next    int32
}

// none ends a list of slots.
const none int32 = -1

// maxReturns is how many returns the average of hold times is taken over.
const maxReturns = 16

// Fresh makes all slots free.
func (r *Rule) Fresh(f *State, _ int64) {
	*f = State{free: none, oldest: none, newest: none, due: math.MaxInt64}
}

// Idle reports whether no slot is taken.
func (r *Rule) Idle(f *State, now int64) bool {
	r.reclaim(f, now)
	return f.count == 0
}

// Take admits a flow while any part of a slot is free. A flow that costs nothing holds nothing. Left does not count the
// flow itself.
func (r *Rule) Take(f *State, now int64, tokens float64) source.Taken {
	r.reclaim(f, now)
	d := source.Taken{OK: true, Left: r.Limit - f.used}
	switch {
	case tokens == 0:
	case r.Hold.left(now) > 0:
		d.OK, d.Left, d.Wait = false, 0, r.Hold.left(now)
	case r.Limit-f.used > source.Slack, f.count == 0 && r.Limit > 0: // a sum of fractions may be a little short
		d.Slot = f.take(now, min(tokens, source.MaxCost))
	default:
		d.OK = false
		if f.oldest != none && r.Limit > 0 {
			d.Wait = min(f.slots[f.oldest].since+r.MaxInflight, f.due) - now
		}
	}
	return d
}

// Cost counts a flow that wants all slots, or more, as all.
func (r *Rule) Cost(tokens float64) float64 { return min(tokens, r.Limit, source.MaxCost) }

// Timed reports false: slots come back when flows end.
func (r *Rule) Timed() bool { return false }

// GiveBack takes a slot back, unless that has been done already.
func (r *Rule) GiveBack(f *State, now int64, _ float64, id uint64, unused bool) bool {
	r.reclaim(f, now)
	i := f.find(id)
	if i == none {
		return false
	}
	since := f.slots[i].since
	f.remove(i)
	if !unused && since >= 0 {
		f.learn(now - since)
		f.end(now - since)
	}
	return true
}

// Inherit takes back what was to be taken back by the numbers before. All other slots stay taken.
func (*Rule) Inherit(f *State, before source.Source[State], now int64) {
	if old, ok := before.(*Rule); ok {
		old.reclaim(f, now)
	}
}

// Oldest returns when the slot was taken that is held the longest; ok is false if none is.
func (r *Rule) Oldest(f *State, now int64) (since int64, ok bool) {
	r.reclaim(f, now)
	if f.oldest == none {
		return 0, false
	}
	return f.slots[f.oldest].since, true
}

// Bind has a slot run out when the session does, if that is sooner.
func (r *Rule) Bind(f *State, id uint64, session [16]byte) {
	if i := f.find(id); i != none {
		f.slots[i].session = session
		f.due = min(f.due, r.Leases.of(session).end(f.slots[i].since))
	}
}

// Usage counts the slots that are free, and the flows that hold some.
func (r *Rule) Usage(f *State, now int64) source.Usage {
	r.reclaim(f, now)
	return source.Usage{Capacity: r.Limit, Remaining: r.Limit - f.used, InFlight: f.count}
}

// Forecast goes by how long flows have held their slots lately. At the least, all flows in flight end at once, and
// those ahead hold the slots in rounds, each for the shortest of those times. A round is as many flows as begin while
// any part of a slot is free. Likely, flows end one after the other, at even distances.
//
// Two flows hold the two slots. Flows have held a slot for 100 ms lately, and none for less than 80 ms. Three flows are
// ahead of the next one, and each wants a slot. At the least, two of them start at once and end 80 ms later, when the
// third and the next one start: 80 ms. Likely, a slot comes back every 50 ms, and the next one gets the fourth: 200 ms.
//
// While no flow is admitted, both are when that ends.
func (r *Rule) Forecast(f *State, now int64, ahead source.Ahead, tokens float64) (least, likely int64) {
	hold := r.Hold.left(now)
	switch {
	case r.Limit == 0:
		return source.Never, source.Never
	case f.returns == 0 || hold > 0:
		return hold, hold
	}
	over := max(f.used-r.Limit, 0)
	cost := r.Cost(tokens)
	round := math.Ceil(r.Limit/cost-source.Slack) * cost
	if ahead.Largest > 0 {
		round = r.Limit + ahead.Largest
	}
	rounds := math.Floor(ahead.Least/round + source.Slack)
	return source.Nanos(float64(f.shortest) * rounds),
		source.Nanos(f.hold*(over+ahead.Likely)/max(f.used, r.Limit) + f.hold/float64(max(f.count, 1)))
}

// reclaim takes back the slots whose time is over.
func (r *Rule) reclaim(f *State, now int64) {
	for f.oldest != none && now-f.slots[f.oldest].since >= r.MaxInflight {
		began := f.slots[f.oldest].since
		f.remove(f.oldest)
		if began >= 0 {
			f.learn(r.MaxInflight)
		}
	}
	if now >= f.due {
		r.expire(f, now)
	}
}

// expire takes back the slots whose sessions have run out. It is not known how long their flows have taken.
func (r *Rule) expire(f *State, now int64) {
	f.due = math.MaxInt64
	var last [16]byte // slots of a session are often taken one after the other
	var of lease
	for i := f.oldest; i != none; {
		s := f.slots[i]
		if s.session != ([16]byte{}) {
			if s.session != last {
				last, of = s.session, r.Leases.of(s.session)
			}
			if end := of.end(s.since); end <= now {
				f.remove(i)
			} else {
				f.due = min(f.due, end)
			}
		}
		i = s.next
	}
}

func (f *State) take(now int64, tokens float64) (id uint64) {
	// It is random, so that neither a late end nor a guessed one frees another flow's slot.
	for id == 0 {
		id = rand.Uint64()
	}
	f.put(id, now, tokens)
	return id
}

// put takes a slot with the ID.
func (f *State) put(id uint64, now int64, tokens float64) {
	i := f.free
	if i == none {
		i = int32(len(f.slots))
		f.slots = append(f.slots, slot{})
	} else {
		f.free = f.slots[i].next
	}
	f.slots[i] = slot{id: id, tokens: tokens, since: now, prev: f.newest, next: none}
	f.places.add(f.slots, i)
	if f.newest == none {
		f.oldest = i
	} else {
		f.slots[f.newest].next = i
	}
	f.newest = i
	f.used += tokens
	f.count++
}

func (f *State) remove(i int32) {
	s := &f.slots[i]
	if s.prev == none {
		f.oldest = s.next
	} else {
		f.slots[s.prev].next = s.next
	}
	if s.next == none {
		f.newest = s.prev
	} else {
		f.slots[s.next].prev = s.prev
	}
	f.used -= s.tokens
	f.count--
	f.places.remove(f.slots, s.id)
	*s = slot{next: f.free}
	f.free = i
	if f.count == 0 {
		f.used = 0 // forget what fractions of tokens left behind
		if len(f.slots) > 64 {
			f.slots, f.places, f.free = nil, places{}, none
		}
	}
}

// outlier bounds what a time counts for, as a multiple of the average: a flow that hung or never ended says nothing
// about the others.
const outlier = 4

// learn takes the time that a slot has been held into the average.
func (f *State) learn(held int64) {
	took := float64(max(held, 0))
	if f.hold > 0 {
		took = min(took, outlier*f.hold)
	}
	f.returns = min(f.returns+1, maxReturns)
	f.hold += (took - f.hold) / float64(f.returns)
}

// end takes the time after which a flow has ended into the shortest. A shorter time counts at once, a longer one
// slowly, because flows are rejected by it. A slot that was reclaimed says nothing about how soon one may come free.
func (f *State) end(held int64) {
	took := float32(max(held, 1))
	if f.shortest > 0 {
		took = min(took, f.shortest*1.25)
	}
	f.shortest = took
}
