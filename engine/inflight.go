package engine

import "math/rand/v2"

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
}

type slot struct {
	id      uint64 // 0: unused
	tokens  float64
	expires int64
	prev    int32
	next    int32
}

// none ends a list of slots.
const none int32 = -1

func freshInflight(f *inflight) {
	*f = inflight{free: none, oldest: none, newest: none}
}

// maxCost bounds what one flow counts for. More would swallow the others in the sum, which is a float, and leave the
// limit open when it goes; the label that says it may come from a peer.
const maxCost = 1e9

// take admits a flow while any part of a slot is free; then id is what give needs to take it back.
func (f *inflight) take(limit, tokens float64, now, expires int64) (id uint64, ok bool) {
	f.reclaim(now)
	if f.used >= limit {
		return 0, false
	}
	i := f.free
	if i == none {
		i = int32(len(f.slots))
		f.slots = append(f.slots, slot{})
	} else {
		f.free = f.slots[i].next
	}
	// The index finds the slot; the random half keeps a late or a guessed end from freeing somebody else's.
	id = uint64(i+1)<<32 | uint64(rand.Uint32())
	tokens = min(tokens, maxCost)
	f.slots[i] = slot{id: id, tokens: tokens, expires: expires, prev: f.newest, next: none}
	if f.newest == none {
		f.oldest = i
	} else {
		f.slots[f.newest].next = i
	}
	f.newest = i
	f.used += tokens
	f.count++
	return id, true
}

// give takes a slot back, unless it has been already.
func (f *inflight) give(id uint64) bool {
	i := int64(id>>32) - 1
	if id == 0 || i < 0 || i >= int64(len(f.slots)) || f.slots[i].id != id {
		return false
	}
	f.remove(int32(i))
	return true
}

// reclaim takes back the slots whose time is over.
func (f *inflight) reclaim(now int64) {
	for f.oldest != none && f.slots[f.oldest].expires <= now {
		f.remove(f.oldest)
	}
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
			freshInflight(f)
		}
	}
}
