package engine_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/allkinds"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

func topOf(t *testing.T, e *engine.Engine, id string) []engine.TopValue {
	t.Helper()
	c, err := e.Component("test", id)
	if err != nil {
		t.Fatal(err)
	}
	return c.Top()
}

// Limiters and schedulers with a label know whose flows they reject most, whatever the agent is.
func TestTop(t *testing.T) {
	at := policy.At("point")
	tested := []policy.Component{policy.CircuitBreaker{}} // see TestTopOfCircuitBreakers
	for _, tt := range []struct {
		id   string
		c    policy.Component
		none bool
	}{
		{"rate_limiter.0", policy.RateLimiter{Selectors: at, Interval: time.Second, LimitBy: "user"}, false},
		{"rate_limiter.0", policy.RateLimiter{Selectors: at, Interval: time.Second, LimitBy: "user", DryRun: true}, false},
		{"rate_limiter.0", policy.RateLimiter{Selectors: at, Interval: time.Second}, true},
		{"calendar_quota.0", policy.CalendarQuota{Selectors: at, Period: policy.PeriodDay, TimeZone: "UTC", LimitBy: "user"}, false},
		{"concurrency_limiter.0", policy.ConcurrencyLimiter{Selectors: at, MaxInflight: time.Second, LimitBy: "user"}, false},
		{"quota_scheduler.0", policy.QuotaScheduler{Selectors: at, Interval: time.Second, LimitBy: "user"}, false},
		{"concurrency_scheduler.0", policy.ConcurrencyScheduler{Selectors: at, MaxInflight: time.Second, LimitBy: "user"}, false},
		{"sampler.0", policy.Sampler{Selectors: at, SessionLabel: "user"}, true},
	} {
		tested = append(tested, tt.c)
		sides.Setup{Policies: sides.Policies(tt.c)}.InBubbles(t, sides.EnginesAndStored, func(t *testing.T, side *sides.Side) {
			if got := topOf(t, side.Engine, tt.id); len(got) != 0 {
				t.Errorf("%s: before a rejection Top() = %+v", tt.id, got)
			}
			first := time.Now()
			for i, user := range []string{"bob", "ann", "ann"} {
				if i > 0 {
					<-time.After(time.Second)
				}
				end(side.Client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": user}}))
			}
			end(side.Client.Start(t.Context(), "point", flowctl.Params{})) // it lacks the label
			want := []engine.TopValue{{Value: "ann", Rejected: 2, Last: first.Add(2 * time.Second)}, {Value: "bob", Rejected: 1, Last: first}}
			if tt.none {
				want = nil
			}
			got := topOf(t, side.Engine, tt.id)
			for i := range got { // messages take a moment, and flows wait in queues
				got[i].Last = got[i].Last.Truncate(time.Second)
			}
			for i := range want {
				want[i].Last = want[i].Last.Round(0).Truncate(time.Second)
			}
			if diff := cmp.Diff(want, got); len(want)+len(got) > 0 && diff != "" {
				t.Errorf("%s: Top() (-want +got):\n%s", tt.id, diff)
			}
		})
	}
	allkinds.Covered(t, "TestTop", allkinds.Having("LimitBy"), tested...)
}

// A circuit breaker knows for whom it is open.
func TestTopOfCircuitBreakers(t *testing.T) {
	sides.Setup{Policies: sides.Policies(policy.CircuitBreaker{
		Selectors: policy.At("point"), LimitBy: "user", FailureCount: 1, MinFlows: 1, Window: time.Minute, OpenDuration: time.Minute,
	})}.InBubbles(t, []sides.Kind{sides.Embedded}, func(t *testing.T, side *sides.Side) {
		for range 3 {
			flow := side.Client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": "ann"}})
			flow.SetStatus(flowctl.StatusError)
			end(flow)
		}
		end(side.Client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": "bob"}}))
		if got := topOf(t, side.Engine, "circuit_breaker.0"); len(got) != 1 || got[0].Value != "ann" || got[0].Rejected != 2 {
			t.Errorf("Top() = %+v want ann rejected twice", got)
		}
	})
}

// A value that must not be shown is not, and one that is too long has its name. Values that share a bucket are not
// counted, nor are flows that a shutdown rejects.
func TestTopOfOddValues(t *testing.T) {
	flow := func(t *testing.T, c *flowctl.Client, label, value string) {
		t.Helper()
		end(c.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{label: value}}))
	}
	limiter := func(label string) []policy.Component {
		return []policy.Component{policy.RateLimiter{Selectors: policy.At("point"), Interval: time.Second, LimitBy: label}}
	}
	t.Run("credentials", func(t *testing.T) {
		for _, label := range credentials {
			e, c := reloadable(t, limiter(label))
			flow(t, c, label, "sesame")
			if got := topOf(t, e, "rate_limiter.0"); len(got) != 1 || !strings.HasPrefix(got[0].Value, "hidden:") {
				t.Errorf("Top() of %q = %+v", label, got)
			}
		}
	})
	t.Run("long", func(t *testing.T) {
		e, c := reloadable(t, limiter("user"))
		flow(t, c, "user", strings.Repeat("x", 1000))
		flow(t, c, "user", strings.Repeat("x", 100_000)) // too long to go by
		if got := topOf(t, e, "rate_limiter.0"); len(got) != 1 || len(got[0].Value) != 256 {
			t.Errorf("Top() = %+v", got)
		}
	})
	t.Run("shared", func(t *testing.T) {
		e, c := reloadable(t, []policy.Component{policy.RateLimiter{Selectors: policy.At("point"), Capacity: 1, Interval: time.Hour, LimitBy: "user"}}, engine.WithKeyCap(1))
		for i := range 10 {
			flow(t, c, "user", "known")
			flow(t, c, "user", fmt.Sprint(i))
		}
		if got := topOf(t, e, "rate_limiter.0"); len(got) != 1 || got[0].Value != "known" || got[0].Rejected != 9 {
			t.Errorf("Top() = %+v", got)
		}
	})
	t.Run("closed", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			e, c := reloadable(t, []policy.Component{policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour, LimitBy: "user"}})
			held := c.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": "ann"}})
			ctx, leave := context.WithCancel(t.Context())
			var waiting sync.WaitGroup
			for _, ctx := range []context.Context{t.Context(), ctx} {
				waiting.Go(func() {
					end(c.Start(ctx, "point", flowctl.Params{Labels: map[string]string{"user": "ann"}, CheckTimeout: -1}))
				})
			}
			synctest.Wait()
			leave()
			synctest.Wait()
			h, err := e.Component("test", "concurrency_scheduler.0")
			if err != nil {
				t.Fatal(err)
			}
			_ = e.Close()
			waiting.Wait()
			end(held)
			if got := h.Top(); len(got) != 0 {
				t.Errorf("Top() = %+v want none: one has left, and the other was rejected by the shutdown", got)
			}
		})
	})
}

// Flows that no component picks are counted: at control points that policies name, and at all others together.
func TestUnpickedFlows(t *testing.T) {
	gold := []policy.Selector{{ControlPoint: "point", Labels: policy.LabelMatcher{Equal: map[string]string{"tier": "gold"}}}}
	limit := policy.RateLimiter{ID: "limit", Selectors: gold, Capacity: 1, Fill: 1, Interval: time.Hour}
	queue := policy.QuotaScheduler{ID: "queue", Selectors: gold, Capacity: 100, Fill: 1, Interval: time.Hour}
	e, c := reloadable(t, []policy.Component{limit, queue})
	start := func(at string, labels map[string]string, key string) {
		t.Helper()
		end(c.Start(t.Context(), at, flowctl.Params{Labels: labels, ResultCacheKey: key}))
	}
	for range 2 {
		start("point", nil, "")
	}
	for range 3 { // two of which the limiter rejects
		start("point", map[string]string{"tier": "gold"}, "")
	}
	start("elsewhere", nil, "")
	f := c.Start(t.Context(), "point", flowctl.Params{ResultCacheKey: "key"})
	if err := f.SetResultCache(t.Context(), []byte("x"), time.Hour); err != nil {
		t.Fatal(err)
	}
	end(f)
	start("point", nil, "key") // the cache spares it the scheduler, which might have picked it
	want := []engine.ControlPointStats{
		{Accepted: 1, Unpicked: 1},
		{ControlPoint: "point", Accepted: 5, Unpicked: 3, RateLimited: 2, CacheHits: 1, CacheMisses: 1},
	}
	if diff := cmp.Diff(want, e.Stats().ControlPoints); diff != "" {
		t.Errorf("ControlPoints (-want +got):\n%s", diff)
	}
	apply(t, e, queue)
	start("point", nil, "")
	want[1].Accepted, want[1].Unpicked = 6, 4
	if diff := cmp.Diff(want, e.Stats().ControlPoints); diff != "" {
		t.Errorf("after Apply: ControlPoints (-want +got):\n%s", diff)
	}
}
