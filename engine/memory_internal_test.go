package engine

import (
	"fmt"
	"runtime"
	"testing"

	"github.com/headgate-go/headgate/engine/internal/bucket"
	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/internal/testing/race"
)

// The budget is 128 bytes a key beyond the key's own text.
func TestKeyMemory(t *testing.T) {
	if race.Enabled {
		t.Skip("the race detector has its own memory")
	}
	const many = 1_000_000
	names := make([]string, many)
	text := 0
	for i := range names {
		names[i] = fmt.Sprintf("user-%d", i)
		text += (len(names[i]) + 7) / 8 * 8 // in the allocator's steps
	}
	r := &bucket.Rule{Capacity: 10, Fill: 10, Interval: 1e9}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	tab := keys.New(many, r.Fresh, r.Idle, nil)
	for _, name := range names {
		e := tab.Lock(name, 0)
		r.Take(&e.State, 0, 1)
		e.Unlock()
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	perKey := (float64(after.HeapAlloc-before.HeapAlloc) - float64(text)) / many
	t.Logf("%.0f bytes a key", perKey)
	if perKey > 128 {
		t.Errorf("%.0f bytes a key want at most 128", perKey)
	}
	runtime.KeepAlive(tab)
	runtime.KeepAlive(names)
}
