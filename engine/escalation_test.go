package engine_test

import (
	"math"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// A multiplier is the load multiplier of a load scheduler, for tests to set.
type multiplier struct{ bits atomic.Uint64 }

func (s *multiplier) set(to float64)    { s.bits.Store(math.Float64bits(to)) }
func (s *multiplier) signal() float64   { return math.Float64frombits(s.bits.Load()) }
func (s *multiplier) of() engine.Option { return engine.WithSignal("share", s.signal) }

// protect is the load scheduler, which limits no flow at the limiters' control point.
func protect() policy.LoadScheduler {
	return policy.LoadScheduler{ID: "protect", Selectors: policy.At("elsewhere"), LoadMultiplier: policy.Named("share")}
}

// press has flows come to load schedulers at the control points until the test ends. It returns after 40 s, when the schedulers know
// how many come, and have been steered a moment ago.
func press(t *testing.T, c *flowctl.Client, points ...string) {
	t.Helper()
	ctx := t.Context()
	go func() {
		for ctx.Err() == nil {
			for _, point := range points {
				end(c.Start(ctx, point, flowctl.Params{MaxWait: flowctl.NoWait}))
			}
			select {
			case <-time.After(500 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	}()
	<-time.After(40 * time.Second)
	synctest.Wait()
}

// pressed is press for a side, by a client in the process.
func pressed(t *testing.T, side *sides.Side) {
	t.Helper()
	c, err := flowctl.New(side.Engine)
	if err != nil {
		t.Fatal(err)
	}
	press(t, c, "elsewhere")
}

func escalation() policy.Escalation {
	return policy.Escalation{Load: "protect", Below: 1, For: 30 * time.Second}
}

// The share is looked at every ten seconds. Other numbers come into force when it has been below 1 for half a minute, and go
// with the first look at which it is not.
func TestEscalation(t *testing.T) {
	type event struct {
		at     time.Duration
		share  float64 // to set; 0 to start a flow
		accept bool
	}
	flow := func(at float64, accept bool) event {
		return event{time.Duration(at * float64(time.Second)), 0, accept}
	}
	set := func(at, share float64) event { return event{time.Duration(at * float64(time.Second)), share, false} }
	for _, tt := range []struct {
		name   string
		when   policy.Escalation
		events []event
	}{
		{"below for half a minute", escalation(), []event{set(5, 0.5), flow(39.5, true), flow(40.5, false), flow(49.5, false)}},
		{"and not any more", escalation(), []event{set(5, 0.5), flow(40.5, false), set(45, 1), flow(49.5, false), flow(51.5, true)}},
		{"with a break", escalation(), []event{set(5, 0.5), set(25, 1), set(35, 0.5), flow(50, true), flow(69.5, true), flow(70.5, false)}},
		{"not known", escalation(), []event{set(5, math.NaN()), flow(50, true)}},
		{"not known any more", escalation(), []event{set(5, 0.5), flow(40.5, false), set(45, math.NaN()), flow(51.5, true)}},
		{"not below", escalation(), []event{set(5, 1), flow(50, true)}},
		{"at once", policy.Escalation{Load: "protect", Below: 0.3}, []event{set(5, 0.3), flow(15, true), set(16, 0.2), flow(19.5, true), flow(20.5, false)}},
		{"to less", policy.Escalation{Load: "protect", Below: 1, Capacity: 1, Fill: 0}, []event{set(5, 0.5), flow(10.5, true), flow(19, false)}},
	} {
		for _, kind := range sides.Engines {
			t.Run(tt.name+"/"+string(kind), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					share := new(multiplier)
					share.set(1)
					limit := policy.RateLimiter{Selectors: policy.At("point"), Capacity: 5, Fill: 1, Interval: time.Second, When: tt.when}
					side := sides.Setup{
						Policies: sides.Policies(limit, protect()), EngineOptions: []engine.Option{share.of()},
					}.New(t, kind)
					pressed(t, side)
					start := time.Now()
					for _, event := range tt.events {
						<-time.After(time.Until(start.Add(event.at)))
						if event.share != 0 {
							share.set(event.share)
							continue
						}
						f := side.Client.Start(t.Context(), "point", flowctl.Params{})
						if got := f.Decision() == flowctl.Accepted; got != event.accept {
							t.Errorf("at %v: accepted = %t", event.at, got)
						}
						end(f)
					}
				})
			})
		}
	}
}

// A flow that waits for a token gets none while there are none, and its own when they come again. One that comes meanwhile
// does not wait for what may never be.
func TestEscalationOfQueues(t *testing.T) {
	for _, by := range []string{"", "user"} {
		synctest.Test(t, func(t *testing.T) {
			share := new(multiplier)
			share.set(1)
			limit := policy.QuotaScheduler{
				ID: "limit", Selectors: policy.At("point"), Capacity: 1, Fill: 1, Interval: 20 * time.Second, LimitBy: by,
				When: policy.Escalation{Load: "protect", Below: 1},
			}
			_, c := reloadable(t, []policy.Component{limit, protect()}, share.of())
			press(t, c, "elsewhere")
			share.set(0.5)
			start := time.Now()
			at := func(s float64) { <-time.After(time.Until(start.Add(time.Duration(s * float64(time.Second))))) }
			ask := func(wait time.Duration) *flowctl.Flow {
				return c.Start(t.Context(), "point", flowctl.Params{MaxWait: wait, Labels: map[string]string{"user": "ann"}})
			}
			end(ask(flowctl.NoWait))
			waited := make(chan time.Duration)
			go func() {
				f := ask(time.Minute)
				defer end(f)
				if f.Decision() != flowctl.Accepted {
					t.Errorf("%v, want it accepted in the end", f)
				}
				waited <- time.Since(start)
			}()
			at(15) // half of its token has come, and was lost at 10 s
			if f := ask(time.Minute); f.Decision() != flowctl.Rejected || time.Since(start) != 15*time.Second {
				t.Errorf("after %v: %v, want it rejected at once", time.Since(start), f)
			}
			share.set(1)
			if got := <-waited; got != 40*time.Second {
				t.Errorf("waited %v, want it to begin anew at 20 s", got)
			}
		})
	}
}

// A limiter that stays the same looks at the load scheduler that there is now.
func TestEscalationAfterApply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		share := new(multiplier)
		share.set(1)
		limit := policy.RateLimiter{ID: "limit", Selectors: policy.At("point"), Capacity: 5, Fill: 5, Interval: time.Second, When: escalation()}
		e, c := reloadable(t, []policy.Component{limit, protect()}, share.of())
		press(t, c, "elsewhere", "somewhere")
		share.set(0.5)
		accepted := func() bool {
			f := c.Start(t.Context(), "point", flowctl.Params{})
			defer end(f)
			return f.Decision() == flowctl.Accepted
		}
		<-time.After(25*time.Second + time.Second/2)
		replaced := protect()
		replaced.Selectors = policy.At("somewhere")
		apply(t, e, limit, replaced) // which accepts every flow until 57 s
		<-time.After(55 * time.Second)
		if !accepted() {
			t.Error("the other numbers are in force, although there was a break")
		}
		<-time.After(15 * time.Second)
		if accepted() {
			t.Error("the other numbers are not in force")
		}
		peek(t, e, "limit", engine.Usage{})
	})
}

// A value with an override has the lesser of its own numbers and the escalation's: one that is refused stays so.
func TestEscalationOfOverrides(t *testing.T) {
	overrides := map[string]policy.Override{
		"acme": {Capacity: 10, Fill: 10}, "small": {Capacity: 1}, "banned": {Capacity: math.SmallestNonzeroFloat64}, "slow": {Interval: time.Hour},
	}
	host := func(_, value string) (policy.Override, bool) { return policy.Override{Capacity: 1}, value == "asked" }
	when := policy.Escalation{Load: "protect", Below: 1, Capacity: 2, Fill: 2}
	for name, limit := range map[string]policy.Component{
		"limiter": policy.RateLimiter{Selectors: policy.At("point"), Capacity: 5, Fill: 5, Interval: time.Second, LimitBy: "user_id", Overrides: overrides, When: when},
		"scheduler": policy.QuotaScheduler{
			Selectors: policy.At("point"), Capacity: 5, Fill: 5, Interval: time.Second, LimitBy: "user_id", Overrides: overrides, When: when,
			Scheduler: policy.Scheduler{Default: policy.WorkloadParameters{QueueTimeout: policy.NoQueue}},
		},
	} {
		for _, kind := range sides.Engines {
			t.Run(name+"/"+string(kind), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					share := new(multiplier)
					share.set(1)
					side := sides.Setup{
						Policies: sides.Policies(limit, protect()), EngineOptions: []engine.Option{share.of(), engine.WithOverrides(host)},
					}.New(t, kind)
					pressed(t, side)
					start := time.Now()
					for _, tt := range []struct {
						at    time.Duration
						share float64
						want  map[string]int
					}{
						{5 * time.Second, 0.5, map[string]int{"ann": 5, "acme": 10, "small": 1, "banned": 0, "slow": 5, "asked": 1}},
						{15 * time.Second, 1, map[string]int{"ann": 2, "acme": 2, "small": 1, "banned": 0, "slow": 0, "asked": 1}},
						{25 * time.Second, 1, map[string]int{"ann": 5, "acme": 10, "small": 1, "banned": 0, "slow": 0, "asked": 1}},
					} {
						<-time.After(time.Until(start.Add(tt.at)))
						for who, want := range tt.want {
							if got := (kindWithOverrides{}).admitted(t, side.Client, who); got != want {
								t.Errorf("at %v: %s: %d flows were admitted want %d", tt.at, who, got, want)
							}
						}
						share.set(tt.share)
					}
				})
			})
		}
	}
}

// Other numbers that are in force stay in force when Apply changes a limiter, and the bucket gets no tokens by it that the limiter's own
// numbers would not have brought. The escalation ends at 50 s.
func TestEscalationAcrossApply(t *testing.T) {
	limit := func(change func(*policy.RateLimiter)) policy.RateLimiter {
		l := policy.RateLimiter{ID: "limit", Selectors: policy.At("point"), Capacity: 10, Fill: 1, Interval: time.Second, When: escalation()}
		change(&l)
		return l
	}
	for _, tt := range []struct {
		name      string
		change    func(*policy.RateLimiter)
		is, later engine.Usage // at once, and 5 s after the escalation
	}{
		{"a dry run", func(l *policy.RateLimiter) { l.DryRun = true }, engine.Usage{}, engine.Usage{Capacity: 10, Remaining: 5}},
		{"more", func(l *policy.RateLimiter) { l.Capacity = 20 }, engine.Usage{}, engine.Usage{Capacity: 20, Remaining: 5}},
		{"other numbers", func(l *policy.RateLimiter) { l.When.Capacity, l.When.Fill = 2, 1 }, engine.Usage{Capacity: 2, Remaining: 2}, engine.Usage{Capacity: 10, Remaining: 7}},
		{"another bound", func(l *policy.RateLimiter) { l.When.Below = 0.9 }, engine.Usage{}, engine.Usage{Capacity: 10, Remaining: 5}},
		{"buckets that fill in steps", func(l *policy.RateLimiter) { l.StepFill = true }, engine.Usage{}, engine.Usage{Capacity: 10, Remaining: 5}},
		{"no escalation", func(l *policy.RateLimiter) { l.When = policy.Escalation{} }, engine.Usage{Capacity: 10}, engine.Usage{Capacity: 10, Remaining: 9.5}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				share := new(multiplier)
				share.set(1)
				e, c := reloadable(t, []policy.Component{limit(func(*policy.RateLimiter) {}), protect()}, share.of())
				press(t, c, "elsewhere")
				share.set(0.5)
				start := time.Now()
				at := func(s float64) { <-time.After(time.Until(start.Add(time.Duration(s * float64(time.Second))))) }
				at(45.5)
				peek(t, e, "limit", engine.Usage{})
				apply(t, e, limit(tt.change), protect())
				peek(t, e, "limit", tt.is)
				share.set(1)
				at(55)
				peek(t, e, "limit", tt.later)
			})
		})
	}
}

// A flow that waits keeps its place when Apply changes a scheduler whose other numbers are in force, unless it never gets its tokens by
// the scheduler's own ones.
func TestEscalationOfQueuesAcrossApply(t *testing.T) {
	for _, tt := range []struct {
		name     string
		capacity float64
		override map[string]policy.Override
		want     flowctl.Decision
		after    time.Duration
	}{
		{"sooner", 1, nil, flowctl.Accepted, 30 * time.Second},
		{"sooner by an override", 0, map[string]policy.Override{"ann": {Capacity: 1}}, flowctl.Accepted, 30 * time.Second},
		{"never", 0, nil, flowctl.Rejected, 15 * time.Second},
		{"never by an override", 1, map[string]policy.Override{"ann": {Fill: math.SmallestNonzeroFloat64}}, flowctl.Rejected, 15 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				share := new(multiplier)
				share.set(1)
				limit := policy.QuotaScheduler{
					ID: "limit", Selectors: policy.At("point"), Capacity: 1, Fill: 1, Interval: 20 * time.Second, LimitBy: "user",
					When: policy.Escalation{Load: "protect", Below: 1},
				}
				e, c := reloadable(t, []policy.Component{limit, protect()}, share.of())
				press(t, c, "elsewhere")
				share.set(0.5)
				start := time.Now()
				ask := func() *flowctl.Flow {
					return c.Start(t.Context(), "point", flowctl.Params{MaxWait: time.Minute, Labels: map[string]string{"user": "ann"}})
				}
				end(ask())
				done := make(chan struct{})
				go func() {
					defer close(done)
					f := ask()
					defer end(f)
					if after := time.Since(start); f.Decision() != tt.want || after != tt.after {
						t.Errorf("after %v: %v want %v after %v", after, f, tt.want, tt.after)
					}
				}()
				<-time.After(15 * time.Second)
				limit.Capacity, limit.Interval, limit.Overrides = tt.capacity, 10*time.Second, tt.override
				apply(t, e, limit, protect())
				share.set(1) // which is looked at at 20 s
				<-done
			})
		})
	}
}

// Other numbers are in force only while the load scheduler keeps flows out: not while it learns how many come, nor after a silence, nor
// in a dry run of its own. Flows of a client in dry run count for it as any.
func TestEscalationWhileEveryFlowIsAccepted(t *testing.T) {
	shares := func(dry bool) policy.Component {
		s := protect()
		s.LoadMultiplier, s.DryRun = policy.Constant(0.5), dry
		return s
	}
	aimd := func(dry bool) policy.Component {
		return policy.AIMDLoadScheduler{
			ID: "protect", Selectors: policy.At("elsewhere"), Signal: policy.Constant(4), Setpoint: policy.Constant(1), DryRun: dry,
		}
	}
	for _, tt := range []struct {
		name      string
		component func(dry bool) policy.Component
		dry       bool // the component
		opts      []flowctl.Option
		until     int    // flows come, in seconds
		tokens    string // that each is
		in        map[int]bool
	}{
		{"no flows", shares, false, nil, 0, "1", map[int]bool{15: false, 45: false, 90: false}},
		{"no flows, AIMD", aimd, false, nil, 0, "1", map[int]bool{15: false, 45: false, 90: false}},
		{"flows that are no load", shares, false, nil, 100, "0", map[int]bool{15: false, 45: false, 90: false}},
		{"flows", shares, false, nil, 100, "1", map[int]bool{15: false, 29: false, 45: true, 90: true}},
		{"flows, AIMD", aimd, false, nil, 100, "1", map[int]bool{15: false, 29: false, 45: true, 90: true}},
		{"a silence", shares, false, nil, 45, "1", map[int]bool{29: false, 44: true, 78: false, 90: false}},
		{"a silence, AIMD", aimd, false, nil, 45, "1", map[int]bool{29: false, 44: true, 78: false, 90: false}},
		{"a dry run", shares, true, nil, 100, "1", map[int]bool{15: false, 45: false, 90: false}},
		{"a dry run, AIMD", aimd, true, nil, 100, "1", map[int]bool{15: false, 45: false, 90: false}},
		{"a dry run of the client", shares, false, []flowctl.Option{flowctl.WithDryRun()}, 100, "1", map[int]bool{15: false, 45: true, 90: true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			protect := tt.component(tt.dry)
			switch p := protect.(type) {
			case policy.LoadScheduler:
				p.Scheduler.TokensLabel = "tokens"
				protect = p
			case policy.AIMDLoadScheduler:
				p.Scheduler.TokensLabel = "tokens"
				protect = p
			}
			limit := policy.RateLimiter{
				Selectors: policy.At("point"), Capacity: 1000, Fill: 1000, Interval: time.Second, When: policy.Escalation{Load: "protect", Below: 1},
			}
			sides.Setup{Policies: sides.Policies(limit, protect)}.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) {
				c, err := flowctl.New(side.Engine, tt.opts...)
				if err != nil {
					t.Fatal(err)
				}
				for second := range 100 {
					if want, ok := tt.in[second]; ok {
						f := side.Client.Start(t.Context(), "point", flowctl.Params{})
						if got := f.Decision() == flowctl.Rejected; got != want {
							t.Errorf("after %d s the other numbers are in force: %v want %v", second, got, want)
						}
						end(f)
					}
					for range 3 {
						if second < tt.until {
							end(c.Start(t.Context(), "elsewhere", flowctl.Params{
								MaxWait: flowctl.NoWait, Labels: map[string]string{"tokens": tt.tokens},
							}))
						}
					}
					<-time.After(time.Second)
				}
			})
		})
	}
}
