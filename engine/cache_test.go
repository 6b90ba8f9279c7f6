package engine

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestCacheTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(100, 1<<20)
		c.close() // its clock ticks every second of the weeks below; what has expired is not found all the same
		for key, ttl := range map[string]time.Duration{"minute": time.Minute, "default": 0, "year": 365 * 24 * time.Hour} {
			if err := c.store(cacheKey{"point", key}, []byte("v"), ttl); err != nil {
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
				if got := c.lookup(cacheKey{"point", key}).Hit; got != tt.want[key] {
					t.Errorf("%s after %v: hit = %v want %v", key, tt.at, got, tt.want[key])
				}
			}
		}
	})
}
