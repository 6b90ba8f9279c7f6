package keys

import (
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/headgate-go/headgate/internal/testing/race"
)

func newTestTable(limit int) *Table[int] {
	return New(limit, func(e *Entry[int], _ int64) { e.State = 0 }, func(e *Entry[int], _ int64) bool { return e.State == 0 }, nil)
}

func (t *Table[S]) update(key string, now int64, f func(*S)) {
	e := t.Lock(key, now)
	f(&e.State)
	e.Unlock()
}

func TestTable(t *testing.T) {
	tab := newTestTable(100_000)
	keys := race.Pick(10_000, 50_000)
	for round := range 2 {
		for i := range keys {
			tab.update(fmt.Sprint(i), int64(round), func(n *int) { *n += i })
		}
	}
	for i := range keys {
		tab.update(fmt.Sprint(i), 2, func(n *int) {
			if *n != 2*i {
				t.Fatalf("state of %d = %d want %d", i, *n, 2*i)
			}
		})
	}
	if got := tab.size.Load(); got != int64(keys) {
		t.Errorf("size = %d want %d", got, keys)
	}
}

func TestTableSweep(t *testing.T) {
	tab := newTestTable(10_000)
	for i := range 1000 {
		tab.update(fmt.Sprint(i), 0, func(n *int) { *n = i % 2 }) // every other one is forgettable
	}
	tab.update("0", int64(50*time.Second), func(*int) {})
	tab.Sweep(int64(100*time.Second), 60*time.Second)
	if got, want := tab.size.Load(), int64(501); got != want { // the odd ones, and the one that was used
		t.Errorf("size = %d want %d", got, want)
	}
	for i := range 1000 {
		tab.update(fmt.Sprint(i), 100, func(n *int) {
			if *n != i%2 {
				t.Fatalf("state of %d = %d want %d", i, *n, i%2)
			}
		})
	}
}

// At the cap a table forgets states as good as new, and has the rest of the unknown keys share. It must not forget a
// debt.
func TestTableFull(t *testing.T) {
	tab := newTestTable(10)
	for i := range 10 {
		tab.update(fmt.Sprint(i), 0, func(n *int) { *n = i }) // just "0" is forgettable
	}
	tab.update("new", 0, func(n *int) { *n = 7 })
	if got := tab.spilled.Load(); got != 0 {
		t.Errorf("spilled = %d want 0: there was a key to forget", got)
	}
	tab.update("newer", int64(1e10), func(n *int) { *n += 40 })
	tab.update("newest", int64(1e10), func(n *int) { *n += 2 })
	if got := tab.spilled.Load(); got != 2 || tab.spill.State != 42 {
		t.Errorf("spilled, spill = %d, %d want 2, 42", got, tab.spill.State)
	}
	for i := 1; i < 10; i++ {
		tab.update(fmt.Sprint(i), int64(1e10), func(n *int) {
			if *n != i {
				t.Errorf("state of %d = %d", i, *n)
			}
		})
	}
	if got := tab.size.Load(); got != 10 {
		t.Errorf("size = %d want 10", got)
	}
}

// Keys come, are counted, are swept away and come again, all at once. Run with the race detector.
func TestTableConcurrent(t *testing.T) {
	tab := newTestTable(300)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 20_000 {
				key := fmt.Sprint((i*7 + w) % 500)
				tab.update(key, int64(i), func(n *int) { *n++ })
				tab.update(key, int64(i), func(n *int) { *n-- })
			}
		})
	}
	wg.Go(func() {
		for i := range 200 {
			tab.Forget(int64(i*100), 0)
			runtime.Gosched()
		}
	})
	wg.Wait()
	// A key that spilled when it was counted up may have been counted down in an entry of its own, so it is the sum
	// that shows whether an update was lost.
	sum, live := tab.spill.State, int64(0)
	for i := range tab.shards {
		slots := *tab.shards[i].slots.Load()
		for j := range slots {
			if e := slots[j].Load(); e != nil && e != tab.shards[i].tombstone {
				sum += e.State
				live++
			}
		}
	}
	if sum != 0 {
		t.Errorf("sum = %d want 0", sum)
	}
	if got := tab.size.Load(); got != live || got > 300 {
		t.Errorf("size = %d want the %d that are there, up to 300", got, live)
	}
}

// A file may have 100,000 limiters, and most have few keys: each shard of a table begins to take memory with its first.
func TestTableIsSmallWithoutKeys(t *testing.T) {
	var before, after runtime.MemStats
	tables := make([]*Table[int], 100)
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range tables {
		tables[i] = newTestTable(1 << 20)
	}
	runtime.ReadMemStats(&after)
	if each := (after.TotalAlloc - before.TotalAlloc) / uint64(len(tables)); each > 10_000 {
		t.Errorf("a table without keys takes %d bytes, want 10,000 at most", each)
	}
	for i := range 1000 {
		tables[0].update(fmt.Sprint(i), 0, func(n *int) { *n = 1 })
	}
	for i := range 1000 {
		if e := tables[1].LockKnown(fmt.Sprint(i)); e != nil {
			t.Fatalf("a key of another table is found: %q", e.key)
		}
		tables[0].update(fmt.Sprint(i), 0, func(n *int) {
			if *n != 1 {
				t.Fatalf("state of %d = %d want 1", i, *n)
			}
		})
	}
}

// LockOwn makes a key that has room, and nothing of one that has none.
func TestTableLockOwn(t *testing.T) {
	tab := newTestTable(2)
	tab.update("0", 0, func(n *int) { *n = 5 })
	for _, tt := range []struct {
		key  string
		want int // of its state; -1 without an entry
	}{{"0", 5}, {"1", 0}, {"2", -1}} {
		e := tab.LockOwn(tt.key, int64(time.Hour), nil)
		if (e == nil) != (tt.want < 0) {
			t.Fatalf("LockOwn(%s) = %v", tt.key, e)
		}
		if e == nil {
			continue
		}
		if e.key != tt.key || e.State != tt.want || e.used != 3600 {
			t.Errorf("LockOwn(%s) = %+v want the state %d, used now", tt.key, &e.State, tt.want)
		}
		e.State = 7
		e.Unlock()
	}
	if tab.Len() != 2 || tab.Spilled() != 0 || tab.spill.State != 0 {
		t.Errorf("%d keys, %d spilled want 2, 0", tab.Len(), tab.Spilled())
	}
}
