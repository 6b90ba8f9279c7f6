package engine

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"
)

func TestCacheTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newMemoryCache(100, 1<<20)
		c.close() // its clock would tick every second of the weeks below; an expired entry is not found without it either
		for key, ttl := range map[string]time.Duration{"minute": time.Minute, "default": 0, "year": 365 * 24 * time.Hour} {
			if err := c.store(t.Context(), cacheKey{"point", key}, []byte("v"), ttl); err != nil {
				t.Fatal(err)
			}
		}
		begin := time.Now()
		for _, tt := range []struct {
			at   time.Duration
			want map[string]bool
		}{
			{time.Minute - time.Nanosecond, map[string]bool{"minute": true, "default": true, "year": true}},
			{time.Minute, map[string]bool{"default": true, "year": true}},
			{7*24*time.Hour - time.Nanosecond, map[string]bool{"default": true, "year": true}},
			{7 * 24 * time.Hour, nil}, // the longest there is
		} {
			<-time.After(time.Until(begin.Add(tt.at)))
			for _, key := range []string{"minute", "default", "year"} {
				if got := c.lookup(cacheKey{"point", key}, nil).Hit; got != tt.want[key] {
					t.Errorf("%s after %v: hit = %v want %v", key, tt.at, got, tt.want[key])
				}
			}
		}
	})
}

// A cache without values has no goroutine, which would wake the process every second. One that is closed gets none by a
// late value, which it keeps.
func TestCacheGoroutine(t *testing.T) {
	for _, closed := range []bool{false, true} {
		t.Run(fmt.Sprintf("closed=%v", closed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newMemoryCache(100, 1<<20)
				k := cacheKey{"point", "key"}
				if c.lookup(k, nil).Hit || c.remove(t.Context(), k) != nil {
					t.Error("an empty cache has a value")
				}
				if c.entries.Load() != nil {
					t.Error("the library's cache is made before there is a value")
				}
				if closed {
					c.close()
				}
				if err := c.store(t.Context(), k, []byte("v"), 0); err != nil || !c.lookup(k, nil).Hit {
					t.Errorf("the value is not kept: %v", err)
				}
				if err := c.remove(t.Context(), k); err != nil || c.lookup(k, nil).Hit {
					t.Errorf("the value is kept: %v", err)
				}
				if !closed {
					c.close()
				}
				// The bubble fails if a goroutine is left.
			})
		})
	}
}

// However the two bounds go together, there are not more entries than there may be.
func TestCacheEntries(t *testing.T) {
	for _, row := range []struct {
		entries int
		bytes   int64
	}{{100, 199}, {1000, 1 << 30}, {1000, 1<<20 + 1}, {3, 1 << 34}} {
		c := newMemoryCache(row.entries, row.bytes)
		for i := range 2 * row.entries {
			if err := c.store(t.Context(), cacheKey{"point", strconv.Itoa(i)}, nil, 0); err != nil && row.bytes > 1000 {
				t.Error(err)
			}
		}
		c.open().CleanUp()
		if got := c.open().EstimatedSize(); got > row.entries {
			t.Errorf("%d entries in a cache of %d and %d bytes", got, row.entries, row.bytes)
		}
		c.close()
	}
}

// A key that is a piece of something large does not keep it in memory.
func TestCacheCopiesKeys(t *testing.T) {
	c := newMemoryCache(10, 1000)
	defer c.close()
	point, key := strings.Repeat("p", 10), strings.Repeat("k", 10)
	if err := c.store(t.Context(), cacheKey{point, key}, []byte("value"), 0); err != nil {
		t.Fatal(err)
	}
	for kept := range c.open().Keys() {
		if unsafe.StringData(kept.key) == unsafe.StringData(key) || unsafe.StringData(kept.controlPoint) == unsafe.StringData(point) {
			t.Error("the cache keeps its caller's strings")
		}
	}
}
