package engine

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine/internal/bucket"
	"github.com/headgate-go/headgate/engine/internal/slots"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

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
			for seed := range uint64(300) {
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
						if err := e.Check(t.Context(), req, &v); err != nil {
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
						tokens := tokensOf(req, "tokens", 1)
						told = s.outlook(l, e.now(), outlookKey{s.workloads.claim(&s.workloads.others, req), tokens, tokens, mostVisits})
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
			if exact < 100 || gaveUp < 100 {
				t.Error("want more to tell by")
			}
		})
	}
}

// A load scheduler lets a flow in that wants more than a second's tokens, and has the others wait for them afterwards.
func TestLookAheadOfLoad(t *testing.T) {
	rule, state := loadRule{}, load{rate: 1, multiplier: 1}
	q := newQueue(new(atomic.Int64), nil)
	q.push(&waiter{tokens: 5, cost: 5, until: int64(5500 * time.Millisecond)}, claim{workload: "low", priority: 1})
	q.push(&waiter{tokens: 5, cost: 5, until: immortal}, claim{workload: "high", priority: 100})
	got := lookAhead[load](rule, state, q, 0, outlookKey{claim: claim{workload: "low", priority: 1}, cost: 1, tokens: 1, visits: mostVisits})
	if want := (outlook{int64(6 * time.Second), true}); got != want {
		t.Errorf("lookAhead() = %v, %v want %v", time.Duration(got.at), got.known, time.Duration(want.at))
	}
}

// However many wait, a look ahead visits few of them, and is a bound as far as it got.
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
			q := newQueue(new(atomic.Int64), nil)
			for i := range 2000 {
				q.push(&waiter{tokens: 1, cost: 1, until: immortal - 1}, claim{priority: 1, fairness: fmt.Sprint(i % tt.users)})
			}
			key := outlookKey{claim: claim{priority: 1, fairness: "0"}, cost: 1, tokens: 1, visits: tt.visits}
			got := lookAhead[bucket.State](rule, state, q, 0, key)
			if got.known != tt.known || got.at < int64(tt.at) || got.at > int64(2001*time.Second) {
				t.Errorf("lookAhead() = %v, %v want %v, at the least %v", time.Duration(got.at), got.known, tt.known, tt.at)
			}
			if rule.Usage(&state, 0).Remaining != 0 || q.len != 2000 {
				t.Errorf("%v tokens, %d flows wait: the look ahead changed what it looked at", rule.Usage(&state, 0).Remaining, q.len)
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
			q := newQueue(new(atomic.Int64), nil)
			for i := range 10_000 {
				q.push(&waiter{tokens: 1, cost: 1, until: immortal - 1}, claim{priority: 1, fairness: fmt.Sprint(i % users)})
			}
			key := outlookKey{claim: claim{priority: 1, fairness: "0"}, cost: 1, tokens: 1, visits: mostVisits}
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
	q, c := newQueue(new(atomic.Int64), nil), claim{priority: 1}
	for range 3 {
		q.push(&waiter{tokens: 50, cost: r.Cost(50)}, c)
	}
	if least, _ := r.Forecast(state, 100, q.ahead(c, r.Cost(50)), 50); least != 300 {
		t.Errorf("forecast behind 3 = %d at least want 300", least)
	}
}
