package engine_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

// quota has 2 tokens, and one more each second.
func quota(f func(*policy.QuotaScheduler)) policy.QuotaScheduler {
	s := policy.QuotaScheduler{Selectors: policy.At("point"), Capacity: 2, Fill: 1, Interval: time.Second}
	if f != nil {
		f(&s)
	}
	return s
}

// concurrency has 2 slots.
func concurrency(f func(*policy.ConcurrencyScheduler)) policy.ConcurrencyScheduler {
	s := policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 2, MaxInflight: time.Minute}
	if f != nil {
		f(&s)
	}
	return s
}

// byLabels reads all there is to a flow from its labels.
var byLabels = policy.Scheduler{TokensLabel: "tokens", PriorityLabel: "priority", WorkloadLabel: "workload", FairnessLabel: "user"}

// labelled reads labels from "key=value key=value".
func labelled(text string) map[string]string {
	labels := make(map[string]string)
	for field := range strings.FieldsSeq(text) {
		key, value, _ := strings.Cut(field, "=")
		labels[key] = value
	}
	return labels
}

// A visit is a flow at a time: when it starts, how long it may take to be answered, how long it holds what it got, and
// what is to become of it.
type visit struct {
	at      time.Duration
	labels  string
	timeout time.Duration
	hold    time.Duration

	in    time.Duration       // when it is admitted; below 0: never
	out   time.Duration       // when it is rejected otherwise
	retry time.Duration       // the rejection's time to retry
	cause flowctl.RejectCause // the rejection's cause
	gone  time.Duration       // when its caller goes, if it is neither
}

const never = -1

func causeOf(flow *flowctl.Flow) flowctl.RejectCause {
	rejected, ok := errors.AsType[*flowctl.RejectedError](flow.Err())
	if !ok {
		return flowctl.CauseNone
	}
	return rejected.Cause()
}

// anyRetry leaves open when to come back.
const anyRetry = -1

// visits makes the flows come, in a bubble.
func visits(t *testing.T, c *flowctl.Client, all []visit) {
	t.Helper()
	begin := time.Now()
	var wg sync.WaitGroup
	for i, v := range all {
		<-time.After(time.Until(begin.Add(v.at)))
		wg.Go(func() {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if v.gone > 0 {
				defer time.AfterFunc(v.gone-v.at, cancel).Stop()
			}
			flow := c.Start(ctx, "point", flowctl.Params{Labels: labelled(v.labels), CheckTimeout: cmp.Or(v.timeout, never)})
			at := time.Since(begin)
			defer end(flow)
			near := func(a, b time.Duration) bool { return (a - b).Abs() <= 10*time.Nanosecond }
			switch {
			case v.gone > 0:
				if flow.Decision() != flowctl.Canceled || at != v.gone {
					t.Errorf("flow %d: %v at %v want it canceled at %v", i, flow, at, v.gone)
				}
			case !flow.Success():
				t.Errorf("flow %d: %v", i, flow.Err())
			case flow.ShouldRun() && (v.in < 0 || !near(at, v.in)):
				t.Errorf("flow %d was admitted at %v want %v, or else rejected at %v", i, at, v.in, v.out)
			case !flow.ShouldRun() && (v.in >= 0 || !near(at, v.out) || v.retry != anyRetry && !near(flow.RetryAfter(), v.retry)):
				t.Errorf("flow %d was rejected at %v, to retry after %v want %v, %v, or else admitted at %v", i, at, flow.RetryAfter(), v.out, v.retry, v.in)
			case !flow.ShouldRun() && causeOf(flow) != v.cause:
				t.Errorf("flow %d: %v: %v want %v", i, flow.Err(), causeOf(flow), v.cause)
			}
			if flow.ShouldRun() {
				<-time.After(v.hold)
			}
		})
		synctest.Wait()
	}
	wg.Wait()
}

func TestQuotaScheduler(t *testing.T) {
	const s, ms = time.Second, time.Millisecond
	byLabels := func(q *policy.QuotaScheduler) { q.Scheduler = byLabels }
	for _, tt := range []struct {
		name   string
		set    func(*policy.QuotaScheduler)
		visits []visit
	}{
		{"tokens come one by one", nil, []visit{{}, {}, {in: s}, {in: 2 * s}, {at: 10 * s, in: 10 * s}}},
		{"in steps", func(q *policy.QuotaScheduler) { q.StepFill, q.Fill = true, 2 }, []visit{{}, {}, {in: s}, {in: s}, {in: 2 * s}}},
		{"after a delay", func(q *policy.QuotaScheduler) { q.DelayInitialFill = true }, []visit{{}, {}, {in: 3 * s}, {in: 4 * s}}},
		{"the higher priority goes first", byLabels, []visit{
			{}, {}, {labels: "priority=1", in: 3 * s}, {labels: "priority=10", in: 2 * s}, {at: 500 * ms, labels: "priority=100", in: s},
		}},
		{"a priority that is none", byLabels, []visit{
			{},
			{},
			{labels: "priority=1 workload=a", in: s},
			{labels: "priority=NaN workload=b", in: 2 * s},
			{labels: "priority=-5 workload=c", in: 3 * s},
			{labels: "priority=Inf workload=d", in: 4 * s},
			{labels: "priority=0 workload=e", in: 5 * s},
		}},
		{"a user with many flows", byLabels, []visit{
			{}, {}, {labels: "user=a", in: s}, {labels: "user=a", in: 3 * s}, {labels: "user=a", in: 4 * s}, {labels: "user=b", in: 2 * s},
		}},
		{"costs", byLabels, []visit{
			{labels: "tokens=1.5"},
			{labels: "tokens=1.5", in: s},
			{labels: "tokens=0"},
			{labels: "tokens=-1", in: 2 * s},
			{labels: "tokens=x", in: 3 * s},
			{labels: "tokens=2", in: 5 * s},
			{at: 4 * s, labels: "tokens=0", in: 4 * s},
		}},
		{"who needs less than the first", byLabels, []visit{
			{labels: "tokens=1"}, {labels: "tokens=2 workload=large", in: 2 * s}, {labels: "tokens=1 workload=small"},
		}},
		{"who comes in the moment of a token", byLabels, []visit{
			{}, {}, {labels: "priority=1", in: s}, {at: s, labels: "priority=100", in: 2 * s},
		}},
		{"who goes", byLabels, []visit{
			{labels: "tokens=2"}, {labels: "tokens=2", gone: 1200 * ms}, {labels: "tokens=1", in: 1200 * ms}, {labels: "tokens=1", in: 2 * s},
		}},
		{"more than the bucket holds", byLabels, []visit{{labels: "tokens=3", in: never}, {}}},
		{"no tokens", func(q *policy.QuotaScheduler) { q.Capacity = 0 }, []visit{{in: never}, {at: s, in: never, out: s}}},
		{"no more tokens", func(q *policy.QuotaScheduler) { q.Fill = 0 }, []visit{{}, {}, {in: never}}},
		{"deadlines", nil, []visit{
			{},
			{},
			{timeout: 1009 * ms, in: never, retry: s, cause: flowctl.CauseQueueTooLong},
			{timeout: 5 * ms, in: never, retry: s, cause: flowctl.CauseLate},
			{timeout: 1010 * ms, in: s},
			{timeout: 1010 * ms, in: never, retry: 2 * s, cause: flowctl.CauseQueueTooLong},
			{at: 500 * ms, timeout: 1510 * ms, in: 2 * s},
		}},
		{"overtaken", byLabels, []visit{
			{},
			{},
			{labels: "priority=1", timeout: 1500 * ms, in: never, out: 1490 * ms, retry: 1510 * ms, cause: flowctl.CauseTimeout},
			{at: 100 * ms, labels: "priority=2", in: s},
			{at: 1100 * ms, labels: "priority=2", in: 2 * s},
		}},
		{"a margin of its own", func(q *policy.QuotaScheduler) { q.Scheduler.Margin = 300 * ms }, []visit{
			{}, {}, {timeout: 1299 * ms, in: never, retry: s, cause: flowctl.CauseQueueTooLong}, {timeout: 1300 * ms, in: s},
		}},
		{"no queue", func(q *policy.QuotaScheduler) { q.Scheduler.Default.QueueTimeout = policy.NoQueue }, []visit{
			{}, {}, {in: never, retry: s}, {at: 999 * ms, in: never, out: 999 * ms, retry: ms}, {at: s, in: s},
		}},
		{"a short queue timeout", func(q *policy.QuotaScheduler) { q.Scheduler.Default.QueueTimeout = 1500 * ms }, []visit{
			{},
			{},
			{timeout: 10 * s, in: s},
			{timeout: 10 * s, in: never, retry: 2 * s, cause: flowctl.CauseQueueTooLong},
			{timeout: s, in: never, retry: 2 * s, cause: flowctl.CauseQueueTooLong},
		}},
		{"a workload that does not wait may go before those who do", func(q *policy.QuotaScheduler) {
			q.Scheduler = byLabels2(policy.Workload{
				Labels:             policy.LabelMatcher{Equal: map[string]string{"tier": "gold"}},
				WorkloadParameters: policy.WorkloadParameters{Priority: 100, QueueTimeout: policy.NoQueue},
			})
		}, []visit{
			{labels: "tokens=1"},
			{labels: "tokens=2", in: 3 * s},
			{at: 100 * ms, labels: "tier=gold", in: 100 * ms},
			{at: 200 * ms, labels: "tier=gold", in: never, out: 200 * ms, retry: 800 * ms},
			{at: 300 * ms, labels: "tier=gold tokens=2", in: never, out: 300 * ms, retry: 1700 * ms},
			{at: s, labels: "tier=gold", in: s},
		}},
		{"a full queue", func(q *policy.QuotaScheduler) { q.Scheduler.MaxQueue = 2 }, []visit{
			{}, {}, {in: s}, {in: 2 * s}, {in: never, retry: 3 * s, cause: flowctl.CauseQueueFull}, {at: s, in: 3 * s},
		}},
		{"a queue that other keys fill", func(q *policy.QuotaScheduler) { q.LimitBy, q.Capacity, q.Scheduler.MaxQueue = "key", 1, 2 }, []visit{
			{labels: "key=a"},
			{labels: "key=b"},
			{labels: "key=c"},
			{labels: "key=a", in: s},
			{labels: "key=b", in: s},
			{labels: "key=c", in: never, retry: s, cause: flowctl.CauseQueueFull},
			{labels: "key=d"},
			{at: s, labels: "key=c", in: s},
			{at: s, labels: "key=c", in: 2 * s},
		}},
		{"room that those who go leave", func(q *policy.QuotaScheduler) { q.LimitBy, q.Capacity, q.Scheduler.MaxQueue = "key", 1, 1 }, []visit{
			{labels: "key=a"},
			{labels: "key=b"},
			{labels: "key=a", gone: 200 * ms},
			{at: 100 * ms, labels: "key=b", in: never, out: 100 * ms, retry: 900 * ms, cause: flowctl.CauseQueueFull},
			{at: 300 * ms, labels: "key=b", timeout: 710 * ms, in: s},
			{at: 400 * ms, labels: "key=a", timeout: s, in: never, out: 400 * ms, retry: 600 * ms, cause: flowctl.CauseQueueFull},
			{at: s, labels: "key=b", in: 2 * s},
		}},
		{"keys", func(q *policy.QuotaScheduler) { q.LimitBy = "key" }, []visit{
			{labels: "key=a"}, {labels: "key=a"}, {labels: "key=a", in: s}, {labels: "key=b"}, {labels: "key="}, {labels: "other=c"}, {labels: "other=c"}, {labels: "other=c"},
		}},
		{"pass through", func(q *policy.QuotaScheduler) { q.PassThrough, q.Capacity = true, 0 }, []visit{{}, {}, {}}},
		{"dry run", func(q *policy.QuotaScheduler) { q.DryRun = true }, []visit{{}, {}, {}, {}, {at: s, in: s}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				visits(t, open(t, []policy.Component{quota(tt.set)}), tt.visits)
			})
		})
	}
}

// byLabels2 is byLabels with a workload.
func byLabels2(w policy.Workload) policy.Scheduler {
	s := byLabels
	s.Workloads = []policy.Workload{w}
	return s
}

func TestConcurrencyScheduler(t *testing.T) {
	const s, ms = time.Second, time.Millisecond
	byLabels := func(c *policy.ConcurrencyScheduler) { c.Scheduler = byLabels }
	for _, tt := range []struct {
		name   string
		set    func(*policy.ConcurrencyScheduler)
		visits []visit
	}{
		{"slots are handed over", nil, []visit{{hold: s}, {hold: 2 * s}, {in: s, hold: 3 * s}, {in: 2 * s}, {in: 2 * s}}},
		{"the higher priority goes first", byLabels, []visit{
			{hold: s}, {hold: 2 * s}, {labels: "priority=1", in: 2 * s}, {at: 500 * ms, labels: "priority=10", in: s, hold: 5 * s},
		}},
		{"costs", byLabels, []visit{
			{labels: "tokens=5", hold: s}, {labels: "tokens=0"}, {labels: "tokens=0.5", in: s, hold: s}, {labels: "tokens=1e300", in: s, hold: s}, {labels: "tokens=1", in: 2 * s},
		}},
		{"a deadline", nil, []visit{
			{hold: s}, {hold: s}, {timeout: 500 * ms, in: never, out: 490 * ms, cause: flowctl.CauseTimeout}, {in: s}, {timeout: 5 * ms, in: never, cause: flowctl.CauseLate},
		}},
		{"a deadline, once it is known how long flows take", nil, []visit{
			{hold: s},
			{hold: s},
			{in: s, hold: s},
			{in: s, hold: s},
			{at: 1100 * ms, timeout: 2 * s, in: 2 * s, hold: s},
			{at: 1150 * ms, timeout: 2 * s, in: 2 * s, hold: s},
			{at: 1200 * ms, timeout: 300 * ms, in: never, out: 1200 * ms, retry: 1500 * ms, cause: flowctl.CauseQueueTooLong},
			{at: 1450 * ms, timeout: 800 * ms, in: never, out: 1450 * ms, retry: 1500 * ms, cause: flowctl.CauseQueueTooLong},
			{at: 1500 * ms, timeout: 2 * s, in: 3 * s},
		}},
		{"a deadline after those of the flows before it, which may give up before a slot comes", nil, []visit{
			{hold: s},
			{hold: s},
			{in: s, hold: s},
			{in: s, hold: 450 * ms},
			{at: 1100 * ms, timeout: 300 * ms, in: never, out: 1390 * ms, retry: 1500 * ms, cause: flowctl.CauseTimeout},
			{at: 1150 * ms, timeout: 300 * ms, in: never, out: 1440 * ms, retry: s, cause: flowctl.CauseTimeout},
			{at: 1200 * ms, timeout: 300 * ms, in: 1450 * ms},
		}},
		{"slots that are taken back are handed over", func(c *policy.ConcurrencyScheduler) { c.MaxInflight = s }, []visit{
			{hold: s / 2}, {hold: 5 * s}, {in: s / 2, hold: 5 * s}, {in: s, hold: 5 * s}, {in: 1500 * ms}, {at: 2 * s, in: 2 * s},
		}},
		{"no queue", func(c *policy.ConcurrencyScheduler) { c.Scheduler.Default.QueueTimeout = policy.NoQueue }, []visit{
			{hold: s}, {hold: 2 * s}, {in: never}, {at: 1100 * ms, in: 1100 * ms, hold: s}, {at: 1200 * ms, in: never, out: 1200 * ms, retry: s / 2},
		}},
		{"a full queue", func(c *policy.ConcurrencyScheduler) { c.Scheduler.MaxQueue = 1 }, []visit{
			{hold: s}, {hold: s}, {in: s}, {in: never, cause: flowctl.CauseQueueFull},
		}},
		{"room that those who do not wait leave", func(c *policy.ConcurrencyScheduler) {
			c.Scheduler = byLabels2(policy.Workload{
				Labels:             policy.LabelMatcher{Equal: map[string]string{"tier": "gold"}},
				WorkloadParameters: policy.WorkloadParameters{QueueTimeout: policy.NoQueue},
			})
			c.Scheduler.MaxQueue = 2
		}, []visit{
			{hold: s},
			{hold: s},
			{in: s},
			{labels: "tier=gold", in: never},
			{labels: "tier=gold", in: never},
			{in: s},
			{in: never, cause: flowctl.CauseQueueFull},
		}},
		{"no slots", func(c *policy.ConcurrencyScheduler) { c.Max = 0 }, []visit{{in: never}}},
		{"keys", func(c *policy.ConcurrencyScheduler) { c.LimitBy, c.Max = "key", 1 }, []visit{
			{labels: "key=a", hold: s}, {labels: "key=a", in: s}, {labels: "key=b", hold: s}, {labels: "other=a"},
		}},
		{"pass through", func(c *policy.ConcurrencyScheduler) { c.PassThrough, c.Max = true, 0 }, []visit{{hold: s}, {hold: s}}},
		{"dry run", func(c *policy.ConcurrencyScheduler) { c.DryRun, c.Max = true, 1 }, []visit{{hold: s}, {hold: s}, {hold: s}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				visits(t, open(t, []policy.Component{concurrency(tt.set)}), tt.visits)
			})
		})
	}
}

// What a decision says about the flow's workload, and a rejection about its reason.
func TestWorkloads(t *testing.T) {
	scheduler := byLabels2(policy.Workload{
		Name: "gold", Labels: policy.LabelMatcher{Equal: map[string]string{"tier": "gold"}},
		WorkloadParameters: policy.WorkloadParameters{Priority: 20, Tokens: 3},
	})
	scheduler.Workloads = append(scheduler.Workloads,
		policy.Workload{Labels: policy.LabelMatcher{Expression: policy.LabelExists("tier")}, WorkloadParameters: policy.WorkloadParameters{Priority: 5}},
		policy.Workload{Name: "free", Labels: policy.LabelMatcher{Expression: policy.LabelExists("free")}, WorkloadParameters: policy.WorkloadParameters{Tokens: policy.NoTokens}})
	scheduler.Default = policy.WorkloadParameters{Priority: 2, Tokens: 4}
	for _, tt := range []struct {
		labels, workload string
		priority, tokens float64
	}{
		{"", "default", 2, 4},
		{"tier=gold", "gold", 20, 3},
		{"tier=other", "1", 5, 1},
		{"tier=gold workload=mine", "mine", 20, 3},
		{"tier=gold priority=7 tokens=0.5", "gold", 7, 0.5},
		{"tier=gold priority=0 tokens=-1", "gold", 20, 3},
		{"priority=1e400 tokens=NaN workload=", "", 2, 4},
		{"tokens=0", "default", 2, 0},
		{"free=yes", "free", 1, 0},
		{"free=yes tokens=2", "free", 1, 2},
	} {
		for _, c := range []policy.Component{
			policy.QuotaScheduler{Selectors: policy.At("point"), Capacity: 10, Fill: 1, Interval: time.Second, Scheduler: scheduler},
			policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 10, MaxInflight: time.Minute, Scheduler: scheduler},
		} {
			t.Run(fmt.Sprintf("%T/%s", c, tt.labels), func(t *testing.T) {
				flow := start(t, open(t, []policy.Component{c}), flowctl.Params{Labels: labelled(tt.labels)})
				type info interface {
					GetLabel() string
					GetWorkloadIndex() string
					GetPriority() float64
					GetTokensInfo() *checkv1.LimiterDecision_TokensInfo
				}
				d := flow.CheckResponse().GetLimiterDecisions()[0]
				var got info = d.GetQuotaSchedulerInfo()
				if s := d.GetConcurrencySchedulerInfo(); s != nil {
					got = s
				}
				if got.GetLabel() != "default" || got.GetWorkloadIndex() != tt.workload || got.GetPriority() != tt.priority || got.GetTokensInfo().GetConsumed() != tt.tokens {
					t.Errorf("decision = %v want workload %q, priority %v, %v tokens", d, tt.workload, tt.priority, tt.tokens)
				}
				if held := end(flow).Held; (held == 1) != (d.GetConcurrencySchedulerInfo().GetRequestId() != "") || held == 1 && tt.tokens == 0 {
					t.Errorf("%d slots held by %v", held, d)
				}
			})
		}
	}
}

func TestSchedulerRejection(t *testing.T) {
	for _, tt := range []struct {
		name   string
		id     string
		c      policy.Component
		status int
	}{
		{"quota", "quota_scheduler.0", quota(func(q *policy.QuotaScheduler) { q.Capacity, q.LimitBy = 0, "user_id" }), 503},
		{"quota with its own status", "quota_scheduler.0", quota(func(q *policy.QuotaScheduler) { q.Capacity, q.LimitBy, q.Scheduler.DeniedStatus = 0, "user_id", 429 }), 429},
		{"concurrency", "concurrency_scheduler.0", concurrency(func(c *policy.ConcurrencyScheduler) { c.Max, c.LimitBy = 0, "user_id" }), 503},
	} {
		t.Run(tt.name, func(t *testing.T) {
			flow := start(t, open(t, []policy.Component{tt.c}), user("sesame"))
			var rejected *flowctl.RejectedError
			if !errors.As(flow.Err(), &rejected) {
				t.Fatalf("Err() = %v want a rejection", flow.Err())
			}
			want := rejection{flowctl.ReasonNoTokens, flowctl.CauseNone, "test", tt.id, "user_id", tt.status, 0}
			if got := rejectionOf(rejected); got != want {
				t.Errorf("rejection = %+v want %+v", got, want)
			}
			if strings.Contains(rejected.Error(), "sesame") {
				t.Errorf("error %q shows a label", rejected)
			}
		})
	}
}

// A caller that goes while it waits is not rejected, and takes nothing with it.
func TestCanceledWhileWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, []policy.Component{
			policy.RateLimiter{Selectors: policy.At("point"), Capacity: 4, Interval: time.Hour},
			concurrency(func(c *policy.ConcurrencyScheduler) { c.Max = 1 }),
		})
		first := start(t, c, flowctl.Params{CheckTimeout: never})
		ctx, cancel := context.WithCancelCause(t.Context())
		why := errors.New("gone home")
		var gone *flowctl.Flow
		var wg sync.WaitGroup
		wg.Go(func() { gone = c.Start(ctx, "point", flowctl.Params{CheckTimeout: never}) })
		synctest.Wait()
		next := make(chan *flowctl.Flow)
		go func() { next <- c.Start(t.Context(), "point", flowctl.Params{CheckTimeout: never}) }()
		synctest.Wait()
		cancel(why)
		wg.Wait()
		if gone.Decision() != flowctl.Canceled || !errors.Is(gone.Err(), why) || gone.ShouldRun() || gone.RejectReason() != flowctl.ReasonNone || end(gone).Held != 0 {
			t.Errorf("%v, %v want it canceled, with the cause", gone, gone.Err())
		}
		end(first)
		second := <-next
		if !second.ShouldRun() || end(second).Returned != 1 {
			t.Errorf("%v: the one behind did not get the slot", second)
		}
		for i := range 3 { // 2 of 4 tokens are used: the third is one too many
			if got := start(t, c, flowctl.Params{}); got.ShouldRun() != (i < 2) {
				t.Errorf("flow %d: %v: the rate limiter was not refunded", i, got)
			} else {
				end(got)
			}
		}
	})
}

// The nearer of the caller's deadline and the check's timeout counts, and is no cancellation: the answer comes before.
func TestDeadlines(t *testing.T) {
	for _, tt := range []struct{ deadline, timeout time.Duration }{
		{time.Second, never}, {time.Second, time.Minute}, {time.Minute, time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			c := open(t, []policy.Component{concurrency(func(c *policy.ConcurrencyScheduler) { c.Max = 1 })})
			start(t, c, flowctl.Params{})
			begin := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), tt.deadline)
			defer cancel()
			flow := c.Start(ctx, "point", flowctl.Params{CheckTimeout: tt.timeout})
			if at := time.Since(begin); flow.Decision() != flowctl.Rejected || at != 990*time.Millisecond {
				t.Errorf("deadline %v, timeout %v: %v after %v want a rejection after 990ms", tt.deadline, tt.timeout, flow, at)
			}
		})
	}
}

// Keys that do not fit wait in one queue.
func TestKeyFloodQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		visits(t, open(t, []policy.Component{concurrency(func(c *policy.ConcurrencyScheduler) { c.Max, c.LimitBy = 1, "key" })}, engine.WithKeyCap(1)), []visit{
			{labels: "key=a", hold: 9 * time.Second},
			{labels: "key=b", hold: time.Second},
			{labels: "key=c", in: time.Second, hold: time.Second},
			{labels: "key=d", in: 2 * time.Second},
			{labels: "key=a", in: 9 * time.Second},
		})
	})
}

// A flow that is not admitted gives back what all stages gave it, and flows that wait get it at once.
func TestRefundAcrossStages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cost := func(tokens string) flowctl.Params {
			return flowctl.Params{Labels: map[string]string{"tokens": tokens}, CheckTimeout: 5 * time.Second}
		}
		c := open(t, []policy.Component{
			quota(func(q *policy.QuotaScheduler) { q.Capacity, q.Scheduler.TokensLabel = 10, "tokens" }),
			concurrency(func(c *policy.ConcurrencyScheduler) { c.Max = 1 }),
			policy.RateLimiter{Selectors: policy.At("point"), Capacity: 3, Interval: time.Hour},
		})
		end(start(t, c, cost("10")))
		begin := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { // has the slot, and waits for tokens until it gives up
			if large := c.Start(ctx, "point", cost("4")); large.Decision() != flowctl.Canceled {
				t.Errorf("%v, %v", large, large.Err())
			}
		})
		synctest.Wait()
		wg.Go(func() {
			small := c.Start(t.Context(), "point", cost("1"))
			if at := time.Since(begin); !small.ShouldRun() || at != time.Second {
				t.Errorf("%v at %v want it to have the slot after 1 s, when there is a token too", small, at)
			}
			end(small)
		})
		<-time.After(time.Second)
		cancel()
		wg.Wait()
		impossible := start(t, c, cost("11"))
		m := impossible.CheckResponse()
		if impossible.ShouldRun() || len(m.GetLimiterDecisions()) != 3 || m.GetLimiterDecisions()[1].GetConcurrencySchedulerInfo().GetRequestId() != "" || end(impossible).Held != 0 {
			t.Errorf("decisions = %v want the slot given back", m)
		}
		// The rate limiter gave 3 tokens to the admitted flows, and got back those of the others.
		if last := start(t, c, cost("1")); !last.ShouldRun() {
			t.Errorf("%v, %v", last, last.Err())
		}
	})
}

// A hit spares the flow the quota, but not the slot.
func TestHitSparesQuota(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, []policy.Component{quota(func(q *policy.QuotaScheduler) { q.Capacity = 1 }), concurrency(nil)})
		params := flowctl.Params{ResultCacheKey: "k", CheckTimeout: 100 * time.Millisecond}
		miss := start(t, c, params)
		if err := miss.SetResultCache(t.Context(), []byte("v"), 0); err != nil {
			t.Fatal(err)
		}
		end(miss)
		for range 3 {
			hit := start(t, c, params)
			value, ok, err := hit.ResultCache()
			if !hit.ShouldRun() || string(value) != "v" || !ok || err != nil || len(hit.CheckResponse().GetLimiterDecisions()) != 1 || end(hit).Returned != 1 {
				t.Errorf("%v: %q, %v, %v: %v", hit, value, ok, err, hit.CheckResponse())
			}
		}
		if other := start(t, c, flowctl.Params{CheckTimeout: 100 * time.Millisecond}); other.ShouldRun() {
			t.Error("the quota was not used up by the miss")
		}
	})
}

// Of several schedulers that drop a flow, the longest wait counts, then the order; once one has, it waits for no other.
func TestSeveralSchedulersDrop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, []policy.Component{
			quota(func(q *policy.QuotaScheduler) { q.ID, q.Capacity, q.Scheduler.DeniedStatus = "a", 1, 429 }),
			quota(func(q *policy.QuotaScheduler) { q.ID, q.Capacity, q.Interval = "b", 1, time.Minute }),
			quota(func(q *policy.QuotaScheduler) { q.ID, q.Capacity, q.Interval = "c", 1, time.Minute }),
			quota(func(q *policy.QuotaScheduler) { q.ID, q.Capacity, q.Interval = "d", 1, 100*time.Millisecond }), // worth to wait for
		})
		if flow := start(t, c, flowctl.Params{}); !flow.ShouldRun() {
			t.Fatal(flow.Err())
		}
		begin := time.Now()
		for range 20 {
			flow := start(t, c, flowctl.Params{})
			var rejected *flowctl.RejectedError
			if !errors.As(flow.Err(), &rejected) || rejected.Component() != "b" || rejected.HTTPStatus != 503 || rejected.RetryAfter() != time.Minute {
				t.Fatalf("%v by %s want by b, 503, 1m", flow.Err(), rejected.Component())
			}
			if got := len(flow.CheckResponse().GetLimiterDecisions()); got != 4 {
				t.Fatalf("%d decisions want all 4", got)
			}
		}
		if waited := time.Since(begin); waited != 0 {
			t.Errorf("waited %v for what could not be", waited)
		}
	})
}

// What a flow waited is in the answer.
func TestAnswerTellsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, []policy.Component{quota(func(q *policy.QuotaScheduler) { q.Capacity = 1 })})
		for i := range 3 {
			m := start(t, c, flowctl.Params{CheckTimeout: never}).CheckResponse()
			want := time.Second
			if i == 0 {
				want = 0
			}
			if got := m.GetEnd().AsTime().Sub(m.GetStart().AsTime()); got != want {
				t.Errorf("flow %d: %v between start and end want %v", i, got, want)
			}
			if left := m.GetLimiterDecisions()[0].GetQuotaSchedulerInfo().GetTokensInfo(); left.GetRemaining() < 0 || left.GetRemaining() > 1e-6 || left.GetConsumed() != 1 {
				t.Errorf("flow %d: tokens = %v", i, left)
			}
		}
	})
}

// Whatever the interleaving: no more flows run than there are slots, each admitted flow holds one, and in the end all
// are back. Run with the race detector.
func TestConcurrentWaiters(t *testing.T) {
	const slots, keys = 3, 4
	e, err := engine.New([]policy.Policy{{Name: "test", Components: []policy.Component{
		concurrency(func(c *policy.ConcurrencyScheduler) {
			c.Max, c.LimitBy, c.Scheduler = slots, "key", byLabels
			c.Scheduler.Margin = time.Microsecond
		}),
		quota(func(q *policy.QuotaScheduler) {
			q.Capacity, q.Fill, q.Scheduler = 10, 20_000, byLabels
			q.Scheduler.Margin = time.Microsecond
		}),
	}}})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	c, err := flowctl.New(e)
	if err != nil {
		t.Fatal(err)
	}
	var running [keys]atomic.Int32
	var decisions [flowctl.Invalid + 1]atomic.Int32
	var wg sync.WaitGroup
	for worker := range 48 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(3, uint64(worker)))
			for range 100 {
				key := rng.IntN(keys)
				ctx, cancel := context.WithCancel(t.Context())
				if rng.IntN(4) == 0 {
					stop := time.AfterFunc(time.Duration(rng.IntN(2000))*time.Microsecond, cancel)
					defer stop.Stop()
				}
				flow := c.Start(ctx, "point", flowctl.Params{
					Labels:       labelled(fmt.Sprintf("key=%d priority=%d user=%d", key, 1+rng.IntN(3), rng.IntN(5))),
					CheckTimeout: time.Duration(1+rng.IntN(20)) * time.Millisecond,
				})
				decisions[flow.Decision()].Add(1)
				if flow.ShouldRun() {
					if n := running[key].Add(1); n > slots {
						t.Errorf("%d flows at once want up to %d", n, slots)
					}
					if rng.IntN(2) == 0 {
						runtime.Gosched()
					}
					running[key].Add(-1)
				}
				if r := end(flow); (r.Returned == 1) != (flow.Decision() == flowctl.Accepted) {
					t.Errorf("%v: end = %+v", flow, r)
				}
				cancel()
			}
		})
	}
	wg.Wait()
	for d := flowctl.Accepted; d <= flowctl.Invalid; d++ {
		t.Log(d, decisions[d].Load())
	}
	if decisions[flowctl.Unreachable].Load() != 0 || decisions[flowctl.Accepted].Load() == 0 {
		t.Error("want flows admitted, and none unreachable")
	}
	for key := range keys {
		var flows []*flowctl.Flow
		for range slots {
			flow := start(t, c, flowctl.Params{Labels: labelled(fmt.Sprint("key=", key)), CheckTimeout: time.Minute})
			if !flow.ShouldRun() {
				t.Errorf("%v: a slot was lost", flow.Err())
			}
			flows = append(flows, flow)
		}
		for _, flow := range flows {
			end(flow)
		}
	}
}
