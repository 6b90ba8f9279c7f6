package engine

import (
	"math"
	"testing"

	"github.com/headgate-go/headgate/engine/internal/wfq"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

// No priority from a label advances the clock so far that the others no longer share alike.
func TestQueueExtremes(t *testing.T) {
	w := &workloads{priorityLabel: "priority"}
	of := newWorkload("", policy.WorkloadParameters{})
	for _, priority := range []string{"1", "1e-18", "1e-320", "1e308"} {
		for _, tokens := range []float64{1, 1e9, 1e20, math.MaxFloat64} {
			q := newTestQueue()
			extreme := w.claim(&of, &agentapi.Labels{Params: map[string]string{"priority": priority}})
			for range 2 { // one is served, and one goes on to wait
				q.Push(newWaiter(tokens, (*loadRule)(nil).Cost(tokens), wfq.NoDeadline), extreme)
			}
			q.Pop()
			all := []wfq.Claim{{Workload: "a", Priority: 1}, {Workload: "b", Priority: 1}}
			for _, c := range all {
				if got := q.Ahead(c, 1); !(got.Least >= 0) || !(got.Likely >= got.Least) || math.IsInf(got.Likely, 1) {
					t.Errorf("priority %s, %v tokens: %v are ahead", priority, tokens, got)
				}
				for range 10 {
					q.Push(newWaiter(1, 1, wfq.NoDeadline), c)
				}
			}
			served := make(map[wfq.Claim]int)
			for n := 0; n < 10; {
				c := q.First().Claim()
				if q.Pop(); c != extreme {
					served[c]++
					n++
				}
			}
			if served[all[0]] != 5 {
				t.Errorf("priority %s, %v tokens: served %v want 5 of each", priority, tokens, served)
			}
		}
	}
}
