package engine_test

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

// A flow is not rejected because of flows before it that give up before their turn. Each row is tried twice: without a
// limit, to see when the last flow is served, and with just enough time for that.
func TestGivenUpPlacesDoNotCount(t *testing.T) {
	const s, ms = time.Second, time.Millisecond
	gold := policy.Workload{
		Name: "gold", Labels: policy.LabelMatcher{Equal: map[string]string{"tier": "gold"}},
		WorkloadParameters: policy.WorkloadParameters{Priority: 100},
	}
	hasty := policy.Workload{
		Name: "hasty", Labels: policy.LabelMatcher{Equal: map[string]string{"tier": "hasty"}},
		WorkloadParameters: policy.WorkloadParameters{QueueTimeout: 6 * s},
	}
	scheduler := byLabels
	scheduler.Workloads = []policy.Workload{gold, hasty}
	quota := policy.QuotaScheduler{Selectors: policy.At("point"), Capacity: 5, Fill: 1, Interval: s, Scheduler: scheduler}
	steps := quota
	steps.StepFill = true
	delayed := quota
	delayed.DelayInitialFill = true
	keyed := quota
	keyed.LimitBy = "key"
	single := policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Minute, Scheduler: scheduler}
	for _, tt := range []struct {
		name string
		c    policy.Component
		all  []visit // before the last
		last visit   // when it is served, and its labels
	}{
		{"a flow of a higher priority comes between", quota, []visit{
			{labels: "tokens=5 priority=1"},
			{labels: "tokens=5 priority=1", timeout: 6 * s, in: never, out: 5990 * ms, cause: flowctl.CauseTimeout},
			{labels: "tokens=5 priority=100", timeout: time.Minute, in: 5 * s},
		}, visit{labels: "tokens=1 priority=1", in: 6 * s}},
		{"a workload's queue timeout", quota, []visit{
			{labels: "tokens=5"},
			{labels: "tokens=5 tier=hasty", in: never, out: 6 * s, cause: flowctl.CauseTimeout},
			{labels: "tokens=5 tier=gold", in: 5 * s},
		}, visit{labels: "tokens=1", in: 6 * s}},
		{"behind it in the same workload", quota, []visit{
			{labels: "tokens=5"},
			{labels: "tokens=5 tier=hasty", in: never, out: 6 * s, cause: flowctl.CauseTimeout},
			{labels: "tokens=5 tier=gold", in: 5 * s},
		}, visit{at: s, labels: "tokens=1 tier=hasty", in: 6 * s}},
		{"of another fairness value", quota, []visit{
			{labels: "tokens=5"},
			{labels: "tokens=3 user=a", timeout: 4 * s, in: never, out: 3990 * ms, cause: flowctl.CauseTimeout},
			{labels: "tokens=3 user=b priority=50", in: 3 * s},
		}, visit{labels: "tokens=1 user=c", in: 4 * s}},
		{"a large one in front, whose place others take", quota, []visit{
			{labels: "tokens=5"},
			{labels: "tokens=4 user=a", timeout: 4500 * ms, in: never, out: 4490 * ms, cause: flowctl.CauseTimeout},
			{labels: "tokens=1 user=a", in: 5 * s},
			{labels: "tokens=4 priority=100", in: 4 * s},
		}, visit{labels: "tokens=2 user=c", in: 7 * s}},
		{"tokens that are lost while a flow waits for more than there will be", quota, []visit{
			{labels: "tokens=1"},
			{labels: "tokens=5", timeout: 900 * ms, in: never, out: 0, cause: flowctl.CauseQueueTooLong},
			{labels: "tokens=5", in: s},
		}, visit{labels: "tokens=1", in: 2 * s}},
		{"in steps", steps, []visit{
			{labels: "tokens=5"},
			{labels: "tokens=5", timeout: 6 * s, in: never, out: 5990 * ms, cause: flowctl.CauseTimeout},
			{labels: "tokens=5 priority=100", in: 5 * s},
		}, visit{labels: "tokens=1", in: 6 * s}},
		{"after a delay", delayed, []visit{
			{labels: "tokens=5"},
			{labels: "tokens=5", timeout: 11 * s, in: never, out: 10990 * ms, cause: flowctl.CauseTimeout},
			{labels: "tokens=5 priority=100", in: 10 * s}, // and the bucket is full again
		}, visit{labels: "tokens=1", in: 16 * s}},
		{"of one key", keyed, []visit{
			{labels: "key=a tokens=5"},
			{labels: "key=b tokens=5"},
			{labels: "key=a tokens=5", timeout: 6 * s, in: never, out: 5990 * ms, cause: flowctl.CauseTimeout},
			{labels: "key=a tokens=5 priority=100", in: 5 * s},
		}, visit{labels: "key=a tokens=1", in: 6 * s}},
		{"for a slot, before any comes back", single, []visit{
			{hold: s},
			{in: s, hold: s},
			{in: 2 * s, hold: 2 * s}, // nothing shows when it ends
			{at: 2100 * ms, timeout: s, in: never, out: 3090 * ms, cause: flowctl.CauseTimeout},
			{at: 2200 * ms, timeout: s, in: never, out: 3190 * ms, cause: flowctl.CauseTimeout},
		}, visit{at: 3050 * ms, in: 4 * s}},
	} {
		for _, timeout := range []time.Duration{never, tt.last.in - tt.last.at + 11*ms} {
			t.Run(fmt.Sprintf("%s/%v", tt.name, timeout), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					last := tt.last
					last.timeout = timeout
					all := append(append([]visit(nil), tt.all...), last)
					for i := range all {
						if all[i].in < 0 {
							all[i].retry = anyRetry
						}
					}
					visits(t, open(t, []policy.Component{tt.c}), all)
				})
			})
		}
	}
}
