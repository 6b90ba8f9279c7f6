package engine

import (
	"fmt"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine/internal/breaker"
	"github.com/headgate-go/headgate/engine/internal/bucket"
	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/engine/internal/slots"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/testing/heap"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/policy"
)

// The budget is 96 bytes a key beyond the key's own text, whatever overrides there are, and for keys in debt.
func TestKeyMemory(t *testing.T) {
	if race.Enabled {
		t.Skip("the race detector has its own memory")
	}
	const many = 1_000_000
	names := make([]string, many)
	text := 0
	for i := range names {
		names[i] = fmt.Sprintf("user-%d", i)
		text += (len(names[i]) + 7) / 8 * 8 // in the allocator's steps
	}
	overrides := make(map[string]policy.Override)
	for i := range 10_000 {
		overrides[names[100*i]] = policy.Override{Capacity: float64(20 + i)}
	}
	e, err := New([]policy.Policy{{Name: "test", Components: []policy.Component{policy.RateLimiter{
		Selectors: policy.At("point"), Capacity: 10, Fill: 10, Interval: time.Second, LimitBy: "user", TokensLabel: "cost", Overrides: overrides,
	}}}}, WithKeyCap(many))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = e.Close() }()
	l := e.rules.Load().installed[0].component.(*limiter[bucket.State])
	before := heap.Live()
	for _, name := range names {
		e := l.lock(nil, &agentapi.LimiterDecision{Label: name}, 0)
		from := l.of(e).rule
		from.Take(&e.State, 0, 1)
		from.(source.Settler[bucket.State]).Settle(&e.State, 0, 1, 15, 0)
		e.Unlock()
	}
	perKey := float64(heap.Live()-before-int64(text)) / many
	t.Logf("%.1f bytes a key", perKey)
	if perKey > 96 {
		t.Errorf("%.1f bytes a key want at most 96", perKey)
	}
	runtime.KeepAlive(names)
}

// The budget of a circuit breaker is 98 bytes a key, as long as it has not opened there: 80 for its entry, and the rest for the slots of
// the table, which are at most three quarters full.
func TestCircuitBreakerMemory(t *testing.T) {
	if race.Enabled {
		t.Skip("the race detector has its own memory")
	}
	const many = 1_000_000
	r := &breaker.Rule{Ratio: 0.5, Least: 2, Step: breaker.StepOf(1e10), Open: 1e9, Probes: 1, Successes: 1, Timeout: 1e9}
	before := heap.Live()
	tab := keys.New(many, func(*keys.Entry[breaker.State], int64) {}, func(e *keys.Entry[breaker.State], now int64) bool { return r.Idle(&e.State, now) }, nil)
	text := 0
	for i := range many {
		name := fmt.Sprintf("user-%d", i) // of which the table makes a copy
		text += (len(name) + 7) / 8 * 8
		e := tab.Lock(name, 0)
		r.End(&e.State, 0, r.Admit(&e.State, 0).Ticket, breaker.Success, 0)
		e.Unlock()
	}
	perKey := float64(heap.Live()-before-int64(text)) / many
	t.Logf("%.0f bytes a key", perKey)
	if perKey > 98 {
		t.Errorf("%.1f bytes a key want at most 98", perKey)
	}
	runtime.KeepAlive(tab)
}

// A key at which a flow has waited keeps no queue: peers may make up any number of keys. The keys at which flows waited
// last keep theirs, and a busy key is one of them.
func TestMemoryOfKeysWithoutWaiters(t *testing.T) {
	if race.Enabled {
		t.Skip("the race detector has its own memory")
	}
	const many = 20 * mostRested
	synctest.Test(t, func(t *testing.T) {
		e := openEngine(t, policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour, LimitBy: "key"})
		s := e.rules.Load().installed[0].component.(*scheduler[slots.State])
		ask := func(key string) (*agentapi.Request, *agentapi.Verdict) {
			req := &agentapi.Request{ControlPoint: "point", Labels: agentapi.Labels{Params: map[string]string{"key": key}}, Timeout: 20 * time.Millisecond}
			v := new(agentapi.Verdict)
			if err := e.Agent().Check(t.Context(), req, v); err != nil {
				t.Fatal(err)
			}
			return req, v
		}
		await := func(key string) {
			req, v := ask(key)
			if _, in := ask(key); in.Rejection().Cause != agentapi.CauseTimeout {
				t.Fatalf("the second flow of %s has the cause %v want one that waited", key, in.Rejection().Cause)
			}
			if _, err := e.Agent().End(t.Context(), req, v, agentapi.Outcome{Ended: agentapi.EndedOK}); err != nil {
				t.Fatal(err)
			}
		}
		queueOf := func(key string) *queue {
			entry := s.table.LockKnown(key)
			defer entry.Unlock()
			return entry.State.queue
		}
		await("busy")
		busy := queueOf("busy")
		before := heap.Live()
		queues := 0
		for i := range many {
			await(fmt.Sprintf("user-%d", i))
			if i%(mostRested/2) == 0 {
				await("busy")
			}
		}
		after := heap.Live()
		if queueOf("busy") != busy {
			t.Error("a busy key has lost its queue")
		}
		for i := range many {
			if queueOf(fmt.Sprintf("user-%d", i)) != nil {
				queues++
			}
		}
		perKey := float64(after-before) / many
		t.Logf("%.0f bytes a key, %d queues", perKey, queues)
		if perKey > 400 || queues > mostRested {
			t.Errorf("%.0f bytes a key and %d queues want at most 400 and %d", perKey, queues, mostRested)
		}
	})
}
