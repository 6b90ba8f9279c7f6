package engine_test

import (
	"context"
	"errors"
	"math"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/shared"
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

// What the store does not answer is decided as the policy says, for flows that wait, too.
func TestSharedSchedulersInAnOutage(t *testing.T) {
	for _, tt := range []struct {
		name     string
		behavior sharedtest.Behavior
	}{
		{"down", sharedtest.Behavior{Err: shared.ErrDown}},
		{"wrong", sharedtest.Behavior{Err: errors.New("the store is not well")}},
		{"late", sharedtest.Behavior{Late: time.Minute}},
		{"lost", sharedtest.Behavior{Lost: context.DeadlineExceeded}},
	} {
		for name, c := range sharedSchedulers() {
			for mode, want := range map[policy.Outage]int{"": 2, policy.OutageOpen: 5, policy.OutageClosed: 0} {
				for _, kind := range sides.Engines {
					t.Run(tt.name+"/"+name+"/"+string(mode)+"/"+string(kind), func(t *testing.T) {
						synctest.Test(t, func(t *testing.T) {
							switch s := c.(type) {
							case policy.QuotaScheduler:
								s.OnOutage = mode
								c = s
							case policy.ConcurrencyScheduler:
								s.OnOutage = mode
								c = s
							}
							f := newFleet(t, 2, kind, c)
							for _, s := range f.stores {
								s.Behave(tt.behavior)
							}
							for at := range f.sides {
								for i := range 5 {
									most := flowctl.NoWait
									if i%2 == 1 {
										most = time.Second
									}
									flow := f.enter(t.Context(), at, "ann", most)
									if got := flow.Decision() == flowctl.Accepted; got != (i < want) {
										t.Errorf("flow %d: %v want it admitted: %v", i, flow, i < want)
									}
									if r := rejectedBy(flow); mode == policy.OutageClosed && (r == nil || r.Cause() != flowctl.CauseNoStore || r.HTTPStatus != 503 || r.RetryAfter() != time.Second) {
										t.Errorf("%v want it rejected with no store, 503, for a second", flow.Err())
									}
								}
								s := f.sides[at].Engine.Stats()
								if (s.Store.Failures == 0) != errors.Is(tt.behavior.Err, shared.ErrDown) || mode != "" && (s.Store.Unanswered != 5 || s.Components[0].LocalDecisions != 5) {
									t.Errorf("stats = %+v, %+v want five decisions without the store", s.Store, s.Components[0])
								}
							}
						})
					})
				}
			}
		}
	}
}

// A flow that waits while the store goes away and comes back is served, and what was let in meanwhile is owed.
func TestSharedQueueOutlivesAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, 2, sides.Embedded, policy.QuotaScheduler{
			ID: "c", Selectors: policy.At("point"), Capacity: 4, Fill: 4, Interval: time.Second, LimitBy: "user",
		})
		f.admitsNow(t, "ann", 4)
		for _, s := range f.stores {
			s.Behave(sharedtest.Behavior{Err: shared.ErrDown})
		}
		began := time.Now()
		for i := range 8 { // half of the tokens are for this engine
			if flow := f.enter(t.Context(), 0, "ann", time.Minute); flow.Decision() != flowctl.Accepted {
				t.Errorf("flow %d: %v", i, flow)
			}
		}
		if took := time.Since(began); took < 3*time.Second || took > 4500*time.Millisecond {
			t.Errorf("8 flows took %v want 4 s, at 2 a second", took)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			if flow := f.enter(t.Context(), 0, "ann", time.Minute); flow.Decision() != flowctl.Accepted {
				t.Errorf("%v want it admitted", flow)
			}
		})
		for _, s := range f.stores {
			s.Behave(sharedtest.Behavior{})
		}
		wg.Wait()
		u, err := peekAt(f.sides[1].Engine, "test", "c", "ann")
		if err != nil || u.Remaining > 3 {
			t.Errorf("Peek = %+v, %v want what was let in meanwhile taken", u, err)
		}
		if got := f.sides[0].Engine.Stats().Components[0]; !got.Shared || got.LocalDecisions < 8 {
			t.Errorf("%+v", got)
		}
	})
}

// What a flow costs beyond its estimate is owed at all engines, and what it costs less is there for flows that wait.
func TestSharedSchedulersSettle(t *testing.T) {
	for _, kind := range sides.Engines {
		t.Run(string(kind), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t, 2, kind, sharedSchedulers()["quota scheduler"])
				for at := range f.sides { // remote clients have sessions from then on
					f.enter(t.Context(), at, "bob", flowctl.NoWait)
				}
				<-time.After(2 * time.Second)
				params := flowctl.Params{Labels: map[string]string{"user": "ann", "cost": "3"}, MaxWait: time.Minute}
				flow := f.sides[0].Client.Start(t.Context(), "point", params)
				left := func(want float64) {
					t.Helper()
					synctest.Wait()
					<-time.After(2 * time.Second) // settlements of remote clients travel in batches
					if u, err := peekAt(f.sides[1].Engine, "test", "c", "ann"); err != nil || u.Remaining != want {
						t.Errorf("Peek = %+v, %v want %v left", u, err, want)
					}
				}
				left(1)
				var wg sync.WaitGroup
				wg.Go(func() {
					if waits := f.sides[1].Client.Start(t.Context(), "point", params); waits.Decision() != flowctl.Rejected {
						t.Errorf("%v: nothing comes for an hour, so it is rejected at once", waits)
					}
				})
				wg.Wait()
				flow.Settle("cost", 1)
				end(flow)
				left(3)
				flow = f.sides[1].Client.Start(t.Context(), "point", params)
				flow.Settle("cost", 5)
				end(flow)
				left(-2)
				for _, side := range f.sides {
					if s := side.Engine.Stats().Components[0]; s.Settled != 1 || s.Unsettled != 0 {
						t.Errorf("settled %d want 1", s.Settled)
					}
				}
			})
		})
	}
}

// What a scheduler gave a flow that another one rejects, or whose caller has gone, is there for others.
func TestSharedSchedulersGiveBack(t *testing.T) {
	for name, c := range sharedSchedulers() {
		for _, kind := range sides.Engines {
			t.Run(name+"/"+string(kind), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					none := policy.QuotaScheduler{ID: "none", Selectors: policy.At("point"), Interval: time.Hour, Local: true}
					f := newFleet(t, 2, kind, c, none)
					for i := range 10 {
						if flow := f.enter(t.Context(), i%2, "ann", flowctl.NoWait); flow.Decision() != flowctl.Rejected {
							t.Errorf("%v want it rejected", flow)
						}
					}
					if u, err := peekAt(f.sides[0].Engine, "test", "c", "ann"); err != nil || u.Remaining != 4 || u.InFlight != 0 {
						t.Errorf("Peek = %+v, %v want all", u, err)
					}
				})
				synctest.Test(t, func(t *testing.T) {
					f := newFleet(t, 2, kind, c)
					for _, s := range f.stores {
						s.Behave(sharedtest.Behavior{Late: 20 * time.Millisecond})
					}
					ctx, cancel := context.WithCancel(t.Context())
					defer time.AfterFunc(10*time.Millisecond, cancel).Stop() // the answer comes later
					flow := f.enter(ctx, 0, "ann", flowctl.NoWait)
					if flow.Decision() != flowctl.Canceled {
						t.Errorf("%v want it canceled", flow)
					}
					end(flow)
					<-time.After(time.Second)
					want := 4.0
					if name == "quota scheduler" && kind == sides.Served {
						want = 3 // a client goes on asking for a while, and only slots come back over the network
					}
					if u, err := peekAt(f.sides[1].Engine, "test", "c", "ann"); err != nil || u.Remaining != want || u.InFlight != 0 {
						t.Errorf("Peek = %+v, %v want all", u, err)
					}
				})
			})
		}
	}
}

// A flow that comes when nothing waits asks once. What it was told holds for a while for flows that do not wait.
func TestSharedSchedulersAskOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, 1, sides.Embedded, sharedSchedulers()["quota scheduler"])
		f.admitsNow(t, "ann", 4)
		if got := f.stores[0].Counted().Draw; got != 5 {
			t.Errorf("5 flows asked %d times", got)
		}
		for range 10 {
			if flow := f.enter(t.Context(), 0, "ann", flowctl.NoWait); flow.RetryAfter() < 59*time.Minute {
				t.Errorf("retry after %v want when the tokens come", flow.RetryAfter())
			}
		}
		if got := f.stores[0].Counted().Draw; got != 5 {
			t.Errorf("flows that the store had refused asked %d times more", got-5)
		}
		<-time.After(2 * time.Second)
		f.enter(t.Context(), 0, "ann", flowctl.NoWait)
		if got := f.stores[0].Counted().Draw; got != 6 {
			t.Errorf("asked %d times want once more after a second", got-5)
		}
	})
}

// Flows wait no longer than they may, are rejected if their turn cannot come by then, and leave when the engine is closed.
func TestSharedQueueEnds(t *testing.T) {
	for _, kind := range sides.Engines {
		t.Run(string(kind), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t, 2, kind, sharedSchedulers()["concurrency scheduler"])
				flows := f.admitsNow(t, "ann", 4)
				began := time.Now()
				flow := f.enter(t.Context(), 1, "ann", 3*time.Second)
				if took := time.Since(began); flow.Decision() != flowctl.Rejected || took != 3*time.Second || causeOf(flow) != flowctl.CauseTimeout {
					t.Errorf("%v after %v want it rejected after 3 s", flow, took)
				}
				<-time.After(2 * time.Second)
				calls := f.stores[1].Counted().Draw
				<-time.After(time.Minute)
				if got := f.stores[1].Counted().Draw; got != calls {
					t.Errorf("%d calls although nothing waits", got-calls)
				}
				var wg sync.WaitGroup
				wg.Go(func() {
					flow := f.enter(t.Context(), 1, "ann", time.Hour)
					if flow.Decision() != flowctl.Rejected || causeOf(flow) != flowctl.CauseClosed {
						t.Errorf("%v want it rejected, because the engine is closed", flow)
					}
				})
				<-time.After(10 * time.Second)
				if err := f.sides[1].Engine.Close(); err != nil {
					t.Error(err)
				}
				wg.Wait()
				for _, flow := range flows {
					end(flow)
				}
				for _, flow := range f.admitsAt(t, 0, "ann", 4) {
					end(flow)
				}
			})
		})
	}
}

// admitsAt is admitsNow at one engine.
func (f *fleet) admitsAt(t *testing.T, at int, user string, want int) []*flowctl.Flow {
	t.Helper()
	one := &fleet{server: f.server, stores: f.stores[at : at+1], sides: f.sides[at : at+1]}
	return one.admitsNow(t, user, want)
}

// Flows that wait go by new numbers, and by a state that was reset.
func TestSharedQueueChanges(t *testing.T) {
	more := func(c policy.Component) policy.Component {
		switch s := c.(type) {
		case policy.QuotaScheduler:
			s.Capacity, s.Fill = 5, 5
			return s
		case policy.ConcurrencyScheduler:
			s.Max = 5
			return s
		}
		return c
	}
	for name, c := range sharedSchedulers() {
		for _, tt := range []struct {
			name   string
			change func(t *testing.T, e *engine.Engine)
			all    bool // flows are served, and not only the first
		}{
			{"more", func(t *testing.T, e *engine.Engine) { apply(t, e, more(c)) }, false},
			{"overrides", func(t *testing.T, e *engine.Engine) {
				o := map[string]policy.Override{"ann": {Capacity: 5, Fill: 5}}
				if s, ok := c.(policy.QuotaScheduler); ok {
					s.Overrides = o
					apply(t, e, s)
					return
				}
				s := c.(policy.ConcurrencyScheduler)
				s.Overrides = map[string]policy.Override{"ann": {Max: 5}}
				apply(t, e, s)
			}, false},
			{"reset", func(t *testing.T, e *engine.Engine) {
				if err := resetAt(e, "test", "c", "ann"); err != nil {
					t.Error(err)
				}
			}, true},
			{"pass through", func(t *testing.T, e *engine.Engine) {
				if s, ok := c.(policy.QuotaScheduler); ok {
					s.PassThrough = true
					apply(t, e, s)
					return
				}
				s := c.(policy.ConcurrencyScheduler)
				s.PassThrough = true
				apply(t, e, s)
			}, true},
		} {
			t.Run(name+"/"+tt.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					f := newFleet(t, 2, sides.Embedded, c)
					f.admitsNow(t, "ann", 4)
					served := make(chan *flowctl.Flow, 2)
					for range 2 {
						go func() { served <- f.enter(t.Context(), 1, "ann", 2*time.Hour) }()
					}
					<-time.After(time.Second)
					began := time.Now()
					tt.change(t, f.sides[1].Engine)
					if flow := <-served; flow.Decision() != flowctl.Accepted || time.Since(began) > time.Second {
						t.Errorf("%v after %v want it admitted", flow, time.Since(began))
					}
					if tt.all {
						<-served
						return
					}
					<-time.After(time.Second)
					select {
					case flow := <-served:
						t.Errorf("%v want it to wait", flow)
					default:
					}
					<-served // an hour later
				})
			})
		}
	}
}

// A check that its client bounds ends in time, although the store takes longer.
func TestSharedSchedulersInTime(t *testing.T) {
	overSchedulers(t, 2, func(t *testing.T, f *fleet, _ string) {
		for _, s := range f.stores {
			s.Behave(sharedtest.Behavior{Late: 45 * time.Millisecond})
		}
		for i := range 3 {
			began := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), 40*time.Millisecond)
			flow := f.enter(ctx, 0, "ann", flowctl.NoWait)
			if got := flow.Decision() == flowctl.Accepted; got != (i < 2) || time.Since(began) > 40*time.Millisecond {
				t.Errorf("flow %d: %v after %v want this engine's half of the tokens, in time", i, flow, time.Since(began))
			}
			cancel()
		}
	})
}

// Local keeps a scheduler to one engine.
func TestLocalSchedulers(t *testing.T) {
	for name, c := range sharedSchedulers() {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				switch s := c.(type) {
				case policy.QuotaScheduler:
					s.Local = true
					c = s
				case policy.ConcurrencyScheduler:
					s.Local = true
					c = s
				}
				f := newFleet(t, 2, sides.Embedded, c)
				f.admitsAt(t, 0, "ann", 4)
				f.admitsAt(t, 1, "ann", 4)
				if got := f.stores[0].Counted(); got != (sharedtest.Counted{}) {
					t.Errorf("calls %+v want none", got)
				}
			})
		})
	}
}

// A flow that never gets what it wants is rejected without a time to come back, and a dry run keeps none back.
func TestSharedSchedulersNever(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, 1, sides.Embedded, policy.QuotaScheduler{
			ID: "c", Selectors: policy.At("point"), Capacity: 2, LimitBy: "user", Interval: time.Hour, Scheduler: policy.Scheduler{TokensLabel: "cost"},
		})
		f.admitsNow(t, "ann", 2)
		for name, params := range map[string]flowctl.Params{
			"all is used":              {Labels: map[string]string{"user": "ann"}, MaxWait: time.Minute},
			"it costs more than there": {Labels: map[string]string{"user": "bob", "cost": "3"}, MaxWait: time.Minute},
		} {
			began := time.Now()
			flow := f.sides[0].Client.Start(t.Context(), "point", params)
			if flow.Decision() != flowctl.Rejected || flow.RetryAfter() != 0 || time.Since(began) > time.Second {
				t.Errorf("%s: %v, retry after %v want it rejected for ever", name, flow, flow.RetryAfter())
			}
		}
		dry := policy.QuotaScheduler{ID: "c", Selectors: policy.At("point"), Capacity: 2, LimitBy: "user", Interval: time.Hour, Scheduler: policy.Scheduler{TokensLabel: "cost"}, DryRun: true}
		apply(t, f.sides[0].Engine, dry)
		if flow := f.enter(t.Context(), 0, "ann", time.Minute); flow.Decision() != flowctl.Accepted {
			t.Errorf("%v want it accepted in a dry run", flow)
		}
		if c := f.sides[0].Engine.Stats().Components[0]; c.DryRunDrops != 1 {
			t.Errorf("%d drops in the dry run want 1", c.DryRunDrops)
		}
		if top := topOf(t, f.sides[0].Engine, "c"); len(top) == 0 || top[0].Value != "ann" {
			t.Errorf("Top = %v want ann", top)
		}
	})
}

// Slots are those of the clients' sessions, or of the engine, and come back with them.
func TestSharedSchedulersHaveHolders(t *testing.T) {
	for _, kind := range sides.Engines {
		t.Run(string(kind), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t, 2, kind, sharedSchedulers()["concurrency scheduler"])
				<-time.After(time.Minute) // a session has begun
				flows := f.admitsNow(t, "ann", 4)
				<-time.After(30 * time.Second)
				if flow := f.enter(t.Context(), 1, "ann", flowctl.NoWait); flow.Decision() != flowctl.Rejected {
					t.Errorf("%v want the slots to be held still", flow)
				}
				f.stores[0].Behave(sharedtest.Behavior{Cut: true})
				<-time.After(15 * time.Second)
				for i := range 3 { // two slots are those of the other one
					if got := f.enter(t.Context(), 1, "ann", flowctl.NoWait).Decision() == flowctl.Accepted; got != (i < 2) {
						t.Errorf("flow %d: accepted %v", i, got)
					}
				}
				for i, flow := range flows {
					if r := end(flow); (r.Returned == 1) != (i%2 == 1) {
						t.Errorf("flow %d returned %+v", i, r)
					}
				}
			})
		})
	}
}

// Any agent behind a balancer takes a scheduler's slot back, also one with another version of the policy.
func TestSharedSchedulersEndAnywhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := sharedSchedulers()["concurrency scheduler"].(policy.ConcurrencyScheduler)
		newer := c
		newer.Max = 5
		for _, other := range []policy.Component{c, newer} {
			f := &fleet{server: sharedtest.New()}
			f.add(t, sides.Embedded, c)
			f.add(t, sides.Embedded, other)
			v, req := new(agentapi.Verdict), &agentapi.Request{ControlPoint: "point", Labels: agentapi.Labels{Params: map[string]string{"user": "ann"}}}
			if err := f.sides[0].Agent.Check(t.Context(), req, v); err != nil {
				t.Fatal(err)
			}
			d := v.At(0)
			for _, want := range []bool{true, false} {
				got := f.sides[1].Engine.Agent().EndSlots(t.Context(), []agentapi.SlotName{{
					Policy: "test", Hash: d.Component.Hash, Component: "c", Label: "user:" + d.Label, Slot: d.Slot(),
				}})
				if !got[0].Known || got[0].Returned != want {
					t.Errorf("EndSlots = %+v want it returned: %v", got, want)
				}
			}
		}
	})
}

// Values beyond the cap of an engine share one queue, and one limit in the store.
func TestSharedSchedulersBeyondTheCap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, client := reloadable(t, []policy.Component{sharedSchedulers()["concurrency scheduler"]},
			engine.WithStore(sharedtest.New().Instance()), engine.WithKeyCap(1))
		enter := func(user string) *flowctl.Flow {
			return client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": user}, MaxWait: flowctl.NoWait})
		}
		var flows []*flowctl.Flow
		for range 4 {
			flows = append(flows, enter("ann"))
		}
		var wg sync.WaitGroup
		wg.Go(func() { // the key is in use
			end(client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": "ann"}, MaxWait: time.Hour}))
		})
		synctest.Wait()
		for _, user := range []string{"bob", "eve"} {
			for i := range 3 {
				flow := enter(user)
				if got, want := flow.Decision() == flowctl.Accepted, user == "bob" || i == 0; got != want {
					t.Errorf("flow %d of %s: %v", i, user, flow)
				}
				flows = append(flows, flow)
			}
		}
		for _, flow := range flows {
			if r := end(flow); flow.Decision() == flowctl.Accepted && r.Returned != 1 {
				t.Errorf("end returned %+v want a slot", r)
			}
		}
		wg.Wait()
		if s := e.Stats().Components[0]; s.Keys != 1 || s.Overflows != 6 {
			t.Errorf("stats = %+v want one key, and an overflow for each flow of the others", s)
		}
		for range 4 {
			if flow := enter("eve"); flow.Decision() != flowctl.Accepted {
				t.Errorf("%v want the slots to be back", flow)
			}
		}
	})
}

// Peek and Reset of a scheduler ask the store, and return its error.
func TestSharedSchedulersPeekAndReset(t *testing.T) {
	for name, c := range sharedSchedulers() {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t, 2, sides.Embedded, c)
				flows := f.admitsNow(t, "ann", 4)
				in := 0
				if name == "concurrency scheduler" {
					in = 4
				}
				if u, err := peekAt(f.sides[1].Engine, "test", "c", "ann"); err != nil || u != (engine.Usage{Capacity: 4, InFlight: in}) {
					t.Errorf("Peek = %+v, %v", u, err)
				}
				if err := resetAt(f.sides[1].Engine, "test", "c", "ann"); err != nil {
					t.Error(err)
				}
				<-time.After(time.Second) // what the other engine remembers
				for _, flow := range append(f.admitsNow(t, "ann", 4), flows...) {
					end(flow)
				}
				f.down(true)
				if _, err := peekAt(f.sides[1].Engine, "test", "c", "ann"); !errors.Is(err, shared.ErrDown) {
					t.Errorf("Peek without the store: %v", err)
				}
				if err := resetAt(f.sides[1].Engine, "test", "c", "ann"); !errors.Is(err, shared.ErrDown) {
					t.Errorf("Reset without the store: %v", err)
				}
			})
		})
	}
}

// What comes for a flow that has gone goes back although the store does not answer, and the engine does not ask for it over and over.
func TestSharedSchedulersGiveBackInAnOutage(t *testing.T) {
	for _, kind := range sides.Engines {
		t.Run(string(kind), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t, 1, kind, sharedSchedulers()["concurrency scheduler"])
				store := f.stores[0]
				store.Behave(sharedtest.Behavior{Late: 20 * time.Millisecond})
				defer time.AfterFunc(15*time.Millisecond, func() { // the answer has been made, and is on its way
					store.Behave(sharedtest.Behavior{Late: time.Millisecond, Lost: context.DeadlineExceeded})
				}).Stop()
				if flow := f.enter(t.Context(), 0, "ann", 10*time.Millisecond); flow.Decision() != flowctl.Rejected {
					t.Errorf("%v want it rejected, because the answer comes later", flow)
				}
				<-time.After(time.Second)
				if got := store.Counted().Draw; got > 2 {
					t.Errorf("the engine asked %d times want no more than twice", got)
				}
				closed := make(chan error, 1)
				go func() { closed <- f.sides[0].Engine.Close() }()
				select {
				case err := <-closed:
					if err != nil {
						t.Error(err)
					}
				case <-time.After(time.Minute):
					t.Error("Close has not returned after a minute of the outage")
				}
				store.Behave(sharedtest.Behavior{})
				synctest.Wait()
				other := &fleet{server: f.server}
				other.add(t, sides.Embedded, sharedSchedulers()["concurrency scheduler"])
				other.admitsNow(t, "ann", 4)
			})
		})
	}
}

// Flows that do not wait are decided about at once by what the store says, however many there are, and whatever waits before them.
func TestSharedSchedulersDecideAtOnce(t *testing.T) {
	const flows = 3*mostListed + 5
	for name, c := range sharedSchedulers() {
		for _, tt := range []struct {
			name      string
			waiting   int // flows that wait before they come
			workloads int
			behavior  sharedtest.Behavior
			want      int // that are admitted
			local     int // that are decided about without the store
		}{
			{"all at once", 0, 1, sharedtest.Behavior{Late: time.Millisecond}, 4, 0},
			{"of many workloads", 0, flows, sharedtest.Behavior{Late: time.Millisecond}, 4, 0},
			{"behind flows that wait", 2 * mostListed, 1, sharedtest.Behavior{Late: time.Millisecond}, 0, 0},
			{"behind workloads that wait", 3 * mostListed, 3 * mostListed, sharedtest.Behavior{Late: time.Millisecond}, 0, 0},
			{"in an outage", 0, 1, sharedtest.Behavior{Late: time.Millisecond, Lost: context.DeadlineExceeded}, 4, flows},
			{"of many workloads in an outage", 0, flows, sharedtest.Behavior{Late: time.Millisecond, Lost: context.DeadlineExceeded}, 4, flows},
		} {
			for _, kind := range sides.Engines {
				t.Run(name+"/"+tt.name+"/"+string(kind), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						switch s := c.(type) {
						case policy.QuotaScheduler:
							s.Scheduler.WorkloadLabel = "class"
							c = s
						case policy.ConcurrencyScheduler:
							s.Scheduler.WorkloadLabel = "class"
							c = s
						}
						f := newFleet(t, 1, kind, c)
						params := func(i int, most time.Duration) flowctl.Params {
							return flowctl.Params{Labels: map[string]string{"user": "ann", "class": strconv.Itoa(i % tt.workloads)}, MaxWait: most}
						}
						ctx, cancel := context.WithCancel(t.Context())
						var wg sync.WaitGroup
						defer wg.Wait()
						defer cancel()
						if tt.waiting > 0 {
							f.admitsNow(t, "ann", 4)
						}
						for i := range tt.waiting {
							wg.Go(func() { f.sides[0].Client.Start(ctx, "point", params(i, 2*time.Hour)) })
						}
						<-time.After(time.Second)
						before := f.sides[0].Engine.Stats().Components[0]
						f.stores[0].Behave(tt.behavior)
						var admitted atomic.Int64
						var own sync.WaitGroup
						for i := range flows {
							own.Go(func() {
								began := time.Now()
								flow := f.sides[0].Client.Start(t.Context(), "point", params(i, flowctl.NoWait))
								if flow.Decision() == flowctl.Accepted {
									admitted.Add(1)
								}
								if took := time.Since(began); took > 10*time.Millisecond {
									t.Errorf("%v after %v want it at once", flow, took)
								}
							})
						}
						own.Wait()
						after := f.sides[0].Engine.Stats().Components[0]
						if got := int(admitted.Load()); got != tt.want {
							t.Errorf("%d flows were admitted want %d", got, tt.want)
						}
						if got := int(after.LocalDecisions - before.LocalDecisions); got != tt.local {
							t.Errorf("%d flows were decided about without the store want %d", got, tt.local)
						}
					})
				})
			}
		}
	}
}

// mostListed is how many flows of a workload a question to the store lists.
const mostListed = 32

// A generous store grants more than it was asked for: what it had put aside for flows that have gone.
type generous struct{ *sharedtest.Store }

func (g generous) Draw(ctx context.Context, d *shared.Drawing) (shared.Drawn, error) {
	drawn, err := g.Store.Draw(ctx, d)
	for i := range drawn.Grants {
		one := &drawn.Grants[i]
		for range 3 {
			one.Tokens = append(one.Tokens, 1)
			if d.Rule.Kind == shared.Slots {
				one.Slots = append(one.Slots, 1)
			}
		}
	}
	return drawn, err
}

// What comes beyond the flows that wait goes back.
func TestSharedSchedulersGrantedMore(t *testing.T) {
	for name, c := range sharedSchedulers() {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := generous{sharedtest.New().Instance()}
				_, client := reloadable(t, []policy.Component{c}, engine.WithStore(store))
				flow := client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": "ann"}})
				if flow.Decision() != flowctl.Accepted {
					t.Errorf("%v want it accepted", flow)
				}
				end(flow)
				synctest.Wait()
				if got := store.Counted().Draw; got != 2 {
					t.Errorf("%d drawings want 2: one for the flow, and one that gives back", got)
				}
			})
		})
	}
}
