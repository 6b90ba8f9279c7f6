package engine_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// When a queue is full, the newest flow of the largest share makes room.
func TestFullQueueMakesRoom(t *testing.T) {
	const s, ms = time.Second, time.Millisecond
	set := func(c *policy.ConcurrencyScheduler) {
		c.Max, c.Scheduler = 1, byLabels
		c.Scheduler.MaxQueue = 3
	}
	full := func(at time.Duration) visit {
		return visit{out: at, in: never, retry: anyRetry, cause: flowctl.CauseQueueFull}
	}
	of := func(v visit, labels string) visit {
		v.labels = labels
		return v
	}
	for _, tt := range []struct {
		name   string
		visits []visit
	}{
		{"of one user, for another", []visit{
			{hold: s},
			{labels: "user=a", in: s},
			{labels: "user=a", in: s},
			of(full(100*ms), "user=a"), // when b comes
			of(full(0), "user=a"),
			{at: 100 * ms, labels: "user=b", in: s},
			{at: 200 * ms, labels: "user=b", in: never, out: 200 * ms, retry: anyRetry, cause: flowctl.CauseQueueFull}, // two and two would be four
		}},
		{"of one workload, for another", []visit{
			{hold: s},
			{labels: "workload=a user=1", in: s},
			{labels: "workload=a user=2", in: s},
			of(full(100*ms), "workload=a user=3"),
			{at: 100 * ms, labels: "workload=b", in: s},
		}},
		{"not for a flow that does not wait", []visit{
			{hold: s},
			{in: s},
			{in: s},
			{in: s},
			{at: 100 * ms, labels: "user=b", timeout: 5 * ms, in: never, out: 100 * ms, retry: anyRetry, cause: flowctl.CauseLate},
		}},
		{"as many shares as there is room", []visit{
			{hold: s},
			{labels: "user=a", in: s},
			{labels: "user=b", in: s},
			{labels: "user=c", in: s},
			of(full(0), "user=d"),
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				visits(t, open(t, []policy.Component{concurrency(set)}), tt.visits)
			})
		})
	}
}

// When a queue of one key has all the room, its newest flow makes room for a flow of another key.
func TestFullQueueMakesRoomForOtherKeys(t *testing.T) {
	const s, ms = time.Second, time.Millisecond
	full := func(at time.Duration, labels string) visit {
		return visit{labels: labels, out: at, in: never, retry: anyRetry, cause: flowctl.CauseQueueFull}
	}
	at := func(at time.Duration, v visit) visit {
		v.at = at
		return v
	}
	for _, tt := range []struct {
		name   string
		visits []visit
	}{
		{"of the longest queue", []visit{
			{labels: "key=a", hold: s},
			{labels: "key=a", in: s},
			{labels: "key=a", in: s},
			full(100*ms, "key=a"), // when the second flow of b comes
			full(0, "key=a"),
			at(100*ms, visit{labels: "key=b", hold: s, in: 100 * ms}),
			at(100*ms, visit{labels: "key=b", in: 1100 * ms}),
			at(200*ms, full(200*ms, "key=b")), // two and two would be four
			at(200*ms, full(200*ms, "key=a")),
		}},
		{"of the largest share of the longest queue", []visit{
			{labels: "key=a user=1", hold: s},
			{labels: "key=a user=1", in: s},
			full(100*ms, "key=a user=1"),
			{labels: "key=a user=2", in: s},
			at(100*ms, visit{labels: "key=b", hold: s, in: 100 * ms}),
			at(100*ms, visit{labels: "key=b", in: 1100 * ms}),
		}},
		{"not for a key that has as many as any", []visit{
			{labels: "key=a", hold: s},
			{labels: "key=b", hold: s},
			{labels: "key=c", hold: s},
			{labels: "key=d", hold: s},
			{labels: "key=a", in: s},
			{labels: "key=b", in: s},
			{labels: "key=c", in: s},
			at(100*ms, full(100*ms, "key=d")),
			at(100*ms, full(100*ms, "key=a")),
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				visits(t, open(t, []policy.Component{concurrency(func(c *policy.ConcurrencyScheduler) {
					c.Max, c.LimitBy, c.Scheduler = 1, "key", byLabels
					c.Scheduler.MaxQueue = 3
				})}), tt.visits)
			})
		})
	}
}

// A tenant with more callers than a queue has room for leaves half of it to the other one. One that makes up a value
// for each flow leaves half to another workload.
func TestFullQueueIsShared(t *testing.T) {
	const took, last = 20 * time.Millisecond, 4 * time.Second
	room := race.Pick(30, 100)
	gold := policy.Workload{Name: "gold", Labels: policy.LabelMatcher{Equal: map[string]string{"tier": "gold"}}}
	for _, tt := range []struct {
		name    string
		callers int
		made    bool   // up, a value for each flow
		labels  string // of the other tenant's
		least   float64
	}{
		{"fewer callers than room", room - 10, false, "tenant=1", 0.45},
		{"more callers than room", 4 * room, false, "tenant=1", 0.45},
		{"another workload", 4 * room, false, "tenant=1 tier=gold", 0.45},
		{"made-up values, and another workload", 4 * room, true, "tenant=1 tier=gold", 0.45},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{policy.ConcurrencyScheduler{
					Selectors: policy.At("point"), Max: 4, MaxInflight: time.Hour,
					Scheduler: policy.Scheduler{FairnessLabel: "tenant", MaxQueue: room, Workloads: []policy.Workload{gold}},
				}}}})
				if err != nil {
					t.Fatal(err)
				}
				defer e.Close()
				client, err := flowctl.New(e)
				if err != nil {
					t.Fatal(err)
				}
				var ran [2]atomic.Int64
				var made atomic.Int64
				until := time.Now().Add(last)
				var wg sync.WaitGroup
				one := func(tenant int, text string) {
					for time.Now().Before(until) {
						labels := labelled(text)
						if tenant == 0 && tt.made {
							labels["tenant"] = fmt.Sprint("made up ", made.Add(1))
						}
						flow := client.Start(context.Background(), "point", flowctl.Params{Labels: labels, CheckTimeout: 2 * time.Second})
						if flow.ShouldRun() {
							ran[tenant].Add(1)
						}
						<-time.After(took + time.Duration(rand.IntN(1000))*time.Microsecond)
						end(flow)
					}
				}
				for range tt.callers {
					wg.Go(func() { one(0, "tenant=0") })
				}
				<-time.After(200 * time.Millisecond)
				for range 8 {
					wg.Go(func() { one(1, tt.labels) })
				}
				wg.Wait()
				a, b := ran[0].Load(), ran[1].Load()
				t.Logf("%d flows of the tenant with %d callers ran, and %d of the one with 8", a, tt.callers, b)
				if share := float64(b) / float64(a+b); share < tt.least-0.05 { // for the time that it came later
					t.Errorf("the tenant with 8 callers had %.0f %% want %.0f %%", 100*share, 100*tt.least)
				}
			})
		})
	}
}

// The forecast for a flow does not count the flow that it displaces from a full queue.
func TestFullQueueForecast(t *testing.T) {
	set := policy.Scheduler{MaxQueue: 2, TokensLabel: "tokens", PriorityLabel: "priority", WorkloadLabel: "workload"}
	schedulers := map[string]func(local bool) policy.Component{
		"tokens": func(local bool) policy.Component {
			return policy.QuotaScheduler{Selectors: policy.At("point"), Capacity: 5, Fill: 1, Interval: time.Second, Scheduler: set, Local: local}
		},
		"slots": func(local bool) policy.Component {
			return policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 5, MaxInflight: time.Hour, Scheduler: set, Local: local}
		},
	}
	for name, c := range schedulers {
		for _, local := range []bool{true, false} {
			for _, tt := range []struct {
				name     string
				most     time.Duration
				accepted bool
			}{
				{"in time", 12 * time.Second, true},
				{"in time without the flow that it displaces", 8 * time.Second, true},
				{"too late in any case", 4 * time.Second, false},
			} {
				t.Run(fmt.Sprintf("%s, in memory %t, %s", name, local, tt.name), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						client := newFleet(t, 1, sides.Embedded, c(local)).sides[0].Client
						start := func(labels string, most time.Duration) *flowctl.Flow {
							return client.Start(t.Context(), "point", flowctl.Params{Labels: labelled(labels), MaxWait: most})
						}
						hold := func(flow *flowctl.Flow) {
							<-time.After(5 * time.Second)
							end(flow)
						}
						hold(start("tokens=5", -1)) // it shows how long flows hold slots
						var wg sync.WaitGroup
						defer wg.Wait()
						first := start("tokens=5", -1)
						wg.Go(func() { hold(first) })
						var displaced atomic.Int64
						for range 2 {
							wg.Go(func() {
								flow := start("tokens=5 workload=high priority=100", -1)
								if causeOf(flow) == flowctl.CauseQueueFull {
									displaced.Add(1)
									return
								}
								hold(flow)
							})
							synctest.Wait()
						}
						<-time.After(3500 * time.Millisecond) // after another 1.5 s, one of those that wait is served for 5 s
						flow := start("tokens=5", tt.most)
						end(flow)
						if got := flow.Decision() == flowctl.Accepted; got != tt.accepted {
							t.Errorf("%v: %v want it accepted: %v", flow, causeOf(flow), tt.accepted)
						}
						if n := displaced.Load(); tt.accepted && n != 1 {
							t.Errorf("%d flows were displaced, want 1", n)
						}
					})
				})
			}
		}
	}
}
