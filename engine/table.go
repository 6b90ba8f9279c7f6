package engine

import (
	"hash/maphash"
	"math/bits"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A table holds a limiter's state for each value of its label. Looking a key up takes no lock but the key's own: the
// slots of a shard are written under the shard's mutex and read without. There are never more keys than the cap;
// unknown ones share the spill entry then.
//
// Library caches do not fit: they cost more memory for a key than its state, and they forget exhausted buckets when
// keys flood in, which is when limits matter.
type table[S any] struct {
	fresh func(state *S, now int64)
	// forgettable reports whether a fresh state would behave like this one.
	forgettable func(state *S, now int64) bool

	seed   maphash.Seed
	mask   uint64
	shards []shard[S]
	cap    int64
	size   atomic.Int64

	spill   entry[S]
	spilled atomic.Uint64 // how often the spill entry was used

	crowded atomic.Bool     // a key did not fit since the last sweep
	full    chan<- struct{} // told when that is so; has room for one, nil for nobody
}

type shard[S any] struct {
	mu        sync.Mutex
	slots     atomic.Pointer[[]atomic.Pointer[entry[S]]] // a power of two of them, probed in line
	live      int
	dead      int       // slots that hold the tombstone
	nextSweep int64     // when a full table may sweep this shard again
	tombstone *entry[S] // keeps a probe going across the slot of a removed key
	forgotten uint64    // flows that entries have admitted which are gone
	_         [8]byte   // a cache line each
}

type entry[S any] struct {
	mu       sync.Mutex
	gone     bool // out of the table: look the key up again
	hash     uint32
	key      string
	used     uint32 // last use, in seconds
	admitted uint32 // flows
	state    S
}

// fullSweepEvery bounds the work that a flood of unknown keys can cause.
const fullSweepEvery = int64(time.Second)

func newTable[S any](limit int, fresh func(*S, int64), forgettable func(*S, int64) bool) *table[S] {
	// A shard for some 16 000 keys, so that growing one is short; the count is a power of two.
	shards := 1 << min(bits.Len(uint(limit)>>14), 8)
	t := &table[S]{
		fresh:       fresh,
		forgettable: forgettable,
		seed:        maphash.MakeSeed(),
		mask:        uint64(shards - 1),
		shards:      make([]shard[S], shards),
		cap:         int64(limit),
	}
	// Most limiters of a large file have no key yet, and few have many. So the shards begin with the same slot, which stays
	// empty: the first key of a shard has it rebuilt.
	slots, tombstone := make([]atomic.Pointer[entry[S]], 1), &entry[S]{gone: true}
	for i := range t.shards {
		t.shards[i].slots.Store(&slots)
		t.shards[i].tombstone = tombstone
	}
	fresh(&t.spill.state, 0)
	return t
}

// lock returns the key's entry, locked; the caller unlocks it. A key that is not known yet gets an entry, or the spill
// entry when the table is full.
func (t *table[S]) lock(key string, now int64) *entry[S] {
	h := maphash.String(t.seed, key)
	s := &t.shards[h&t.mask]
	for {
		e := s.find(uint32(h>>32), key)
		if e == nil {
			if e = t.insert(s, uint32(h>>32), key, now); e == nil {
				t.spilled.Add(1)
				e = &t.spill
			}
		}
		e.mu.Lock()
		if !e.gone {
			e.used = second(now)
			return e
		}
		e.mu.Unlock()
	}
}

// lockKnown is lock for a key that need not be there: it returns nil for unknown ones.
func (t *table[S]) lockKnown(key string) *entry[S] {
	h := maphash.String(t.seed, key)
	s := &t.shards[h&t.mask]
	for {
		e := s.find(uint32(h>>32), key)
		if e == nil {
			return nil
		}
		e.mu.Lock()
		if !e.gone {
			return e
		}
		e.mu.Unlock()
	}
}

// lockMet is lock for a look at the entry: a key that is not known gets none, but a new one that is in no table, or the
// spill entry when the table is full.
func (t *table[S]) lockMet(key string, now int64) *entry[S] {
	h := maphash.String(t.seed, key)
	s := &t.shards[h&t.mask]
	for {
		e := s.find(uint32(h>>32), key)
		if e == nil && t.size.Load() >= t.cap {
			e = &t.spill
		}
		if e == nil {
			e = new(entry[S])
			t.fresh(&e.state, now)
		}
		e.mu.Lock()
		if !e.gone {
			return e
		}
		e.mu.Unlock()
	}
}

// second is a time as entries keep it. It is early by a second at the most, which is no matter: what is forgotten when it
// is idle is what nobody will miss.
func second(now int64) uint32 { return uint32(now / int64(time.Second)) }

// admitted is how many flows the entries have admitted, those that are gone too. It looks at each.
func (t *table[S]) admitted() uint64 {
	n := t.spill.count()
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock() // so that none goes meanwhile
		n += s.forgotten
		slots := *s.slots.Load()
		for j := range slots {
			if e := slots[j].Load(); e != nil && e != s.tombstone {
				n += e.count()
			}
		}
		s.mu.Unlock()
	}
	return n
}

// count is how many flows the entry has admitted, as far as it shows.
func (e *entry[S]) count() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return uint64(e.admitted)
}

func (s *shard[S]) find(hash uint32, key string) *entry[S] {
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

// insert adds the key, unless somebody else just did. It returns nil when the table is full.
func (t *table[S]) insert(s *shard[S], hash uint32, key string, now int64) *entry[S] {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.find(hash, key); e != nil {
		return e
	}
	if t.size.Add(1) > t.cap {
		t.crowded.Store(true)
		select {
		case t.full <- struct{}{}: // for the sweep of the other shards
		default:
		}
		if now >= s.nextSweep {
			s.nextSweep = now + fullSweepEvery
			t.sweepShard(s, now, 0)
		}
		if t.size.Load() > t.cap {
			t.size.Add(-1)
			return nil
		}
	}
	slots := *s.slots.Load()
	if 4*(s.live+s.dead+1) > 3*len(slots) {
		slots = s.rebuild()
	}
	e := &entry[S]{hash: hash, key: strings.Clone(key), used: second(now)}
	t.fresh(&e.state, now)
	place(slots, e)
	s.live++
	return e
}

// place puts the entry into the first empty slot of its probe. Slots of removed keys are left to rebuild: a reader may
// be probing across them.
func place[S any](slots []atomic.Pointer[entry[S]], e *entry[S]) {
	mask := uint32(len(slots) - 1)
	i := e.hash & mask
	for slots[i].Load() != nil {
		i = (i + 1) & mask
	}
	slots[i].Store(e)
}

// rebuild copies the live entries into new slots, at most half full, which readers see at once or not at all. The
// shard's mutex is held.
func (s *shard[S]) rebuild() []atomic.Pointer[entry[S]] {
	size := 8
	for size < 2*(s.live+1) {
		size *= 2
	}
	old, slots := *s.slots.Load(), make([]atomic.Pointer[entry[S]], size)
	for i := range old {
		if e := old[i].Load(); e != nil && e != s.tombstone {
			place(slots, e)
		}
	}
	s.dead = 0
	s.slots.Store(&slots)
	return slots
}

// sweep forgets the keys that nobody has used for idle and that nobody will miss; when a key did not fit, however lately
// they were used. Zero forgets none for being idle.
func (t *table[S]) sweep(now int64, idle time.Duration) {
	if t.crowded.Swap(false) {
		t.forget(now, 0)
	} else if idle > 0 {
		t.forget(now, idle)
	}
}

func (t *table[S]) forget(now int64, idle time.Duration) {
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

func (t *table[S]) sweepShard(s *shard[S], now, idle int64) {
	slots := *s.slots.Load()
	for i := range slots {
		e := slots[i].Load()
		if e == nil || e == s.tombstone || !e.mu.TryLock() { // a locked one is in use
			continue
		}
		if now-int64(e.used)*int64(time.Second) >= idle && t.forgettable(&e.state, now) {
			e.gone = true
			s.forgotten += uint64(e.admitted)
			slots[i].Store(s.tombstone)
			s.live--
			s.dead++
			t.size.Add(-1)
		}
		e.mu.Unlock()
	}
}
