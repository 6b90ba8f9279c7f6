package engine_test

import (
	"context"
	"math"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/sharedtest"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// sharedSchedulers have 4 tokens or slots for each user, and get no others for an hour.
func sharedSchedulers() map[string]policy.Component {
	return map[string]policy.Component{
		"quota scheduler": policy.QuotaScheduler{
			ID: "c", Selectors: policy.At("point"), Capacity: 4, Fill: 4, Interval: time.Hour, StepFill: true, LimitBy: "user",
			Scheduler: policy.Scheduler{TokensLabel: "cost"},
		},
		"concurrency scheduler": policy.ConcurrencyScheduler{
			ID: "c", Selectors: policy.At("point"), Max: 4, MaxInflight: time.Hour, LimitBy: "user",
		},
	}
}

// overSchedulers runs f over the kinds of schedulers and of agents, in bubbles.
func overSchedulers(t *testing.T, engines int, f func(t *testing.T, f *fleet, kind string)) {
	for name, c := range sharedSchedulers() {
		for _, kind := range sides.Engines {
			t.Run(name+"/"+string(kind), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { f(t, newFleet(t, engines, kind, c), name) })
			})
		}
	}
}

// enter starts a flow of the user at one of the engines, which waits for so long at the most.
func (f *fleet) enter(ctx context.Context, at int, user string, most time.Duration) *flowctl.Flow {
	return f.sides[at].Client.Start(ctx, "point", flowctl.Params{Labels: map[string]string{"user": user}, MaxWait: most})
}

// admitsNow is admits for flows that do not wait.
func (f *fleet) admitsNow(t *testing.T, user string, want int) (flows []*flowctl.Flow) {
	t.Helper()
	for i := 0; i <= want; i++ {
		flow := f.enter(t.Context(), i%len(f.sides), user, flowctl.NoWait)
		if got := flow.Decision() == flowctl.Accepted; got != (i < want) {
			t.Errorf("flow %d of %s: %v want it admitted: %v", i, user, flow, i < want)
		}
		if flow.ShouldRun() {
			flows = append(flows, flow)
		}
	}
	return flows
}

// A scheduler's tokens and slots are the same for all engines, and slots come back by whichever engine.
func TestSharedSchedulers(t *testing.T) {
	overSchedulers(t, 3, func(t *testing.T, f *fleet, kind string) {
		flows := f.admitsNow(t, "ann", 4)
		for _, flow := range f.admitsNow(t, "bob", 4) {
			end(flow)
		}
		for i, side := range f.sides {
			if u, err := peekAt(side.Engine, "test", "c", "ann"); err != nil || u.Remaining != 0 || u.Capacity != 4 {
				t.Errorf("engine %d: Peek = %+v, %v want nothing left", i, u, err)
			}
		}
		for _, flow := range flows {
			if r := end(flow); kind == "concurrency scheduler" && r.Returned != 1 {
				t.Errorf("end returned %+v want a slot", r)
			}
		}
		want := 0
		if kind == "concurrency scheduler" {
			want = 4
		}
		for _, flow := range f.admitsNow(t, "ann", want) {
			end(flow)
		}
		if kind != "concurrency scheduler" {
			<-time.After(time.Hour)
			f.admitsNow(t, "ann", 4)
		}
	})
}

// A flow that waits at one engine gets what comes back at another, at once.
func TestSharedSlotsWakeOthers(t *testing.T) {
	for _, kind := range sides.Engines {
		t.Run(string(kind), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t, 2, kind, sharedSchedulers()["concurrency scheduler"])
				flows := f.admitsNow(t, "ann", 4)
				began := time.Now()
				var wg sync.WaitGroup
				for i := range 4 {
					wg.Go(func() {
						flow := f.enter(t.Context(), i%2, "ann", time.Minute)
						if flow.Decision() != flowctl.Accepted || time.Since(began) > 10*time.Second+fastestCall {
							t.Errorf("%v after %v", flow, time.Since(began))
						}
						end(flow)
					})
				}
				<-time.After(10 * time.Second)
				for _, flow := range flows {
					end(flow)
				}
				wg.Wait()
				f.admitsNow(t, "ann", 4)
			})
		})
	}
}

// fastestCall is the shortest time between two questions for one key.
const fastestCall = 5 * time.Millisecond

// A crowd is callers at one engine that come back at once, all the time.
type sharedCrowd struct {
	at       int
	workload string
	callers  int
}

// Shares by priority hold over all engines, wherever the flows come to, and nothing that comes is left unused.
func TestSharedShares(t *testing.T) {
	for _, tt := range []struct {
		name           string
		engines        int
		capacity, rate float64
		crowds         []sharedCrowd
		want           map[string]float64 // points
	}{
		{"each at an engine of its own", 2, 20, 200, []sharedCrowd{{0, "small", 60}, {1, "large", 60}}, map[string]float64{"small": 25, "large": 75}},
		{
			"both everywhere", 3, 30, 300,
			[]sharedCrowd{{0, "small", 40}, {1, "small", 40}, {0, "large", 40}, {1, "large", 40}, {2, "large", 40}},
			map[string]float64{"small": 25, "large": 75},
		},
		{"few callers", 2, 20, 200, []sharedCrowd{{0, "small", 3}, {1, "large", 3}}, map[string]float64{"small": 25, "large": 75}},
		{"more than is listed", 2, 40, 1000, []sharedCrowd{{0, "small", 100}, {1, "large", 100}}, map[string]float64{"small": 25, "large": 75}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t, tt.engines, sides.Embedded, policy.QuotaScheduler{
					Selectors: policy.At("point"), Capacity: tt.capacity, Fill: tt.rate, Interval: time.Second,
					Scheduler: policy.Scheduler{Workloads: []policy.Workload{
						{Name: "small", Labels: policy.LabelMatcher{Equal: map[string]string{"class": "small"}}, WorkloadParameters: policy.WorkloadParameters{Priority: 1}},
						{Name: "large", Labels: policy.LabelMatcher{Equal: map[string]string{"class": "large"}}, WorkloadParameters: policy.WorkloadParameters{Priority: 3}},
					}},
				})
				for _, s := range f.stores {
					s.Behave(sharedtest.Behavior{Late: time.Millisecond})
				}
				const warm, lasts = time.Second, 11 * time.Second
				began := time.Now()
				var mu sync.Mutex
				got, calls := make(map[string]float64), 0
				ctx, cancel := context.WithCancel(t.Context()) // without a deadline, by which flows would be rejected at once
				defer cancel()
				var wg sync.WaitGroup
				for _, c := range tt.crowds {
					for range c.callers {
						wg.Go(func() {
							for ctx.Err() == nil {
								flow := f.sides[c.at].Client.Start(ctx, "point", flowctl.Params{Labels: map[string]string{"class": c.workload}, MaxWait: time.Minute})
								if flow.Decision() == flowctl.Accepted && time.Since(began) >= warm {
									mu.Lock()
									got[c.workload]++
									mu.Unlock()
								}
								end(flow)
							}
						})
					}
				}
				<-time.After(warm)
				for _, s := range f.stores {
					calls -= s.Counted().Draw
				}
				<-time.After(lasts - warm)
				cancel()
				wg.Wait()
				sum := 0.0
				for _, n := range got {
					sum += n
				}
				for _, s := range f.stores {
					calls += s.Counted().Draw
				}
				use, each := sum/(tt.rate*(lasts-warm).Seconds())*100, float64(calls)/sum
				t.Logf("use %.2f %%, %.2f calls a flow", use, each)
				for workload, want := range tt.want {
					if share := got[workload] / sum * 100; math.Abs(share-want) > 1 {
						t.Errorf("%s got %.2f %% want %v", workload, share, want)
					}
				}
				if use < 98 || use > 101 || each > 2 {
					t.Errorf("want all that comes used, and at most 2 calls a flow")
				}
			})
		})
	}
}
