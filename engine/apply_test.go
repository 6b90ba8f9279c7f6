package engine_test

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/internal/wire"
	"github.com/headgate-go/headgate/policy"
)

// reloadable is an engine and its client.
func reloadable(t testing.TB, components []policy.Component, opts ...engine.Option) (*engine.Engine, *flowctl.Client) {
	t.Helper()
	var policies []policy.Policy
	if len(components) > 0 {
		policies = []policy.Policy{{Name: "test", Components: components}}
	}
	e, err := engine.New(policies, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	c, err := flowctl.New(e)
	if err != nil {
		t.Fatal(err)
	}
	return e, c
}

// apply puts the components into force, as the one policy.
func apply(t testing.TB, e *engine.Engine, components ...policy.Component) {
	t.Helper()
	var policies []policy.Policy
	if len(components) > 0 {
		policies = []policy.Policy{{Name: "test", Components: components}}
	}
	if err := e.Apply(policies); err != nil {
		t.Fatal(err)
	}
}

func peek(t testing.TB, e *engine.Engine, component string, want engine.Usage) {
	t.Helper()
	if got, err := peekAt(e, "test", component, ""); err != nil || got != want {
		t.Errorf("%s: Peek = %+v, %v want %+v", component, got, err, want)
	}
}

// A component that stays the same keeps its state, whatever changes beside it, and so does one whose numbers change.
func TestApplyKeeps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ramp := policy.LoadRamp{
			ID: "ramp", Selectors: policy.At("elsewhere"),
			Steps: []policy.RampStep{{Target: 10}, {Target: 90, Duration: time.Minute}}, Start: true,
		}
		rate := limiter(func(l *policy.RateLimiter) { l.ID, l.Capacity, l.Fill = "rate", 10, 0 })[0]
		held := slots(func(l *policy.ConcurrencyLimiter) { l.ID, l.Max = "held", 10 })[0]
		changed := func(capacity float64) policy.Component {
			return limiter(func(l *policy.RateLimiter) { l.ID, l.Capacity, l.Fill = "changed", capacity, 0 })[0]
		}
		e, c := reloadable(t, []policy.Component{rate, held, changed(5), ramp})
		flow := start(t, c, flowctl.Params{})
		<-time.After(30 * time.Second)

		apply(t, e, changed(7), ramp, held, rate)
		peek(t, e, "rate", engine.Usage{Capacity: 10, Remaining: 9})
		peek(t, e, "held", engine.Usage{Capacity: 10, Remaining: 9, InFlight: 1})
		peek(t, e, "changed", engine.Usage{Capacity: 7, Remaining: 6})
		if r, ok := rampOf(e, "test", "ramp"); !ok || r.Percentage() != 50 {
			t.Errorf("the ramp does not go on: %v", ok)
		}
		if got := end(flow); got != (flowctl.EndResponse{Held: 1, Returned: 1}) {
			t.Errorf("End = %+v want the slot given back", got)
		}
		peek(t, e, "held", engine.Usage{Capacity: 10, Remaining: 10})

		apply(t, e)
		if _, err := peekAt(e, "test", "rate", ""); err == nil {
			t.Error("a policy that is gone has a limiter")
		}
		for range 20 {
			if flow := start(t, c, flowctl.Params{}); !flow.ShouldRun() {
				t.Fatal(flow)
			}
		}
	})
}

// A flow gives its slot back where it took it, embedded and by the names over the wire, however often the component
// comes and goes.
func TestApplyInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limit := func(n float64) policy.Component {
			return slots(func(l *policy.ConcurrencyLimiter) { l.Max = n })[0]
		}
		e, c := reloadable(t, []policy.Component{limit(1)})
		embedded := start(t, c, flowctl.Params{})
		apply(t, e, limit(3))
		served, late := start(t, c, flowctl.Params{}), start(t, c, flowctl.Params{})
		apply(t, e, limit(1))
		peek(t, e, "concurrency_limiter.0", engine.Usage{Capacity: 1, Remaining: -2, InFlight: 3})
		apply(t, e, limit(3))
		peek(t, e, "concurrency_limiter.0", engine.Usage{Capacity: 3, InFlight: 3})

		if got := end(embedded); got.Returned != 1 {
			t.Errorf("End = %+v want the slot given back", got)
		}
		endSlot := func(flow *flowctl.Flow) agentapi.SlotEnd {
			d := flow.CheckResponse().GetLimiterDecisions()[0]
			info := d.GetConcurrencyLimiterInfo()
			return e.Agent().EndSlots(t.Context(), []agentapi.SlotName{
				{
					Policy: d.GetPolicyName(), Hash: d.GetPolicyHash(), Component: d.GetComponentId(), Label: info.GetLabel(),
					Slot: wire.ReadSlotID(info.GetRequestId()),
				},
			})[0]
		}
		if got := endSlot(served); got != (agentapi.SlotEnd{Known: true, Returned: true}) {
			t.Errorf("EndSlots = %+v want it returned", got)
		}
		peek(t, e, "concurrency_limiter.0", engine.Usage{Capacity: 3, Remaining: 2, InFlight: 1})
		if got := endSlot(served); got != (agentapi.SlotEnd{Known: true}) {
			t.Errorf("the second EndSlots = %+v want it known", got)
		}
		apply(t, e)
		<-time.After(2*time.Minute + time.Second) // a sweep after its time is over
		synctest.Wait()
		if got := endSlot(late); got != (agentapi.SlotEnd{}) {
			t.Errorf("EndSlots after MaxInflight = %+v want it unknown", got)
		}
	})
}

// A flow that waits in a queue that is retired is decided about anew. A queue whose numbers change goes on. The flows that never get
// their tokens by the new numbers are decided about anew.
func TestApplyWaiters(t *testing.T) {
	first := slots(func(l *policy.ConcurrencyLimiter) { l.ID, l.Max, l.MaxInflight = "first", 10, time.Hour })[0]
	full := quota(func(q *policy.QuotaScheduler) { q.ID, q.Capacity, q.Fill, q.Interval = "queue", 1, 1, time.Minute })
	for _, tt := range []struct {
		name    string
		next    []policy.Component
		run     int           // how many of the two that wait run
		at      time.Duration // when the last of them does, at the latest
		holding int           // slots of the first
	}{
		{"the same", []policy.Component{first, full}, 2, 2 * time.Minute, 3},
		{"another order", []policy.Component{full, first}, 2, 2 * time.Minute, 3},
		{"no queue", []policy.Component{first}, 2, 0, 3},
		{"none at all", nil, 2, 0, 0},
		{"a larger one", []policy.Component{first, quota(func(q *policy.QuotaScheduler) { q.ID, q.Capacity = "queue", 3 })}, 2, 0, 3},
		{"one with less time", []policy.Component{first, quota(func(q *policy.QuotaScheduler) {
			q.ID, q.Capacity, q.Fill, q.Interval = "queue", 1, 1, time.Hour
		})}, 0, 0, 1},
		{"one that fills at other times", []policy.Component{first, quota(func(q *policy.QuotaScheduler) {
			q.ID, q.Capacity, q.Fill, q.Interval, q.StepFill = "queue", 1, 1, time.Hour, true
		})}, 1, 0, 2},
		{"a dry one", []policy.Component{first, quota(func(q *policy.QuotaScheduler) { q.ID, q.Capacity, q.Fill, q.DryRun = "queue", 1, 0, true })}, 2, 0, 3},
		{"one that lets all pass", []policy.Component{first, quota(func(q *policy.QuotaScheduler) { q.ID, q.Capacity, q.PassThrough = "queue", 1, true })}, 2, 0, 3},
		{"one that refuses", []policy.Component{first, quota(func(q *policy.QuotaScheduler) { q.ID, q.Capacity = "queue", 0 })}, 0, 0, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, c := reloadable(t, []policy.Component{first, full})
				start(t, c, flowctl.Params{}) // has the only token
				begin := time.Now()
				var flows sync.WaitGroup
				var run atomic.Int64
				var last atomic.Int64
				for range 2 {
					flows.Go(func() {
						flow := start(t, c, flowctl.Params{CheckTimeout: 150 * time.Second})
						if flow.ShouldRun() {
							run.Add(1)
							last.Store(int64(time.Since(begin)))
						}
					})
				}
				synctest.Wait()
				<-time.After(time.Second)
				apply(t, e, tt.next...)
				flows.Wait()
				if run.Load() != int64(tt.run) {
					t.Errorf("%d flows ran want %d", run.Load(), tt.run)
				}
				if at := max(tt.at, time.Second); tt.run > 0 && (time.Duration(last.Load())-at).Abs() > time.Millisecond {
					t.Errorf("the last was admitted at %v want %v", time.Duration(last.Load()), at)
				}
				if len(tt.next) == 0 {
					return
				}
				if got, err := peekAt(e, "test", "first", ""); err != nil || got.InFlight != tt.holding {
					t.Errorf("Peek = %+v, %v want %d in flight", got, err, tt.holding)
				}
			})
		})
	}
}

func TestApplyErrors(t *testing.T) {
	e, c := reloadable(t, limiter(func(l *policy.RateLimiter) { l.Fill = 0 }))
	end(start(t, c, flowctl.Params{}))
	for _, tt := range []struct {
		name     string
		policies []policy.Policy
		want     string
	}{
		{"a bad policy beside a good one", []policy.Policy{
			{Name: "good", Components: slots(nil)},
			{Name: "bad", Components: limiter(func(l *policy.RateLimiter) { l.Interval = 0 })},
		}, `headgate: engine: policy "bad"`},
		{"a name twice", []policy.Policy{{Name: "p", Components: slots(nil)}, {Name: "p", Components: slots(nil)}}, "headgate: engine: policy \"p\": the name is taken"},
		{"a signal that nobody knows", []policy.Policy{{Name: "p", Components: []policy.Component{
			policy.LoadScheduler{Selectors: policy.At("point"), LoadMultiplier: policy.Named("cpu")},
		}}}, `headgate: engine: policy "p": components[0]: LoadMultiplier: no WithSignal("cpu", …)`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := e.Apply(tt.policies); err == nil || !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("Apply = %v want %s", err, tt.want)
			}
			peek(t, e, "rate_limiter.0", engine.Usage{Capacity: 2, Remaining: 1})
		})
	}
	_ = e.Close()
	if err := e.Apply(nil); err == nil || err.Error() != "headgate: engine: closed" {
		t.Errorf("Apply after Close = %v", err)
	}
}

// The controller reads the signals of what is in force, and measures for it.
func TestApplyControls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var reads atomic.Int64
		e, c := reloadable(t, nil, engine.WithSignal("share", func() float64 {
			reads.Add(1)
			return 0
		}))
		latency := policy.MeanLatency{Selectors: policy.At("point"), Over: time.Minute}
		closes := policy.LoadScheduler{
			Selectors: policy.At("point"), LoadMultiplier: policy.Named("share"), WorkloadLatencyTokens: true,
			Scheduler: policy.Scheduler{Default: policy.WorkloadParameters{QueueTimeout: policy.NoQueue}},
		}
		opens := policy.LoadScheduler{ID: "other", Selectors: policy.At("elsewhere"), LoadMultiplier: latency}
		for _, tt := range []struct {
			name       string
			components []policy.Component
			reads      int64 // in a minute
			measures   bool
			rejects    bool
		}{
			{"none", nil, 0, false, false},
			{"one", []policy.Component{closes}, 6, true, true},
			{"one more", []policy.Component{opens, policy.LoadScheduler{ID: "second", Selectors: policy.At("point"), LoadMultiplier: policy.Named("share")}}, 6, true, false},
			{"none again", nil, 0, false, false},
		} {
			apply(t, e, tt.components...)
			reads.Store(0)
			if got := e.Agent().Measures("point"); got != tt.measures {
				t.Errorf("%s: Measures = %v want %v", tt.name, got, tt.measures)
			}
			rejected := false
			for range 60 {
				flow := c.Start(t.Context(), "point", flowctl.Params{CheckTimeout: time.Millisecond})
				rejected = !flow.ShouldRun()
				end(flow)
				<-time.After(time.Second)
			}
			synctest.Wait()
			if got := reads.Load(); got != tt.reads {
				t.Errorf("%s: %d reads a minute want %d", tt.name, got, tt.reads)
			}
			if tt.rejects && !rejected {
				t.Errorf("%s: nothing is rejected", tt.name)
			}
		}
	})
}

// Flows come, wait and end, and usage is read, while policies come and go; in the end no flow holds anything.
func TestApplyConcurrently(t *testing.T) {
	kept := concurrency(func(c *policy.ConcurrencyScheduler) { c.ID, c.Max = "kept", 4 })
	e, c := reloadable(t, []policy.Component{kept})
	ctx, cancel := context.WithCancel(context.Background())
	var flows sync.WaitGroup
	var ran atomic.Int64
	for i := range 8 {
		flows.Go(func() {
			for ctx.Err() == nil {
				flow := start(t, c, user(fmt.Sprint(i)))
				if flow.ShouldRun() {
					ran.Add(1)
				}
				if got := end(flow); got.Held != got.Returned {
					t.Errorf("End = %+v want all given back", got)
				}
			}
		})
	}
	for ran.Load() == 0 {
		runtime.Gosched()
	}
	for i := range 300 {
		apply(t, e, kept,
			concurrency(func(c *policy.ConcurrencyScheduler) { c.ID, c.Max, c.LimitBy = "changed", float64(1+i%3), "user_id" }),
			quota(func(q *policy.QuotaScheduler) { q.ID, q.Capacity, q.Fill = "quota", float64(1+i), 10_000 }),
			slots(func(l *policy.ConcurrencyLimiter) { l.ID = fmt.Sprint("new", i); l.Max = 100 })[0])
	}
	cancel()
	flows.Wait()
	peek(t, e, "kept", engine.Usage{Capacity: 4, Remaining: 4})
	peek(t, e, "new299", engine.Usage{Capacity: 100, Remaining: 100})
}

// Of many limiters, Apply keeps each. The last one is checked.
func TestApplyManyLimiters(t *testing.T) {
	n := race.Pick(1000, 5000)
	all := func(limit float64) []policy.Policy {
		p := policy.Policy{Name: "many"}
		for i := range n {
			p.Components = append(p.Components, policy.ConcurrencyLimiter{
				Selectors: policy.At(fmt.Sprint("point-", i)), Max: limit, MaxInflight: time.Hour,
			})
		}
		return []policy.Policy{p}
	}
	e, err := engine.New(all(1))
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	client, err := flowctl.New(e)
	if err != nil {
		t.Fatal(err)
	}
	last := fmt.Sprint("point-", n-1)
	held := client.Start(t.Context(), last, flowctl.Params{})
	for _, tt := range []struct {
		limit float64
		want  flowctl.Decision
	}{
		{1, flowctl.Rejected}, // the same limiter, whose slot is taken
		{2, flowctl.Accepted}, // with a slot more
	} {
		if err := e.Apply(all(tt.limit)); err != nil {
			t.Fatal(err)
		}
		flow := client.Start(t.Context(), last, flowctl.Params{})
		if flow.Decision() != tt.want {
			t.Errorf("after Apply with a limit of %v: %v want %v", tt.limit, flow.Decision(), tt.want)
		}
		_, _ = flow.End(t.Context())
	}
	if r, err := held.End(t.Context()); err != nil || r.Returned != 1 {
		t.Errorf("the flow in flight ends with %+v, %v, want its slot returned", r, err)
	}
}
