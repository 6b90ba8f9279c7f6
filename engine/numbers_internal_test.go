package engine

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine/internal/bucket"
	"github.com/headgate-go/headgate/engine/internal/slots"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

// Numbers that the host says take a place for as long as a key has them, and equal ones share it.
func TestPlacesOfOverrides(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		say := policy.Override{Capacity: 5}
		e, err := New([]policy.Policy{{Name: "test", Components: []policy.Component{policy.RateLimiter{
			Selectors: policy.At("point"), Capacity: 10, Fill: 10, Interval: time.Second, LimitBy: "user", MaxIdle: time.Second,
			Overrides: map[string]policy.Override{"a": {Capacity: 1}, "b": {Capacity: 1}, "c": {Capacity: 2}},
		}}}}, WithOverrides(func(string, string) (policy.Override, bool) { return say, true }))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = e.Close() }()
		l := e.rules.Load().installed[0].component.(*limiter[bucket.State])
		terms := func(places, asked, free int) {
			t.Helper()
			tt := l.terms.Load()
			tt.mu.Lock()
			defer tt.mu.Unlock()
			if len(*tt.list.Load()) != places || len(tt.asked) != asked || len(tt.free) != free {
				t.Errorf("%d places, %d of the host, %d free want %d, %d, %d", len(*tt.list.Load()), len(tt.asked), len(tt.free), places, asked, free)
			}
		}
		meet := func(user string, capacity float64) {
			t.Helper()
			var v agentapi.Verdict
			req := &agentapi.Request{ControlPoint: "point", Labels: agentapi.Labels{Params: map[string]string{"user": user}}}
			if err := e.Agent().Check(t.Context(), req, &v); err != nil || v.At(0).Capacity != capacity {
				t.Errorf("%s: Check = %v, capacity %v want %v", user, err, v.At(0).Capacity, capacity)
			}
		}
		terms(3, 0, 0)
		meet("a", 1)
		terms(3, 0, 0)
		for i := range 100 {
			meet(fmt.Sprint("user-", i), 5)
		}
		terms(4, 1, 0)
		say.Capacity = 6
		meet("other", 6)
		meet("other", 6)
		meet("user-1", 5)
		terms(5, 2, 0)
		<-time.After(2 * sweepEvery) // all are full by then
		synctest.Wait()
		terms(5, 0, 2)
		say.Capacity = 7
		meet("user-1", 7)
		terms(5, 1, 1)
	})
}

// A flow may come to an entry that has left the table. Whatever has changed since, that does no harm.
func TestNumbersOfEntriesThatAreGone(t *testing.T) {
	limit := func(capacity float64, overrides map[string]policy.Override) []policy.Policy {
		return []policy.Policy{{Name: "test", Components: []policy.Component{policy.RateLimiter{
			Selectors: policy.At("point"), Capacity: capacity, Fill: 10, Interval: time.Second, LimitBy: "user", Overrides: overrides,
		}}}}
	}
	e, err := New(limit(10, map[string]policy.Override{"a": {Capacity: 1}}))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = e.Close() }()
	l := e.rules.Load().installed[0].component.(*limiter[bucket.State])
	gone := l.lock(nil, &agentapi.LimiterDecision{Label: "a"}, 0)
	if got := l.of(gone).capacity; got != 1 {
		t.Errorf("capacity = %v want 1", got)
	}
	gone.Unlock()
	l.table.Forget(int64(time.Hour), 0)
	for _, capacity := range []float64{2, 3, 4} {
		if err := e.Apply(limit(capacity, nil)); err != nil {
			t.Fatal(err)
		}
		gone.Lock()
		if got := l.of(gone).capacity; got != capacity {
			t.Errorf("capacity = %v want %v", got, capacity)
		}
		gone.Unlock()
	}
}

// The slots of flows from before a change are known by the name that the component had, and no longer than one of them is held.
func TestNamesOfSlotsAfterChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limit := func(n float64) policy.ConcurrencyLimiter {
			return policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: n, MaxInflight: 24 * time.Hour, LimitBy: "user"}
		}
		e := openEngine(t, limit(1))
		req := &agentapi.Request{ControlPoint: "point", Labels: agentapi.Labels{Params: map[string]string{"user": "u"}}}
		take := func() *agentapi.LimiterDecision {
			t.Helper()
			v := new(agentapi.Verdict)
			if err := e.Agent().Check(t.Context(), req, v); err != nil || v.At(0).Slot() == 0 {
				t.Fatalf("Check() = %v, %+v want a slot", err, v)
			}
			return v.At(0)
		}
		apply := func(n float64) {
			t.Helper()
			if err := e.Apply([]policy.Policy{{Name: "test", Components: []policy.Component{limit(n)}}}); err != nil {
				t.Fatal(err)
			}
		}
		names := func(want int) {
			t.Helper()
			<-time.After(3 * sweepEvery)
			synctest.Wait()
			e.mu.RLock()
			defer e.mu.RUnlock()
			if len(e.holders) != want {
				t.Errorf("%d names want %d", len(e.holders), want)
			}
		}
		back := func(d *agentapi.LimiterDecision) {
			t.Helper()
			c := d.Component
			got := e.Agent().EndSlots(t.Context(), []agentapi.SlotName{{Policy: c.Policy, Hash: c.Hash, Component: c.ID, Label: "user:u", Slot: d.Slot()}})
			if !got[0].Known || !got[0].Returned {
				t.Errorf("EndSlots = %+v want the slot given back", got)
			}
		}
		first := take()
		apply(2)
		<-time.After(2 * sweepEvery)
		second := take()
		apply(3)
		apply(4)
		names(4) // the flow of the first may have taken the others too
		back(first)
		names(3)
		back(second)
		names(1)
		s := e.rules.Load().installed[0].component.(*limiter[slots.State])
		if _, ok := s.oldest(e.now()); ok {
			t.Error("a slot is still held")
		}
	})
}
