package engine_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/internal/testing/sharedtest"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// limiters have 4 tokens or slots for each user, and get no others for an hour.
func limiters() map[string]policy.Component {
	return map[string]policy.Component{
		"rate limiter": policy.RateLimiter{
			ID: "c", Selectors: policy.At("point"), Capacity: 4, Fill: 4, Interval: time.Hour, StepFill: true, LimitBy: "user", TokensLabel: "cost",
		},
		"calendar quota": policy.CalendarQuota{
			ID: "c", Selectors: policy.At("point"), Amount: 4, Period: policy.PeriodHour, LimitBy: "user", TokensLabel: "cost",
		},
		"concurrency limiter": policy.ConcurrencyLimiter{
			ID: "c", Selectors: policy.At("point"), Max: 4, MaxInflight: time.Hour, LimitBy: "user",
		},
	}
}

// A fleet is engines that share a store.
type fleet struct {
	server *sharedtest.Server
	stores []*sharedtest.Store
	sides  []*sides.Side
}

// newFleet makes so many, of the kind.
func newFleet(t *testing.T, n int, kind sides.Kind, components ...policy.Component) *fleet {
	t.Helper()
	f := &fleet{server: sharedtest.New()}
	for range n {
		f.stores = append(f.stores, f.server.Instance())
	}
	for _, store := range f.stores {
		f.sides = append(f.sides, sideOf(t, store, kind, components...))
	}
	return f
}

// add adds an engine.
func (f *fleet) add(t *testing.T, kind sides.Kind, components ...policy.Component) {
	t.Helper()
	f.stores = append(f.stores, f.server.Instance())
	f.sides = append(f.sides, sideOf(t, f.stores[len(f.stores)-1], kind, components...))
}

func sideOf(t *testing.T, store *sharedtest.Store, kind sides.Kind, components ...policy.Component) *sides.Side {
	t.Helper()
	return sides.Setup{Policies: sides.Policies(components...), EngineOptions: []engine.Option{engine.WithStore(store)}}.New(t, kind)
}

// start starts a flow of the user at one of the engines.
func (f *fleet) start(t *testing.T, at int, user string) *flowctl.Flow {
	t.Helper()
	return f.sides[at].Client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": user}})
}

// overLimiters runs f over the kinds of limiters and of agents, in bubbles.
func overLimiters(t *testing.T, engines int, f func(t *testing.T, f *fleet, kind string)) {
	for name, c := range limiters() {
		for _, kind := range sides.Engines {
			t.Run(name+"/"+string(kind), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { f(t, newFleet(t, engines, kind, c), name) })
			})
		}
	}
}

// admits starts flows at the engines by turns until one is rejected, and checks how many were admitted. It returns those.
func (f *fleet) admits(t *testing.T, user string, want int) (flows []*flowctl.Flow) {
	t.Helper()
	for i := 0; i <= want; i++ {
		flow := f.start(t, i%len(f.sides), user)
		if got := flow.Decision() == flowctl.Accepted; got != (i < want) {
			t.Errorf("flow %d of %s: %v want it admitted: %v", i, user, flow, i < want)
		}
		if flow.ShouldRun() {
			flows = append(flows, flow)
		}
	}
	return flows
}

// A limit holds for all engines together, for each value of the label, and slots come back by whichever engine.
func TestSharedLimits(t *testing.T) {
	overLimiters(t, 3, func(t *testing.T, f *fleet, kind string) {
		flows := f.admits(t, "ann", 4)
		for _, flow := range f.admits(t, "bob", 4) {
			end(flow)
		}
		for _, flow := range flows {
			if r := end(flow); kind == "concurrency limiter" && r.Returned != 1 {
				t.Errorf("end returned %+v want a slot", r)
			}
		}
		want := 0
		if kind == "concurrency limiter" {
			want = 4
		}
		for _, flow := range f.admits(t, "ann", want) {
			end(flow)
		}
		if kind != "concurrency limiter" {
			<-time.After(time.Hour)
			f.admits(t, "ann", 4)
		}
	})
}

// What one component gave a flow that another one rejects is there for others.
func TestSharedLimitsTogether(t *testing.T) {
	for name, c := range limiters() {
		for _, kind := range sides.Engines {
			for _, other := range []policy.Component{
				policy.RateLimiter{ID: "none", Selectors: policy.At("point"), Interval: time.Hour},
				policy.RateLimiter{ID: "none", Selectors: policy.At("point"), Interval: time.Hour, Local: true},
				policy.QuotaScheduler{ID: "none", Selectors: policy.At("point"), Interval: time.Hour, Local: true},
			} {
				t.Run(name+"/"+string(kind), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						f := newFleet(t, 2, kind, c, other)
						for i := range 10 {
							if flow := f.start(t, i%2, "ann"); flow.Decision() != flowctl.Rejected {
								t.Errorf("%v want it rejected", flow)
							}
						}
						for _, side := range f.sides {
							if u, err := peekAt(side.Engine, "test", "c", "ann"); err != nil || u.Remaining != 4 || u.InFlight != 0 {
								t.Errorf("Peek = %+v, %v want all", u, err)
							}
						}
					})
				})
			}
		}
	}
}

// A flow asks once for all limiters, and not at all if one in memory rejects it.
func TestSharedLimitsAskOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all := limiters()
		rate := all["rate limiter"].(policy.RateLimiter)
		rate.ID = "rate"
		quota := all["calendar quota"].(policy.CalendarQuota)
		quota.ID = "quota"
		local := policy.RateLimiter{ID: "local", Local: true, Selectors: policy.At("point"), Capacity: 1, Interval: time.Hour}
		f := newFleet(t, 1, sides.Embedded, rate, quota, all["concurrency limiter"], local)
		end(f.start(t, 0, "ann"))
		if got := f.stores[0].Counted(); got != (sharedtest.Counted{Take: 1, Return: 1}) {
			t.Errorf("a flow of three limiters: %+v want one Take and one Return", got)
		}
		end(f.start(t, 0, "ann"))
		if got := f.stores[0].Counted(); got.Take != 1 {
			t.Errorf("a flow that a local limiter rejects: %+v want no Take", got)
		}
	})
}

func rejectedBy(flow *flowctl.Flow) *flowctl.RejectedError {
	r, _ := errors.AsType[*flowctl.RejectedError](flow.Err())
	return r
}

// What the store does not answer is decided as the policy says.
func TestStoreOutage(t *testing.T) {
	for _, tt := range []struct {
		name     string
		behavior sharedtest.Behavior
	}{
		{"down", sharedtest.Behavior{Err: shared.ErrDown}},
		{"wrong", sharedtest.Behavior{Err: errors.New("the store is not well")}},
		{"late", sharedtest.Behavior{Late: time.Minute}},
		{"lost", sharedtest.Behavior{Lost: context.DeadlineExceeded}},
	} {
		for name, c := range limiters() {
			for mode, want := range map[policy.Outage]int{"": 2, policy.OutageShare: 2, policy.OutageOpen: 9, policy.OutageClosed: 0} {
				for _, kind := range sides.Engines {
					t.Run(tt.name+"/"+name+"/"+string(mode)+"/"+string(kind), func(t *testing.T) {
						synctest.Test(t, func(t *testing.T) {
							f := newFleet(t, 2, kind, onOutage(c, mode))
							for _, s := range f.stores {
								s.Behave(tt.behavior)
							}
							f.outage(t, want, tt.name == "down", mode == policy.OutageClosed)
						})
					})
				}
			}
		}
	}
}

// outage has nine flows at each engine, while the store does not answer. So many are admitted.
func (f *fleet) outage(t *testing.T, want int, down, closed bool) {
	for at := range f.sides {
		for i := range 9 {
			flow := f.start(t, at, "ann")
			if got := flow.Decision() == flowctl.Accepted; got != (i < want) {
				t.Errorf("flow %d: %v want it admitted: %v", i, flow, i < want)
			}
			if r := rejectedBy(flow); closed && (r == nil || r.Cause() != flowctl.CauseNoStore || r.HTTPStatus != 503) {
				t.Errorf("%v want it rejected with no store, 503", flow.Err())
			}
		}
		s := f.sides[at].Engine.Stats()
		if s.Store.Unanswered != 9 || s.Components[0].LocalDecisions != 9 || s.Store.Down != down {
			t.Errorf("stats = %+v, %+v want nine decisions without the store", s.Store, s.Components[0])
		}
	}
}

func onOutage(c policy.Component, mode policy.Outage) policy.Component {
	switch c := c.(type) {
	case policy.RateLimiter:
		c.OnOutage = mode
		return c
	case policy.CalendarQuota:
		c.OnOutage = mode
		return c
	case policy.ConcurrencyLimiter:
		c.OnOutage = mode
		return c
	default:
		return c
	}
}
