package engine_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// Limits that admit no flow, or none after the first ones, are warned about, and others are not. The test tries each
// limit.
func TestWarningsOfImpossibleLimits(t *testing.T) {
	at := policy.At("point")
	heavy := policy.Workload{
		Name: "heavy", Labels: policy.LabelMatcher{Equal: map[string]string{"job": "heavy"}},
		WorkloadParameters: policy.WorkloadParameters{Tokens: 9},
	}
	rate := func(capacity, fill float64, f func(*policy.RateLimiter)) policy.Component {
		l := policy.RateLimiter{ID: "x", Selectors: at, Capacity: capacity, Fill: fill, Interval: time.Second}
		if f != nil {
			f(&l)
		}
		return l
	}
	quota := func(capacity, fill float64, f func(*policy.Scheduler)) policy.Component {
		q := policy.QuotaScheduler{ID: "x", Selectors: at, Capacity: capacity, Fill: fill, Interval: time.Second}
		if f != nil {
			f(&q.Scheduler)
		}
		return q
	}
	calendar := func(amount float64, label string) policy.Component {
		return policy.CalendarQuota{ID: "x", Selectors: at, Amount: amount, Period: policy.PeriodMonth, TokensLabel: label}
	}
	slots := func(limit float64) policy.Component {
		return policy.ConcurrencyLimiter{ID: "x", Selectors: at, Max: limit, MaxInflight: time.Hour}
	}
	slotQueue := func(limit float64, w ...policy.Workload) policy.Component {
		return policy.ConcurrencyScheduler{ID: "x", Selectors: at, Max: limit, MaxInflight: time.Hour, Scheduler: policy.Scheduler{Workloads: w}}
	}
	breaker := func(f func(*policy.CircuitBreaker)) policy.Component {
		b := policy.CircuitBreaker{ID: "x", Selectors: at, Window: time.Minute, OpenDuration: time.Minute}
		f(&b)
		return b
	}
	where := func(e policy.Expression) policy.Component {
		return policy.RateLimiter{
			ID: "x", Selectors: []policy.Selector{{ControlPoint: "point", Labels: policy.LabelMatcher{Expression: e}}}, Interval: time.Second,
		}
	}
	matched := func(m policy.LabelMatcher) policy.Component {
		return policy.RateLimiter{ID: "x", Selectors: []policy.Selector{{ControlPoint: "point", Labels: m}}, Interval: time.Second}
	}
	for _, tt := range []struct {
		name   string
		c      policy.Component
		labels string
		want   string // of the warning
		admits int    // flows, of two in two minutes
	}{
		{"a bucket below the cost", rate(0.5, 0.5, nil), "", "it takes 1 tokens, and the bucket holds 0.5", 0},
		{"a bucket below the cost, with a label for it", rate(0.5, 0.5, func(l *policy.RateLimiter) { l.TokensLabel = "tokens" }), "", `component "x": no flow without the label "tokens" is ever admitted: it takes 1 tokens, and the bucket holds 0.5`, 0},
		{"the same bucket, for a flow that has the label", rate(0.5, 0.5, func(l *policy.RateLimiter) { l.TokensLabel = "tokens" }), "tokens=0.5", `no flow without the label "tokens"`, 2},
		{"a calendar quota below the cost", calendar(0.5, ""), "", "it takes 1 tokens, and the bucket holds 0.5", 0},
		{"a calendar quota below the cost, with a label for it", calendar(0.5, "tokens"), "", `no flow without the label "tokens" is ever admitted: it takes 1 tokens, and the bucket holds 0.5`, 0},
		{"a bucket below the cost that lets all pass", rate(0.5, 0.5, func(l *policy.RateLimiter) { l.PassThrough = true }), "", "", 2},
		{"a bucket that does not refill", rate(1, 0, nil), "", "never refills", 1},
		{"a bucket that refills in many centuries", rate(1, 1e-12, nil), "", "never refills", 1},
		{"a bucket that refills once a minute", rate(1, 1.0/60, nil), "", "", 2},
		{"an override that does not refill", rate(5, 5, func(l *policy.RateLimiter) {
			l.LimitBy, l.Overrides = "job", map[string]policy.Override{"heavy": {Capacity: 1, Fill: math.SmallestNonzeroFloat64}}
		}), "job=heavy", `component "x": an override (Capacity 1, Fill 0): a fill of 0 in 1s never refills`, 1},
		{"an override below the cost", rate(5, 5, func(l *policy.RateLimiter) {
			l.LimitBy, l.Overrides = "job", map[string]policy.Override{"heavy": {Capacity: 0.5}}
		}), "job=heavy", `component "x": an override (Capacity 0.5): no flow is ever admitted: it takes 1 tokens, and the bucket holds 0.5`, 0},
		{"an override of 0, which refuses", rate(5, 5, func(l *policy.RateLimiter) {
			l.LimitBy, l.Overrides = "job", map[string]policy.Override{"heavy": {Capacity: math.SmallestNonzeroFloat64}}
		}), "job=heavy", "", 0},
		{"an override below the cost of a workload", policy.QuotaScheduler{
			ID: "x", Selectors: at, Capacity: 9, Fill: 9, Interval: time.Second, LimitBy: "job", Scheduler: policy.Scheduler{Workloads: []policy.Workload{heavy}},
			Overrides: map[string]policy.Override{"heavy": {Capacity: 8}},
		}, "job=heavy", `an override (Capacity 8): workload "heavy": no flow is ever admitted`, 0},
		{"a calendar quota with an override below the cost", policy.CalendarQuota{
			ID: "x", Selectors: at, Amount: 9, Period: policy.PeriodMonth, LimitBy: "job", Overrides: map[string]policy.Override{"heavy": {Amount: 0.5}},
		}, "job=heavy", "an override (Amount 0.5): no flow is ever admitted", 0},
		{"a breaker that one failure opens by an override", breaker(func(b *policy.CircuitBreaker) {
			b.FailureCount, b.LimitBy, b.Overrides = 2, "job", map[string]policy.Override{"heavy": {FailureCount: 1}}
		}), "job=heavy", "an override (FailureCount 1): a single flow that fails opens the breaker", 2},
		{"a limit of 0, which refuses", rate(0, 0, nil), "", "", 0},
		{"a limit of 0 that refills", rate(0, 1, nil), "", "", 0},
		{"a limit of 0 with a queue", quota(0, 0, nil), "", "", 0},
		{"a quota below the cost", quota(0.5, 1, nil), "", `workload "default": no flow is ever admitted: it takes 1 tokens, and the bucket holds 0.5`, 0},
		{"a quota below the cost, with a label for it", quota(0.5, 1, func(s *policy.Scheduler) { s.TokensLabel = "tokens" }), "", `workload "default": no flow without the label "tokens" is ever admitted: it takes 1 tokens, and the bucket holds 0.5`, 0},
		{"the same quota, for a flow that has the label", quota(0.5, 1, func(s *policy.Scheduler) { s.TokensLabel = "tokens" }), "tokens=0.5", `no flow without the label "tokens"`, 2},
		{"a quota that does not refill", quota(1, 0, nil), "", "never refills", 1},
		{"a workload that costs more than the quota", quota(8, 1, func(s *policy.Scheduler) { s.Workloads = []policy.Workload{heavy} }), "job=heavy", `workload "heavy": no flow is ever admitted: it takes 9 tokens, and the bucket holds 8`, 0},
		{"the same with a label for it", quota(8, 1, func(s *policy.Scheduler) { s.Workloads, s.TokensLabel = []policy.Workload{heavy}, "tokens" }), "job=heavy", `workload "heavy": no flow without the label "tokens" is ever admitted: it takes 9`, 0},
		{"the same for a flow that has the label", quota(8, 1, func(s *policy.Scheduler) { s.Workloads, s.TokensLabel = []policy.Workload{heavy}, "tokens" }), "job=heavy tokens=1", `no flow without the label "tokens"`, 2},
		{"a workload that costs nothing", quota(0.5, 1, func(s *policy.Scheduler) { s.Default.Tokens = policy.NoTokens }), "", "", 2},
		{"half a slot, which admits one flow at a time", slots(0.5), "", "", 2},
		{"no slot, which refuses", slots(0), "", "", 0},
		{"half a slot with a queue", slotQueue(0.5), "", "", 2},
		{"a workload that costs more than there are slots", slotQueue(2, heavy), "job=heavy", "", 2},
		{"a breaker that one failure opens", breaker(func(b *policy.CircuitBreaker) { b.FailureCount = 1 }), "", "a single flow that fails opens the breaker", 2},
		{"a breaker that one of one opens", breaker(func(b *policy.CircuitBreaker) { b.FailureRatio, b.MinFlows = 0.5, 1 }), "", "a single flow that fails opens the breaker", 2},
		{"a breaker that one of two opens", breaker(func(b *policy.CircuitBreaker) { b.FailureRatio, b.MinFlows = 0.5, 2 }), "", "", 2},
		{"a breaker that two failures open", breaker(func(b *policy.CircuitBreaker) { b.FailureCount = 2 }), "", "", 2},
		{"a breaker that one failure opens, and that lets all pass", breaker(func(b *policy.CircuitBreaker) { b.FailureCount, b.PassThrough = 1, true }), "", "", 2},
		{"a sampler of nothing, which refuses", policy.Sampler{ID: "x", Selectors: at}, "", "", 0},
		{"an any without parts", where(policy.Any{}), "", `Selectors[0].Labels.Expression holds for no flow: an any without parts is false`, 2},
		{"a not of an all without parts", where(policy.Not{Of: policy.All{}}), "", "Selectors[0].Labels.Expression holds for no flow", 2},
		{"an all with an any without parts", where(policy.All{policy.LabelExists("job"), policy.Any{}}), "", "Selectors[0].Labels.Expression holds for no flow", 2},
		{"an all without parts", where(policy.All{}), "", "", 0},
		{"a label that is there and is not", where(policy.All{policy.LabelExists("job"), policy.Not{Of: policy.LabelExists("job")}}), "job=heavy", `Selectors[0].Labels holds for no flow: its conditions on the label "job" contradict each other`, 2},
		{"a label of two values", where(policy.All{policy.LabelEquals{Label: "job", Value: "heavy"}, policy.All{policy.LabelEquals{Label: "job", Value: "light"}}}), "job=heavy", `the label "job" contradict`, 2},
		{"a label of one of two values", where(policy.Any{policy.LabelEquals{Label: "job", Value: "heavy"}, policy.LabelEquals{Label: "job", Value: "light"}}), "job=heavy", "", 0},
		{"a value that it has and has not", where(policy.All{policy.LabelEquals{Label: "job", Value: "heavy"}, policy.Not{Of: policy.Any{policy.LabelEquals{Label: "job", Value: "heavy"}, policy.LabelExists("x")}}}), "job=heavy", `the label "job" contradict`, 2},
		{"a value and not another", where(policy.All{policy.LabelEquals{Label: "job", Value: "heavy"}, policy.Not{Of: policy.LabelEquals{Label: "job", Value: "light"}}}), "job=heavy", "", 0},
		{"a match of a label that is not there", where(policy.All{policy.LabelMatches{Label: "job", Regex: ".*"}, policy.Not{Of: policy.LabelExists("job")}}), "", `the label "job" contradict`, 2},
		{"no match of a label that is not there", where(policy.All{policy.Not{Of: policy.LabelMatches{Label: "job", Regex: ".*"}}, policy.Not{Of: policy.LabelExists("job")}}), "", "", 0},
		{"possibilities that contradict themselves", where(policy.Any{
			policy.All{policy.LabelExists("job"), policy.Not{Of: policy.LabelExists("job")}},
			policy.Not{Of: policy.Any{policy.LabelExists("a"), policy.Not{Of: policy.LabelExists("a")}}},
		}), "job=heavy", "Selectors[0].Labels.Expression holds for no flow: in each of its possibilities", 2},
		{"a possibility that contradicts itself, and another", where(policy.Any{policy.All{policy.LabelExists("job"), policy.Not{Of: policy.LabelExists("job")}}, policy.LabelExists("job")}), "job=heavy", "", 0},
		{"a not of all", where(policy.Not{Of: policy.All{policy.LabelExists("job"), policy.Not{Of: policy.LabelExists("job")}}}), "job=heavy", "", 0},
		{"an equal and a require", matched(policy.LabelMatcher{Equal: map[string]string{"job": "heavy"}, Require: []policy.Requirement{{Key: "job", Operator: policy.DoesNotExist}}}), "job=heavy", `the label "job" contradict`, 2},
		{"lists without a common value", matched(policy.LabelMatcher{Require: []policy.Requirement{
			{Key: "job", Operator: policy.In, Values: []string{"a", "b"}}, {Key: "job", Operator: policy.In, Values: []string{"c", "d"}},
		}}), "job=a", `the label "job" contradict`, 2},
		{"a list without any of its values", matched(policy.LabelMatcher{Require: []policy.Requirement{
			{Key: "job", Operator: policy.In, Values: []string{"a", "b"}}, {Key: "job", Operator: policy.NotIn, Values: []string{"b", "a"}},
		}}), "job=a", `the label "job" contradict`, 2},
		{"a list without one of its values", matched(policy.LabelMatcher{Require: []policy.Requirement{
			{Key: "job", Operator: policy.In, Values: []string{"a", "b"}}, {Key: "job", Operator: policy.NotIn, Values: []string{"b"}},
		}}), "job=a", "", 0},
		{"a label that is not there has none of the values", matched(policy.LabelMatcher{Require: []policy.Requirement{
			{Key: "job", Operator: policy.NotIn, Values: []string{"b"}}, {Key: "job", Operator: policy.DoesNotExist},
		}}), "", "", 0},
		{"a limit by a label that is not there", policy.RateLimiter{ID: "x", Interval: time.Second, LimitBy: "job", Selectors: []policy.Selector{{
			ControlPoint: "point", Labels: policy.LabelMatcher{Require: []policy.Requirement{{Key: "job", Operator: policy.DoesNotExist}}},
		}}}, "", `Selectors[0] limits no flow: it selects flows without the label "job"`, 2},
		{"a limit by a label that may not be there", policy.RateLimiter{ID: "x", Interval: time.Second, LimitBy: "job", Selectors: []policy.Selector{{
			ControlPoint: "point", Labels: policy.LabelMatcher{Require: []policy.Requirement{{Key: "job", Operator: policy.NotIn, Values: []string{"a"}}}},
		}}}, "job=heavy", "", 0},
		{"an any with parts", where(policy.Any{policy.Any{}, policy.LabelExists("job")}), "job=heavy", "", 0},
		{"a workload of an any without parts", quota(9, 9, func(s *policy.Scheduler) {
			s.Workloads = []policy.Workload{{Name: "none", Labels: policy.LabelMatcher{Expression: policy.Any{}}}}
		}), "", "Scheduler.Workloads[0].Labels.Expression holds for no flow", 2},
		{"a latency of an any without parts", policy.LoadScheduler{ID: "x", Selectors: at, LoadMultiplier: policy.MeanLatency{
			Selectors: []policy.Selector{{ControlPoint: "point", Labels: policy.LabelMatcher{Expression: policy.Any{}}}}, Over: time.Minute,
		}}, "", "LoadMultiplier.Selectors[0].Labels.Expression holds for no flow", 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{tt.c}}})
				if err != nil {
					t.Fatal(err)
				}
				defer e.Close()
				client, err := flowctl.New(e)
				if err != nil {
					t.Fatal(err)
				}
				got := strings.Join(e.Warnings(), "; ")
				if (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) || got != "" && !strings.HasPrefix(got, `policy "p": component "x": `) {
					t.Errorf("Warnings() = %q want %q", got, tt.want)
				}
				admitted := 0
				for range 2 {
					flow := client.Start(t.Context(), "point", flowctl.Params{Labels: labelled(tt.labels)})
					if flow.ShouldRun() {
						admitted++
					}
					end(flow)
					<-time.After(time.Minute)
				}
				if admitted != tt.admits {
					t.Errorf("%d of 2 flows were admitted want %d", admitted, tt.admits)
				}
			})
		})
	}
}

// A queue timeout that a client's check timeout cuts short is reported, by the warnings and in the log, whichever came
// first: the policies or the client.
func TestWarningsOfQueueTimeouts(t *testing.T) {
	const ms = time.Millisecond
	scheduled := func(s policy.Scheduler) []policy.Policy {
		return []policy.Policy{{Name: "p", Components: []policy.Component{
			policy.QuotaScheduler{ID: "x", Selectors: policy.At("point"), Capacity: 1, Fill: 1, Interval: time.Second, Scheduler: s},
		}}}
	}
	timeouts := func(d, gold time.Duration) policy.Scheduler {
		return policy.Scheduler{
			Default: policy.WorkloadParameters{QueueTimeout: d},
			Workloads: []policy.Workload{{
				Name: "gold", Labels: policy.LabelMatcher{Equal: map[string]string{"tier": "gold"}},
				WorkloadParameters: policy.WorkloadParameters{QueueTimeout: gold},
			}},
		}
	}
	warning := func(workload string, timeout, check, allowed time.Duration) string {
		return fmt.Sprintf(`policy "p": component "x": workload %q: queue timeout of %v: a client's check timeout of %v lets flows wait for %v, `+
			"unless Params.MaxWait or Params.CheckTimeout says more", workload, timeout, check, allowed)
	}
	for _, tt := range []struct {
		name     string
		policies []policy.Policy
		checks   []time.Duration // of clients; 0: the default
		want     []string
	}{
		{"none", scheduled(policy.Scheduler{}), []time.Duration{0}, nil},
		{"no queue", scheduled(timeouts(policy.NoQueue, policy.NoQueue)), []time.Duration{0}, nil},
		{"short", scheduled(timeouts(190*ms, 100*ms)), []time.Duration{0}, nil},
		{"shorter by less than the margin", scheduled(timeouts(200*ms, 191*ms)), []time.Duration{0}, []string{
			warning("gold", 191*ms, 200*ms, 190*ms), warning("default", 200*ms, 200*ms, 190*ms),
		}},
		{
			"shorter by less than a margin of its own", scheduled(policy.Scheduler{Margin: 150 * ms, Default: policy.WorkloadParameters{QueueTimeout: 150 * ms}}),
			[]time.Duration{0},
			[]string{warning("default", 150*ms, 200*ms, 50*ms)},
		},
		{"no client", scheduled(timeouts(5*time.Second, 0)), nil, nil},
		{"the default", scheduled(timeouts(5*time.Second, 0)), []time.Duration{0}, []string{warning("default", 5*time.Second, 200*ms, 190*ms)}},
		{"a workload's", scheduled(timeouts(0, time.Second)), []time.Duration{0}, []string{warning("gold", time.Second, 200*ms, 190*ms)}},
		{"clients that wait as long as it takes", scheduled(timeouts(time.Second, 0)), []time.Duration{-1, time.Minute}, nil},
		{"the shortest of clients", scheduled(timeouts(time.Second, 2*time.Second)), []time.Duration{-1, time.Minute, 700 * ms, 800 * ms}, []string{
			warning("gold", 2*time.Second, 700*ms, 690*ms), warning("default", time.Second, 700*ms, 690*ms),
		}},
		{"a margin", scheduled(policy.Scheduler{Margin: 300 * ms}), []time.Duration{0}, []string{
			`policy "p": component "x": no flow waits, unless Params.MaxWait says so: the margin of 300ms leaves none of a client's check timeout of 200ms`,
		}},
		{"a margin without a queue", scheduled(policy.Scheduler{Margin: 300 * ms, Default: policy.WorkloadParameters{QueueTimeout: policy.NoQueue}}), []time.Duration{0}, nil},
		{"a dry run, in which no flow waits", []policy.Policy{{Name: "p", Components: []policy.Component{
			concurrency(func(c *policy.ConcurrencyScheduler) { c.DryRun, c.Scheduler.Default.QueueTimeout = true, time.Second }),
		}}}, []time.Duration{0}, nil},
		{"a load scheduler", []policy.Policy{{Name: "p", Components: []policy.Component{policy.LoadScheduler{
			ID: "x", Selectors: policy.At("point"), LoadMultiplier: policy.Constant(1), Scheduler: timeouts(5*time.Second, 0),
		}}}}, []time.Duration{0}, []string{warning("default", 5*time.Second, 200*ms, 190*ms)}},
	} {
		for _, applied := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/applied=%v", tt.name, applied), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var log bytes.Buffer
					first := tt.policies
					if applied {
						first = nil
					}
					e, err := engine.New(first, engine.WithLogger(slog.New(slog.NewJSONHandler(&log, nil))))
					if err != nil {
						t.Fatal(err)
					}
					defer e.Close()
					for _, d := range tt.checks {
						if _, err := flowctl.New(e, flowctl.WithCheckTimeout(d)); err != nil {
							t.Fatal(err)
						}
					}
					if applied {
						if err := e.Apply(tt.policies); err != nil {
							t.Fatal(err)
						}
					}
					if diff := cmp.Diff(tt.want, e.Warnings()); diff != "" {
						t.Errorf("Warnings() (-want +got):\n%s", diff)
					}
					if got := strings.Count(log.String(), "level"); got != len(tt.want) {
						t.Errorf("%d lines are in the log want %d:\n%s", got, len(tt.want), log.String())
					}
				})
			})
		}
	}
}

// A policy file whose queue timeout is longer than the default check timeout, as an operator would write it.
func TestQueueTimeoutOfAFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		policies, err := policy.Parse("q.yaml", []byte(`
blueprint: quota-scheduling/base
policy:
  policy_name: q
  quota_scheduler:
    bucket_capacity: 1
    fill_amount: 1
    rate_limiter: {interval: 1s}
    scheduler: {default_workload_parameters: {queue_timeout: 5s}}
    selectors: [{control_point: x}]
`))
		if err != nil {
			t.Fatal(err)
		}
		e, err := engine.New(policies)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		for _, tt := range []struct {
			timeout time.Duration
			warned  bool
		}{{6 * time.Second, false}, {0, true}} {
			client, err := flowctl.New(e, flowctl.WithCheckTimeout(tt.timeout))
			if err != nil {
				t.Fatal(err)
			}
			warned := slices.ContainsFunc(e.Warnings(), func(w string) bool { return strings.Contains(w, "queue timeout of 5s") })
			if warned != tt.warned {
				t.Errorf("check timeout %v: Warnings() = %q", tt.timeout, e.Warnings())
			}
			for i := range 2 {
				flow := client.Start(t.Context(), "x", flowctl.Params{})
				if waits := !tt.warned; flow.ShouldRun() != (waits || i == 0) {
					t.Errorf("check timeout %v: flow %d: %v", tt.timeout, i, flow.Err())
				}
				end(flow)
			}
			<-time.After(time.Minute)
		}
	})
}

// A bucket of half a token refuses all flows that cost one, and the engine says so.
func TestCapacityBelowOne(t *testing.T) {
	e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{
		policy.RateLimiter{Selectors: policy.At("x"), Capacity: 0.5, Fill: 0.5, Interval: time.Second}, // "one in two seconds"
	}}})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	client, err := flowctl.New(e)
	if err != nil {
		t.Fatal(err)
	}
	ran := false
	_ = headgate.Do(t.Context(), client, "x", flowctl.Params{}, func(context.Context, *flowctl.Flow) error { ran = true; return nil })
	if !ran && len(e.Warnings()) == 0 {
		t.Error("no flow will ever run, and nothing tells of it")
	}
}

// A client in dry run has no flow wait, so its check timeout cuts nothing short.
func TestNoWarningsOfQueueTimeoutsInDryRun(t *testing.T) {
	policies := []policy.Policy{{Name: "p", Components: []policy.Component{policy.QuotaScheduler{
		Selectors: policy.At("point"), Capacity: 1, Fill: 1, Interval: time.Second,
		Scheduler: policy.Scheduler{Default: policy.WorkloadParameters{QueueTimeout: time.Minute}},
	}}}}
	for _, dryRun := range []bool{false, true} {
		e, err := engine.New(policies)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		opts := []flowctl.Option{flowctl.WithCheckTimeout(time.Second)}
		if dryRun {
			opts = append(opts, flowctl.WithDryRun())
		}
		if _, err := flowctl.New(e, opts...); err != nil {
			t.Fatal(err)
		}
		if got := e.Warnings(); (len(got) == 0) != dryRun {
			t.Errorf("dry run %v: Warnings() = %q", dryRun, got)
		}
	}
}

// The numbers of an escalation are checked as those of an override are, since no flow may pass while they are in force.
func TestWarningsOfEscalations(t *testing.T) {
	at := policy.At("point")
	for _, tt := range []struct {
		name     string
		capacity float64
		warned   bool
	}{{"below the cost", 0.5, true}, {"the cost", 1, false}, {"zero, which refuses", 0, false}} {
		when := policy.Escalation{Load: "load", Below: 1, Capacity: tt.capacity}
		for name, c := range map[string]policy.Component{
			"rate limiter":    policy.RateLimiter{ID: "x", Selectors: at, Capacity: 9, Fill: 9, Interval: time.Second, When: when},
			"quota scheduler": policy.QuotaScheduler{ID: "x", Selectors: at, Capacity: 9, Fill: 9, Interval: time.Second, When: when},
		} {
			t.Run(tt.name+" "+name, func(t *testing.T) {
				e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{
					policy.LoadScheduler{ID: "load", Selectors: at, LoadMultiplier: policy.Constant(1)}, c,
				}}})
				if err != nil {
					t.Fatal(err)
				}
				defer e.Close()
				warned := slices.ContainsFunc(e.Warnings(), func(w string) bool {
					return strings.HasPrefix(w, `policy "p": component "x": When: `) && strings.HasSuffix(w, "no flow is ever admitted: it takes 1 tokens, and the bucket holds 0.5")
				})
				if warned != tt.warned || !warned && len(e.Warnings()) > 0 {
					t.Errorf("Warnings() = %q", e.Warnings())
				}
			})
		}
	}
}

// A queue timeout that a flow's MaxWait cuts short is reported too. A flow that is not to wait is none.
func TestWarningsOfMaxWaits(t *testing.T) {
	for _, tt := range []struct {
		name  string
		waits []time.Duration // of flows
		want  time.Duration   // 0: no warning
	}{
		{"none", []time.Duration{0, -1}, 0},
		{"long enough", []time.Duration{5 * time.Second, time.Hour}, 0},
		{"no wait", []time.Duration{flowctl.NoWait}, 0},
		{"the shortest", []time.Duration{2 * time.Second, time.Second, 4 * time.Second, flowctl.NoWait}, time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{
					concurrency(func(c *policy.ConcurrencyScheduler) { c.Scheduler.Default.QueueTimeout = 5 * time.Second }),
				}}})
				if err != nil {
					t.Fatal(err)
				}
				defer e.Close()
				client, err := flowctl.New(e, flowctl.WithCheckTimeout(time.Minute))
				if err != nil {
					t.Fatal(err)
				}
				for { // until the slots are taken
					if flow := client.Start(t.Context(), "point", flowctl.Params{MaxWait: flowctl.NoWait}); !flow.ShouldRun() {
						break
					}
				}
				for _, d := range tt.waits {
					end(client.Start(t.Context(), "point", flowctl.Params{MaxWait: d}))
				}
				var want []string
				if tt.want > 0 {
					want = []string{fmt.Sprintf(`policy "p": component "concurrency_scheduler.0": workload "default": queue timeout of 5s: `+
						"the Params.MaxWait of a flow let it wait for %v", tt.want)}
				}
				if diff := cmp.Diff(want, e.Warnings()); diff != "" {
					t.Errorf("Warnings() (-want +got):\n%s", diff)
				}
			})
		})
	}
}

// A queue timeout that a flow's own CheckTimeout cuts short is reported too, if that is less than its client's. Over the network it is not
// known: there is only the time that is left.
func TestWarningsOfCheckTimeouts(t *testing.T) {
	const ms = time.Millisecond
	type params = flowctl.Params
	for _, tt := range []struct {
		name  string
		kinds []sides.Kind
		flows []params
		want  time.Duration // 0: no warning
	}{
		{"the client's", sides.EnginesAndStored, []params{{}, {CheckTimeout: time.Minute}}, 0},
		{"none", sides.EnginesAndStored, []params{{CheckTimeout: -1}}, 0},
		{"long enough", sides.EnginesAndStored, []params{{CheckTimeout: 5010 * ms}, {CheckTimeout: time.Hour}}, 0},
		{"apart from MaxWait", sides.EnginesAndStored, []params{{CheckTimeout: time.Second, MaxWait: 6 * time.Second}}, 0},
		{"no wait", sides.EnginesAndStored, []params{{CheckTimeout: 10 * ms}}, 0},
		{"long enough without the margin", []sides.Kind{sides.Embedded, sides.Stored}, []params{{CheckTimeout: 5005 * ms}}, 4995 * ms},
		{"the shortest", []sides.Kind{sides.Embedded, sides.Stored}, []params{{CheckTimeout: 2 * time.Second}, {CheckTimeout: 200 * ms}, {CheckTimeout: 10 * ms}}, 190 * ms},
		{"over the network", []sides.Kind{sides.Served}, []params{{CheckTimeout: 2 * time.Second}, {CheckTimeout: 200 * ms}}, 0},
	} {
		for _, at := range []struct {
			flows int // of each at a time
			check time.Duration
		}{{1, time.Minute}, {9, time.Minute}, {1, -1}, {9, -1}} {
			t.Run(fmt.Sprintf("%s, %d at a time, client's %v", tt.name, at.flows, at.check), func(t *testing.T) {
				sides.Setup{
					Policies: sides.Policies(concurrency(func(c *policy.ConcurrencyScheduler) { c.Scheduler.Default.QueueTimeout = 5 * time.Second })),
					Options:  []flowctl.Option{flowctl.WithCheckTimeout(at.check)},
				}.InBubbles(t, tt.kinds, func(t *testing.T, side *sides.Side) {
					for { // until the slots are taken
						if flow := side.Client.Start(t.Context(), "point", params{MaxWait: flowctl.NoWait}); !flow.ShouldRun() {
							break
						}
					}
					var flows sync.WaitGroup
					for _, p := range tt.flows {
						for range at.flows {
							flows.Go(func() { end(side.Client.Start(t.Context(), "point", p)) })
						}
					}
					flows.Wait()
					var want []string
					if tt.want > 0 {
						want = []string{fmt.Sprintf(`policy "test": component "concurrency_scheduler.0": workload "default": queue timeout of 5s: `+
							"the Params.CheckTimeout of a flow let it wait for %v", tt.want)}
					}
					if diff := cmp.Diff(want, side.Engine.Warnings()); diff != "" {
						t.Errorf("Warnings() (-want +got):\n%s", diff)
					}
				})
			})
		}
	}
}

// A flow whose own check timeout leaves it no time to wait, less the margin, is warned about, also if its workload has no queue timeout. A check
// timeout as short as the margin that policies have by themselves says that the flow is not to wait.
func TestWarningsOfCheckTimeoutsBelowTheMargin(t *testing.T) {
	type params = flowctl.Params
	const ms = time.Millisecond
	local := []sides.Kind{sides.Embedded, sides.Stored}
	for _, tt := range []struct {
		name   string
		kinds  []sides.Kind
		margin time.Duration
		queue  time.Duration
		flows  []params
		want   time.Duration // 0: no warning
	}{
		{"less than the margin", local, 500 * ms, 0, []params{{CheckTimeout: 200 * ms}}, 200 * ms},
		{"the margin", local, 500 * ms, 0, []params{{CheckTimeout: 500 * ms}}, 500 * ms},
		{"the shortest", local, 500 * ms, 0, []params{{CheckTimeout: 300 * ms}, {CheckTimeout: 200 * ms}, {CheckTimeout: time.Second}}, 200 * ms},
		{"longer", sides.EnginesAndStored, 500 * ms, 0, []params{{CheckTimeout: 600 * ms}}, 0},
		{"apart from MaxWait", sides.EnginesAndStored, 500 * ms, 0, []params{{CheckTimeout: 200 * ms, MaxWait: time.Second}}, 0},
		{"no wait", sides.EnginesAndStored, 0, 0, []params{{CheckTimeout: policy.DefaultMargin}}, 0},
		{"no queue", sides.EnginesAndStored, 500 * ms, policy.NoQueue, []params{{CheckTimeout: 200 * ms}}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sides.Setup{
				Policies: sides.Policies(concurrency(func(c *policy.ConcurrencyScheduler) {
					c.Scheduler.Margin, c.Scheduler.Default.QueueTimeout = tt.margin, tt.queue
				})),
				Options: []flowctl.Option{flowctl.WithCheckTimeout(time.Minute)},
			}.InBubbles(t, tt.kinds, func(t *testing.T, side *sides.Side) {
				for { // until the slots are taken
					if flow := side.Client.Start(t.Context(), "point", params{MaxWait: flowctl.NoWait}); !flow.ShouldRun() {
						break
					}
				}
				for _, p := range tt.flows {
					end(side.Client.Start(t.Context(), "point", p))
				}
				var want []string
				if tt.want > 0 {
					want = []string{fmt.Sprintf(`policy "test": component "concurrency_scheduler.0": a flow did not wait: the margin of %v left none `+
						"of its Params.CheckTimeout of %v", tt.margin, tt.want)}
				}
				if diff := cmp.Diff(want, side.Engine.Warnings()); diff != "" {
					t.Errorf("Warnings() (-want +got):\n%s", diff)
				}
			})
		})
	}
}

// What flows of a client cut short counts no more as a check timeout of their own once the client is closed.
func TestWarningsOfCheckTimeoutsOfClosedClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{
			concurrency(func(c *policy.ConcurrencyScheduler) { c.Scheduler.Default.QueueTimeout = 5 * time.Second }),
		}}})
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		for _, d := range []time.Duration{time.Minute, time.Second} {
			client, err := flowctl.New(e, flowctl.WithCheckTimeout(d))
			if err != nil {
				t.Fatal(err)
			}
			for client.Start(t.Context(), "point", flowctl.Params{}).ShouldRun() { // until the slots are taken
			}
			if d == time.Second {
				_ = client.Close(t.Context())
			}
		}
		if got := e.Warnings(); got != nil {
			t.Errorf("Warnings() = %q", got)
		}
	})
}

// The check timeout of a client counts until the client is closed.
func TestWarningsOfClosedClients(t *testing.T) {
	e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{policy.QuotaScheduler{
		Selectors: policy.At("point"), Capacity: 1, Fill: 1, Interval: time.Second,
		Scheduler: policy.Scheduler{Default: policy.WorkloadParameters{QueueTimeout: time.Minute}},
	}}}})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	var clients []*flowctl.Client
	for _, d := range []time.Duration{2 * time.Minute, 30 * time.Second, time.Second, time.Second, -1} {
		client, err := flowctl.New(e, flowctl.WithCheckTimeout(d))
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, client)
	}
	for _, step := range []struct {
		closes int // of the clients; below 0: none
		want   string
	}{{-1, "1s"}, {2, "1s"}, {4, "1s"}, {3, "30s"}, {3, "30s"}, {0, "30s"}, {1, ""}} {
		if step.closes >= 0 {
			_ = clients[step.closes].Close(t.Context())
		}
		got := strings.Join(e.Warnings(), "; ")
		if (got == "") != (step.want == "") || !strings.Contains(got, "check timeout of "+step.want) && step.want != "" {
			t.Errorf("client %d was closed: Warnings() = %q want a check timeout of %q", step.closes, got, step.want)
		}
	}
}

// A name of a policy's for a label that no component reads is warned about: it may be misspelt where a component reads it.
func TestWarningsOfNamesThatNothingReads(t *testing.T) {
	const warning = `policy "p": no component reads "user_typ", which is a name of the policy's for the label "http.request.header.user_type"`
	for _, tt := range []struct {
		name string
		c    policy.Component
		want []string
	}{
		{"misspelt", policy.RateLimiter{Selectors: policy.At("point"), Interval: time.Second, LimitBy: "user_type"}, []string{warning}},
		{"the label by its own name", policy.RateLimiter{
			Selectors: policy.At("point"), Interval: time.Second, LimitBy: "http.request.header.user_type",
		}, []string{warning}},
		{"read", policy.RateLimiter{Selectors: policy.At("point"), Interval: time.Second, LimitBy: "user_typ"}, nil},
		{"read by a pointer", &policy.RateLimiter{Selectors: policy.At("point"), Interval: time.Second, LimitBy: "user_typ"}, nil},
		{"read by an expression", policy.RateLimiter{
			Selectors: []policy.Selector{{ControlPoint: "point", Labels: policy.LabelMatcher{Expression: policy.Not{Of: policy.LabelExists("user_typ")}}}},
			Interval:  time.Second,
		}, nil},
		{"read by a workload", policy.ConcurrencyScheduler{
			Selectors: policy.At("point"), MaxInflight: time.Second,
			Scheduler: policy.Scheduler{Workloads: []policy.Workload{{Labels: policy.LabelMatcher{Equal: map[string]string{"user_typ": "guest"}}}}},
		}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e, err := engine.New([]policy.Policy{{
				Name: "p", Labels: map[string]string{"user_typ": "http.request.header.user_type"}, Components: []policy.Component{tt.c},
			}})
			if err != nil {
				t.Fatal(err)
			}
			defer e.Close()
			if diff := cmp.Diff(tt.want, e.Warnings(), cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("Warnings (-want +got):\n%s", diff)
			}
		})
	}
}
