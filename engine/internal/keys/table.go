// Package keys holds a state for each key of a component, and gives keys their names.
//
// It is the lowest floor of the engine: it knows nothing of limits, queues or policies.
package keys

import (
	"hash/maphash"
	"math/bits"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A Table holds a state of type S for each key. It never has more keys than its limit. Beyond the limit, unknown keys share
// one entry, the spill.
//
// To look up a key takes no lock except the key's own: the slots of a shard are written under the shard's mutex and
// read without it. Times are nanoseconds by a clock of the caller's. All methods are safe for concurrent use.
//
// Library caches do not fit: they cost more memory for a key than its state, and they forget exhausted buckets when
// keys flood in, which is when limits matter.
type Table[S any] struct {
	fresh       func(e *Entry[S], now int64)
	forgettable func(e *Entry[S], now int64) bool

	seed   maphash.Seed
	mask   uint64
	shards []shard[S]
	limit  int64
	size   atomic.Int64

	spill   Entry[S]
	spilled atomic.Uint64 // how often the spill was used

	crowded atomic.Bool     // a key did not fit since the last sweep
	full    chan<- struct{} // receives when a key did not fit; may be nil
}

type shard[S any] struct {
	mu        sync.Mutex
	slots     atomic.Pointer[[]atomic.Pointer[Entry[S]]] // a power of two of them, probed in line
	live      int
	dead      int       // slots that hold the tombstone
	nextSweep int64     // when a full table may sweep this shard again
	tombstone *Entry[S] // keeps a probe going across the slot of a removed key
	forgotten uint64    // the counts of the entries that are gone
	_         [8]byte   // a cache line each
}

// An Entry is the state of one key, with a lock that guards it. Entries of no table are for states without a key; their
// zero value is ready.
type Entry[S any] struct {
	mu   sync.Mutex
	mark uint32 // see Mark; goneMark is out of the table: look the key up again
	hash uint32
	key  string
	used uint32 // last use, in seconds

	// Count is a counter for the caller, guarded by the lock. [Table.Counted] sums it up.
	Count uint32

	// State is guarded by the lock.
	State S
}

// Key returns the entry's key and its hash, which never change. An entry of no table, and the spill, have none.
func (e *Entry[S]) Key() (key string, hash uint32) { return e.key, e.hash }

// goneMark is the bit of a mark that is not the caller's.
const goneMark = 1 << 31

// Mark returns what [Entry.SetMark] has noted, and 0 at first. It takes no memory. The lock guards it.
func (e *Entry[S]) Mark() uint32 { return e.mark &^ goneMark }

// SetMark notes a number below 1<<31 with the entry. The lock guards it.
func (e *Entry[S]) SetMark(mark uint32) { e.mark = e.mark&goneMark | mark&^goneMark }

// Gone reports whether the entry, which is locked, has left its table.
func (e *Entry[S]) Gone() bool { return e.mark&goneMark != 0 }

// Lock locks the entry.
func (e *Entry[S]) Lock() { e.mu.Lock() }

// TryLock locks the entry unless it is locked, and reports whether it has.
func (e *Entry[S]) TryLock() bool { return e.mu.TryLock() }

// LockLive locks the entry unless it has left its table, and reports whether it has.
func (e *Entry[S]) LockLive() bool {
	e.mu.Lock()
	if e.Gone() {
		e.mu.Unlock()
		return false
	}
	return true
}

// Unlock unlocks the entry.
func (e *Entry[S]) Unlock() { e.mu.Unlock() }

// Counted returns the entry's count. The entry must not be locked.
func (e *Entry[S]) Counted() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return uint64(e.Count)
}

// FullSweepEvery is how often a full table looks for keys to forget. It bounds the work that a flood of unknown keys can
// cause.
const FullSweepEvery = time.Second

// New makes a table of up to limit keys. The function fresh initializes the state of an entry. The function forgettable reports
// whether a fresh state would behave like that of an entry, which is forgotten then. Both are called with the entry locked, or
// before others know it.
//
// When a key does not fit, the table sends to full without blocking: a channel with room for one keeps the news. Full may
// be nil.
func New[S any](limit int, fresh func(*Entry[S], int64), forgettable func(*Entry[S], int64) bool, full chan<- struct{}) *Table[S] {
	// A shard for some 16 000 keys, so that growing one is short; the count is a power of two.
	shards := 1 << min(bits.Len(uint(limit)>>14), 8)
	t := &Table[S]{
		fresh:       fresh,
		forgettable: forgettable,
		seed:        maphash.MakeSeed(),
		mask:        uint64(shards - 1),
		shards:      make([]shard[S], shards),
		limit:       int64(limit),
		full:        full,
	}
	// Most limiters of a large file have no key yet, and few have many. So the shards begin with the same slot, which stays
	// empty: the first key of a shard has it rebuilt.
	slots, tombstone := make([]atomic.Pointer[Entry[S]], 1), &Entry[S]{mark: goneMark}
	for i := range t.shards {
		t.shards[i].slots.Store(&slots)
		t.shards[i].tombstone = tombstone
	}
	fresh(&t.spill, 0)
	return t
}

// Lock returns the key's entry, locked; the caller unlocks it. A key that is not known yet gets an entry, or the spill
// when the table is full.
func (t *Table[S]) Lock(key string, now int64) *Entry[S] {
	h := maphash.String(t.seed, key)
	s := &t.shards[h&t.mask]
	for {
		e := s.find(uint32(h>>32), key)
		if e == nil {
			if e = t.insert(s, uint32(h>>32), key, now, t.fresh); e == nil {
				t.spilled.Add(1)
				e = &t.spill
			}
		}
		e.mu.Lock()
		if !e.Gone() {
			e.used = second(now)
			return e
		}
		e.mu.Unlock()
	}
}

// LockSpill returns what [Table.Lock] does for a key that does not fit.
func (t *Table[S]) LockSpill() *Entry[S] {
	t.spilled.Add(1)
	t.spill.mu.Lock()
	return &t.spill
}

// HasRoom reports whether there is room for the key, which is not known. It makes room if it can, as [Table.Lock] does.
func (t *Table[S]) HasRoom(key string, now int64) bool {
	if t.size.Load() < t.limit {
		return true
	}
	s := &t.shards[maphash.String(t.seed, key)&t.mask]
	s.mu.Lock()
	defer s.mu.Unlock()
	t.crowd(s, now)
	return t.size.Load() < t.limit
}

// LockOwn returns what [Table.Lock] does, but nil when the key has no entry of its own because the table is full. If it makes an
// entry, it calls fresh for it, or the table's own function if that is nil.
func (t *Table[S]) LockOwn(key string, now int64, fresh func(*Entry[S], int64)) *Entry[S] {
	if fresh == nil {
		fresh = t.fresh
	}
	h := maphash.String(t.seed, key)
	s := &t.shards[h&t.mask]
	for {
		e := s.find(uint32(h>>32), key)
		if e == nil {
			if e = t.insert(s, uint32(h>>32), key, now, fresh); e == nil {
				return nil
			}
		}
		e.mu.Lock()
		if !e.Gone() {
			e.used = second(now)
			return e
		}
		e.mu.Unlock()
	}
}

// Use notes that the entry, which is locked, is used now.
func (e *Entry[S]) Use(now int64) { e.used = second(now) }

// LockKnown returns the key's entry, locked, or nil when the key is not known. It counts as no use.
func (t *Table[S]) LockKnown(key string) *Entry[S] {
	h := maphash.String(t.seed, key)
	s := &t.shards[h&t.mask]
	for {
		e := s.find(uint32(h>>32), key)
		if e == nil {
			return nil
		}
		e.mu.Lock()
		if !e.Gone() {
			return e
		}
		e.mu.Unlock()
	}
}

// LockPeek returns the entry that [Table.Lock] would return, locked, without adding the key. It is nil for a key that is not known
// and would get a new entry. It counts as no use.
func (t *Table[S]) LockPeek(key string) *Entry[S] {
	h := maphash.String(t.seed, key)
	s := &t.shards[h&t.mask]
	for {
		e := s.find(uint32(h>>32), key)
		if e == nil && t.size.Load() >= t.limit {
			e = &t.spill
		}
		if e == nil {
			return nil
		}
		e.mu.Lock()
		if !e.Gone() {
			return e
		}
		e.mu.Unlock()
	}
}

// Find returns the key's entry, or nil when the key is not known. The entry is not locked, and may leave the table at any time: it is for
// what may be read without a lock. It counts as no use.
func (t *Table[S]) Find(key string) *Entry[S] {
	h := maphash.String(t.seed, key)
	return t.shards[h&t.mask].find(uint32(h>>32), key)
}

// Full reports whether there is no room for another key.
func (t *Table[S]) Full() bool { return t.size.Load() >= t.limit }

// Spill returns the entry that unknown keys share when the table is full. It is not locked.
func (t *Table[S]) Spill() *Entry[S] { return &t.spill }

// Len returns the number of keys.
func (t *Table[S]) Len() int {
	return int(min(t.size.Load(), t.limit)) // a key that does not fit is counted for a moment
}

// Spilled returns how often [Table.Lock] returned the spill.
func (t *Table[S]) Spilled() uint64 { return t.spilled.Load() }

// Crowded reports whether a key did not fit since the last sweep.
func (t *Table[S]) Crowded() bool { return t.crowded.Load() }

// second is a time as entries keep it, early by a second at the most. This does no harm: an idle entry is forgotten
// only if its state is as good as new.
func second(now int64) uint32 { return uint32(now / int64(time.Second)) }

// Counted returns the sum of the counts of all entries, forgotten ones and the spill included. It looks at each entry.
func (t *Table[S]) Counted() uint64 {
	n := t.spill.Counted()
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock() // so that none goes meanwhile
		n += s.forgotten
		slots := *s.slots.Load()
		for j := range slots {
			if e := slots[j].Load(); e != nil && e != s.tombstone {
				n += e.Counted()
			}
		}
		s.mu.Unlock()
	}
	return n
}

func (s *shard[S]) find(hash uint32, key string) *Entry[S] {
	slots := *s.slots.Load()
	mask := uint32(len(slots) - 1)
	for i := hash & mask; ; i = (i + 1) & mask {
		e := slots[i].Load()
		if e == nil {
			return nil
		}
		if e.hash == hash && e.key == key && e != s.tombstone {
			return e
		}
	}
}

// insert adds the key, unless another goroutine just did. It returns nil when the table is full.
func (t *Table[S]) insert(s *shard[S], hash uint32, key string, now int64, fresh func(*Entry[S], int64)) *Entry[S] {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.find(hash, key); e != nil {
		return e
	}
	if t.size.Add(1) > t.limit {
		t.crowd(s, now)
		if t.size.Load() > t.limit {
			t.size.Add(-1)
			return nil
		}
	}
	slots := *s.slots.Load()
	if 4*(s.live+s.dead+1) > 3*len(slots) {
		slots = s.rebuild()
	}
	e := &Entry[S]{hash: hash, key: strings.Clone(key), used: second(now)}
	fresh(e, now)
	place(slots, e)
	s.live++
	return e
}

// crowd has room made for a key that does not fit, in its shard at once. The shard's mutex is held.
func (t *Table[S]) crowd(s *shard[S], now int64) {
	t.crowded.Store(true)
	select {
	case t.full <- struct{}{}: // for the sweep of the other shards
	default:
	}
	if now >= s.nextSweep {
		s.nextSweep = now + int64(FullSweepEvery)
		t.sweepShard(s, now, 0)
	}
}

// Each calls f with each entry, locked, and with the spill. It locks one entry at a time. It leaves out no key that was made before
// it is called.
func (t *Table[S]) Each(f func(*Entry[S])) {
	for e := range t.Entries {
		e.mu.Lock()
		if !e.Gone() {
			f(e)
		}
		e.mu.Unlock()
	}
	t.spill.mu.Lock()
	f(&t.spill)
	t.spill.mu.Unlock()
}

// Entries yields the entry of each key. It is not locked, and may leave the table at any time.
func (t *Table[S]) Entries(yield func(*Entry[S]) bool) {
	var entries []*Entry[S]
	for i := range t.shards {
		s := &t.shards[i]
		entries = entries[:0]
		s.mu.Lock() // so that an entry which is made meanwhile is seen
		slots := *s.slots.Load()
		for j := range slots {
			if e := slots[j].Load(); e != nil && e != s.tombstone {
				entries = append(entries, e)
			}
		}
		s.mu.Unlock()
		for _, e := range entries {
			if !yield(e) {
				return
			}
		}
	}
}

// place puts the entry into the first empty slot of its probe. Slots of removed keys are left to rebuild: a reader may
// be probing across them.
func place[S any](slots []atomic.Pointer[Entry[S]], e *Entry[S]) {
	mask := uint32(len(slots) - 1)
	i := e.hash & mask
	for slots[i].Load() != nil {
		i = (i + 1) & mask
	}
	slots[i].Store(e)
}

// rebuild copies the live entries into new slots, at most half full, which readers see at once or not at all. The
// shard's mutex is held.
func (s *shard[S]) rebuild() []atomic.Pointer[Entry[S]] {
	size := 8
	for size < 2*(s.live+1) {
		size *= 2
	}
	old, slots := *s.slots.Load(), make([]atomic.Pointer[Entry[S]], size)
	for i := range old {
		if e := old[i].Load(); e != nil && e != s.tombstone {
			place(slots, e)
		}
	}
	s.dead = 0
	s.slots.Store(&slots)
	return slots
}

// Sweep forgets the keys that were not used for the time idle and whose state is as good as new. If a key did not fit
// since the last sweep, it forgets all keys whose state is as good as new. Otherwise, with an idle time of zero, it
// forgets nothing.
func (t *Table[S]) Sweep(now int64, idle time.Duration) {
	if t.crowded.Swap(false) {
		t.Forget(now, 0)
	} else if idle > 0 {
		t.Forget(now, idle)
	}
}

// Forget forgets the keys that were not used for the time idle and whose state is as good as new.
func (t *Table[S]) Forget(now int64, idle time.Duration) {
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock()
		t.sweepShard(s, now, int64(idle))
		if len(*s.slots.Load()) > 64 && (s.dead > s.live || 8*s.live < len(*s.slots.Load())) {
			s.rebuild()
		}
		s.mu.Unlock()
	}
}

func (t *Table[S]) sweepShard(s *shard[S], now, idle int64) {
	slots := *s.slots.Load()
	for i := range slots {
		e := slots[i].Load()
		if e == nil || e == s.tombstone || !e.mu.TryLock() { // a locked one is in use
			continue
		}
		if now-int64(e.used)*int64(time.Second) >= idle && t.forgettable(e, now) {
			e.mark |= goneMark
			s.forgotten += uint64(e.Count)
			slots[i].Store(s.tombstone)
			s.live--
			s.dead++
			t.size.Add(-1)
		}
		e.mu.Unlock()
	}
}
