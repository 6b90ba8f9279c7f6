package engine_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/internal/testing/replay"
	"github.com/headgate-go/headgate/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// open builds an engine of one policy and a client of it, and closes them with the test.
func open(t testing.TB, components []policy.Component, opts ...engine.Option) *flowctl.Client {
	t.Helper()
	return client(t, []policy.Policy{{Name: "test", Components: components}}, opts)
}

func client(t testing.TB, policies []policy.Policy, opts []engine.Option, clientOpts ...flowctl.Option) *flowctl.Client {
	t.Helper()
	e, err := engine.New(policies, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	c, err := flowctl.New(e, clientOpts...)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func user(name string) flowctl.Params {
	return flowctl.Params{Labels: map[string]string{"user_id": name}}
}

// start starts a flow at the control point "point", and ends it unless it is to be kept.
func start(t testing.TB, c *flowctl.Client, params flowctl.Params) *flowctl.Flow {
	t.Helper()
	flow := c.Start(context.Background(), "point", params)
	if !flow.Success() {
		t.Fatalf("%v: %v", flow, flow.Err())
	}
	return flow
}

func end(flow *flowctl.Flow) flowctl.EndResponse {
	r, _ := flow.End(context.Background())
	return r
}

// What a real agent answered.
func TestVectors(t *testing.T) {
	replay.Run(t, func(t *testing.T, policies []policy.Policy) checkv1.FlowControlServiceClient {
		return replay.Stub(client(t, policies, nil))
	})
}

func limiter(f func(*policy.RateLimiter)) []policy.Component {
	r := policy.RateLimiter{Selectors: policy.At("point"), Capacity: 2, Fill: 1, Interval: time.Second}
	if f != nil {
		f(&r)
	}
	return []policy.Component{r}
}

func slots(f func(*policy.ConcurrencyLimiter)) []policy.Component {
	l := policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 2, MaxInflight: time.Minute}
	if f != nil {
		f(&l)
	}
	return []policy.Component{l}
}

func TestRateLimiter(t *testing.T) {
	type flow struct {
		at     time.Duration
		labels map[string]string
		ok     bool
		wait   time.Duration
	}
	cost := func(text string) map[string]string { return map[string]string{"cost": text} }
	byCost := func(r *policy.RateLimiter) { r.TokensLabel = "cost" }
	for _, tt := range []struct {
		name  string
		set   func(*policy.RateLimiter)
		flows []flow
	}{
		{name: "burst, then refill", flows: []flow{
			{ok: true}, {ok: true}, {wait: time.Second}, {at: 400 * time.Millisecond, wait: 600 * time.Millisecond}, {at: time.Second, ok: true},
		}},
		{name: "step fill", set: func(r *policy.RateLimiter) { r.StepFill = true }, flows: []flow{
			{ok: true}, {ok: true}, {at: 999 * time.Millisecond, wait: time.Millisecond}, {at: time.Second, ok: true},
		}},
		{name: "delayed fill", set: func(r *policy.RateLimiter) { r.DelayInitialFill = true }, flows: []flow{
			{ok: true}, {ok: true}, {wait: 3 * time.Second}, {at: 2 * time.Second, wait: time.Second}, {at: 3 * time.Second, ok: true},
		}},
		{name: "limit of 0", set: func(r *policy.RateLimiter) { r.Capacity, r.Fill = 0, 0 }, flows: []flow{{}, {at: time.Hour}}},
		{name: "no refill", set: func(r *policy.RateLimiter) { r.Fill = 0 }, flows: []flow{{ok: true}, {ok: true}, {}, {at: time.Hour}}},
		{name: "pass through", set: func(r *policy.RateLimiter) { r.Capacity, r.PassThrough = 0, true }, flows: []flow{{ok: true}, {ok: true}}},
		{name: "dry run", set: func(r *policy.RateLimiter) { r.Capacity, r.DryRun = 1, true }, flows: []flow{{ok: true}, {ok: true}, {ok: true}}},
		{name: "tokens", set: byCost, flows: []flow{
			{labels: cost("1.5"), ok: true}, {labels: cost("0"), ok: true}, {labels: cost("1"), wait: 500 * time.Millisecond}, {labels: cost("0.5"), ok: true},
		}},
		{name: "tokens that are none", set: byCost, flows: []flow{
			{labels: cost("-5"), ok: true}, {labels: cost("NaN"), ok: true}, {labels: cost("Inf"), wait: time.Second}, {labels: cost("x"), wait: time.Second},
		}},
		{name: "a small flow after a large one", set: byCost, flows: []flow{
			{labels: cost("1"), ok: true}, {labels: cost("2"), wait: time.Second}, {labels: cost("1"), ok: true},
		}},
		{name: "more than the bucket holds", set: byCost, flows: []flow{{labels: cost("3")}, {labels: cost("1e308")}, {labels: cost("2"), ok: true}}},
		{name: "a label without a value", set: func(r *policy.RateLimiter) { r.LimitBy = "user" }, flows: []flow{
			{labels: map[string]string{"user": ""}, ok: true},
			{labels: map[string]string{"user": ""}, ok: true},
			{labels: map[string]string{"user": ""}, wait: time.Second},
			{labels: map[string]string{"other": ""}, ok: true},
			{labels: map[string]string{"user": "u"}, ok: true},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := open(t, limiter(tt.set))
				begin := time.Now()
				for i, f := range tt.flows {
					<-time.After(time.Until(begin.Add(f.at)))
					flow := start(t, c, flowctl.Params{Labels: f.labels})
					if flow.ShouldRun() != f.ok || (flow.RetryAfter()-f.wait).Abs() > 2*time.Nanosecond {
						t.Errorf("flow %d: ShouldRun() = %v, RetryAfter() = %v want %v, %v", i, flow.ShouldRun(), flow.RetryAfter(), f.ok, f.wait)
					}
				}
			})
		})
	}
}

func TestRejection(t *testing.T) {
	for _, tt := range []struct {
		name   string
		id     string
		c      policy.Component
		status int
	}{
		{"rate limiter", "rate_limiter.0", policy.RateLimiter{Selectors: policy.At("point"), Interval: time.Second, LimitBy: "user_id"}, 429},
		{"its own status", "rate_limiter.0", policy.RateLimiter{Selectors: policy.At("point"), Interval: time.Second, LimitBy: "user_id", DeniedStatus: 503}, 503},
		{"its own id", "mine", policy.RateLimiter{ID: "mine", Selectors: policy.At("point"), Interval: time.Second, LimitBy: "user_id"}, 429},
		{"concurrency limiter", "concurrency_limiter.0", policy.ConcurrencyLimiter{Selectors: policy.At("point"), MaxInflight: time.Second, LimitBy: "user_id"}, 429},
	} {
		t.Run(tt.name, func(t *testing.T) {
			flow := start(t, open(t, []policy.Component{tt.c}), user("sesame"))
			var rejected *flowctl.RejectedError
			if !errors.As(flow.Err(), &rejected) {
				t.Fatalf("Err() = %v want a rejection", flow.Err())
			}
			want := rejection{flowctl.ReasonRateLimited, flowctl.CauseNone, "test", tt.id, "user_id", tt.status, 0}
			if tt.name == "its own id" {
				want.component = "mine"
			}
			if got := rejectionOf(rejected); got != want {
				t.Errorf("rejection = %+v want %+v", got, want)
			}
			if strings.Contains(rejected.Error(), "sesame") {
				t.Errorf("error %q shows a label", rejected)
			}
		})
	}
}

// rejection is what the error of a rejected flow at "point" says.
type rejection struct {
	reason                      flowctl.RejectReason
	cause                       flowctl.RejectCause
	policy, component, labelKey string
	status                      int
	retryAfter                  time.Duration
}

func rejectionOf(e *flowctl.RejectedError) rejection {
	return rejection{e.Reason, e.Cause(), e.Policy(), e.Component(), e.LabelKey(), e.HTTPStatus, e.RetryAfter()}
}

func TestConcurrencyLimiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, slots(func(l *policy.ConcurrencyLimiter) { l.LimitBy = "user_id" }))
		a, b := start(t, c, user("u")), start(t, c, user("u"))
		if full := start(t, c, user("u")); full.ShouldRun() || full.RetryAfter() != 0 {
			t.Errorf("a third flow: ShouldRun() = %v, RetryAfter() = %v", full.ShouldRun(), full.RetryAfter())
		} else if got := end(full); got != (flowctl.EndResponse{}) {
			t.Errorf("end of a rejected flow = %+v want nothing held", got)
		}
		if !start(t, c, user("other")).ShouldRun() || !start(t, c, flowctl.Params{}).ShouldRun() {
			t.Error("other users were rejected")
		}
		if got := end(a); got != (flowctl.EndResponse{Held: 1, Returned: 1}) {
			t.Errorf("end = %+v want 1 of 1", got)
		}
		again := start(t, c, user("u"))
		if !again.ShouldRun() {
			t.Error("rejected although a slot was free")
		}
		<-time.After(time.Minute)
		if !start(t, c, user("u")).ShouldRun() || !start(t, c, user("u")).ShouldRun() || start(t, c, user("u")).ShouldRun() {
			t.Error("slots of flows that do not end must come back, once")
		}
		if got := end(b); got != (flowctl.EndResponse{Held: 1}) {
			t.Errorf("end after the slot was reclaimed = %+v want none returned", got)
		}
	})
}

func TestConcurrencyLimiterCosts(t *testing.T) {
	c := open(t, slots(func(l *policy.ConcurrencyLimiter) { l.TokensLabel = "slots" }))
	cost := func(text string) flowctl.Params {
		return flowctl.Params{Labels: map[string]string{"slots": text}}
	}
	big := start(t, c, cost("5")) // overshoots, for a slot was free
	if !big.ShouldRun() || start(t, c, cost("1")).ShouldRun() {
		t.Error("want the large flow in, and nothing beside it")
	}
	free := start(t, c, cost("0"))
	if !free.ShouldRun() || end(free) != (flowctl.EndResponse{}) {
		t.Error("a flow that costs nothing holds nothing")
	}
	end(big)
	if !start(t, c, cost("-1")).ShouldRun() || !start(t, c, cost("0.5")).ShouldRun() || !start(t, c, cost("0.6")).ShouldRun() || start(t, c, cost("0.1")).ShouldRun() {
		t.Error("want 1 (for a bad number), 0.5 and 0.6 of 2 in, and no more")
	}
}

func TestConcurrencyLimiterNeverReclaims(t *testing.T) {
	c := open(t, slots(func(l *policy.ConcurrencyLimiter) { l.Max, l.MaxInflight = 1, math.MaxInt64 }))
	if !start(t, c, flowctl.Params{}).ShouldRun() || start(t, c, flowctl.Params{}).ShouldRun() {
		t.Error("want one flow of one slot")
	}
}

func TestConcurrencyLimiterDryRun(t *testing.T) {
	c := open(t, slots(func(l *policy.ConcurrencyLimiter) { l.Max, l.DryRun = 1, true }))
	held := start(t, c, flowctl.Params{})
	for range 3 {
		if flow := start(t, c, flowctl.Params{}); !flow.ShouldRun() || end(flow).Held != 0 {
			t.Error("a dry run rejects nothing, and what it would have rejected holds nothing")
		}
	}
	if end(held).Returned != 1 || end(start(t, c, flowctl.Params{})).Returned != 1 {
		t.Error("want slots counted as if it were for real")
	}
}

// A rejection costs nothing: what the other limiters gave goes back.
func TestRefund(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, []policy.Component{
			policy.RateLimiter{Selectors: policy.At("point"), Capacity: 3, Interval: time.Hour, LimitBy: "user_id"},
			policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 10, MaxInflight: time.Hour},
			policy.RateLimiter{Selectors: policy.At("point"), Capacity: 2, Interval: time.Hour},
		})
		for range 2 {
			if flow := start(t, c, user("u")); !flow.ShouldRun() || end(flow).Returned != 1 {
				t.Fatal("rejected too early")
			}
		}
		for range 5 {
			flow := start(t, c, user("u"))
			if flow.ShouldRun() {
				t.Fatal("accepted too often")
			}
			m := flow.CheckResponse()
			if got := m.GetLimiterDecisions()[0].GetRateLimiterInfo().GetTokensInfo(); got.GetRemaining() != 0 || got.GetConsumed() != 1 {
				t.Errorf("the first limiter's decision = %v want it as its own take left it", got)
			}
			if id := m.GetLimiterDecisions()[1].GetConcurrencyLimiterInfo().GetRequestId(); id != "" {
				t.Errorf("slot %q of a rejected flow was not given back", id)
			}
			if got := end(flow); got.Held != 0 {
				t.Errorf("end = %+v want nothing held", got)
			}
		}
	})
}

// Of several limiters that drop a flow, the longest wait counts, then the order; and no wait if one will never admit it.
func TestSeveralDrops(t *testing.T) {
	rate := func(id string, interval time.Duration, status int) policy.RateLimiter {
		return policy.RateLimiter{ID: id, Selectors: policy.At("point"), Capacity: 1, Fill: 1, Interval: interval, DeniedStatus: status}
	}
	for _, tt := range []struct {
		name       string
		components []policy.Component
		by         string
		status     int
		wait       time.Duration
	}{
		{"the longest wait", []policy.Component{rate("a", time.Second, 503), rate("b", time.Minute, 0), rate("c", time.Second, 403)}, "b", 429, time.Minute},
		{"the first of equals", []policy.Component{rate("a", time.Second, 503), rate("b", time.Second, 403)}, "a", 503, time.Second},
		{"one that never will", []policy.Component{
			rate("a", time.Second, 0),
			policy.RateLimiter{ID: "b", Selectors: policy.At("point"), Interval: time.Second, DryRun: true},
			rate("c", time.Minute, 0),
			policy.RateLimiter{ID: "d", Selectors: policy.At("point"), Capacity: 1, Interval: time.Second, DeniedStatus: 403},
		}, "c", 429, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := open(t, tt.components)
				start(t, c, flowctl.Params{})
				for range 20 {
					flow := start(t, c, flowctl.Params{})
					var rejected *flowctl.RejectedError
					if !errors.As(flow.Err(), &rejected) || rejected.Component() != tt.by || rejected.HTTPStatus != tt.status || rejected.RetryAfter() != tt.wait {
						t.Fatalf("%v by %s want by %s, %d, %v", flow.Err(), rejected.Component(), tt.by, tt.status, tt.wait)
					}
					if got := len(flow.CheckResponse().GetLimiterDecisions()); got != len(tt.components) {
						t.Fatalf("%d decisions want %d: every limiter answers", got, len(tt.components))
					}
				}
			})
		})
	}
}

func TestSelectors(t *testing.T) {
	none := func(selectors ...policy.Selector) []policy.Component {
		return []policy.Component{policy.RateLimiter{Selectors: selectors, Interval: time.Second}}
	}
	gold := policy.LabelMatcher{Equal: map[string]string{"tier": "gold"}}
	for _, tt := range []struct {
		name     string
		selector []policy.Selector
		service  string
		labels   map[string]string
		hit      bool
	}{
		{name: "control point", selector: policy.At("point"), hit: true},
		{name: "another control point", selector: policy.At("other", "poin", "point2", "")[:3]},
		{name: "one of several", selector: policy.At("other", "point"), hit: true},
		{name: "twice the same", selector: policy.At("point", "point"), hit: true},
		{name: "labels", selector: []policy.Selector{{ControlPoint: "point", Labels: gold}}, labels: map[string]string{"tier": "gold"}, hit: true},
		{name: "other labels", selector: []policy.Selector{{ControlPoint: "point", Labels: gold}}, labels: map[string]string{"tier": "free"}},
		{name: "either labels", selector: []policy.Selector{
			{ControlPoint: "point", Labels: gold}, {ControlPoint: "point", Labels: policy.LabelMatcher{Require: []policy.Requirement{{Key: "vip", Operator: policy.Exists}}}},
		}, labels: map[string]string{"vip": ""}, hit: true},
		{name: "any service", selector: []policy.Selector{{ControlPoint: "point", Service: "any"}}, service: "shop", hit: true},
		{name: "the service", selector: []policy.Selector{{ControlPoint: "point", Service: "shop"}}, service: "shop", hit: true},
		{name: "another service", selector: []policy.Selector{{ControlPoint: "point", Service: "shop"}}, service: "bank"},
		{name: "no service", selector: []policy.Selector{{ControlPoint: "point", Service: "shop"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := client(t, []policy.Policy{{Name: "test", Components: none(tt.selector...)}}, nil, flowctl.WithService(tt.service))
			flow := start(t, c, flowctl.Params{Labels: tt.labels})
			decisions := len(flow.CheckResponse().GetLimiterDecisions())
			if flow.ShouldRun() == tt.hit || decisions > 1 || (decisions == 1) != tt.hit {
				t.Errorf("ShouldRun() = %v, %d decisions want a hit: %v", flow.ShouldRun(), decisions, tt.hit)
			}
		})
	}
}

func TestLabelMatcher(t *testing.T) {
	have := map[string]string{"tier": "gold", "empty": "", "agent": "goodbot/1.0"}
	req := func(key string, op policy.Operator, values ...string) policy.LabelMatcher {
		return policy.LabelMatcher{Require: []policy.Requirement{{Key: key, Operator: op, Values: values}}}
	}
	expr := func(e policy.Expression) policy.LabelMatcher { return policy.LabelMatcher{Expression: e} }
	yes, no := policy.LabelExists("tier"), policy.LabelExists("none")
	for _, tt := range []struct {
		name  string
		m     policy.LabelMatcher
		match bool
	}{
		{"nothing", policy.LabelMatcher{}, true},
		{"equal", policy.LabelMatcher{Equal: map[string]string{"tier": "gold", "empty": ""}}, true},
		{"one not equal", policy.LabelMatcher{Equal: map[string]string{"tier": "gold", "empty": "x"}}, false},
		{"equal to nothing, absent", policy.LabelMatcher{Equal: map[string]string{"none": ""}}, false},
		{"In", req("tier", policy.In, "silver", "gold"), true},
		{"In, another", req("tier", policy.In, "silver"), false},
		{"In, absent", req("none", policy.In, "gold"), false},
		{"NotIn", req("tier", policy.NotIn, "silver"), true},
		{"NotIn, the value", req("tier", policy.NotIn, "gold"), false},
		{"NotIn, absent", req("none", policy.NotIn, "gold"), true},
		{"Exists", req("empty", policy.Exists), true},
		{"Exists, absent", req("none", policy.Exists), false},
		{"DoesNotExist", req("none", policy.DoesNotExist), true},
		{"DoesNotExist, present", req("empty", policy.DoesNotExist), false},
		{"all parts", policy.LabelMatcher{Equal: map[string]string{"tier": "gold"}, Require: []policy.Requirement{{Key: "none", Operator: policy.DoesNotExist}}, Expression: yes}, true},
		{"all parts but one", policy.LabelMatcher{Equal: map[string]string{"tier": "gold"}, Require: []policy.Requirement{{Key: "none", Operator: policy.DoesNotExist}}, Expression: no}, false},
		{"not", expr(policy.Not{Of: no}), true},
		{"all", expr(policy.All{yes, policy.LabelEquals{Label: "empty"}}), true},
		{"all but one", expr(policy.All{yes, no}), false},
		{"all of none", expr(policy.All{}), true},
		{"any", expr(policy.Any{no, yes}), true},
		{"any of wrong ones", expr(policy.Any{no, no}), false},
		{"any of none", expr(policy.Any{}), false},
		{"label equals, absent", expr(policy.LabelEquals{Label: "none"}), false},
		{"regex, not anchored", expr(policy.LabelMatches{Label: "agent", Regex: "bot/[0-9]"}), true},
		{"regex, anchored", expr(policy.LabelMatches{Label: "agent", Regex: "^bot"}), false},
		{"regex, absent", expr(policy.LabelMatches{Label: "none", Regex: ".*"}), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := open(t, []policy.Component{policy.RateLimiter{
				Selectors: []policy.Selector{{ControlPoint: "point", Labels: tt.m}}, Interval: time.Second,
			}})
			if flow := start(t, c, flowctl.Params{Labels: have}); flow.ShouldRun() == tt.match {
				t.Errorf("match = %v want %v", !flow.ShouldRun(), tt.match)
			}
		})
	}
}

// A flood of made-up users must not make the engine forget empty buckets.
func TestKeyFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		c := open(t, limiter(func(r *policy.RateLimiter) { r.Capacity, r.Interval, r.LimitBy = 1, time.Hour, "user_id" }),
			engine.WithKeyCap(100), engine.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
		if !start(t, c, user("victim")).ShouldRun() {
			t.Fatal("the first flow was rejected")
		}
		accepted := 0
		for i := range 10_000 {
			if start(t, c, user(fmt.Sprint("bot", i))).ShouldRun() {
				accepted++
			}
		}
		if accepted != 100 { // 99 keys of their own, and one bucket for the others
			t.Errorf("%d of the flood got in want 100", accepted)
		}
		if start(t, c, user("victim")).ShouldRun() {
			t.Error("the flood refilled an empty bucket")
		}
		<-time.After(61 * time.Second)
		synctest.Wait()
		if got := log.String(); strings.Count(got, "more keys than its cap") != 1 || !strings.Contains(got, "policy=test component=rate_limiter.0 decisions=9901") {
			t.Errorf("log:\n%s", got)
		}
		<-time.After(2 * time.Hour) // all are full again, and make room
		if !start(t, c, user("new")).ShouldRun() || !start(t, c, user("newer")).ShouldRun() {
			t.Error("full buckets made no room for new users")
		}
	})
}

// Nor may it admit flows of a user whose slots are taken.
func TestKeyFloodOfSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, slots(func(l *policy.ConcurrencyLimiter) { l.Max, l.LimitBy, l.MaxInflight = 1, "user_id", time.Hour }), engine.WithKeyCap(100))
		held := start(t, c, user("victim"))
		for round := range 3 {
			for i := range 1000 {
				end(start(t, c, user(fmt.Sprint("bot", round, i))))
			}
			if start(t, c, user("victim")).ShouldRun() {
				t.Fatal("the flood freed a slot that is held")
			}
			<-time.After(2 * time.Minute) // sweeps come and go
		}
		if got := end(held); got.Returned != 1 || !start(t, c, user("victim")).ShouldRun() {
			t.Errorf("end = %+v want the slot back, and free", got)
		}
	})
}

// Slots from the bucket that unknown keys share go back there.
func TestKeyFloodSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, slots(func(l *policy.ConcurrencyLimiter) { l.Max, l.LimitBy, l.MaxInflight = 1, "user_id", time.Hour }), engine.WithKeyCap(1))
		known, spilled := start(t, c, user("a")), start(t, c, user("b"))
		if !known.ShouldRun() || !spilled.ShouldRun() || start(t, c, user("c")).ShouldRun() {
			t.Fatal("want one flow of the known key and one of all others")
		}
		end(known)
		<-time.After(2 * time.Second)
		own := start(t, c, user("b")) // makes room for b itself
		if !own.ShouldRun() {
			t.Fatal("rejected")
		}
		if got := end(spilled); got.Returned != 1 {
			t.Errorf("end = %+v want the slot of the shared bucket back", got)
		}
		if got := end(own); got.Returned != 1 {
			t.Errorf("end = %+v", got)
		}
	})
}

// Full buckets make room wherever they are: the sweeper comes when a key does not fit.
func TestKeyFloodSweeps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := race.Pick(10_000, 40_000) // in several shards
		c := open(t, limiter(func(r *policy.RateLimiter) { r.Capacity, r.Interval, r.LimitBy = 1, time.Second, "user_id" }), engine.WithKeyCap(keys))
		for i := range keys {
			start(t, c, user(fmt.Sprint("old", i)))
		}
		<-time.After(2 * time.Second)
		start(t, c, user("first"))
		<-time.After(2 * time.Second)
		synctest.Wait()
		for i := range keys / 2 {
			if !start(t, c, user(fmt.Sprint("new", i))).ShouldRun() {
				t.Fatalf("new user %d was rejected although there was room", i)
			}
		}
	})
}

func TestCacheBounds(t *testing.T) {
	const entries, size = 100, 10_000
	fill := func(t *testing.T, value []byte, n int) (kept int) {
		synctest.Test(t, func(t *testing.T) {
			c := client(t, nil, []engine.Option{engine.WithCacheBounds(entries, size)})
			for i := range n {
				flow := c.Start(t.Context(), "point", flowctl.Params{ResultCacheKey: fmt.Sprint(i)})
				if err := flow.SetResultCache(t.Context(), value, 0); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Wait() // for the cache to tidy up
			for i := range n {
				if _, ok, _ := c.Start(t.Context(), "point", flowctl.Params{ResultCacheKey: fmt.Sprint(i)}).ResultCache(); ok {
					kept++
				}
			}
		})
		return kept
	}
	if kept := fill(t, nil, 1000); kept > entries || kept < entries/2 {
		t.Errorf("%d small entries are kept want up to %d", kept, entries)
	}
	if kept := fill(t, make([]byte, 1000), 100); kept > size/1000 || kept < size/2000 {
		t.Errorf("%d large entries are kept want up to %d", kept, size/1000)
	}
	c := client(t, nil, []engine.Option{engine.WithCacheBounds(entries, size)})
	flow := c.Start(t.Context(), "point", flowctl.Params{ResultCacheKey: "k"})
	if err := flow.SetResultCache(t.Context(), make([]byte, size+1), 0); err == nil {
		t.Error("an entry larger than the cache was stored without an error")
	}
}

func TestClose(t *testing.T) {
	e, err := engine.New([]policy.Policy{{Name: "p", Components: slots(nil)}})
	if err != nil {
		t.Fatal(err)
	}
	c, err := flowctl.New(e)
	if err != nil {
		t.Fatal(err)
	}
	flow := start(t, c, flowctl.Params{ResultCacheKey: "k"})
	for range 2 {
		if err := e.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	}
	if got := end(flow); got.Returned != 1 {
		t.Errorf("end after Close = %+v want the slot returned", got)
	}
	late := c.Start(t.Context(), "point", flowctl.Params{})
	if late.Decision() != flowctl.Unreachable || !late.ShouldRun() || !errors.Is(late.Err(), flowctl.ErrClosed) {
		t.Errorf("%v, %v want unreachable, closed", late, late.Err())
	}
	if err := flow.SetResultCache(t.Context(), nil, 0); !errors.Is(err, flowctl.ErrClosed) {
		t.Errorf("SetResultCache() = %v want ErrClosed", err)
	}
	if err := c.Ready(t.Context()); !errors.Is(err, flowctl.ErrClosed) {
		t.Errorf("Ready() = %v want ErrClosed", err)
	}
}

func TestNewErrors(t *testing.T) {
	good := limiter(nil)
	for _, tt := range []struct {
		name     string
		policies []policy.Policy
		opts     []engine.Option
		want     []string
	}{
		{name: "same name twice", policies: []policy.Policy{{Name: "p", Components: good}, {Name: "p", Components: good}}, want: []string{`policy "p"`, "taken"}},
		{name: "key cap", opts: []engine.Option{engine.WithKeyCap(0)}, want: []string{"WithKeyCap(0)"}},
		{name: "signal without a name", opts: []engine.Option{engine.WithSignal("", func() float64 { return 0 })}, want: []string{`WithSignal("")`}},
		{name: "signal without a function", opts: []engine.Option{engine.WithSignal("cpu", nil)}, want: []string{`WithSignal("cpu")`}},
		{
			name: "signals that nobody provides",
			policies: []policy.Policy{
				{Name: "one", Components: []policy.Component{limiter(nil)[0], policy.LoadScheduler{Selectors: policy.At("x"), LoadMultiplier: policy.Named("share")}}},
				{Name: "two", Components: []policy.Component{policy.AIMDLoadScheduler{Selectors: policy.At("x"), Signal: policy.Constant(1), Setpoint: policy.Named("target")}}},
				{Name: "three", Components: []policy.Component{policy.AIMDLoadScheduler{
					Selectors: policy.At("x"), Signal: policy.Constant(1), Setpoint: policy.Constant(1), OverloadConfirmation: policy.Named("sure"),
				}}},
			},
			opts: []engine.Option{engine.WithSignal("other", func() float64 { return 0 })},
			want: []string{
				`policy "one": components[1]: LoadMultiplier: `, `WithSignal("share"`, `policy "two": components[0]: Setpoint: `, `WithSignal("target"`,
				`policy "three": components[0]: OverloadConfirmation: `, `WithSignal("sure"`,
			},
		},
		{name: "name", opts: []engine.Option{engine.WithName("orders\xff")}, want: []string{"WithName"}},
		{name: "cache bounds", opts: []engine.Option{engine.WithCacheBounds(10, 5)}, want: []string{"WithCacheBounds(10, 5)"}},
		{
			name: "several at once",
			policies: []policy.Policy{
				{Name: "one", Components: []policy.Component{policy.RateLimiter{Capacity: math.NaN(), Selectors: policy.At("x")}}},
				{Name: "two", Components: []policy.Component{policy.ConcurrencyLimiter{Max: -1}}},
			},
			want: []string{`"one"`, "Capacity", "Interval", `"two"`, "Max", "Selectors"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := engine.New(tt.policies, tt.opts...)
			if err == nil {
				t.Fatal("New() = nil")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error does not say %q:\n%v", want, err)
				}
			}
		})
	}
	e, err := engine.New(nil, nil, engine.WithLogger(nil))
	if err != nil {
		t.Fatalf("New() with nil options = %v", err)
	}
	_ = e.Close()
}

// The engine keeps nothing of what it was given.
func TestPoliciesAreCopied(t *testing.T) {
	match := map[string]string{"tier": "free"}
	values := []string{"eu"}
	selectors := []policy.Selector{{ControlPoint: "point", Labels: policy.LabelMatcher{
		Equal: match, Require: []policy.Requirement{{Key: "region", Operator: policy.In, Values: values}},
	}}}
	c := open(t, []policy.Component{policy.RateLimiter{Selectors: selectors, Interval: time.Second}})
	match["tier"], values[0], selectors[0].ControlPoint = "gold", "us", "other"
	if start(t, c, flowctl.Params{Labels: map[string]string{"tier": "free", "region": "eu"}}).ShouldRun() {
		t.Error("the engine follows changes of its policies")
	}
}

// Whatever the interleaving, no more flows pass than there are tokens and slots.
func TestConcurrentFlows(t *testing.T) {
	c := open(t, []policy.Component{
		policy.RateLimiter{Selectors: policy.At("point"), Capacity: 1000, Interval: time.Hour, LimitBy: "user_id"},
		policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 4, MaxInflight: time.Hour},
	})
	var wg sync.WaitGroup
	var mu sync.Mutex
	accepted, running := 0, 0
	for range 16 {
		wg.Go(func() {
			for range 500 {
				flow := c.Start(context.Background(), "point", user("u"))
				if !flow.ShouldRun() {
					end(flow)
					continue
				}
				mu.Lock()
				accepted++
				running++
				if running > 4 {
					t.Errorf("%d flows at once want up to 4", running)
				}
				mu.Unlock()
				mu.Lock()
				running--
				mu.Unlock()
				if r := end(flow); r.Returned != 1 {
					t.Errorf("end = %+v", r)
				}
			}
		})
	}
	wg.Wait()
	if accepted > 1000 {
		t.Errorf("%d flows were accepted want up to 1000", accepted)
	}
	// What a rejection for want of a slot took must have been refunded.
	for ; accepted < 1000; accepted++ {
		flow := start(t, c, user("u"))
		if !flow.ShouldRun() {
			t.Fatalf("tokens were lost: only %d flows were accepted", accepted)
		}
		end(flow)
	}
	if start(t, c, user("u")).ShouldRun() {
		t.Error("more flows than tokens were accepted")
	}
}

// A rejection has no time to retry if the wait is decades.
func TestWaitOfDecades(t *testing.T) {
	for _, step := range []bool{false, true} {
		c := open(t, []policy.Component{policy.RateLimiter{
			Selectors: policy.At("point"), Capacity: 1, Fill: 1e-300, Interval: time.Second, StepFill: step,
		}})
		start(t, c, user("u"))
		if flow := start(t, c, user("u")); flow.ShouldRun() || flow.RetryAfter() != 0 {
			t.Errorf("step %v: ShouldRun() = %v, RetryAfter() = %v want it rejected, and no time", step, flow.ShouldRun(), flow.RetryAfter())
		}
	}
}
