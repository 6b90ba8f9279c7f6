package redisstore_test

import (
	"context"
	"testing"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/redisstore"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// takeSlot takes a slot for the holder.
func takeSlot(t *testing.T, s shared.Store, key shared.Key, rule *shared.Rule, holder shared.Holder) (slot uint64, ok bool) {
	t.Helper()
	answers := make([]shared.Answer, 1)
	if err := s.Take(t.Context(), []shared.Ask{{Key: key, Rule: rule, Tokens: 1, Holder: holder}}, answers); err != nil {
		t.Fatal(err)
	}
	return answers[0].Slot, answers[0].OK
}

// An instance learns of others long before it renews its lease: an engine's part of a limit goes by their number.
func TestFleetInstancesAreCountedOften(t *testing.T) {
	client := newClient(t, startServer(t))
	a := newStore(t, client, redisstore.WithLease(time.Hour))
	b := newStore(t, client, redisstore.WithLease(time.Hour))
	eventually(t, "both instances know each other", func() bool { return a.Instances() == 2 && b.Instances() == 2 })
}

// An instance's slots are kept while it renews its lease, and come back when it has ended.
func TestFleetLease(t *testing.T) {
	client := newClient(t, startServer(t))
	a := newStore(t, client, redisstore.WithLease(time.Second))
	b := newStore(t, client, redisstore.WithLease(time.Second))
	rule := &shared.Rule{Kind: shared.Slots, Capacity: 1, MaxInflight: time.Hour}
	if !a.Kept().IsZero() {
		t.Error("slots are kept, and none are held")
	}
	began := time.Now()
	slot, ok := takeSlot(t, a, keyOf("s", "a"), rule, shared.Holder{})
	if !ok || !a.Kept().After(began) {
		t.Fatalf("slot %d, %v, kept until %v", slot, ok, a.Kept())
	}
	eventually(t, "both instances know each other", func() bool { return a.Instances() == 2 && b.Instances() == 2 })
	eventually(t, "the lease is renewed", func() bool { return a.Kept().Sub(began) > 3*time.Second })
	if _, ok := takeSlot(t, b, keyOf("s", "a"), rule, shared.Holder{}); ok {
		t.Error("the slot of an instance that lives is given to another one")
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the slot comes back", func() bool {
		_, ok := takeSlot(t, b, keyOf("s", "a"), rule, shared.Holder{})
		return ok
	})
	eventually(t, "one instance is left", func() bool { return b.Instances() == 1 })
	// The one that is late does not free another's slot.
	results := make([]shared.Result, 1)
	err := b.Return(t.Context(), []shared.Return{{Key: keyOf("s", "a"), Rule: rule, Slot: slot}}, results)
	if err != nil || results[0].Returned {
		t.Errorf("Return of a slot that has run out = %+v, %v", results, err)
	}
}

// Slots of a session live as long as it is renewed, by whichever instance.
func TestFleetSessions(t *testing.T) {
	client := newClient(t, startServer(t))
	a := newStore(t, client, redisstore.WithLease(time.Second))
	b := newStore(t, client, redisstore.WithLease(time.Second))
	rule := &shared.Rule{Kind: shared.Slots, Capacity: 2, MaxInflight: time.Hour}
	one, two := shared.Holder{1}, shared.Holder{2}
	a.Renew(one, 2*time.Second)
	a.Renew(two, 2*time.Second)
	for _, h := range []shared.Holder{one, two} {
		if _, ok := takeSlot(t, a, keyOf("s", "a"), rule, h); !ok {
			t.Fatal("no slot")
		}
	}
	if !a.Kept().IsZero() {
		t.Error("slots of sessions count as the instance's own")
	}
	inFlight := func() int {
		u, err := b.Look(t.Context(), keyOf("s", "a"), rule)
		if err != nil {
			t.Fatal(err)
		}
		return u.InFlight
	}
	for deadline := time.Now().Add(3 * time.Second); time.Now().Before(deadline); <-time.After(100 * time.Millisecond) {
		b.Renew(one, 2*time.Second)
		a.Renew(two, 2*time.Second)
		if got := inFlight(); got != 2 {
			t.Fatalf("%d slots are held of 2 sessions that live", got)
		}
	}
	for deadline := time.Now().Add(20 * time.Second); inFlight() != 1; <-time.After(100 * time.Millisecond) {
		b.Renew(one, 2*time.Second)
		if time.Now().After(deadline) {
			t.Fatal("the slot of a session that is not renewed does not come back")
		}
	}
	b.Renew(one, 0)
	eventually(t, "the slot of a session that has ended comes back", func() bool { return inFlight() == 0 })
}

// A heartbeat of a session that is known costs the server nothing, however long the instances' lease is.
func TestFleetHeartbeats(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	s := newStore(t, newClient(t, server.Addr()), redisstore.WithLease(time.Hour))
	session := shared.Holder{1}
	rule := &shared.Rule{Kind: shared.Slots, Capacity: 1, MaxInflight: time.Hour}
	s.Renew(session, 10*time.Second)
	takeSlot(t, s, keyOf("s", "a"), rule, session)
	const heartbeats = 200
	scripts := func() int64 { return ran(t, server, "evalsha") + ran(t, server, "eval") }
	before := scripts()
	for range heartbeats {
		s.Renew(session, 10*time.Second)
		if usage, err := s.Look(t.Context(), keyOf("s", "a"), rule); err != nil || usage.InFlight != 1 {
			t.Fatalf("Look = %+v, %v want a slot that is held", usage, err)
		}
	}
	if renewals := scripts() - before - heartbeats; renewals > heartbeats/4 {
		t.Errorf("%d heartbeats were %d renewals", heartbeats, renewals)
	}
}

// A slot runs out by its own time, although its holder lives.
func TestFleetMaxInflight(t *testing.T) {
	s := newStore(t, newClient(t, startServer(t)))
	rule := &shared.Rule{Kind: shared.Slots, Capacity: 1, MaxInflight: 50 * time.Millisecond}
	takeSlot(t, s, keyOf("s", "a"), rule, shared.Holder{})
	eventually(t, "the slot runs out", func() bool {
		_, ok := takeSlot(t, s, keyOf("s", "a"), rule, shared.Holder{})
		return ok
	})
}

// A caller that leaves loses nothing: its tokens and slots come back when the answer has come.
func TestFleetCallerLeaves(t *testing.T) {
	s := newStore(t, newClient(t, startServer(t)))
	bucket := &shared.Rule{Kind: shared.Bucket, Capacity: 1000, Interval: time.Hour}
	slots := &shared.Rule{Kind: shared.Slots, Capacity: 1000, MaxInflight: time.Hour}
	got := 0
	for range 200 {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		answers := make([]shared.Answer, 2)
		go func() {
			done <- s.Take(ctx, []shared.Ask{{Key: keyOf("b", "a"), Rule: bucket, Tokens: 1}, {Key: keyOf("s", "a"), Rule: slots, Tokens: 1}}, answers)
		}()
		cancel()
		if err := <-done; err == nil {
			got++
		}
	}
	eventually(t, "all comes back", func() bool {
		b, err := s.Look(t.Context(), keyOf("b", "a"), bucket)
		u, err2 := s.Look(t.Context(), keyOf("s", "a"), slots)
		return err == nil && err2 == nil && b.Remaining == float64(1000-got) && u.InFlight == got
	})
}

// Each of 10,000 keys has a state of its own, of about 200 bytes, that goes when it is full.
func TestFleetManyKeys(t *testing.T) {
	const keys = 10_000
	client := newClient(t, startServer(t))
	s := newStore(t, client, redisstore.WithNamespace("headgate"))
	memory := func() int64 {
		info := do(t, client, "INFO", "memory")
		return infoNumber(t, info, "used_memory")
	}
	rule := &shared.Rule{Kind: shared.Bucket, Capacity: 10, Fill: 100, Interval: time.Second}
	ask := func(i int, tokens float64) {
		answers := make([]shared.Answer, 1)
		err := s.Take(t.Context(), []shared.Ask{{Key: keyOf("rate-limiter", userName(i)), Rule: rule, Tokens: tokens}}, answers)
		if err != nil || !answers[0].OK {
			t.Fatalf("Take of key %d = %+v, %v", i, answers, err)
		}
	}
	ask(0, 1) // what a script takes
	before := memory()
	slow := *rule
	slow.Interval = time.Hour
	rule = &slow
	for i := range keys {
		ask(i+1, 1)
	}
	each := float64(memory()-before) / keys
	t.Logf("%.0f bytes a bucket, of which %s are its own", each, do(t, client, "MEMORY", "USAGE", "{headgate:user=user-100}:checkout/rate-limiter"))
	if each > 250 { // with its part of the server's tables
		t.Errorf("%.0f bytes a bucket want about 200", each)
	}
	if size := do(t, client, "DBSIZE"); size < "10000" {
		t.Errorf("%s keys", size)
	}
	fast := slow
	fast.Interval = time.Millisecond
	rule = &fast
	for i := range keys {
		ask(i+1, 1)
	}
	eventually(t, "full buckets go", func() bool { return len(do(t, client, "DBSIZE")) <= 1 })
}
