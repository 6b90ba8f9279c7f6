package engine

import (
	"math"
	"math/rand/v2"
)

// slotRule is what the slots of one concurrency limiter or scheduler have in common.
type slotRule struct {
	limit       float64
	maxInflight int64 // nanoseconds until a slot is taken back
}

// inflight is what one key of a concurrency limiter has in flight: the slots in order of admission, which is the order
// in which they expire too. They live in one slice and link by index, so that taking and giving back allocate nothing
// once the slice has grown to the limit.
type inflight struct {
	used   float64
	count  int
	slots  []slot
	free   int32 // first of the unused slots
	oldest int32
	newest int32

	// How long slots have been held lately, in nanoseconds: a moving average over returns of them, and at the least.
	hold     float64
	returns  int32
	shortest float32 // of flows that have ended; 0 where none has
}

type slot struct {
	id     uint64 // 0: unused
	tokens float64
	since  int64
	prev   int32
	next   int32
}

// none ends a list of slots.
const none int32 = -1

// maxCost bounds what one flow counts for, of slots, of a load, and in a queue. More would swallow the others in the
// sum, which is a float, and leave the limit open when it goes; the label that says it may come from a peer.
const maxCost = 1e9

// maxReturns is how many returns the average of hold times is taken over.
const maxReturns = 16

func (r *slotRule) fresh(f *inflight, _ int64) {
	*f = inflight{free: none, oldest: none, newest: none}
}

func (r *slotRule) idle(f *inflight, now int64) bool {
	r.reclaim(f, now)
	return f.count == 0
}

// take admits a flow while any part of a slot is free; then its slot is what giveBack needs. What costs nothing holds
// nothing. What is left is told without the flow itself.
func (r *slotRule) take(f *inflight, now int64, tokens float64) taken {
	r.reclaim(f, now)
	d := taken{ok: true, left: r.limit - f.used}
	switch {
	case tokens == 0:
	case r.limit-f.used > slack, f.count == 0 && r.limit > 0: // a sum of fractions may be a little short
		d.slot = f.take(now, min(tokens, maxCost))
	default:
		d.ok = false
		if f.oldest != none {
			d.wait = f.slots[f.oldest].since + r.maxInflight - now
		}
	}
	return d
}

// cost counts a flow that wants all that there is, or more, as all.
func (r *slotRule) cost(tokens float64) float64 { return min(tokens, r.limit, maxCost) }

// timed reports false: slots come back when flows end.
func (r *slotRule) timed() bool { return false }

// giveBack takes a slot back, unless it has been already.
func (r *slotRule) giveBack(f *inflight, now int64, _ float64, id uint64, unused bool) bool {
	r.reclaim(f, now)
	i := int64(id>>32) - 1
	if id == 0 || i < 0 || i >= int64(len(f.slots)) || f.slots[i].id != id {
		return false
	}
	since := f.slots[i].since
	f.remove(int32(i))
	if !unused {
		f.learn(now - since)
		f.end(now - since)
	}
	return true
}

func (r *slotRule) usage(f *inflight, now int64) Usage {
	r.reclaim(f, now)
	return Usage{Capacity: r.limit, Remaining: r.limit - f.used, InFlight: f.count}
}

// forecast goes by how long flows have held their slots lately. At the least, all that are in flight end at once, and
// those ahead hold the slots in rounds, each for the shortest of those times; a round is as many as begin while any part
// of a slot is free. Likely, they end one after the other, at even distances.
func (r *slotRule) forecast(f *inflight, _ int64, ahead backlog, tokens float64) (least, likely int64) {
	switch {
	case r.limit == 0:
		return never, never
	case f.returns == 0:
		return 0, 0
	}
	over := max(f.used-r.limit, 0)
	cost := r.cost(tokens)
	round := math.Ceil(r.limit/cost-slack) * cost
	if ahead.largest > 0 {
		round = r.limit + ahead.largest
	}
	rounds := math.Floor(ahead.least/round + slack)
	return clampNanos(float64(f.shortest) * rounds),
		clampNanos(f.hold*(over+ahead.likely)/max(f.used, r.limit) + f.hold/float64(max(f.count, 1)))
}

// reclaim takes back the slots whose time is over.
func (r *slotRule) reclaim(f *inflight, now int64) {
	for f.oldest != none && now-f.slots[f.oldest].since >= r.maxInflight {
		f.remove(f.oldest)
		f.learn(r.maxInflight)
	}
}

func (f *inflight) take(now int64, tokens float64) (id uint64) {
	i := f.free
	if i == none {
		i = int32(len(f.slots))
		f.slots = append(f.slots, slot{})
	} else {
		f.free = f.slots[i].next
	}
	// The index finds the slot; the random half keeps a late or a guessed end from freeing somebody else's.
	id = uint64(i+1)<<32 | uint64(rand.Uint32())
	f.slots[i] = slot{id: id, tokens: tokens, since: now, prev: f.newest, next: none}
	if f.newest == none {
		f.oldest = i
	} else {
		f.slots[f.newest].next = i
	}
	f.newest = i
	f.used += tokens
	f.count++
	return id
}

func (f *inflight) remove(i int32) {
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
	*s = slot{next: f.free}
	f.free = i
	if f.count == 0 {
		f.used = 0 // forget what fractions of tokens left behind
		if len(f.slots) > 64 {
			f.slots, f.free = nil, none
		}
	}
}

// outlier is how many times the average a time counts for at the most: of a flow that hung, or never ended, the others
// know nothing.
const outlier = 4

// learn takes the time that a slot has been held into the average.
func (f *inflight) learn(held int64) {
	took := float64(max(held, 0))
	if f.hold > 0 {
		took = min(took, outlier*f.hold)
	}
	f.returns = min(f.returns+1, maxReturns)
	f.hold += (took - f.hold) / float64(f.returns)
}

// end takes the time after which a flow has ended into the shortest: at once where it is shorter, and slowly else, for
// by that flows are sent away. A slot that was taken back tells nothing of how soon one may come free.
func (f *inflight) end(held int64) {
	took := float32(max(held, 1))
	if f.shortest > 0 {
		took = min(took, f.shortest*1.25)
	}
	f.shortest = took
}
