package engine

import (
	"testing"

	"github.com/headgate-go/headgate/internal/agentapi"
)

// Whatever reasons there are, each thing at a control point has a counter of its own.
func TestControlPointCounters(t *testing.T) {
	at := []int{flowsCanceled, cacheHits, cacheMisses}
	for r := range agentapi.Reasons {
		at = append(at, decided(r))
	}
	if len(at) != flowCounts {
		t.Errorf("%d counters are for %d things", flowCounts, len(at))
	}
	var c counts
	for _, what := range at {
		count(&c, new(agentapi.Request), what)
	}
	for _, what := range at {
		if n := c.sum(what); n != 1 {
			t.Errorf("counter %d shows %d want 1", what, n)
		}
	}
}
