package flowctl

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// The largest labels are left out, as if all were sorted.
func TestShed(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		m := make(map[string]string)
		for i := range random.IntN(60) {
			m[fmt.Sprint("k", i)] = strings.Repeat("v", random.IntN(8))
		}
		room := random.IntN(labelsSize(m)+100) - 50
		want, size := maps.Clone(m), labelsSize(m)
		for _, key := range slices.SortedFunc(maps.Keys(m), func(a, b string) int {
			return cmp.Or(labelSize(b, m[b])-labelSize(a, m[a]), strings.Compare(b, a))
		}) {
			if size <= room {
				break
			}
			size -= labelSize(key, m[key])
			delete(want, key)
		}
		kept, left := shed(maps.Clone(m), room)
		if !maps.Equal(kept, want) || left != len(m)-len(want) {
			t.Fatalf("shed(%v, %d) = %v, %d want %v, %d", m, room, kept, left, want, len(m)-len(want))
		}
	}
}
