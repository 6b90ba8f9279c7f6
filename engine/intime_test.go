package engine_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/policy"
)

// A comer is a flow of a random queue.
type comer struct {
	at      time.Duration
	labels  map[string]string
	timeout time.Duration
}

// comers has flows come to a queue, each of which holds what it is given for a while, and returns the decision about the
// last and how long it took.
func comers(t *testing.T, c policy.Component, flows []comer, hold time.Duration) (last flowctl.Decision, after time.Duration) {
	synctest.Test(t, func(t *testing.T) {
		client := open(t, []policy.Component{c})
		var all sync.WaitGroup
		for i, comer := range flows {
			all.Go(func() {
				<-time.After(comer.at)
				began := time.Now()
				flow := client.Start(t.Context(), "point", flowctl.Params{Labels: comer.labels, CheckTimeout: comer.timeout})
				if i == len(flows)-1 {
					last, after = flow.Decision(), time.Since(began)
				}
				if flow.Decision() == flowctl.Accepted {
					<-time.After(hold)
				}
				if _, err := flow.End(context.WithoutCancel(t.Context())); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
	})
	return last, after
}

// A flow that can wait for long enough is not rejected when it comes, whatever waits before it. Each random queue is
// tried three times: with plenty of time, to see when its last flow is served, with just enough, and with a little less,
// so that it cannot be.
func TestFlowsInTimeAreServed(t *testing.T) {
	const hold, little = 407 * time.Millisecond, 10 * time.Microsecond
	costs := func(rng *rand.Rand) string { return fmt.Sprint([]float64{0.5, 1, 1.25, 2, 3, 3.75, 4}[rng.IntN(7)]) }
	one := func(*rand.Rand) string { return "1" }
	quota := policy.QuotaScheduler{
		Selectors: policy.At("point"), Capacity: 4, Fill: 5, Interval: 1436 * time.Millisecond, Scheduler: byLabels,
	}
	steps, delayed, both := quota, quota, quota
	steps.StepFill, both.StepFill = true, true
	delayed.DelayInitialFill, both.DelayInitialFill = true, true
	slots := policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 2, MaxInflight: time.Hour, Scheduler: byLabels}
	for _, tt := range []struct {
		name  string
		c     policy.Component
		costs func(*rand.Rand) string
		hasty int // one flow of so many gives up before long; 0: none
	}{
		{"quota", quota, costs, 4},
		{"quota, nobody gives up", quota, costs, 0},
		{"quota, of one cost", quota, one, 0},
		{"quota in steps", steps, costs, 4},
		{"quota after a delay", delayed, costs, 4},
		{"quota after a delay, nobody gives up", delayed, costs, 0},
		{"quota in steps after a delay", both, costs, 4},
		{"slots", slots, one, 0},
		{"slots, some give up", slots, one, 4},
		{"slots of many costs", slots, costs, 4},
	} {
		t.Run(tt.name, func(t *testing.T) {
			served, rejected := 0, 0
			for seed := range race.Pick[uint64](12, 200) {
				rng := rand.New(rand.NewPCG(seed, 67))
				priorities := [][]string{{"1", "5"}, {"1", "2", "5"}, {"0.1", "1", "2", "3", "5"}}[rng.IntN(3)]
				var flows []comer
				at := time.Duration(0)
				for range 8 + rng.IntN(20) {
					at += time.Duration(1+rng.IntN(250_000)) * time.Microsecond
					c := comer{at, map[string]string{
						"tokens": tt.costs(rng), "priority": priorities[rng.IntN(len(priorities))],
						"user": string("ab"[rng.IntN(2)]), "workload": string("ab"[rng.IntN(2)]),
					}, 10 * time.Minute}
					if tt.hasty > 0 && rng.IntN(tt.hasty) == 0 {
						c.timeout = time.Duration(1+rng.IntN(4_000_000)) * time.Microsecond
					}
					flows = append(flows, c)
				}
				last := &flows[len(flows)-1]
				last.timeout = 10 * time.Minute
				decision, after := comers(t, tt.c, flows, hold)
				if decision != flowctl.Accepted || after == 0 {
					continue
				}
				last.timeout = after + policy.DefaultMargin + little
				if decision, again := comers(t, tt.c, flows, hold); decision != flowctl.Accepted || (again-after).Abs() > little {
					t.Errorf("seed %d: %v after %v want it served after %v, as with more time", seed, decision, again, after)
				}
				served++
				last.timeout = max(after+policy.DefaultMargin-little, 1)
				decision, _ = comers(t, tt.c, flows, hold)
				if decision == flowctl.Accepted {
					t.Errorf("seed %d: served within %v, and after %v with more time", seed, last.timeout, after)
				} else {
					rejected++
				}
			}
			t.Logf("%d were served in time, %d were not with less", served, rejected)
			if least := race.Pick(5, 80); served < least {
				t.Errorf("%d queues in which the last flow waits want %d to tell by", served, least)
			}
		})
	}
}
