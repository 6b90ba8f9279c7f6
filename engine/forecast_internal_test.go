package engine

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine/internal/bucket"
	"github.com/headgate-go/headgate/engine/internal/slots"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/engine/internal/wfq"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/policy"
)

func newTestQueue() *wfq.Queue[pending] { return wfq.New[pending](wfq.NewRoom(1<<40, false), nil) }

func newWaiter(tokens, cost float64, deadline int64) *waiter {
	return &waiter{Flow: pending{demand: demand{tokens: tokens}}, Cost: cost, Deadline: deadline}
}

// The example of the comment in forecast.go.
func TestForecastExample(t *testing.T) {
	const second = int64(time.Second)
	rule, state := &bucket.Rule{Capacity: 1, Fill: 1, Interval: float64(time.Second)}, bucket.State{}
	rule.Fresh(&state, 0)
	rule.Take(&state, 0, 1)
	q, c := newTestQueue(), wfq.Claim{Priority: 1}
	q.Push(newWaiter(1, 1, wfq.NoDeadline), c)
	q.Push(newWaiter(1, 1, 3*second/2), c)
	if least, likely := rule.Forecast(&state, 0, source.Ahead(q.Ahead(c, 1)), 1); least != 3*second || likely != least {
		t.Errorf("by sums the flow waits for %v, %v want 3s", time.Duration(least), time.Duration(likely))
	}
	got := lookAhead[bucket.State](rule, state, q, 0, forecastKey{wish{c, 1, 1}, nil, mostVisits})
	if !got.known || got.at != 2*second {
		t.Errorf("the look ahead serves the flow at %v, %v want 2s", time.Duration(got.at), got.known)
	}
}

// A look ahead foretells exactly when a flow is served, whatever the flows before it cost, and whichever of them give
// up: so no flow is rejected that could have been served in time.
func TestLookAheadForetells(t *testing.T) {
	all := policy.Scheduler{TokensLabel: "tokens", PriorityLabel: "priority", FairnessLabel: "user"}
	for _, tt := range []struct {
		name string
		set  func(*policy.QuotaScheduler)
	}{
		{"continuous", func(*policy.QuotaScheduler) {}},
		{"in steps", func(q *policy.QuotaScheduler) { q.StepFill = true }},
		{"after a delay", func(q *policy.QuotaScheduler) { q.DelayInitialFill = true }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			gaveUp, exact := 0, 0
			for seed := range race.Pick[uint64](60, 300) {
				rng := rand.New(rand.NewPCG(seed, 5))
				c := policy.QuotaScheduler{Selectors: policy.At("point"), Capacity: 5, Fill: 1, Interval: time.Second, Scheduler: all}
				tt.set(&c)
				synctest.Test(t, func(t *testing.T) {
					e := openEngine(t, c)
					s := e.rules.Load().installed[0].component.(*scheduler[bucket.State])
					var wg sync.WaitGroup
					var mu sync.Mutex
					check := func(labels map[string]string, timeout time.Duration) (time.Duration, bool) {
						req := &agentapi.Request{ControlPoint: "point", Labels: agentapi.Labels{Params: labels}, Timeout: timeout}
						var v agentapi.Verdict
						if err := e.Agent().Check(t.Context(), req, &v); err != nil {
							t.Error(err)
						}
						return time.Duration(e.now()), !v.Rejected()
					}
					labels := func() map[string]string {
						return map[string]string{
							"tokens": fmt.Sprint(1 + rng.IntN(5)), "priority": fmt.Sprint([]int{1, 2, 50}[rng.IntN(3)]), "user": fmt.Sprint(rng.IntN(3)),
						}
					}
					for range 20 {
						labels, timeout := labels(), time.Duration(rng.IntN(3))*time.Duration(1+rng.IntN(40))*500*time.Millisecond
						wg.Go(func() {
							if _, ok := check(labels, timeout); !ok {
								mu.Lock()
								gaveUp++
								mu.Unlock()
							}
						})
						synctest.Wait()
						<-time.After(time.Duration(rng.IntN(800)) * time.Millisecond)
						synctest.Wait()
					}
					last := labels()
					req := &agentapi.Labels{Params: last}
					l := &s.single.State
					s.single.Lock()
					var told outlook
					if s.serve(s.single, e.now()); l.waiting() {
						tokens := tokensOf(req, "tokens")
						told = outlookOf(s.of(s.single).rule, l, e.now(), forecastKey{wish{s.workloads.claim(&s.workloads.others, req), tokens, tokens}, nil, mostVisits})
					}
					s.single.Unlock()
					at, ok := check(last, 0)
					wg.Wait()
					switch {
					case !told.known:
					case !ok || (at-time.Duration(told.at)).Abs() > 100*time.Nanosecond:
						t.Errorf("seed %d: served %v at %v want it at %v, as was foretold", seed, ok, at, time.Duration(told.at))
					default:
						exact++
					}
				})
			}
			t.Logf("%d were foretold, with %d that gave up", exact, gaveUp)
			if least := race.Pick(20, 100); exact < least || gaveUp < least {
				t.Error("want more to tell by")
			}
		})
	}
}

// A load scheduler lets a flow in that wants more than a second's tokens, and has the others wait for them afterwards.
func TestLookAheadOfLoad(t *testing.T) {
	rule, state := loadRule{}, load{rate: 1, multiplier: 1}
	q := newTestQueue()
	q.Push(newWaiter(5, 5, int64(5500*time.Millisecond)), wfq.Claim{Workload: "low", Priority: 1})
	q.Push(newWaiter(5, 5, wfq.NoDeadline), wfq.Claim{Workload: "high", Priority: 100})
	got := lookAhead[load](&rule, state, q, 0, forecastKey{wish{wfq.Claim{Workload: "low", Priority: 1}, 1, 1}, nil, mostVisits})
	if want := (outlook{at: int64(6 * time.Second), known: true}); got != want {
		t.Errorf("lookAhead() = %v, %v want %v", time.Duration(got.at), got.known, time.Duration(want.at))
	}
}

// However many flows wait, a look ahead visits few of them, and returns a bound if it did not reach its flow.
func TestLookAheadIsBounded(t *testing.T) {
	for _, tt := range []struct {
		name          string
		users, visits int
		known         bool
		at            time.Duration // at the least
	}{
		{"one share", 1, mostVisits, true, 2000 * time.Second},
		{"ten shares", 10, mostVisits, false, 300 * time.Second},
		{"ten shares, for an estimate", 10, fewVisits, false, 20 * time.Second},
		{"as many shares as flows", 2000, mostVisits, false, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rule := &bucket.Rule{Capacity: 1, Fill: 1, Interval: float64(time.Second)}
			var state bucket.State
			rule.Fresh(&state, 0)
			rule.Take(&state, 0, 1)
			q := newTestQueue()
			for i := range 2000 {
				q.Push(newWaiter(1, 1, wfq.NoDeadline-1), wfq.Claim{Priority: 1, Fairness: fmt.Sprint(i % tt.users)})
			}
			key := forecastKey{wish{wfq.Claim{Priority: 1, Fairness: "0"}, 1, 1}, nil, tt.visits}
			got := lookAhead[bucket.State](rule, state, q, 0, key)
			if got.known != tt.known || got.at < int64(tt.at) || got.at > int64(2001*time.Second) {
				t.Errorf("lookAhead() = %v, %v want %v, at the least %v", time.Duration(got.at), got.known, tt.known, tt.at)
			}
			if rule.Usage(&state, 0).Remaining != 0 || q.Len() != 2000 {
				t.Errorf("%v tokens, %d flows wait: the look ahead changed what it looked at", rule.Usage(&state, 0).Remaining, q.Len())
			}
		})
	}
}

func BenchmarkLookAhead(b *testing.B) {
	for _, users := range []int{1, 10, 100} {
		b.Run(fmt.Sprintf("shares=%d", users), func(b *testing.B) {
			rule := &bucket.Rule{Capacity: 1, Fill: 1, Interval: float64(time.Second)}
			var state bucket.State
			rule.Fresh(&state, 0)
			rule.Take(&state, 0, 1)
			q := newTestQueue()
			for i := range 10_000 {
				q.Push(newWaiter(1, 1, wfq.NoDeadline-1), wfq.Claim{Priority: 1, Fairness: fmt.Sprint(i % users)})
			}
			key := forecastKey{wish{wfq.Claim{Priority: 1, Fairness: "0"}, 1, 1}, nil, mostVisits}
			for b.Loop() {
				lookAhead[bucket.State](rule, state, q, 0, key)
			}
		})
	}
}

// Flows that want more than all slots are let in one after the other, and no slower.
func TestForecastOverLimit(t *testing.T) {
	r, state := &slots.Rule{Limit: 2, MaxInflight: 1000}, new(slots.State)
	r.Fresh(state, 0)
	r.GiveBack(state, 100, 50, r.Take(state, 0, 50).Slot, false)
	r.Take(state, 100, 50)
	q, c := newTestQueue(), wfq.Claim{Priority: 1}
	for range 3 {
		q.Push(newWaiter(50, r.Cost(50), wfq.NoDeadline), c)
	}
	if least, _ := r.Forecast(state, 100, source.Ahead(q.Ahead(c, r.Cost(50))), 50); least != 300 {
		t.Errorf("forecast behind 3 = %d at least want 300", least)
	}
}
