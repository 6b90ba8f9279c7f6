package engine

import (
	"math"
	"math/rand/v2"
)

// sampled says whether the value is among the share of all values, in percent: by its FNV-1a hash (Fowler, Noll and Vo;
// RFC 9923), as Aperture agents have it, so that a value which is in at some percentage is in at every larger one, and
// everywhere alike.
func sampled(value string, percentage float64) bool {
	hash := uint32(2166136261)
	for i := range len(value) {
		hash = (hash ^ uint32(value[i])) * 16777619
	}
	return percentage > 0 && float64(hash)/math.MaxUint32 <= percentage/100
}

// drawn says whether a flow without a value to go by is among the share.
func drawn(percentage float64) bool { return 100*rand.Float64() < percentage }
