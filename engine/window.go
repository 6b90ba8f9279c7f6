package engine

// A window sums what happened lately. It counts in slots of time, and forgets the oldest when a new one begins. Times are
// nanoseconds since the engine's epoch. The zero value is not ready, and no method is safe for concurrent use.
type window struct {
	width  int64   // of a slot
	slots  []tally // a ring: the slot numbered n is at n modulo its length
	newest int64   // number of the newest slot, counted from the epoch
}

// A tally is how often something happened, and what it came to.
type tally struct{ sum, count float64 }

// newWindow makes a window of n whole slots before the one that is under way.
func newWindow(n int, width, now int64) *window {
	return &window{width: width, slots: make([]tally, n+1), newest: now / width}
}

// advance begins the slot of now. A clock that steps back changes nothing.
func (w *window) advance(now int64) {
	slot := now / w.width
	if slot-w.newest >= int64(len(w.slots)) {
		clear(w.slots)
		w.newest = slot
	}
	for ; w.newest < slot; w.newest++ {
		w.slots[(w.newest+1)%int64(len(w.slots))] = tally{}
	}
}

// add counts one thing that came to x.
func (w *window) add(now int64, x float64) {
	w.advance(now)
	t := &w.slots[w.newest%int64(len(w.slots))]
	t.sum += x
	t.count++
}

// whole sums all slots except the current one. It does not subtract the current one from the total: a huge value there
// would swallow the others.
func (w *window) whole(now int64) tally {
	w.advance(now)
	current := int(w.newest % int64(len(w.slots)))
	return sum(w.slots[:current]).plus(sum(w.slots[current+1:]))
}

// total sums all slots.
func (w *window) total(now int64) tally {
	w.advance(now)
	return sum(w.slots)
}

func sum(slots []tally) (t tally) {
	for _, s := range slots {
		t = t.plus(s)
	}
	return t
}

func (t tally) plus(s tally) tally { return tally{t.sum + s.sum, t.count + s.count} }
