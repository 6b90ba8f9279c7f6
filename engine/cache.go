package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/maypok86/otter/v2"

	"github.com/headgate-go/headgate/internal/agentapi"
)

// maxTTL is the longest lifetime of a cache entry, and the default.
const maxTTL = 7 * 24 * time.Hour

// A cache keeps values for other flows.
type cache interface {
	// store keeps the value for so long; 0 is for as long as there is.
	store(ctx context.Context, k cacheKey, value []byte, ttl time.Duration) error

	remove(ctx context.Context, k cacheKey) error
	stats() CacheStats
	close()
}

// newCaches makes the caches of results and of all control points: in the store, if there is one.
func (e *Engine) newCaches() {
	if e.store != nil {
		e.results, e.globals = &sharedCache{engine: e}, &sharedCache{engine: e}
		return
	}
	e.memory.results, e.memory.globals = newMemoryCache(e.cacheEntries, e.cacheBytes), newMemoryCache(e.cacheEntries, e.cacheBytes)
	e.results, e.globals = e.memory.results, e.memory.globals
}

// A memoryCache is bounded by the number of its values, and by their bytes.
type memoryCache struct {
	entries atomic.Pointer[otter.Cache[cacheKey, cached]] // nil until a value is stored: it has a goroutine that wakes every second
	unit    int64                                         // of weights, in bytes
	limit   uint32
	floor   uint32

	mu     sync.Mutex // held while entries are made or closed
	closed bool

	cacheCounts
}

// cacheCounts are what a cache counts.
type cacheCounts struct{ hits, misses, stores, deletes, refused atomic.Uint64 }

func (c *cacheCounts) stats() CacheStats {
	return CacheStats{Hits: c.hits.Load(), Misses: c.misses.Load(), Stores: c.stores.Load(), Deletes: c.deletes.Load(), Refused: c.refused.Load()}
}

type cacheKey struct{ controlPoint, key string }

type cached struct {
	value []byte
	ttl   time.Duration
}

// newMemoryCache makes a cache of at most so many entries and bytes of keys and values. The library bounds only one of the
// two, so an entry weighs its bytes, but at least size/entries. The library's weights are of 32 bits, so those of
// a large cache are in larger units.
func newMemoryCache(entries int, size int64) *memoryCache {
	const most = 1 << 31
	unit := (size-1)/most + 1
	limit := size / unit
	return &memoryCache{unit: unit, limit: uint32(limit), floor: uint32(max((limit-1)/int64(entries)+1, 1))}
}

// open returns the entries, and makes them if there are none.
func (c *memoryCache) open() *otter.Cache[cacheKey, cached] {
	if entries := c.entries.Load(); entries != nil {
		return entries
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if entries := c.entries.Load(); entries != nil {
		return entries
	}
	entries := otter.Must(&otter.Options[cacheKey, cached]{
		MaximumWeight: uint64(c.limit),
		Weigher:       func(k cacheKey, v cached) uint32 { return c.weight(k, v.value) },
		ExpiryCalculator: otter.ExpiryWritingFunc(func(e otter.Entry[cacheKey, cached]) time.Duration {
			return e.Value.ttl
		}),
	})
	if c.closed {
		entries.StopAllGoroutines()
	}
	c.entries.Store(entries)
	return entries
}

func (c *memoryCache) weight(k cacheKey, value []byte) uint32 {
	n := int64(len(k.controlPoint)) + int64(len(k.key)) + int64(len(value))
	return max(uint32(min((n+c.unit-1)/c.unit, math.MaxUint32)), c.floor)
}

var (
	errNoCacheKey = errors.New("cache key cannot be empty") // in the words of other agents
	errNoRoom     = errors.New("there is no room for the cached value in the answer")
)

// lookup returns a copy of the value, so that no caller can change what the next flow finds. If room is not nil, it
// must have room for the value, which is not copied: callers with a room do not change it, and many may hold it for
// long.
func (c *memoryCache) lookup(k cacheKey, room func(size int) bool) agentapi.CacheAnswer {
	var v cached
	ok := false
	if entries := c.entries.Load(); entries != nil {
		v, ok = entries.GetIfPresent(k)
	}
	if !ok {
		c.misses.Add(1)
		return agentapi.CacheAnswer{}
	}
	value := v.value
	if room == nil {
		value = bytes.Clone(value)
	} else if !room(len(value)) {
		c.misses.Add(1)
		return agentapi.CacheAnswer{Err: errNoRoom}
	}
	c.hits.Add(1)
	return agentapi.CacheAnswer{Value: value, Hit: true}
}

func (c *memoryCache) store(_ context.Context, k cacheKey, value []byte, ttl time.Duration) error {
	if k.key == "" {
		c.refused.Add(1)
		return errNoCacheKey
	}
	if c.weight(k, value) > c.limit {
		c.refused.Add(1)
		return fmt.Errorf("cache entry of %d bytes is larger than the cache", len(k.key)+len(value))
	}
	if ttl <= 0 || ttl > maxTTL {
		ttl = maxTTL
	}
	k = cacheKey{strings.Clone(k.controlPoint), strings.Clone(k.key)} // they may be pieces of something large
	c.open().Set(k, cached{value: bytes.Clone(value), ttl: ttl})
	c.stores.Add(1)
	return nil
}

func (c *memoryCache) remove(_ context.Context, k cacheKey) error {
	if k.key == "" {
		return errNoCacheKey
	}
	if entries := c.entries.Load(); entries != nil {
		entries.Invalidate(k)
	}
	c.deletes.Add(1)
	return nil
}

// close ends the cache's goroutine. Its values stay.
func (c *memoryCache) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if entries := c.entries.Load(); entries != nil {
		entries.StopAllGoroutines()
	}
}

func (c *memoryCache) stats() CacheStats {
	s := c.cacheCounts.stats()
	if entries := c.entries.Load(); entries != nil {
		s.Entries = entries.EstimatedSize()
	}
	return s
}
