package engine

import (
	"encoding/json"
	"math"
)

// MarshalJSON encodes the usage with null for a Capacity and a Remaining that are unlimited, for JSON has no infinity.
func (u Usage) MarshalJSON() ([]byte, error) {
	type plain Usage
	return json.Marshal(struct {
		plain
		Capacity, Remaining *float64
	}{plain(u), finite(u.Capacity), finite(u.Remaining)})
}

// MarshalJSON encodes the stats with null for a LoadMultiplier that is unlimited, for JSON has no infinity.
func (s ComponentStats) MarshalJSON() ([]byte, error) {
	type plain ComponentStats
	return json.Marshal(struct {
		plain
		LoadMultiplier *float64
	}{plain(s), finite(s.LoadMultiplier)})
}

// finite returns nil for a number that is not finite.
func finite(n float64) *float64 {
	if math.IsInf(n, 0) || math.IsNaN(n) {
		return nil
	}
	return &n
}
