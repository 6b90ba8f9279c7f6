package agent

import (
	"context"
	"fmt"
	"testing"
	"time"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
)

// settled counts what it settles, by slot.
type settled map[uint64]int

func (s settled) Settle(_ context.Context, d *agentapi.LimiterDecision, _ agentapi.Outcome) bool {
	s[d.Slot()]++
	return true
}

// The agent remembers the latest decisions, up to a bound, and each until it is settled. Labels distinguish decisions of the
// same time.
func TestOutcomesAreBounded(t *testing.T) {
	const many = maxAwaited + 1000
	got := make(settled)
	c := &agentapi.Component{ID: "breaker", LabelKey: "upstream", Outcomes: true, Settler: got}
	var o outcomes
	for i := range many {
		v := agentapi.Verdict{Start: int64(i / 2)} // two of each time
		d := v.Add(c)
		d.Scope, d.Label = agentapi.ScopeLabel, fmt.Sprint("u", i%2)
		d.Hold(uint64(i + 1))
		o.add(&v)
	}
	if len(o.order) != maxAwaited || len(o.asked) != maxAwaited/2 {
		t.Errorf("%d decisions of %d times are remembered want %d of %d", len(o.order), len(o.asked), maxAwaited, maxAwaited/2)
	}
	for range 2 {
		for i := range many {
			o.settle(t.Context(), time.Unix(0, int64(i/2)), []*checkv1.LimiterDecision{{
				ComponentId: "breaker",
				Details: &checkv1.LimiterDecision_RateLimiterInfo_{RateLimiterInfo: &checkv1.LimiterDecision_RateLimiterInfo{
					Label: fmt.Sprint("upstream:u", i%2),
				}},
			}}, agentapi.Outcome{Ended: agentapi.EndedOK})
		}
	}
	for i := range many {
		want := 1
		if i < many-maxAwaited {
			want = 0
		}
		if got[uint64(i+1)] != want {
			t.Fatalf("decision %d was settled %d times want %d", i, got[uint64(i+1)], want)
		}
	}
	if o.any() {
		t.Errorf("%d times are still awaited", len(o.asked))
	}
}
