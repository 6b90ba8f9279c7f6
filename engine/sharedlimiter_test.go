package engine_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/internal/testing/metertest"
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
		"leased limiter": policy.RateLimiter{
			ID: "c", Selectors: policy.At("point"), Capacity: 4, Fill: 4, Interval: time.Hour, LimitBy: "user", TokensLabel: "cost", Share: policy.ShareLeased,
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
						<-time.After(time.Second) // an engine may have kept a leased token for a moment
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
			if r := rejectedBy(flow); closed && (r == nil || r.Cause() != flowctl.CauseNoStore || r.HTTPStatus != 503 || r.RetryAfter() != time.Second) {
				t.Errorf("%v want it rejected with no store, 503, for a second", flow.Err())
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

// down has all engines of the fleet meet a store that does not answer, or that does again.
func (f *fleet) down(is bool) {
	for _, s := range f.stores {
		if s.Behave(sharedtest.Behavior{}); is {
			s.Behave(sharedtest.Behavior{Err: shared.ErrDown})
		}
	}
}

// admitted has flows of the user at the engine until one is rejected, and returns how many were admitted. They end at once.
func (f *fleet) admitted(t *testing.T, at int, user string) (n int) {
	t.Helper()
	for ; n < 100; n++ {
		flow := f.start(t, at, user)
		end(flow)
		if flow.Decision() != flowctl.Accepted {
			return n
		}
	}
	return n
}

// What was let in during an outage is taken when the store answers again, as far as it has not come back by itself.
func TestStoreOutageIsOwed(t *testing.T) {
	slow := limiters()["rate limiter"].(policy.RateLimiter)
	fast := slow
	fast.StepFill, fast.Interval = false, 4*time.Second
	for _, tt := range []struct {
		name     string
		c        policy.Component
		mode     policy.Outage
		inOutage int
		pause    time.Duration
		after    int // of both engines
	}{
		{"bucket", slow, policy.OutageShare, 2, time.Minute, 2},
		{"bucket that is open", slow, policy.OutageOpen, 3, time.Minute, 1},
		{"bucket that fills", fast, policy.OutageShare, 2, time.Minute, 4},
		{"bucket that fills a little", fast, policy.OutageShare, 2, 2 * time.Second, 3},
		{"quota", limiters()["calendar quota"], policy.OutageShare, 2, time.Minute, 2},
		{"quota of the next hour", limiters()["calendar quota"], policy.OutageShare, 2, time.Hour, 4},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t, 2, sides.Embedded, onOutage(tt.c, tt.mode))
				f.down(true)
				n := 0
				for n < 3 && f.start(t, 0, "ann").Decision() == flowctl.Accepted {
					n++
				}
				if n != tt.inOutage {
					t.Errorf("%d flows were admitted in the outage want %d", n, tt.inOutage)
				}
				f.down(false)
				<-time.After(tt.pause)
				got := 0
				if f.start(t, 0, "ann").Decision() == flowctl.Accepted { // it tells the store
					got = 1 + f.admitted(t, 1, "ann") + f.admitted(t, 0, "ann")
				}
				if got != tt.after {
					t.Errorf("%d flows were admitted afterwards want %d", got, tt.after)
				}
			})
		})
	}
}

// A limit of fewer tokens than there are engines lets flows in during an outage, at the rate of each part, and after as long as it takes
// to fill a token.
func TestStoreOutageOfSmallLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, 4, sides.Embedded, policy.RateLimiter{
			Selectors: policy.At("point"), Capacity: 1, Fill: 1, Interval: 10 * time.Second, LimitBy: "user",
		})
		f.down(true)
		for second := range 75 {
			flow := f.start(t, 0, "ann")
			if got := flow.Decision() == flowctl.Accepted; got != (second == 30 || second == 70) { // a quarter was there
				t.Errorf("after %d s: %v", second, flow)
			}
			end(flow)
			<-time.After(time.Second)
		}
	})
}

// What the store has said of a key counts in an outage: a key that has used its limit up does not begin anew.
func TestStoreOutageOfUsedKeys(t *testing.T) {
	for _, name := range []string{"rate limiter", "calendar quota"} {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t, 2, sides.Embedded, limiters()[name])
			if got := f.admitted(t, 0, "ann"); got != 4 {
				t.Errorf("%s: %d flows were admitted want 4", name, got)
			}
			f.down(true)
			<-time.After(time.Minute)
			if got := f.admitted(t, 0, "ann"); got != 0 {
				t.Errorf("%s: %d flows were admitted in the outage want none", name, got)
			}
		})
	}
}

// slotted have 4 slots for each user.
func slotted() map[string]policy.Component {
	return map[string]policy.Component{
		"concurrency limiter":   limiters()["concurrency limiter"],
		"concurrency scheduler": sharedSchedulers()["concurrency scheduler"],
	}
}

// Slots that an engine has granted in an outage come back to it, during the outage and afterwards, over the network too. So do those of
// values beyond the engine's cap.
func TestStoreOutageSlots(t *testing.T) {
	for name, c := range slotted() {
		for _, kind := range sides.Engines {
			for _, tt := range []struct {
				name          string
				beyond, after bool
			}{
				{"during the outage", false, false},
				{"after the outage", false, true},
				{"beyond the cap, during the outage", true, false},
				{"beyond the cap, after the outage", true, true},
			} {
				t.Run(name+"/"+string(kind)+"/"+tt.name, func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						f := &fleet{server: sharedtest.New()}
						f.stores = append(f.stores, f.server.Instance(), f.server.Instance())
						f.sides = append(f.sides, sides.Setup{
							Policies: sides.Policies(c), EngineOptions: []engine.Option{engine.WithStore(f.stores[0]), engine.WithKeyCap(1)},
						}.New(t, kind))
						f.down(true)
						if tt.beyond { // the key is in use
							f.enter(t.Context(), 0, "eve", flowctl.NoWait)
						}
						var flows []*flowctl.Flow
						for range 2 {
							flows = append(flows, f.enter(t.Context(), 0, "ann", flowctl.NoWait))
						}
						if flow := f.enter(t.Context(), 0, "ann", flowctl.NoWait); flow.Decision() != flowctl.Rejected {
							t.Errorf("%v want it rejected", flow)
						}
						f.down(!tt.after)
						for _, flow := range flows {
							if r := end(flow); r.Returned != 1 {
								t.Errorf("%v returned %+v want a slot", flow, r)
							}
						}
						f.down(true)
						if flow := f.enter(t.Context(), 0, "ann", flowctl.NoWait); flow.Decision() != flowctl.Accepted {
							t.Errorf("%v want the slots to be free", flow)
						}
						if got := f.stores[0].Counted().Return; got != 0 {
							t.Errorf("%d slots went to the store want none", got)
						}
					})
				})
			}
		}
	}
}

// A slot that had run out before it came back leaves as many free as there were.
func TestSharedSlotsThatRanOut(t *testing.T) {
	for name, c := range slotted() {
		for _, kind := range sides.Engines {
			t.Run(name+"/"+string(kind), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					switch s := c.(type) {
					case policy.ConcurrencyLimiter:
						s.LimitBy, s.MaxInflight = "", 10*time.Second
						c = s
					case policy.ConcurrencyScheduler:
						s.LimitBy, s.MaxInflight = "", 10*time.Second
						c = s
					}
					f := newFleet(t, 1, kind, c)
					late := f.enter(t.Context(), 0, "", flowctl.NoWait)
					<-time.After(11 * time.Second)
					f.admitsNow(t, "", 4)
					if r := end(late); r.Returned != 0 {
						t.Errorf("end returned %+v want nothing", r)
					}
					if s := f.sides[0].Engine.Stats().Components[0]; s.Usage.Remaining != 0 {
						t.Errorf("%v slots are free want none", s.Usage.Remaining)
					}
				})
			})
		}
	}
}

// An engine that knows that there are no tokens does not ask for them, for a second at the most, and not after a refund of its own.
func TestSharedLimitsRemember(t *testing.T) {
	for _, name := range []string{"rate limiter", "calendar quota"} {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t, 1, sides.Embedded, limiters()[name])
			flow := f.start(t, 0, "ann")
			f.admitted(t, 0, "ann")
			asked := f.stores[0].Counted().Take
			for range 10 {
				wait := time.Until(time.Date(2000, 1, 1, 1, 0, 0, 0, time.UTC))
				if r := rejectedBy(f.start(t, 0, "ann")); r == nil || r.RetryAfter() != wait {
					t.Errorf("%s: %v want it rejected for %v", name, r, wait)
				}
				<-time.After(50 * time.Millisecond)
			}
			if got := f.stores[0].Counted().Take; got != asked {
				t.Errorf("%s: %d more questions want none", name, got-asked)
			}
			<-time.After(time.Second)
			f.start(t, 0, "ann")
			if got := f.stores[0].Counted().Take; got != asked+1 {
				t.Errorf("%s: %d more questions after a second want one", name, got-asked)
			}
			flow.Settle("cost", 0)
			end(flow)
			if flow := f.start(t, 0, "ann"); flow.Decision() != flowctl.Accepted {
				t.Errorf("%s: %v want the refund of another flow to admit it", name, flow)
			}
		})
	}
}

// A dry run decides the same and takes the same, of a component or of a flow.
func TestSharedLimitsDryRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := limiters()["rate limiter"].(policy.RateLimiter)
		c.DryRun = true
		other := policy.RateLimiter{ID: "other", Selectors: policy.At("point"), Capacity: 5, Interval: time.Hour}
		f := newFleet(t, 2, sides.Embedded, c, other)
		for i := range 6 {
			flow := f.start(t, i%2, "ann")
			if got := flow.Decision() == flowctl.Accepted; got != (i < 5) {
				t.Errorf("flow %d: %v want it accepted: %v", i, flow, i < 5)
			}
		}
		if s := f.sides[0].Engine.Stats().Components[0]; s.DryRunDrops != 1 || s.Dropped != 0 {
			t.Errorf("stats = %+v want a dry drop", s)
		}
		f = newFleet(t, 1, sides.Embedded, limiters()["rate limiter"], other)
		dry, err := flowctl.New(f.sides[0].Engine, flowctl.WithDryRun())
		if err != nil {
			t.Fatal(err)
		}
		for range 8 {
			flow := dry.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": "ann"}})
			if !flow.ShouldRun() {
				t.Errorf("%v want it to run", flow)
			}
			end(flow)
		}
		for id, want := range map[string]string{"c": "ann", "other": ""} {
			if u, err := peekAt(f.sides[0].Engine, "test", id, want); err != nil || u.Remaining != 0 {
				t.Errorf("%s: Peek = %+v, %v want all taken", id, u, err)
			}
		}
	})
}

// A slot is that of the client's session over the network, and of the engine in the process. It is free when the session, or the lease of
// the engine, runs out.
func TestSharedSlotsHaveHolders(t *testing.T) {
	for _, kind := range sides.Engines {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t, 2, kind, limiters()["concurrency limiter"])
			<-time.After(time.Minute) // a session has begun
			flows := f.admits(t, "ann", 4)
			if got := f.stores[0].Asked()[0].Holder != (shared.Holder{}); got != (kind == sides.Served) {
				t.Errorf("%s: has a session: %v", kind, got)
			}
			<-time.After(30 * time.Second)
			if flow := f.start(t, 1, "ann"); flow.Decision() != flowctl.Rejected {
				t.Errorf("%s: %v want the slots to be held still", kind, flow)
			}
			f.stores[0].Behave(sharedtest.Behavior{Cut: true})
			<-time.After(15 * time.Second)
			for i := range 3 { // two slots are those of the other one
				if got := f.start(t, 1, "ann").Decision() == flowctl.Accepted; got != (i < 2) {
					t.Errorf("%s: flow %d: accepted %v", kind, i, got)
				}
			}
			for i, flow := range flows {
				if r := end(flow); (r.Returned == 1) != (i%2 == 1) {
					t.Errorf("%s: flow %d returned %+v", kind, i, r)
				}
			}
		})
	}
}

// Any agent behind a balancer takes a slot back, also one with another version of the policy.
func TestSharedSlotsEndAnywhere(t *testing.T) {
	c := limiters()["concurrency limiter"].(policy.ConcurrencyLimiter)
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
}

// Values that carry credentials have the same name at all engines, and the store does not learn of them.
func TestSharedLimitsHideCredentials(t *testing.T) {
	const label, secret = "http.request.header.authorization", "Bearer abc"
	c := limiters()["rate limiter"].(policy.RateLimiter)
	c.LimitBy = label
	f := newFleet(t, 2, sides.Embedded, c)
	for i := range 5 {
		flow := f.sides[i%2].Client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{label: secret}})
		if got := flow.Decision() == flowctl.Accepted; got != (i < 4) {
			t.Errorf("flow %d: %v", i, flow)
		}
	}
	for _, ask := range f.stores[0].Asked() {
		if ask.Key.Value == "" || strings.Contains(ask.Key.Value, "abc") {
			t.Errorf("the store has the key %q", ask.Key.Value)
		}
	}
}

// Two versions of a policy are noticed, and a version that all engines have come to is not.
func TestSharedNumbersThatDiffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		c := limiters()["rate limiter"].(policy.RateLimiter)
		f := newFleet(t, 1, sides.Embedded, c)
		store := f.server.Instance()
		e, err := engine.New(sides.Policies(c), engine.WithStore(store), engine.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		client, err := flowctl.New(e)
		if err != nil {
			t.Fatal(err)
		}
		both := func() uint64 {
			for range 3 {
				end(f.start(t, 0, "ann"))
				end(client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": "ann", "cost": "0"}}))
			}
			return e.Stats().Components[0].NumbersDiffer
		}
		c.Capacity = 50
		if n := both(); n != 0 {
			t.Errorf("%d answers differ want none", n)
		}
		apply(t, f.sides[0].Engine, c)
		if n := both(); n == 0 {
			t.Error("no answer differs while there are two versions")
		}
		apply(t, e, c)
		n := both()
		if m := both(); m != n {
			t.Errorf("%d answers differ while there is one version", m-n)
		}
		<-time.After(time.Minute)
		synctest.Wait()
		if !strings.Contains(log.String(), "two versions of a policy") {
			t.Errorf("log: %s", log.String())
		}
	})
}

// A look at the store uses no numbers, so the first question after it does not say that another engine has others.
func TestPeekUsesNoNumbers(t *testing.T) {
	limiter := limiters()["rate limiter"].(policy.RateLimiter)
	scheduler := policy.QuotaScheduler{ID: "c", Selectors: policy.At("point"), Capacity: 4, Fill: 4, Interval: time.Hour, LimitBy: "user"}
	larger, wider := limiter, scheduler
	larger.Capacity, wider.Capacity = 50, 50
	for _, tt := range []struct {
		name          string
		before, after policy.Component
	}{
		{"a limiter", limiter, larger},
		{"a scheduler", scheduler, wider},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t, 1, sides.Embedded, tt.before)
				e := f.sides[0].Engine
				end(f.start(t, 0, "ann"))
				apply(t, e, tt.after)
				c, err := e.Component("test", "c")
				if err != nil {
					t.Fatal(err)
				}
				if _, err := c.Peek(t.Context(), "ann"); err != nil {
					t.Fatal(err)
				}
				end(f.start(t, 0, "ann"))
				if n := e.Stats().Components[0].NumbersDiffer; n != 0 {
					t.Errorf("%d answers differ want none", n)
				}
			})
		})
	}
}

// A check is over when its time is, and a flow whose caller leaves is canceled.
func TestStoreIsBoundedByTheCheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, 2, sides.Embedded, limiters()["concurrency limiter"])
		f.stores[0].Behave(sharedtest.Behavior{Late: time.Minute})
		began := time.Now()
		flow := f.sides[0].Client.Start(t.Context(), "point", flowctl.Params{CheckTimeout: 10 * time.Millisecond, Labels: map[string]string{"user": "ann"}})
		if took := time.Since(began); flow.Decision() != flowctl.Accepted || took != 10*time.Millisecond {
			t.Errorf("%v after %v want it decided here, after the check's time", flow, took)
		}
		end(flow)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		flow = f.sides[0].Client.Start(ctx, "point", flowctl.Params{Labels: map[string]string{"user": "ann"}})
		if flow.Decision() == flowctl.Accepted || !errors.Is(flow.Err(), context.DeadlineExceeded) {
			t.Errorf("%v: %v want the caller's error", flow, flow.Err())
		}
		end(flow)
		if s := f.sides[0].Engine.Stats(); s.Store.Unanswered != 1 || s.ControlPoints[1].Canceled != 1 {
			t.Errorf("stats = %+v, %+v want one decision without the store, and one flow that left", s.Store, s.ControlPoints)
		}
	})
}

// When a slot is likely to be free is known by how long flows have held slots lately, not by when slots run out.
func TestSharedSlotsForecast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, 1, sides.Embedded, limiters()["concurrency limiter"])
		flows := f.admits(t, "ann", 4)
		if r := rejectedBy(f.start(t, 0, "ann")); r == nil || r.RetryAfter() != 0 {
			t.Errorf("%v want no time that is known", r)
		}
		<-time.After(2 * time.Second)
		end(flows[0])
		f.start(t, 0, "ann")
		if r := rejectedBy(f.start(t, 0, "ann")); r == nil || r.RetryAfter() != time.Second/2 { // one of four ends every half a second
			t.Errorf("%v want half a second", r)
		}
	})
}

// Values beyond the cap of an engine have limits of their own in the store.
func TestSharedLimitsBeyondTheCap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, client := reloadable(t, []policy.Component{limiters()["rate limiter"]}, engine.WithStore(sharedtest.New().Instance()), engine.WithKeyCap(1))
		for _, user := range []string{"ann", "bob", "eve"} {
			for i := range 6 {
				flow := client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": user}})
				if got := flow.Decision() == flowctl.Accepted; got != (i < 4) {
					t.Errorf("flow %d of %s: %v", i, user, flow)
				}
				end(flow)
			}
		}
		if s := e.Stats().Components[0]; s.Keys != 1 || s.Overflows != 0 {
			t.Errorf("stats = %+v want one key, and no overflow", s)
		}
	})
}

// Peek and Reset ask the store, and return its error. The stats tell what was learned last.
func TestSharedPeekAndReset(t *testing.T) {
	for name, c := range limiters() {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t, 2, sides.Embedded, c)
			flows := f.admits(t, "ann", 4)
			in := 0
			if name == "concurrency limiter" {
				in = 4
			}
			if u, err := peekAt(f.sides[1].Engine, "test", "c", "ann"); err != nil || u != (engine.Usage{Capacity: 4, InFlight: in}) {
				t.Errorf("%s: Peek = %+v, %v", name, u, err)
			}
			if err := resetAt(f.sides[1].Engine, "test", "c", "ann"); err != nil {
				t.Error(err)
			}
			<-time.After(time.Second) // what the other engine remembers
			for _, flow := range append(f.admits(t, "ann", 4), flows...) {
				end(flow)
			}
			f.down(true)
			if _, err := peekAt(f.sides[1].Engine, "test", "c", "ann"); !errors.Is(err, shared.ErrDown) {
				t.Errorf("%s: Peek without the store: %v", name, err)
			}
			if err := resetAt(f.sides[1].Engine, "test", "c", "ann"); !errors.Is(err, shared.ErrDown) {
				t.Errorf("%s: Reset without the store: %v", name, err)
			}
		})
	}
}

// The stats show what the store has after a settlement, as Peek does, although another engine has taken tokens that this one does not
// know of. The store forgives what is beyond MaxDebt.
func TestSharedStatsOfSettledFlows(t *testing.T) {
	at := policy.At("point")
	components := map[string]policy.Component{
		"rate limiter": policy.RateLimiter{
			Selectors: at, Capacity: 10, Fill: 10, Interval: time.Hour, StepFill: true, TokensLabel: "cost", MaxDebt: 3,
		},
		"leased limiter": policy.RateLimiter{
			Selectors: at, Capacity: 10, Fill: 1e-9, Interval: time.Hour, TokensLabel: "cost", MaxDebt: 3, Share: policy.ShareLeased,
		},
		"quota scheduler": policy.QuotaScheduler{
			Selectors: at, Capacity: 10, Fill: 10, Interval: time.Hour, StepFill: true, MaxDebt: 3,
			Scheduler: policy.Scheduler{TokensLabel: "cost", Default: policy.WorkloadParameters{QueueTimeout: policy.NoQueue}},
		},
		"calendar quota": policy.CalendarQuota{Selectors: at, Amount: 10, Period: policy.PeriodHour, TokensLabel: "cost", MaxDebt: 3},
	}
	for kind, c := range components {
		for _, tt := range []struct {
			name         string
			other        float64 // what a flow of another engine takes meanwhile
			cost, remain float64 // of a flow that takes 4
		}{
			{"a debt", 0, 12, -2},
			{"beyond the largest debt", 0, 100, -3},
			{"beyond it because of others", 6, 9, -3},
			{"a refund", 0, 1, 9},
		} {
			for _, peeks := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/%v", kind, tt.name, peeks), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						f := newFleet(t, 2, sides.Embedded, c)
						start := func(at int, cost float64) *flowctl.Flow {
							flow := f.sides[at].Client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"cost": fmt.Sprint(cost)}})
							if !flow.ShouldRun() {
								t.Fatal(flow.Err())
							}
							return flow
						}
						flow := start(0, 4)
						end(start(1, tt.other))
						flow.Settle("cost", tt.cost)
						end(flow)
						e := f.sides[0].Engine
						if peeks {
							if got := left(t, e, ""); got != tt.remain {
								t.Errorf("Peek shows %v left want %v", got, tt.remain)
							}
						}
						if _, s := first(t, e); s.Usage.Remaining != tt.remain {
							t.Errorf("the stats show %v left want %v", s.Usage.Remaining, tt.remain)
						}
					})
				})
			}
		}
	}
}

// Peek goes by the numbers that flows of a value go by, also if the engine has no room for it.
func TestSharedPeekBeyondTheCap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := limiters()["rate limiter"].(policy.RateLimiter)
		c.Overrides = map[string]policy.Override{"vip": {Capacity: 10, Fill: 10}}
		e, client := reloadable(t, []policy.Component{c}, engine.WithStore(sharedtest.New().Instance()), engine.WithKeyCap(1))
		for _, user := range []string{"ann", "bob", "vip"} {
			end(client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": user}}))
		}
		for user, capacity := range map[string]float64{"ann": 4, "bob": 4, "vip": 10, "eve": 4} {
			used := 1.0
			if user == "eve" {
				used = 0
			}
			if u, err := peekAt(e, "test", "c", user); err != nil || u != (engine.Usage{Capacity: capacity, Remaining: capacity - used}) {
				t.Errorf("Peek of %s = %+v, %v want %v of %v", user, u, err, capacity-used, capacity)
			}
		}
	})
}

// An outage is logged once a minute, and its end.
func TestStoreOutageIsLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		store := sharedtest.New().Instance()
		_, client := reloadable(t, []policy.Component{limiters()["rate limiter"]}, engine.WithStore(store),
			engine.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
		flow := func() {
			end(client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": "ann"}}))
		}
		store.Behave(sharedtest.Behavior{Err: shared.ErrDown})
		for range 90 {
			flow()
			<-time.After(time.Second)
		}
		store.Behave(sharedtest.Behavior{})
		flow()
		flow()
		if got := strings.Count(log.String(), "does not answer"); got != 2 {
			t.Errorf("%d warnings want 2: %s", got, log.String())
		}
		if got := strings.Count(log.String(), "answers again"); got != 1 || !strings.Contains(log.String(), "after=1m30s") {
			t.Errorf("%d lines of its end want 1, after 90 s: %s", got, log.String())
		}
		if strings.Contains(log.String(), "ann") {
			t.Errorf("the log has a label's value: %s", log.String())
		}
	})
}

// Apply changes the numbers of all keys, which keep what they have used. The engines need not change at once.
func TestSharedLimitsAcrossApply(t *testing.T) {
	for name, c := range limiters() {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t, 2, sides.Embedded, c)
			flows := f.admits(t, "ann", 4)
			more := c
			switch c := more.(type) {
			case policy.RateLimiter:
				c.Capacity = 6
				more = c
			case policy.CalendarQuota:
				c.Amount = 6
				more = c
			case policy.ConcurrencyLimiter:
				c.Max = 6
				more = c
			default:
				t.Fatalf("how does a %s get more? Add a case", name)
			}
			for _, side := range f.sides {
				apply(t, side.Engine, more)
			}
			flows = append(flows, f.admits(t, "ann", 2)...)
			for _, flow := range flows {
				if r := end(flow); name == "concurrency limiter" && r.Returned != 1 {
					t.Errorf("end returned %+v want a slot", r)
				}
			}
			if s := f.sides[0].Engine.Stats().Components[0]; s.Accepted != 3 || !s.Shared {
				t.Errorf("%s: stats = %+v want them to go on", name, s)
			}
		})
	}
}

// A store that is closed while flows are in flight is no outage. It is one for flows that still come.
func TestClosedStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		store := sharedtest.New().Instance()
		side := sides.Setup{
			Policies: sides.Policies(twoSlots(false)),
			EngineOptions: []engine.Option{
				engine.WithStore(store), engine.WithLogger(slog.New(slog.NewTextHandler(&log, nil))),
			},
		}.New(t, sides.Embedded)
		flow := side.Client.Start(t.Context(), "point", flowctl.Params{})
		store.Behave(sharedtest.Behavior{Err: shared.ErrClosed})
		end(flow)
		if s := side.Engine.Stats().Store; s.Failures != 0 || log.Len() != 0 {
			t.Errorf("%+v, %s want nothing of an outage", s, log.String())
		}
		end(side.Client.Start(t.Context(), "point", flowctl.Params{}))
		if s := side.Engine.Stats().Store; s.Failures != 0 || s.Unanswered != 1 || strings.Count(log.String(), "does not answer") != 1 {
			t.Errorf("%+v, %s want a flow that was decided without the store", s, log.String())
		}
	})
}

// The metrics say how the store is, and what was decided without it.
func TestStoreMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, p := newFleet(t, 2, sides.Embedded, limiters()["rate limiter"]), new(metertest.Provider)
		if err := f.sides[0].Engine.Instrument(p); err != nil {
			t.Fatal(err)
		}
		flow := f.start(t, 0, "ann")
		const own = 3
		f.stores[0].Behave(sharedtest.Behavior{Err: errors.New("the store is not well"), Failures: own})
		flow.Settle("cost", 2)
		end(flow) // in vain
		f.stores[0].Behave(sharedtest.Behavior{Err: shared.ErrDown, Failures: own})
		end(f.start(t, 0, "bob")) // which asks nobody
		got := make(map[string]float64)
		for name, n := range p.Read(t.Context()) {
			name, _, _ = strings.Cut(name, " ")
			if strings.HasPrefix(name, "store_") || strings.Contains(name, "local") || strings.Contains(name, "unreturned") || strings.Contains(name, "differ") {
				got[name] = n
			}
		}
		if diff := cmp.Diff(map[string]float64{
			"store_up": 0, "store_instances": 2, "store_failures_total": own + 1, "store_unanswered_flows_total": 1,
			"limiter_local_decisions_total": 1, "limiter_unreturned_total": 1, "limiter_numbers_differ_total": 0,
		}, got); diff != "" {
			t.Errorf("metrics (-want +got):\n%s", diff)
		}
		if s := f.sides[0].Engine.Stats().Components[0]; s.Unsettled != 1 || s.ForgivenTokens != 1 {
			t.Errorf("stats = %+v want a token that nobody was charged with", s)
		}
	})
}
