package flowctl

import (
	"strconv"
	"testing"

	"github.com/headgate-go/headgate/internal/testing/metertest"
)

// Programs that make up control points do not fill the memory with sets of attributes.
func TestOutcomesAreBounded(t *testing.T) {
	o, err := newObserver(nil, new(metertest.Provider))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 * maxOutcomes {
		o.set(outcome{controlPoint: strconv.Itoa(i), decision: Accepted})
	}
	kept := 0
	for range o.sets.Range {
		kept++
	}
	if kept != maxOutcomes {
		t.Errorf("%d sets are kept want %d", kept, maxOutcomes)
	}
}
