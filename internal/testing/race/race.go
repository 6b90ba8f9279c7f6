// Package race sizes tests by whether the race detector is on. The detector makes code some ten times as slow, and
// needs only some of the rounds. So tests that do one thing very often do it less often under it. `make test-long` runs
// them in full without it.
package race

import "math/bits"

// Pick returns the first value under the race detector, and the second without it. Tests of programs of 32 bits are after what an int
// is too small for, and not after races, so they get the first value too.
func Pick[T any](under, without T) T {
	if Enabled || bits.UintSize == 32 {
		return under
	}
	return without
}
