package engine

import (
	"math"
	"sync"
	"sync/atomic"

	"github.com/headgate-go/headgate/engine/internal/source"
)

// A ratio is what the flows of a workload have cost lately, by what they were estimated to cost. Flows that wait count for
// that much more or less in the queue, so that a workload that estimates too little gets no more than its share. It is 1
// until a flow has been settled. The zero value is ready, and safe for concurrent use.
type ratio struct {
	bits atomic.Uint64 // of the float64; 0 for 1

	mu              sync.Mutex
	settled         float64 // flows, up to settledFlows
	cost, estimated float64 // means of so many
}

const (
	// mostRatio bounds the ratio, and 1/mostRatio. What one flow cost counts for no more than that either: a single flow must
	// not decide the ratio.
	mostRatio = 16

	// settledFlows is how many flows the means are of.
	settledFlows = 64
)

// of returns what a flow that is estimated to cost so many tokens counts for.
func (r *ratio) of(tokens float64) float64 {
	if bits := r.bits.Load(); bits != 0 {
		return tokens * math.Float64frombits(bits)
	}
	return tokens
}

// learn takes a flow into the ratio. One that was estimated to cost nothing tells of no ratio.
func (r *ratio) learn(estimated, cost float64) {
	if estimated <= 0 {
		return
	}
	estimated, cost = min(estimated, source.MaxCost), min(cost, source.MaxCost)
	cost = min(max(cost, estimated/mostRatio), estimated*mostRatio)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.settled = min(r.settled+1, settledFlows)
	r.cost += (cost - r.cost) / r.settled
	r.estimated += (estimated - r.estimated) / r.settled
	is := r.cost / r.estimated
	if !(is > 0) { // of estimates that are too small for a float64
		return
	}
	r.bits.Store(math.Float64bits(min(max(is, 1.0/mostRatio), mostRatio)))
}
