package engine

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

// A limiter that is no longer in force is kept for as long as a flow holds a slot of it, not for as long as one could.
func TestRetiredAreForgotten(t *testing.T) {
	for _, by := range []string{"", "user_id"} {
		synctest.Test(t, func(t *testing.T) {
			slots := func(limit float64) policy.ConcurrencyLimiter {
				return policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: limit, MaxInflight: 24 * time.Hour, LimitBy: by}
			}
			e := openEngine(t, slots(1))
			req := &agentapi.Request{ControlPoint: "point", Labels: agentapi.Labels{Params: map[string]string{"user_id": "u"}}}
			var v agentapi.Verdict
			if err := e.Agent().Check(t.Context(), req, &v); err != nil || v.At(0).Slot() == 0 {
				t.Fatalf("Check() = %v, %+v want a slot", err, v)
			}
			for i := range 100 {
				if err := e.Apply([]policy.Policy{{Name: "test", Components: []policy.Component{slots(float64(2 + i))}}}); err != nil {
					t.Fatal(err)
				}
			}
			kept := func() (retired, holders int) {
				synctest.Wait()
				e.mu.RLock()
				defer e.mu.RUnlock()
				return len(e.retired), len(e.holders)
			}
			if retired, holders := kept(); retired != 100 || holders != 101 {
				t.Errorf("%d retired, %d holders want 100, 101: flows may be under way", retired, holders)
			}
			<-time.After(2 * sweepEvery)
			if retired, holders := kept(); retired != 1 || holders != 2 {
				t.Errorf("%d retired, %d holders want the one with a slot, and the one in force", retired, holders)
			}
			if r, err := e.Agent().End(t.Context(), req, &v, agentapi.Outcome{Ended: agentapi.EndedOK}); err != nil || r != (agentapi.Returns{Held: 1, Returned: 1}) {
				t.Errorf("End() = %+v, %v want the slot given back", r, err)
			}
			<-time.After(sweepEvery)
			if retired, holders := kept(); retired != 0 || holders != 1 {
				t.Errorf("%d retired, %d holders want the one in force", retired, holders)
			}
		})
	}
}
