//go:build !race

package engine

// RaceEnabled says that the race detector is on.
const RaceEnabled = false
