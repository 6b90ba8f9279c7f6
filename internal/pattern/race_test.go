//go:build race

package pattern_test

const raceEnabled = true // it makes a match several times as slow
