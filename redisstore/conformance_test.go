package redisstore_test

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/internal/testing/sharedtest"
	"github.com/headgate-go/headgate/redisstore"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// A step is a call of a store, and what becomes of it. Waits depend on when a step runs, so only their signs are compared.
type step struct {
	by int // which of the instances

	// Take, one flow's.
	asks   []shared.Ask
	ok     []bool
	left   []float64
	wait   []int // the sign
	differ []bool

	// Return of what step number of has got, or of nothing if it is 0.
	back     *shared.Return
	of       int // counted from 1
	returned bool
	forgiven float64

	// Look, after the step.
	look      shared.Key
	rule      *shared.Rule
	remaining float64
	inFlight  int
}

// behaviors are what any store does. Nothing comes back to the buckets by itself in the time that a test takes.
func behaviors() map[string][]step {
	key := func(component string) shared.Key { return keyOf(component, "a") }
	bucket := &shared.Rule{Kind: shared.Bucket, Capacity: 10, Fill: 1, Interval: 1000 * time.Hour, Step: true}
	larger := &shared.Rule{Kind: shared.Bucket, Capacity: 20, Fill: 1, Interval: 1000 * time.Hour, Step: true}
	lowered := &shared.Rule{Kind: shared.Bucket, Capacity: 3, Base: 10, Fill: 1, Interval: 1000 * time.Hour, Step: true}
	stopped := &shared.Rule{Kind: shared.Bucket, Capacity: 10, Interval: time.Hour}
	bounded := &shared.Rule{Kind: shared.Bucket, Capacity: 10, Fill: 1, Interval: 1000 * time.Hour, Step: true, MaxDebt: 3}
	quota := &shared.Rule{Kind: shared.Quota, Capacity: 10, Periods: fixedPeriods}
	slots := &shared.Rule{Kind: shared.Slots, Capacity: 2, MaxInflight: time.Hour}
	single := &shared.Rule{Kind: shared.Slots, Capacity: 1, MaxInflight: time.Hour}
	none := &shared.Rule{Kind: shared.Slots, Capacity: 0, MaxInflight: time.Hour}
	ask := func(component string, rule *shared.Rule, tokens float64) shared.Ask {
		return shared.Ask{Key: key(component), Rule: rule, Tokens: tokens}
	}
	one := func(by int, a shared.Ask, ok bool, left float64, wait int) step {
		return step{by: by, asks: []shared.Ask{a}, ok: []bool{ok}, left: []float64{left}, wait: []int{wait}}
	}
	differing := func(s step) step {
		s.differ = []bool{true}
		return s
	}
	dry := func(a shared.Ask) shared.Ask { a.Dry = true; return a }
	owing := func(a shared.Ask, owed float64) shared.Ask { a.Owed = owed; return a }
	back := func(of int, returned bool, forgiven float64, r shared.Return) step {
		return step{of: of, back: &r, returned: returned, forgiven: forgiven}
	}
	look := func(component string, rule *shared.Rule, remaining float64, inFlight int) step {
		return step{look: key(component), rule: rule, remaining: remaining, inFlight: inFlight}
	}
	return map[string][]step{
		"a bucket of two instances": {
			one(0, ask("b", bucket, 4), true, 6, 0), one(1, ask("b", bucket, 4), true, 2, 0), one(0, ask("b", bucket, 4), false, 2, 1),
			one(1, ask("b", bucket, 11), false, 2, -1), one(0, ask("b", bucket, 2), true, 0, 0), look("b", bucket, 0, 0),
		},
		"fractions are not cut": {one(0, ask("b", bucket, 3.7), true, 6.3, 0), one(0, ask("b", bucket, 0.25), true, 6.05, 0)},
		"nothing is never refused": {
			one(0, ask("b", bucket, 10), true, 0, 0), one(0, ask("b", bucket, 0), true, 0, 0),
			one(0, ask("s", none, 0), true, 0, 0), one(0, ask("s", none, 1), false, 0, -1),
		},
		"a bucket that never fills": {one(0, ask("b", stopped, 10), true, 0, 0), one(0, ask("b", stopped, 1), false, 0, -1)},
		"all or nothing": {
			one(0, ask("b", bucket, 8), true, 2, 0),
			{asks: []shared.Ask{ask("c", bucket, 1), ask("b", bucket, 3)}, ok: []bool{true, false}, left: []float64{10, 2}, wait: []int{0, 1}},
			{asks: []shared.Ask{ask("s", slots, 1), ask("q", quota, 1), ask("b", bucket, 3)}, ok: []bool{true, true, false}, left: []float64{2, 10, 2}, wait: []int{0, 0, 1}},
			look("c", bucket, 10, 0), look("s", slots, 2, 0), look("q", quota, 10, 0),
		},
		"a key twice": {
			{asks: []shared.Ask{dry(ask("b", bucket, 6)), dry(ask("b", bucket, 6))}, ok: []bool{true, false}, left: []float64{4, 4}, wait: []int{0, 1}},
			{asks: []shared.Ask{dry(ask("s", single, 1)), dry(ask("s", single, 1))}, ok: []bool{true, false}, left: []float64{0, 0}, wait: []int{0, 0}},
			look("b", bucket, 4, 0), look("s", single, 0, 1),
		},
		"a dry ask keeps nobody out": {
			one(0, ask("b", bucket, 8), true, 2, 0),
			{asks: []shared.Ask{ask("c", bucket, 1), dry(ask("b", bucket, 3))}, ok: []bool{true, false}, left: []float64{9, 2}, wait: []int{0, 1}},
			{asks: []shared.Ask{ask("c", bucket, 1), dry(ask("b", bucket, 2))}, ok: []bool{true, true}, left: []float64{8, 0}, wait: []int{0, 0}},
		},
		"unused tokens come back": {
			one(0, ask("b", bucket, 4), true, 6, 0), back(1, true, 0, shared.Return{Tokens: 4, Unused: true}), look("b", bucket, 10, 0),
			back(1, true, 0, shared.Return{Tokens: 4, Unused: true}), look("b", bucket, 10, 0), // never more than the capacity
		},
		"settlements": {
			one(0, ask("b", bucket, 4), true, 6, 0), back(1, true, 0, shared.Return{Tokens: 4, Cost: 1}), look("b", bucket, 9, 0),
			back(1, false, 0, shared.Return{Tokens: 4, Cost: 18}), look("b", bucket, -5, 0), one(1, ask("b", bucket, 1), false, -5, 1),
			back(1, false, 3, shared.Return{Tokens: 0, Cost: 8}), look("b", bucket, -10, 0),
			one(0, ask("m", bounded, 10), true, 0, 0), back(9, false, 2, shared.Return{Tokens: 10, Cost: 15}), look("m", bounded, -3, 0),
		},
		"what was let in meanwhile is owed": {
			one(0, owing(ask("b", bucket, 1), 4), true, 5, 0), one(0, owing(ask("b", bucket, 1), 8), false, -3, 1), look("b", bucket, -3, 0),
			one(1, owing(ask("b", bucket, 1), 100), false, -10, 1),
		},
		"numbers that change": {
			one(0, ask("b", bucket, 8), true, 2, 0), differing(one(1, ask("b", larger, 1), true, 11, 0)),
			one(1, ask("b", larger, 1), true, 10, 0), one(1, ask("b", larger, 9), true, 1, 0), differing(one(0, ask("b", bucket, 1), false, 0, 1)),
		},
		"numbers for a time": {
			one(0, ask("b", bucket, 4), true, 6, 0), differing(one(1, ask("b", lowered, 1), true, 2, 0)), look("b", lowered, 2, 0),
			differing(one(0, ask("b", bucket, 1), true, 1, 0)), differing(one(0, ask("b", lowered, 1), true, 0, 0)),
			differing(one(0, ask("b", bucket, 1), false, 0, 1)),
		},
		"a quota": {
			one(0, ask("q", quota, 4), true, 6, 0), one(1, ask("q", quota, 7), false, 6, 1), one(1, ask("q", quota, 11), false, 6, -1),
			back(1, true, 0, shared.Return{Tokens: 4, Unused: true}), look("q", quota, 10, 0), back(0, false, 0, shared.Return{Key: key("q"), Rule: quota, Slot: 1, Tokens: 4, Unused: true}),
			back(1, false, 0, shared.Return{Tokens: 4, Cost: 19}), look("q", quota, -5, 0), one(0, ask("q", quota, 1), false, -5, 1),
		},
		"slots": {
			one(0, ask("s", slots, 1), true, 1, 0), one(1, ask("s", slots, 1), true, 0, 0), look("s", slots, 0, 2),
			{by: 1, of: 1, back: &shared.Return{Tokens: 1}, returned: true}, // of another instance
			{by: 0, of: 1, back: &shared.Return{Tokens: 1}},
			look("s", slots, 1, 1),
			back(0, false, 0, shared.Return{Key: key("s"), Rule: slots, Slot: 99}), one(0, ask("s", slots, 1), true, 0, 0),
		},
		"parts of slots": {
			one(0, ask("s", slots, 1.5), true, 0.5, 0), one(0, ask("s", slots, 1.5), true, -1, 0), look("s", slots, -1, 2),
			back(1, true, 0, shared.Return{}), look("s", slots, 0.5, 1),
		},
	}
}

// fixedPeriods are periods of four hours, of which the test does not see the end.
func fixedPeriods(at time.Time) [4]time.Time {
	begin := at.Truncate(time.Hour).Add(-time.Hour)
	return [4]time.Time{begin.Add(-4 * time.Hour), begin, begin.Add(4 * time.Hour), begin.Add(8 * time.Hour)}
}

// conform checks what any store does. Instances returns two of one state.
func conform(t *testing.T, instances func(t *testing.T) [2]shared.Store) {
	t.Helper()
	for name, steps := range behaviors() {
		t.Run(name, func(t *testing.T) {
			stores := instances(t)
			var taken []shared.Return // by step
			for i, st := range steps {
				taken = append(taken, shared.Return{})
				switch s := stores[st.by]; {
				case st.asks != nil:
					answers := make([]shared.Answer, len(st.asks))
					if err := s.Take(t.Context(), st.asks, answers); err != nil {
						t.Fatalf("step %d: Take: %v", i+1, err)
					}
					for j, a := range answers {
						sign := int(min(max(a.Wait, -1), 1))
						differs := st.differ != nil && st.differ[j]
						if a.OK != st.ok[j] || !near(a.Left, st.left[j]) || sign != st.wait[j] && st.asks[j].Rule.Kind != shared.Slots || a.Differs != differs {
							t.Errorf("step %d: answer %d = %+v want %v, %v left, a wait like %d, differs %v", i+1, j, a, st.ok[j], st.left[j], st.wait[j], differs)
						}
						taken[i] = shared.Return{Key: st.asks[j].Key, Rule: st.asks[j].Rule, Slot: a.Slot}
					}
				case st.back != nil:
					r := *st.back
					if st.of > 0 {
						of := taken[st.of-1]
						r.Key, r.Rule, r.Slot = of.Key, of.Rule, of.Slot
					}
					results := make([]shared.Result, 1)
					err := s.Return(t.Context(), []shared.Return{r}, results)
					held := results[0].Held
					results[0].Held = 0
					if (held > 0) != (r.Rule.Kind == shared.Slots && st.returned) {
						t.Errorf("step %d: a slot was held for %v", i+1, held)
					}
					if want := (shared.Result{Returned: st.returned, Forgiven: st.forgiven}); err != nil || results[0] != want {
						t.Errorf("step %d: Return(%+v) = %+v, %v want %+v", i+1, r, results[0], err, want)
					}
				default:
					want := shared.Usage{Remaining: st.remaining, InFlight: st.inFlight}
					if got, err := s.Look(t.Context(), st.look, st.rule); err != nil || !near(got.Remaining, want.Remaining) || got.InFlight != want.InFlight {
						t.Errorf("step %d: Look = %+v, %v want %+v", i+1, got, err, want)
					}
				}
			}
			for _, st := range steps {
				for _, a := range st.asks {
					if err := stores[1].Reset(t.Context(), a.Key); err != nil {
						t.Fatal(err)
					}
					if u, err := stores[0].Look(t.Context(), a.Key, a.Rule); err != nil || u.Remaining != a.Rule.Capacity || u.InFlight != 0 {
						t.Errorf("Look after Reset = %+v, %v want %v", u, err, a.Rule.Capacity)
					}
				}
			}
		})
	}
}

func near(a, b float64) bool { return a-b < 1e-6 && b-a < 1e-6 }

func TestFleetConforms(t *testing.T) {
	client := newClient(t, startServer(t))
	conform(t, func(t *testing.T) [2]shared.Store {
		t.Helper()
		return [2]shared.Store{newStore(t, client), newStore(t, client)}
	})
}

// The callers of such a store send lone calls themselves.
func TestFleetOwnCallsConform(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	conform(t, func(t *testing.T) (stores [2]shared.Store) {
		t.Helper()
		for i := range stores {
			s, err := redisstore.Open(t.Context(), server.URL(), redisstore.WithNamespace(t.Name()), redisstore.WithTimeout(time.Second))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = s.Close() })
			stores[i] = uncanceled{s}
		}
		return stores
	})
}

// An uncanceled store has calls whose context does not end.
type uncanceled struct{ *redisstore.Store }

func (u uncanceled) Take(ctx context.Context, asks []shared.Ask, answers []shared.Answer) error {
	return u.Store.Take(context.WithoutCancel(ctx), asks, answers)
}

func (u uncanceled) Return(ctx context.Context, returns []shared.Return, results []shared.Result) error {
	return u.Store.Return(context.WithoutCancel(ctx), returns, results)
}

func (u uncanceled) Look(ctx context.Context, key shared.Key, rule *shared.Rule) (shared.Usage, error) {
	return u.Store.Look(context.WithoutCancel(ctx), key, rule)
}

// What tests of engines use instead is no other.
func TestTwinConforms(t *testing.T) {
	conform(t, func(t *testing.T) [2]shared.Store {
		t.Helper()
		server := sharedtest.New()
		return [2]shared.Store{server.Instance(), server.Instance()}
	})
}

func TestFleetCaches(t *testing.T) {
	client := newClient(t, startServer(t))
	a, b := newStore(t, client), newStore(t, client)
	keys := []shared.CacheKey{{ControlPoint: "c", Key: "k"}, {Key: "k"}, {ControlPoint: "c", Key: "other"}}
	if err := a.Set(t.Context(), keys[0], []byte("one"), time.Hour); err != nil {
		t.Fatal(err)
	}
	if err := b.Set(t.Context(), keys[1], []byte{}, time.Hour); err != nil {
		t.Fatal(err)
	}
	got, err := b.Get(t.Context(), keys)
	if err != nil || !cmp.Equal(got, [][]byte{[]byte("one"), {}, nil}) {
		t.Errorf("Get = %q, %v", got, err)
	}
	if err := b.Delete(t.Context(), keys[0]); err != nil {
		t.Fatal(err)
	}
	if err := b.Set(t.Context(), keys[2], []byte("x"), time.Nanosecond); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nothing but the value that lasts", func() bool {
		got, err := a.Get(t.Context(), keys)
		return err == nil && slices.EqualFunc(got, [][]byte{nil, {}, nil}, func(a, b []byte) bool { return (a == nil) == (b == nil) })
	})
}

func TestFleetRamps(t *testing.T) {
	client := newClient(t, startServer(t))
	a, b := newStore(t, client), newStore(t, client)
	key := shared.Key{Policy: "p", Component: "ramp"}
	move := func(s shared.Store, from uint64, to *shared.Position) shared.Position {
		t.Helper()
		at, err := s.Move(t.Context(), key, from, to)
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	if got := move(a, 0, nil); got != (shared.Position{}) {
		t.Errorf("a ramp that has not begun = %+v", got)
	}
	if got := move(a, 0, &shared.Position{At: time.Minute, Direction: 1, Left: true}); got != (shared.Position{Version: 1, At: time.Minute, Direction: 1, Left: true}) {
		t.Errorf("begun = %+v", got)
	}
	eventually(t, "the ramp goes on", func() bool { return move(b, 0, nil).At > time.Minute })
	// The other one does not know that it has begun.
	if got := move(b, 0, &shared.Position{At: time.Hour}); got.Version != 1 || got.Direction != 1 {
		t.Errorf("moved from a position of before = %+v want the one that is", got)
	}
	if got := move(b, 1, &shared.Position{At: time.Millisecond, Direction: -1}); got.Version != 2 || got.Direction != -1 || got.Left {
		t.Errorf("moved = %+v", got)
	}
	eventually(t, "the ramp is at its beginning", func() bool { return move(a, 0, nil).At == 0 })
}

// However many flows ask at once, of however many instances, no more tokens and slots are taken than there are.
func TestFleetConcurrency(t *testing.T) {
	client := newClient(t, startServer(t))
	stores := []shared.Store{newStore(t, client), newStore(t, client)}
	bucket := &shared.Rule{Kind: shared.Bucket, Capacity: 500, Interval: time.Hour}
	slots := &shared.Rule{Kind: shared.Slots, Capacity: 7, MaxInflight: time.Hour}
	var mu sync.Mutex
	var admitted, held, most int
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			for range 100 {
				s := stores[i%2]
				asks := []shared.Ask{{Key: keyOf("b", "a"), Rule: bucket, Tokens: 1}, {Key: keyOf("s", "a"), Rule: slots, Tokens: 1}}
				answers := make([]shared.Answer, 2)
				if err := s.Take(t.Context(), asks, answers); err != nil {
					t.Error(err)
					return
				}
				if !answers[0].OK || !answers[1].OK {
					continue
				}
				mu.Lock()
				admitted++
				held++
				most = max(most, held)
				mu.Unlock()
				mu.Lock()
				held--
				mu.Unlock()
				results := make([]shared.Result, 1)
				if err := s.Return(t.Context(), []shared.Return{{Key: asks[1].Key, Rule: slots, Slot: answers[1].Slot}}, results); err != nil || !results[0].Returned {
					t.Errorf("Return = %+v, %v", results, err)
				}
			}
		})
	}
	wg.Wait()
	if admitted > 500 || most > 7 {
		t.Errorf("%d flows admitted, %d at a time want at most 500, 7", admitted, most)
	}
	u, err := stores[0].Look(t.Context(), keyOf("b", "a"), bucket)
	if err != nil || u.Remaining != float64(500-admitted) {
		t.Errorf("%v tokens are left, %v want %d", u.Remaining, err, 500-admitted)
	}
	if u, err := stores[0].Look(t.Context(), keyOf("s", "a"), slots); err != nil || u.InFlight != 0 || u.Remaining != 7 {
		t.Errorf("slots = %+v, %v want all", u, err)
	}
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); <-time.After(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it does not come true: %s", what)
		}
	}
}
