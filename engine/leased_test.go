package engine_test

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/internal/testing/sharedtest"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/internal/testing/witness"
	"github.com/headgate-go/headgate/policy"
)

// leasedLimiter has so many tokens, and as many come in each second as the rate says.
func leasedLimiter(capacity, rate float64) policy.RateLimiter {
	return policy.RateLimiter{
		ID: "c", Selectors: policy.At("point"), Capacity: capacity, Fill: rate, Interval: time.Second, LimitBy: "user", TokensLabel: "cost",
		Share: policy.ShareLeased, OnOutage: policy.OutageClosed,
	}
}

// A record is what was seen of flows.
type record struct {
	mu       sync.Mutex
	begin    time.Time
	admitted []witness.Admission
	flows    int
}

func newRecord() *record { return &record{begin: time.Now()} }

func (w *record) saw(flow *flowctl.Flow, asked time.Time, tokens float64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.flows++
	if flow.Decision() == flowctl.Accepted {
		w.admitted = append(w.admitted, witness.Admission{Asked: asked.Sub(w.begin), Told: time.Since(w.begin), Tokens: tokens})
	}
}

func (w *record) tokens() (sum float64) {
	for _, a := range w.admitted {
		sum += a.Tokens
	}
	return sum
}

// bounds checks that since the beginning no more tokens were taken than there were, and in any span of time no more than half of the
// capacity beyond that.
func (w *record) bounds(t *testing.T, capacity, rate float64) {
	t.Helper()
	if s := (witness.Bound{Capacity: 1.5 * capacity, Rate: rate}).Worst(w.admitted); s.Broken() {
		t.Errorf("%+v of a capacity of %v, and %v a second", s, capacity, rate)
	}
	for i := range w.admitted {
		w.admitted[i].Asked = 0
	}
	if s := (witness.Bound{Capacity: capacity, Rate: rate}).Worst(w.admitted); s.Broken() {
		t.Errorf("since the beginning, %+v of a capacity of %v, and %v a second", s, capacity, rate)
	}
}

// A traffic is flows of several instances.
type traffic struct {
	f     *fleet
	w     *record
	flows sync.WaitGroup
}

// run has flows come to an instance, at random times, until then.
func (tr *traffic) run(t *testing.T, r *rand.Rand, at int, perSecond float64, until time.Time, cost func() int) {
	for {
		<-time.After(time.Duration(r.ExpFloat64() / perSecond * float64(time.Second)))
		if time.Now().After(until) {
			return
		}
		tokens := cost()
		tr.flows.Go(func() {
			asked := time.Now()
			flow := tr.f.sides[at].Client.Start(t.Context(), "point", flowctl.Params{
				Labels: map[string]string{"user": "ann", "cost": fmt.Sprint(tokens)},
			})
			tr.w.saw(flow, asked, float64(tokens))
			end(flow)
		})
	}
}

func one() int { return 1 }

// uneven is how the flows of four instances are divided.
var uneven = []float64{0.7, 0.1, 0.1, 0.1}

// demand runs flows at four instances, so many a second in all, and returns what the witness and the instances saw.
func demand(t *testing.T, c policy.RateLimiter, seed uint64, perSecond float64, lasts time.Duration) (*record, []sharedtest.Counted) {
	t.Helper()
	f := newFleet(t, len(uneven), sides.Embedded, c)
	for _, s := range f.stores {
		s.Behave(sharedtest.Behavior{Late: time.Millisecond})
	}
	tr := &traffic{f: f, w: newRecord()}
	begin := time.Now()
	var wg sync.WaitGroup
	for at, part := range uneven {
		r := rand.New(rand.NewPCG(seed, uint64(at)))
		wg.Go(func() { tr.run(t, r, at, perSecond*part, begin.Add(lasts), one) })
	}
	wg.Wait()
	tr.flows.Wait()
	var calls []sharedtest.Counted
	for i, s := range f.stores {
		if err := f.sides[i].Engine.Close(); err != nil {
			t.Fatal(err)
		}
		calls = append(calls, s.Counted())
	}
	tr.w.bounds(t, c.Capacity, c.Fill)
	return tr.w, calls
}

// Leased tokens admit what exact ones do, with few calls.
func TestLeasedDemand(t *testing.T) {
	for _, tt := range []struct {
		name           string
		capacity, rate float64
		load           float64 // in parts of the rate
		least          float64 // of what exact ones admit
		perSecond      float64 // calls of an instance; 0 for any number
		perFlow        float64 // calls; 0 for any number
	}{
		{"little", 1000, 1000, 0.02, 0.99, 25, 0},
		{"a tenth", 1000, 1000, 0.1, 0.99, 25, 0},
		{"half", 1000, 1000, 0.5, 0.99, 25, 0},
		{"most", 1000, 1000, 0.9, 0.99, 25, 0},
		{"a small bucket", 200, 1000, 0.8, 0.99, 25, 0},
		{"just too much", 1000, 1000, 1.2, 0.99, 100, 0},
		{"three times too much", 200, 1000, 3, 0.99, 0, 0.02},
		{"far too much", 1000, 1000, 5, 0.99, 0, 0.02},
		{"ten times too much", 500, 500, 10, 0.99, 0, 0.02},
	} {
		t.Run(tt.name, func(t *testing.T) {
			lasts := race.Pick(5*time.Second, 10*time.Second)
			var exact, leased *record
			var calls []sharedtest.Counted
			synctest.Test(t, func(t *testing.T) {
				c := leasedLimiter(tt.capacity, tt.rate)
				c.Share = policy.ShareExact
				exact, _ = demand(t, c, 1, tt.load*tt.rate, lasts)
			})
			synctest.Test(t, func(t *testing.T) {
				leased, calls = demand(t, leasedLimiter(tt.capacity, tt.rate), 1, tt.load*tt.rate, lasts)
			})
			all := 0
			for i, c := range calls {
				n := c.Take + c.Return
				all += n
				if tt.perSecond > 0 && float64(n) > tt.perSecond*lasts.Seconds() {
					t.Errorf("instance %d called %d times in %v, %+v want %v a second", i, n, lasts, c, tt.perSecond)
				}
			}
			t.Logf("%.1f %% of what exact ones admit of %d flows, %.2f calls for 100 flows: %+v",
				100*leased.tokens()/exact.tokens(), leased.flows, 100*float64(all)/float64(leased.flows), calls)
			if leased.tokens() < tt.least*exact.tokens() {
				t.Errorf("%v tokens taken of the %v that exact limiters give want %v %%", leased.tokens(), exact.tokens(), 100*tt.least)
			}
			if tt.perFlow > 0 && float64(all) > tt.perFlow*float64(leased.flows) {
				t.Errorf("%d calls for %d flows want %v %%", all, leased.flows, 100*tt.perFlow)
			}
		})
	}
}

// Whatever instances do, flows take no more tokens than there are.
func TestLeasedBounds(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { randomFleet(t, rand.New(rand.NewPCG(seed, 0))) })
		})
	}
}

func randomFleet(t *testing.T, r *rand.Rand) {
	pick := func(of ...float64) float64 { return of[r.IntN(len(of))] }
	c := leasedLimiter(pick(1, 3, 20, 100, 1000), pick(1, 20, 200, 1000))
	load := pick(0.5, 0.95, 1.5, 10) * c.Fill
	costs := r.IntN(2) == 0
	const lasts = 5 * time.Second
	f := newFleet(t, len(uneven), sides.Embedded, c)
	tr := &traffic{f: f, w: newRecord()}
	begin := time.Now()
	var wg sync.WaitGroup
	for at, part := range uneven {
		own := rand.New(rand.NewPCG(r.Uint64(), 0))
		wg.Go(func() {
			cost := one
			if costs {
				cost = func() int { return own.IntN(4) }
			}
			for time.Since(begin) < lasts {
				until := time.Now().Add(time.Duration(own.ExpFloat64() * float64(500*time.Millisecond)))
				behavior := sharedtest.Behavior{Late: time.Duration(own.IntN(int(3 * time.Millisecond)))}
				switch own.IntN(8) {
				case 0: // it stalls
					f.stores[at].Behave(sharedtest.Behavior{Late: time.Second})
				case 1: // its answers are lost
					behavior.Lost = shared.ErrDown
					f.stores[at].Behave(behavior)
				case 2: // it crashes: what it has drawn is lost
					f.stores[at].Behave(sharedtest.Behavior{Err: shared.ErrDown})
					_ = f.sides[at].Engine.Close()
					return
				default:
					f.stores[at].Behave(behavior)
				}
				tr.run(t, own, at, load*part, until, cost)
			}
		})
	}
	wg.Wait()
	tr.flows.Wait()
	tr.w.bounds(t, c.Capacity, c.Fill)
}

// overLeased runs f over the kinds of agents, in bubbles, with so many engines that share a leased limiter. Hardly any token comes.
func overLeased(t *testing.T, engines int, change func(*policy.RateLimiter), f func(t *testing.T, f *fleet)) {
	for _, kind := range sides.Engines {
		t.Run(string(kind), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := leasedLimiter(1000, 1e-9)
				c.OnOutage = ""
				if change != nil {
					change(&c)
				}
				f(t, newFleet(t, engines, kind, c))
			})
		})
	}
}

// flows runs so many flows of the user, one after the other, and returns how many were admitted.
func (f *fleet) flows(t *testing.T, at int, user string, n int) (admitted int) {
	t.Helper()
	for range n {
		flow := f.start(t, at, user)
		if flow.Decision() == flowctl.Accepted {
			admitted++
		}
		end(flow)
	}
	return admitted
}

// left returns what an engine says is left for the user.
func (f *fleet) left(t *testing.T, at int, user string) float64 {
	t.Helper()
	u, err := peekAt(f.sides[at].Engine, "test", "c", user)
	if err != nil {
		t.Fatal(err)
	}
	return math.Round(u.Remaining*1e6) / 1e6
}

// behave has all instances behave so.
func (f *fleet) behave(is sharedtest.Behavior) {
	for _, s := range f.stores {
		s.Behave(is)
	}
}

// calls returns how many calls the instance has made since the function was called last.
func calls(s *sharedtest.Store) func() sharedtest.Counted {
	var before sharedtest.Counted
	return func() sharedtest.Counted {
		now := s.Counted()
		since := sharedtest.Counted{Take: now.Take - before.Take, Return: now.Return - before.Return}
		before = now
		return since
	}
}

// What an engine does not use goes back: after a while, or when it is closed.
func TestLeasedTokensGoBack(t *testing.T) {
	overLeased(t, 2, nil, func(t *testing.T, f *fleet) {
		if n := f.flows(t, 0, "ann", 10); n != 10 {
			t.Errorf("%d flows admitted want 10", n)
		}
		if own, other := f.left(t, 0, "ann"), f.left(t, 1, "ann"); own != 990 || other >= 990 {
			t.Errorf("%v tokens are left, and %v for another engine want 990, and less", own, other)
		}
		<-time.After(250 * time.Millisecond)
		if own, other := f.left(t, 0, "ann"), f.left(t, 1, "ann"); own != 990 || other != 990 {
			t.Errorf("a while later %v tokens are left, and %v for another engine want 990", own, other)
		}
		f.flows(t, 0, "ann", 10)
		if err := f.sides[0].Engine.Close(); err != nil {
			t.Fatal(err)
		}
		if other := f.left(t, 1, "ann"); other != 980 {
			t.Errorf("after Close %v tokens are left want 980", other)
		}
	})
}

// What comes when the engine has been closed goes back at once.
func TestLeasedTokensThatComeLateGoBack(t *testing.T) {
	overLeased(t, 2, nil, func(t *testing.T, f *fleet) {
		f.flows(t, 0, "ann", 1)
		f.behave(sharedtest.Behavior{Late: 10 * time.Millisecond})
		flow := make(chan *flowctl.Flow)
		go func() { flow <- f.start(t, 0, "ann") }()
		<-time.After(time.Millisecond)
		_ = f.sides[0].Engine.Close()
		end(<-flow)
		<-time.After(20 * time.Millisecond)
		if other := f.left(t, 1, "ann"); other != 998 && other != 999 { // the flow may have been given back, too
			t.Errorf("%v tokens are left want 998 or 999", other)
		}
	})
}

// Flows that come while tokens are drawn wait for those.
func TestLeasedFlowsAskOnce(t *testing.T) {
	overLeased(t, 1, nil, func(t *testing.T, f *fleet) {
		f.behave(sharedtest.Behavior{Late: 5 * time.Millisecond})
		since := calls(f.stores[0])
		for i, most := range []int{4, 1} { // the first time, nobody knows what flows want
			var wg sync.WaitGroup
			var admitted atomic.Int64
			begin := time.Now()
			for range 64 {
				wg.Go(func() {
					flow := f.start(t, 0, "ann")
					if flow.Decision() == flowctl.Accepted {
						admitted.Add(1)
					}
					end(flow)
				})
			}
			wg.Wait()
			if admitted.Load() != 64 || time.Since(begin) > 20*time.Millisecond {
				t.Errorf("%d flows admitted in %v want 64 in 20ms", admitted.Load(), time.Since(begin))
			}
			if n := since(); n.Take > most {
				t.Errorf("round %d: %+v want at most %d", i, n, most)
			}
		}
	})
}

// While the store does not answer, flows that wait for the answer to another one do not ask one after the other.
func TestLeasedFlowsFailTogether(t *testing.T) {
	for mode, want := range map[policy.Outage]int{policy.OutageShare: 100, policy.OutageOpen: 100, policy.OutageClosed: 0} {
		overLeased(t, 1, func(c *policy.RateLimiter) { c.OnOutage = mode }, func(t *testing.T, f *fleet) {
			f.flows(t, 0, "ann", 2)
			<-time.After(300 * time.Millisecond) // nothing is left ahead
			f.behave(sharedtest.Behavior{Late: time.Minute})
			begin := time.Now()
			var wg sync.WaitGroup
			var admitted atomic.Int64
			for range 100 {
				wg.Go(func() {
					flow := f.start(t, 0, "ann")
					if flow.Decision() == flowctl.Accepted {
						admitted.Add(1)
					}
					end(flow)
				})
			}
			wg.Wait()
			if admitted.Load() != int64(want) || time.Since(begin) > 3*sharedtest.Bound {
				t.Errorf("%s: %d flows admitted in %v want %d within %v", mode, admitted.Load(), time.Since(begin), want, 3*sharedtest.Bound)
			}
			if s := f.sides[0].Engine.Stats(); s.Store.Unanswered != 100 || s.Components[0].LocalDecisions != 100 {
				t.Errorf("%s: stats = %+v, %+v want 100 decisions without the store", mode, s.Store, s.Components[0])
			}
			f.behave(sharedtest.Behavior{})
			f.flows(t, 0, "ann", 1)
			<-time.After(300 * time.Millisecond)
			// The call that was late has counted, too.
			if left := f.left(t, 0, "ann"); left > 997-float64(want) {
				t.Errorf("%s: %v tokens are left want at most %v", mode, left, 997-want)
			}
		})
	}
}

// A caller that leaves while it draws takes no other flow with it.
func TestLeasedCallerLeaves(t *testing.T) {
	overLeased(t, 1, nil, func(t *testing.T, f *fleet) {
		f.flows(t, 0, "ann", 1)
		f.behave(sharedtest.Behavior{Late: 20 * time.Millisecond})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			end(f.sides[0].Client.Start(ctx, "point", flowctl.Params{Labels: map[string]string{"user": "ann"}}))
		})
		<-time.After(time.Millisecond)
		for range 8 {
			wg.Go(func() {
				flow := f.start(t, 0, "ann")
				if flow.Decision() != flowctl.Accepted {
					t.Errorf("%v want it accepted", flow)
				}
				end(flow)
			})
		}
		<-time.After(time.Millisecond)
		cancel()
		wg.Wait()
		if s := f.sides[0].Engine.Stats(); s.Store.Unanswered != 0 {
			t.Errorf("stats = %+v want no decision without the store", s.Store)
		}
	})
}

// A reset key has what it has, and nothing of before.
func TestLeasedReset(t *testing.T) {
	overLeased(t, 1, func(c *policy.RateLimiter) { c.Capacity = 40 }, func(t *testing.T, f *fleet) {
		f.flows(t, 0, "ann", 10)
		if err := resetAt(f.sides[0].Engine, "test", "c", "ann"); err != nil {
			t.Fatal(err)
		}
		if n := f.flows(t, 0, "ann", 100); n != 40 {
			t.Errorf("%d flows admitted after a reset want 40", n)
		}
	})
}

// What was drawn by other numbers goes back, and what was used stays used.
func TestLeasedApply(t *testing.T) {
	overLeased(t, 1, nil, func(t *testing.T, f *fleet) {
		f.flows(t, 0, "ann", 10)
		apply := func(capacity float64, share policy.Share) {
			t.Helper()
			c := leasedLimiter(capacity, 1e-9)
			c.Share = share
			if err := f.sides[0].Engine.Apply(sides.Policies(c)); err != nil {
				t.Fatal(err)
			}
		}
		apply(0, policy.ShareLeased)
		if n := f.flows(t, 0, "ann", 10); n != 0 {
			t.Errorf("%d flows admitted by a limit of 0", n)
		}
		apply(100, policy.ShareLeased)
		<-time.After(2 * time.Second)
		if n := f.flows(t, 0, "ann", 40); n != 40 {
			t.Errorf("%d flows admitted want 40", n)
		}
		apply(100, policy.ShareExact)
		<-time.After(250 * time.Millisecond)
		if own := f.left(t, 0, "ann"); own != 60 {
			t.Errorf("%v tokens are left want 60", own)
		}
		if n := f.flows(t, 0, "ann", 100); n != 60 {
			t.Errorf("%d flows admitted want 60", n)
		}
	})
}

// The other keys beyond the bound are asked about one by one.
func TestWithLeasedKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := sharedtest.New().Instance()
		side := sides.Setup{
			Policies: sides.Policies(leasedLimiter(1000, 1)), EngineOptions: []engine.Option{engine.WithStore(store), engine.WithLeasedKeys(1)},
		}.New(t, sides.Embedded)
		f := &fleet{stores: []*sharedtest.Store{store}, sides: []*sides.Side{side}}
		since := calls(store)
		if f.flows(t, 0, "ann", 100); since().Take > 20 {
			t.Error("100 flows of the first key asked more than 20 times")
		}
		if f.flows(t, 0, "bob", 100); since().Take != 100 {
			t.Error("100 flows of another key did not ask 100 times")
		}
		<-time.After(time.Second) // the first one has ended
		if f.flows(t, 0, "bob", 100); since().Take > 20 {
			t.Error("100 flows of the other key asked more than 20 times, although the first one has ended")
		}
	})
	allocations := func(c policy.RateLimiter) float64 {
		e, err := engine.New(sides.Policies(c), engine.WithStore(sharedtest.New().Instance()), engine.WithLeasedKeys(0))
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		req := &agentapi.Request{ControlPoint: "point", Labels: agentapi.Labels{Params: map[string]string{"user": "ann"}}}
		return testing.AllocsPerRun(1000, func() {
			var v agentapi.Verdict
			if err := e.Agent().Check(t.Context(), req, &v); err != nil || v.Rejected() {
				t.Fatal(err)
			}
		})
	}
	leased := leasedLimiter(1e9, 1)
	exact := leased
	exact.Share = policy.ShareExact
	if with, without := allocations(leased), allocations(exact); with > without {
		t.Errorf("%v allocations a flow beyond the bound, %v without leases", with, without)
	}
	if _, err := engine.New(nil, engine.WithLeasedKeys(-1)); err == nil {
		t.Error("a negative bound is no error")
	}
}

// What flows have cost counts, and not what they have taken.
func TestLeasedTokensAreSettled(t *testing.T) {
	overLeased(t, 2, nil, func(t *testing.T, f *fleet) {
		f.flows(t, 0, "ann", 1)
		<-time.After(2 * time.Second) // a client across the network has its session
		for range 5 {
			flow := f.sides[0].Client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": "ann", "cost": "4"}})
			flow.Settle("cost", 1)
			end(flow)
			flow = f.sides[0].Client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": "ann", "cost": "1"}})
			flow.Settle("cost", 4)
			end(flow)
		}
		<-time.After(250 * time.Millisecond)
		if own, other := f.left(t, 0, "ann"), f.left(t, 1, "ann"); own != 974 || other != 974 {
			t.Errorf("%v tokens are left, and %v for another engine want 974", own, other)
		}
	})
}

// A quota scheduler that is to lease tokens says that it does not.
func TestWarningOfLeasedSchedulers(t *testing.T) {
	for _, tt := range []struct {
		name  string
		share policy.Share
		opts  []engine.Option
		want  int
	}{
		{"leased", policy.ShareLeased, []engine.Option{engine.WithStore(sharedtest.New().Instance())}, 1},
		{"exact", policy.ShareExact, []engine.Option{engine.WithStore(sharedtest.New().Instance())}, 0},
		{"without a store", policy.ShareLeased, nil, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e, err := engine.New(sides.Policies(policy.QuotaScheduler{
				ID: "c", Selectors: policy.At("point"), Capacity: 10, Fill: 10, Interval: time.Second, Share: tt.share,
			}), tt.opts...)
			if err != nil {
				t.Fatal(err)
			}
			defer e.Close()
			if w := e.Warnings(); len(w) != tt.want {
				t.Errorf("warnings = %q want %d", w, tt.want)
			}
		})
	}
}
