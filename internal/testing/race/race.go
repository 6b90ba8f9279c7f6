// Package race sizes tests by whether the race detector is on. It makes code some ten times as slow, and it finds what it
// finds in a part of the rounds: tests that do one thing very often do it less often under it, and run in full without it,
// by `make test-long`.
package race

// Pick gives the first value under the race detector, and the second without it.
func Pick[T any](under, without T) T {
	if Enabled {
		return under
	}
	return without
}
