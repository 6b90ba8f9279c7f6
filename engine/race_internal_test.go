//go:build race

package engine

// RaceEnabled says that the race detector is on, whose runtime does not stand any number of goroutines.
const RaceEnabled = true
