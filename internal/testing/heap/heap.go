// Package heap measures how much memory a test's values take.
package heap

import "runtime"

// collections is how often garbage is collected before memory is measured. What other tests have left in pools goes with the second
// collection, and what finalizers and cleanups have kept with the one after these have run.
const collections = 4

// Live returns the bytes of all values that are in use. A test compares two of these. The difference is negative if other values have
// become garbage meanwhile.
func Live() int64 {
	for range collections {
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc) //nolint:gosec // no heap has 8 EiB
}
