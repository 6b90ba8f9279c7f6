package engine

import (
	"math"
	"sync/atomic"
	"unsafe"

	"github.com/headgate-go/headgate/internal/agentapi"
)

// counts are eight counters, for many who count at once. The zero value is ready.
type counts struct {
	cells [16][8]atomic.Uint64 // a cache line each
}

// What is counted at a control point. The rejections come after it, by their reason.
const (
	flowsAccepted = 0
	flowsRejected = flowsAccepted // and the reason
	flowsCanceled = 5
	cacheHits     = 6
	cacheMisses   = 7
)

// What is counted of a component, and of a workload.
const (
	decisionsAccepted = iota // but those that entries count, see limiter.admit
	decisionsDropped
	decisionsDry      // what would have been dropped
	decisionsFree     // what had no bucket
	decisionsRefunded // what was accepted and gave back
	tokensAccepted    // a float64
	tokensRejected    // a float64
	decisionsLong     // what was dropped, or would have been, because a label's value is too long
)

// cell is where to count something about a flow, by part of it. What a processor allocates lies close together, so that
// going by the address keeps processors off each other's cache lines most of the time, and costs less than to draw lots.
func cell[T any](c *counts, of *T) *[8]atomic.Uint64 {
	const page = 13 // that the allocator divides into objects of one size, as a power of two
	return &c.cells[uintptr(unsafe.Pointer(of))>>page%uintptr(len(c.cells))]
}

// count counts one, about the flow that something is part of.
func count[T any](c *counts, of *T, what int) { cell(c, of)[what].Add(1) }

// addFloat adds to a float64.
func addFloat[T any](c *counts, of *T, what int, n float64) {
	at := &cell(c, of)[what]
	for {
		old := at.Load()
		if at.CompareAndSwap(old, math.Float64bits(math.Float64frombits(old)+n)) {
			return
		}
	}
}

// decision counts a decision.
func (c *counts) decision(d *agentapi.LimiterDecision) {
	at := cell(c, d)
	if d.Cause == agentapi.CauseLongLabel {
		at[decisionsLong].Add(1)
	}
	if !d.Passed() {
		at[decisionsDropped].Add(1)
		return
	}
	at[decisionsAccepted].Add(1)
	if d.Dropped {
		at[decisionsDry].Add(1)
	}
	if d.Scope == agentapi.ScopeNone {
		at[decisionsFree].Add(1)
	}
}

func (c *counts) sum(what int) uint64 {
	var n uint64
	for i := range c.cells {
		n += c.cells[i][what].Load()
	}
	return n
}

func (c *counts) sumFloat(what int) float64 {
	var n float64
	for i := range c.cells {
		n += math.Float64frombits(c.cells[i][what].Load())
	}
	return n
}
