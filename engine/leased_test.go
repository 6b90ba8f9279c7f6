package engine_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/internal/testing/sharedtest"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// leasedLimiter has so many tokens, and as many come in each second as the rate says.
func leasedLimiter(capacity, rate float64) policy.RateLimiter {
	return policy.RateLimiter{
		ID: "c", Selectors: policy.At("point"), Capacity: capacity, Fill: rate, Interval: time.Second, LimitBy: "user", TokensLabel: "cost",
		Share: policy.ShareLeased, OnOutage: policy.OutageClosed,
	}
}

// A witness knows when which flows were admitted.
type witness struct {
	mu       sync.Mutex
	admitted []admission
	flows    int
}

type admission struct {
	at   time.Time
	cost float64
}

func (w *witness) saw(flow *flowctl.Flow, cost float64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.flows++
	if flow.Decision() == flowctl.Accepted {
		w.admitted = append(w.admitted, admission{time.Now(), cost})
	}
}

func (w *witness) tokens() (sum float64) {
	for _, a := range w.admitted {
		sum += a.cost
	}
	return sum
}

// bounds checks that since the beginning no more tokens were taken than there were, and in any span of time no more than half of the
// capacity beyond that.
//
// A flow is admitted when the answer comes. So what is taken in a span of time counts from the latest answer before it.
func (w *witness) bounds(t *testing.T, begin time.Time, capacity, rate float64) {
	t.Helper()
	slices.SortFunc(w.admitted, func(a, b admission) int { return a.at.Compare(b.at) })
	const slack = 1e-4
	sum, least := 0.0, 0.0 // what was taken, less what has come: before the flow, and the least of that
	for i, a := range w.admitted {
		come := rate * a.at.Sub(begin).Seconds()
		before := sum - come
		if i == 0 {
			least = before
		}
		least = min(least, before)
		sum += a.cost
		if over := sum - come - capacity; over > slack {
			t.Fatalf("after %v: %v tokens beyond the capacity of %v", a.at.Sub(begin), over, capacity)
		}
		if over := sum - come - least - 1.5*capacity - rate*late.Seconds(); over > slack {
			t.Fatalf("a span up to %v: %v tokens beyond 1.5 times the capacity of %v", a.at.Sub(begin), over, capacity)
		}
	}
}

// A traffic is flows of several instances.
type traffic struct {
	f     *fleet
	w     *witness
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
			flow := tr.f.sides[at].Client.Start(t.Context(), "point", flowctl.Params{
				Labels: map[string]string{"user": "ann", "cost": fmt.Sprint(tokens)},
			})
			tr.w.saw(flow, float64(tokens))
			end(flow)
		})
	}
}

// late is how late an answer of a store is at the most.
const late = 3 * time.Millisecond

func one() int { return 1 }

// uneven is how the flows of four instances are divided.
var uneven = []float64{0.7, 0.1, 0.1, 0.1}

// demand runs flows at four instances, so many a second in all, and returns what the witness and the instances saw.
func demand(t *testing.T, c policy.RateLimiter, seed uint64, perSecond float64, lasts time.Duration) (*witness, []sharedtest.Counted) {
	t.Helper()
	f := newFleet(t, len(uneven), sides.Embedded, c)
	for _, s := range f.stores {
		s.Behave(sharedtest.Behavior{Late: time.Millisecond})
	}
	tr := &traffic{f: f, w: new(witness)}
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
	tr.w.bounds(t, begin, c.Capacity, c.Fill)
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
		{"far too much", 1000, 1000, 5, 0.99, 0, 0.02},
		{"ten times too much", 500, 500, 10, 0.99, 0, 0.02},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const lasts = 10 * time.Second
			var exact, leased *witness
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
			t.Logf("%.1f %% of %d flows, calls of instances: %+v, %.2f for 100 flows", 100*leased.tokens()/exact.tokens(), leased.flows, calls, 100*float64(all)/float64(leased.flows))
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
	tr := &traffic{f: f, w: new(witness)}
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
				behavior := sharedtest.Behavior{Late: time.Duration(own.IntN(int(late)))}
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
	tr.w.bounds(t, begin, c.Capacity, c.Fill)
}
