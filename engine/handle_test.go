package engine_test

import (
	"cmp"
	"math"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/allkinds"
	"github.com/headgate-go/headgate/policy"
)

// What four flows of ann's, which stay in flight, leave of two tokens or slots, and of new ones.
func TestPeekAndReset(t *testing.T) {
	var tested []policy.Component
	for _, tt := range []struct {
		name     string
		c        policy.Component
		id       string // other than rate_limiter.0
		options  []engine.Option
		value    string
		is       engine.Usage
		reset    engine.Usage
		returned int // slots, when the flows have ended in spite of it
	}{
		{
			name: "a rate limiter", value: "ann", is: engine.Usage{Capacity: 2}, reset: engine.Usage{Capacity: 2, Remaining: 2},
			c: limiter(func(l *policy.RateLimiter) { l.LimitBy = "user_id" })[0],
		},
		{
			name: "a value that nobody had", value: "bob", is: engine.Usage{Capacity: 2, Remaining: 2}, reset: engine.Usage{Capacity: 2, Remaining: 2},
			c: limiter(func(l *policy.RateLimiter) { l.LimitBy = "user_id" })[0],
		},
		{
			name: "a value that has no bucket of its own", value: "ann", is: engine.Usage{Capacity: 2}, reset: engine.Usage{Capacity: 2, Remaining: 2},
			c: limiter(func(l *policy.RateLimiter) { l.LimitBy = "user_id" })[0], options: []engine.Option{engine.WithKeyCap(1)},
		},
		{
			name: "no label", is: engine.Usage{Capacity: 2}, reset: engine.Usage{Capacity: 2, Remaining: 2},
			c: limiter(nil)[0],
		},
		{
			name: "a calendar quota", value: "ann", is: engine.Usage{Capacity: 2}, reset: engine.Usage{Capacity: 2, Remaining: 2},
			id: "calendar_quota.0", c: calendarQuota(func(q *policy.CalendarQuota) { q.LimitBy = "user_id" }),
		},
		{
			name: "a circuit breaker", value: "ann", is: engine.Usage{Capacity: 2, Remaining: 2, State: "closed"}, reset: engine.Usage{Capacity: 2, Remaining: 2, State: "closed"},
			id: "circuit_breaker.0", c: circuitBreaker(func(b *policy.CircuitBreaker) { b.LimitBy = "user_id" }),
		},
		{
			name: "a concurrency limiter", value: "ann", is: engine.Usage{Capacity: 2, InFlight: 2}, reset: engine.Usage{Capacity: 2, Remaining: 2},
			id: "concurrency_limiter.0", c: slots(func(l *policy.ConcurrencyLimiter) { l.Max, l.LimitBy = 2, "user_id" })[0],
		},
		{
			name: "a quota scheduler", value: "ann", is: engine.Usage{Capacity: 2, Waiting: 2}, reset: engine.Usage{Capacity: 2},
			id: "quota_scheduler.0", c: quota(func(q *policy.QuotaScheduler) { q.LimitBy = "user_id" }),
		},
		{
			name: "a concurrency scheduler", value: "ann", is: engine.Usage{Capacity: 2, InFlight: 2, Waiting: 2},
			reset: engine.Usage{Capacity: 2, InFlight: 2}, returned: 2,
			id: "concurrency_scheduler.0", c: concurrency(func(c *policy.ConcurrencyScheduler) { c.LimitBy = "user_id" }),
		},
		{
			name: "a load scheduler", is: engine.Usage{Capacity: math.Inf(1), Remaining: math.Inf(1)}, reset: engine.Usage{Capacity: math.Inf(1), Remaining: math.Inf(1)},
			id: "load_scheduler.0",
			c:  policy.LoadScheduler{Selectors: policy.At("point"), LoadMultiplier: policy.Constant(0.5)},
		},
	} {
		tested = append(tested, tt.c)
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, err := engine.New([]policy.Policy{{Name: "test", Components: []policy.Component{tt.c}}}, tt.options...)
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = e.Close() }()
				c, err := flowctl.New(e)
				if err != nil {
					t.Fatal(err)
				}
				if tt.options != nil {
					end(start(t, c, user("zoe"))) // has the only bucket
				}
				stay := make(chan struct{})
				returned := make(chan int, 4)
				var flows sync.WaitGroup
				for range 4 {
					flows.Go(func() {
						flow := start(t, c, flowctl.Params{Labels: map[string]string{"user_id": "ann"}, CheckTimeout: -1})
						<-stay
						returned <- end(flow).Returned
					})
				}
				synctest.Wait()
				peek := func(want engine.Usage) {
					t.Helper()
					got, err := peekAt(e, "test", cmp.Or(tt.id, "rate_limiter.0"), tt.value)
					if err != nil || got != want {
						t.Errorf("Peek = %+v, %v want %+v", got, err, want)
					}
				}
				peek(tt.is)
				peek(tt.is) // it takes nothing
				if err := resetAt(e, "test", cmp.Or(tt.id, "rate_limiter.0"), tt.value); err != nil {
					t.Error(err)
				}
				synctest.Wait()
				peek(tt.reset)
				close(stay)
				flows.Wait()
				sum := 0
				for range 4 {
					sum += <-returned
				}
				if sum != tt.returned {
					t.Errorf("%d slots were returned want %d: others are forgotten", sum, tt.returned)
				}
				if got, err := peekAt(e, "test", cmp.Or(tt.id, "rate_limiter.0"), tt.value); err != nil || got.InFlight != 0 || got.Remaining > got.Capacity {
					t.Errorf("in the end Peek = %+v, %v want nothing in flight", got, err)
				}
			})
		})
	}
	allkinds.Covered(t, "TestPeekAndReset", allkinds.Having("LimitBy"), tested...)
}

// A load scheduler that knows its load lets in a share of it, until it is to learn it again.
func TestPeekLoadScheduler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New([]policy.Policy{{Name: "test", Components: []policy.Component{policy.LoadScheduler{
			Selectors: policy.At("point"), LoadMultiplier: policy.Constant(0.5),
			Scheduler: policy.Scheduler{Default: policy.WorkloadParameters{QueueTimeout: policy.NoQueue}},
		}}}})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = e.Close() }()
		c, err := flowctl.New(e)
		if err != nil {
			t.Fatal(err)
		}
		for range 450 { // ten a second
			end(start(t, c, flowctl.Params{}))
			<-time.After(time.Second / 10)
		}
		if got, err := peekAt(e, "test", "load_scheduler.0", ""); err != nil || math.Abs(got.Capacity-5) > 0.5 || got.Remaining > got.Capacity {
			t.Errorf("Peek = %+v, %v want a capacity of half the load", got, err)
		}
		if err := resetAt(e, "test", "load_scheduler.0", ""); err != nil {
			t.Error(err)
		}
		if got, err := peekAt(e, "test", "load_scheduler.0", ""); err != nil || !math.IsInf(got.Capacity, 1) {
			t.Errorf("Peek = %+v, %v want everything let in", got, err)
		}
	})
}

func TestPeekAndResetErrors(t *testing.T) {
	e, err := engine.New([]policy.Policy{{Name: "test", Components: []policy.Component{
		limiter(nil)[0], policy.Sampler{ID: "tenth", Selectors: policy.At("point"), AcceptPercentage: 10},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = e.Close() }()
	for _, tt := range []struct{ name, policy, component, value, want string }{
		{"no such policy", "tset", "rate_limiter.0", "", `headgate: engine: no policy "tset"`},
		{"no such component", "test", "rate_limiter.1", "", `headgate: engine: policy "test": no component "rate_limiter.1"`},
		{"a sampler", "test", "tenth", "", `headgate: engine: policy "test": component "tenth": a sampler has no buckets`},
		{"a value of no label", "test", "rate_limiter.0", "sesame", `headgate: engine: policy "test": component "rate_limiter.0": it has no label`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, peek := peekAt(e, tt.policy, tt.component, tt.value)
			reset := resetAt(e, tt.policy, tt.component, tt.value)
			for _, err := range []error{peek, reset} {
				if err == nil || !strings.HasPrefix(err.Error(), tt.want) || strings.Contains(err.Error(), "sesame") {
					t.Errorf("error = %v want %s", err, tt.want)
				}
			}
		})
	}
}

// A handle is that of the component that was in force when it was made. It says so when that is no longer in force, and
// goes on where Apply keeps the component.
func TestComponentAfterApply(t *testing.T) {
	still := func(l *policy.RateLimiter) { l.Fill = 0 }
	e, client := reloadable(t, limiter(still))
	before, err := e.Component("test", "rate_limiter.0")
	if err != nil {
		t.Fatal(err)
	}
	end(start(t, client, flowctl.Params{}))
	apply(t, e, policy.Sampler{Selectors: policy.At("point"), AcceptPercentage: 100}, limiter(still)[0]) // which shifts no ID of another kind
	want := engine.Usage{Capacity: 2, Remaining: 1}
	if got, err := before.Peek(t.Context(), ""); err != nil || got != want {
		t.Errorf("Peek = %+v, %v want %+v", got, err, want)
	}
	apply(t, e, limiter(func(l *policy.RateLimiter) { l.Capacity, l.Fill = 3, 0 })[0])
	want = engine.Usage{Capacity: 3, Remaining: 2}
	if got, err := before.Peek(t.Context(), ""); err != nil || got != want {
		t.Errorf("Peek = %+v, %v want %+v", got, err, want)
	}
	apply(t, e, limiter(func(l *policy.RateLimiter) { l.Capacity, l.StepFill = 3, !l.StepFill })[0])
	const gone = `headgate: engine: policy "test": component "rate_limiter.0": it is no longer in force`
	if _, err := before.Peek(t.Context(), ""); err == nil || err.Error() != gone {
		t.Errorf("Peek after the policy has changed = %v want %q", err, gone)
	}
	if err := before.Reset(t.Context(), ""); err == nil || err.Error() != gone {
		t.Errorf("Reset after the policy has changed = %v want %q", err, gone)
	}
	if after, err := e.Component("test", "rate_limiter.0"); err != nil {
		t.Error(err)
	} else if got, err := after.Peek(t.Context(), ""); err != nil || got != (engine.Usage{Capacity: 3, Remaining: 3}) {
		t.Errorf("Peek at the new one = %+v, %v", got, err)
	}
}

// A component that a policy points to is the one that it points to, for Apply too.
func TestComponentByPointer(t *testing.T) {
	l := policy.RateLimiter{Selectors: policy.At("point"), Capacity: 2, Interval: time.Second}
	e, client := reloadable(t, []policy.Component{&l})
	end(start(t, client, flowctl.Params{}))
	apply(t, e, l)
	if got, err := peekAt(e, "test", "rate_limiter.0", ""); err != nil || got != (engine.Usage{Capacity: 2, Remaining: 1}) {
		t.Errorf("Peek = %+v, %v want the bucket kept, for the component is the same", got, err)
	}
}
