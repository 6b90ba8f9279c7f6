package engine

import (
	"encoding/json"
	"math"
)

// MarshalJSON encodes the usage with null for a Capacity and a Remaining that are unlimited, for JSON has no infinity. A struct that
// embeds a Usage gets this method, and needs one of its own.
func (u Usage) MarshalJSON() ([]byte, error) {
	type plain Usage
	return json.Marshal(struct {
		plain
		Capacity, Remaining *float64
	}{plain(u), finite(u.Capacity), finite(u.Remaining)})
}

// UnmarshalJSON decodes what MarshalJSON has encoded.
func (u *Usage) UnmarshalJSON(b []byte) error {
	type plain Usage
	in := struct {
		*plain
		Capacity, Remaining *float64
	}{(*plain)(u), new(float64), new(float64)} // which null makes nil, and a missing key does not
	if err := json.Unmarshal(b, &in); err != nil {
		return err
	}
	u.Capacity, u.Remaining = unlimited(in.Capacity), unlimited(in.Remaining)
	return nil
}

// MarshalJSON encodes the stats with null for a LoadMultiplier that is unlimited, for JSON has no infinity. A struct that embeds a
// ComponentStats gets this method, and needs one of its own.
func (s ComponentStats) MarshalJSON() ([]byte, error) {
	type plain ComponentStats
	return json.Marshal(struct {
		plain
		LoadMultiplier *float64
	}{plain(s), finite(s.LoadMultiplier)})
}

// UnmarshalJSON decodes what MarshalJSON has encoded.
func (s *ComponentStats) UnmarshalJSON(b []byte) error {
	type plain ComponentStats
	in := struct {
		*plain
		LoadMultiplier *float64
	}{(*plain)(s), new(float64)}
	if err := json.Unmarshal(b, &in); err != nil {
		return err
	}
	s.LoadMultiplier = unlimited(in.LoadMultiplier)
	return nil
}

// unlimited returns +Inf for null.
func unlimited(n *float64) float64 {
	if n == nil {
		return math.Inf(1)
	}
	return *n
}

// finite returns nil for a number that is not finite.
func finite(n float64) *float64 {
	if math.IsInf(n, 0) || math.IsNaN(n) {
		return nil
	}
	return &n
}
