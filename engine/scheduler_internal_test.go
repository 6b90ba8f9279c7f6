package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine/internal/bucket"
	"github.com/headgate-go/headgate/engine/internal/slots"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/policy"
)

// openEngine is an engine of one policy.
func openEngine(t *testing.T, components ...policy.Component) *Engine {
	t.Helper()
	e, err := New([]policy.Policy{{Name: "p", Components: components}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	return e
}

// Ten thousand flows wait, are canceled, time out or are admitted; then nothing is left of them.
func TestNothingIsLeftOfWaiters(t *testing.T) {
	everything := policy.Scheduler{PriorityLabel: "priority", WorkloadLabel: "workload", FairnessLabel: "user"}
	at := policy.At("point")
	synctest.Test(t, func(t *testing.T) {
		flows := race.Pick(2_000, 10_000)
		e := openEngine(t,
			policy.ConcurrencyScheduler{Selectors: at, Max: 100, MaxInflight: time.Second, Scheduler: everything},
			policy.QuotaScheduler{Selectors: at, Capacity: 10, Fill: 100, Interval: time.Second, Scheduler: everything})
		slots := e.rules.Load().installed[0].component.(*scheduler[slots.State])
		tokens := e.rules.Load().installed[1].component.(*scheduler[bucket.State])
		rng := rand.New(rand.NewPCG(1, 2))
		outcomes := make(map[string]int)
		var mu sync.Mutex
		var wg sync.WaitGroup
		for range flows {
			ctx, cancel := context.WithCancel(t.Context())
			labels := map[string]string{
				"priority": fmt.Sprint(1 + rng.IntN(3)), "workload": fmt.Sprint(rng.IntN(5)), "user": fmt.Sprint(rng.IntN(50)),
			}
			cancelAfter, timeout := time.Duration(rng.IntN(20_000))*time.Millisecond, time.Duration(0)
			if rng.IntN(3) == 0 {
				timeout = time.Duration(1+rng.IntN(10_000)) * time.Millisecond
			}
			hold := time.Duration(rng.IntN(1200)) * time.Millisecond // some for too long
			wg.Go(func() {
				defer cancel()
				stop := time.AfterFunc(cancelAfter, cancel)
				defer stop.Stop()
				req := &agentapi.Request{ControlPoint: "point", Labels: agentapi.Labels{Params: labels}, Timeout: timeout}
				var v agentapi.Verdict
				err := e.Agent().Check(ctx, req, &v)
				outcome := "admitted"
				switch {
				case errors.Is(err, context.Canceled):
					outcome = "canceled"
				case err != nil:
					t.Error(err)
				case v.Rejected():
					outcome = cmp.Or(v.Rejection().Cause.String(), "rejected at once")
				default:
					<-time.After(hold)
				}
				if _, err := e.Agent().End(ctx, req, &v, agentapi.Outcome{Ended: agentapi.EndedOK}); err != nil {
					t.Error(err)
				}
				mu.Lock()
				outcomes[outcome]++
				mu.Unlock()
			})
		}
		synctest.Wait()
		slots.single.Lock() // else nothing orders this before what the waiters do next
		if n := slots.single.State.queue.Len(); n < flows/2 {
			t.Errorf("%d wait want most of %d", n, flows)
		}
		slots.single.Unlock()
		wg.Wait()
		table := "\n"
		for _, outcome := range slices.Sorted(maps.Keys(outcomes)) {
			table += fmt.Sprintf("%24s %6d\n", outcome, outcomes[outcome])
		}
		t.Log(table + fmt.Sprintf("%24s %6d", "left in the queues", slots.single.State.queue.Len()+tokens.single.State.queue.Len()))
		for _, outcome := range []string{"admitted", "canceled", agentapi.CauseTimeout.String()} {
			if outcomes[outcome] == 0 {
				t.Errorf("none was %s", outcome)
			}
		}
		for _, q := range []*queue{slots.single.State.queue, tokens.single.State.queue} {
			if q.Len() != 0 || q.First() != nil || q.HasDeadlines() {
				t.Errorf("an empty queue holds %d waiters", q.Len())
			}
			if q.alarm.rings != 0 || q.alarm.timer.Stop() {
				t.Error("the alarm of an empty queue is set")
			}
		}
		if a, b := slots.room.Used(), tokens.room.Used(); a != 0 || b != 0 {
			t.Errorf("%d and %d flows have room want none", a, b)
		}
		if u := slots.usage("", e.now()); u.Remaining != u.Capacity || u.InFlight != 0 {
			t.Errorf("%v of %v slots are free, of %d flows", u.Remaining, u.Capacity, u.InFlight)
		}
	})
}

// A key is not forgotten while a flow waits for it.
func TestKeysWithWaitersAreKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := openEngine(t, policy.QuotaScheduler{
			Selectors: policy.At("point"), Capacity: 1, Fill: 1, Interval: 24 * time.Hour, LimitBy: "user", MaxIdle: time.Minute,
		})
		s := e.rules.Load().installed[0].component.(*scheduler[bucket.State])
		check := func() bool {
			var v agentapi.Verdict
			req := &agentapi.Request{ControlPoint: "point", Labels: agentapi.Labels{Params: map[string]string{"user": "u"}}}
			if err := e.Agent().Check(t.Context(), req, &v); err != nil {
				t.Error(err)
			}
			return !v.Rejected()
		}
		begin := time.Now()
		var wg sync.WaitGroup
		for i := range 3 {
			wg.Go(func() {
				if ok, at := check(), time.Since(begin); !ok || at != time.Duration(i)*24*time.Hour {
					t.Errorf("flow %d: %v after %v", i, ok, at)
				}
			})
			synctest.Wait()
		}
		u := s.table.LockKnown("u")
		if s.idle(u, e.now()+int64(time.Hour*100)) {
			t.Error("the key would be forgotten if its timer were late")
		}
		u.Unlock()
		wg.Wait()
		if got := s.table.Len(); got != 1 {
			t.Errorf("%d keys want 1", got)
		}
		<-time.After(24*time.Hour + 2*time.Minute)
		synctest.Wait()
		if got := s.table.Len(); got != 0 {
			t.Errorf("%d keys want it forgotten when it is full again", got)
		}
	})
}

// A flow that gets a slot while it gives up gives the slot back.
func TestSlotOfCanceledWaiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := openEngine(t, policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour})
		req := &agentapi.Request{ControlPoint: "point"}
		var first, next agentapi.Verdict
		if err := e.Agent().Check(t.Context(), req, &first); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			var v agentapi.Verdict
			if err := e.Agent().Check(ctx, req, &v); !errors.Is(err, context.Canceled) || v.Len() != 0 {
				t.Errorf("Check() = %v, with %d decisions want it canceled", err, v.Len())
			}
		})
		synctest.Wait()
		wg.Go(func() {
			if err := e.Agent().Check(t.Context(), req, &next); err != nil || next.Rejected() {
				t.Errorf("Check() = %v, %+v want the slot", err, next)
			}
		})
		synctest.Wait()
		// The slot comes when the first of them has been canceled, and has not yet seen it.
		s := e.rules.Load().installed[0].component.(*scheduler[slots.State])
		begin := time.Now()
		s.single.Lock()
		cancel()
		if !s.of(s.single).rule.GiveBack(&s.single.State.tokens, e.now(), 1, first.At(0).Slot(), false) {
			t.Error("the first slot was gone")
		}
		s.serve(s.single, e.now())
		s.single.Unlock()
		wg.Wait()
		if took := time.Since(begin); took != 0 { // a slot that is lost comes back after MaxInflight
			t.Errorf("the slot was handed on after %v want at once", took)
		}
	})
}

// However late the queue is served, no token is lost that came while flows waited for it.
func TestLateAlarm(t *testing.T) {
	const second = int64(time.Second)
	enter := func(s *scheduler[bucket.State], now int64, d *agentapi.LimiterDecision) *waiter {
		var t ticket[bucket.State]
		s.enter(new(agentapi.Request), now, d, &t, func(*workload) time.Duration { return forever })
		return t.waiter
	}
	late := 3*second + second/2
	for _, tt := range []struct {
		name string
		look func(s *scheduler[bucket.State], first *agentapi.LimiterDecision)
		want int
		due  int64 // the next
	}{
		{"the alarm", func(s *scheduler[bucket.State], _ *agentapi.LimiterDecision) {
			s.single.Lock()
			defer s.single.Unlock()
			s.serve(s.single, late)
		}, 3, 4 * second},
		{"a flow comes", func(s *scheduler[bucket.State], _ *agentapi.LimiterDecision) {
			enter(s, late, new(agentapi.LimiterDecision))
		}, 3, 4 * second},
		{"a token comes back", func(s *scheduler[bucket.State], first *agentapi.LimiterDecision) {
			s.giveBack(late, first, true)
		}, 4, late + second}, // the half of one that does not fit beside it is lost
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := openEngine(t, policy.QuotaScheduler{Selectors: policy.At("point"), Capacity: 1, Fill: 1, Interval: time.Second})
				s := e.rules.Load().installed[0].component.(*scheduler[bucket.State])
				var first agentapi.LimiterDecision
				enter(s, 0, &first)
				var waiting []*waiter
				for range 10 {
					waiting = append(waiting, enter(s, 0, new(agentapi.LimiterDecision)))
				}
				tt.look(s, &first)
				served := 0
				for _, w := range waiting {
					if w.Served() {
						served++
					}
				}
				if served != tt.want {
					t.Errorf("%d were served want %d", served, tt.want)
				}
				if q := s.single.State.queue; q.alarm.due != tt.due || q.alarm.rings != q.alarm.due {
					t.Errorf("the next is due at %v, the alarm rings at %v want %v", time.Duration(q.alarm.due), time.Duration(q.alarm.rings), time.Duration(tt.due))
				}
				s.single.State.queue.alarm.timer.Stop()
			})
		})
	}
}

// A flow that is taken back says nothing about how long flows hold slots.
func TestUnusedSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := openEngine(t, policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour})
		req := &agentapi.Request{ControlPoint: "point"}
		var v agentapi.Verdict
		if err := e.Agent().Check(t.Context(), req, &v); err != nil || v.Rejected() {
			t.Fatalf("Check() = %v, %+v", err, v)
		}
		<-time.After(time.Second)
		if _, err := e.Agent().End(t.Context(), req, &v, agentapi.Outcome{Ended: agentapi.EndedOK}); err != nil {
			t.Fatal(err)
		}
		v = agentapi.Verdict{}
		if err := e.Agent().Check(t.Context(), req, &v); err != nil || v.Rejected() {
			t.Fatalf("Check() = %v, %+v", err, v)
		}
		<-time.After(time.Millisecond)
		e.Agent().Revert(t.Context(), req, &v)
		s := e.rules.Load().installed[0].component.(*scheduler[slots.State])
		_, likely := s.of(s.single).rule.Forecast(&s.single.State.tokens, e.now(), source.Ahead{}, 1)
		if n := s.usage("", e.now()).InFlight; n != 0 || likely != int64(time.Second) {
			t.Errorf("%d in flight, and a forecast of %v want none, a second", n, time.Duration(likely))
		}
	})
}
