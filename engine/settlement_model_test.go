package engine_test

import (
	"fmt"
	"math"
	"math/big"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/policy"
)

// A ledger is a slow and exact bucket: it computes its balance from all that has happened to it. A tick is an eighth of a
// second.
type ledger struct {
	capacity, fill, maxDebt int64 // tokens; fill is of a tick; a negative debt has no bound
	entries                 []entry
}

// An entry is what a flow took, or what it was corrected by.
type entry struct {
	tick    int64
	tokens  int64
	settles bool
}

// balance is what there is at the tick, and what was forgiven so far.
func (l *ledger) balance(tick int64) (tokens, forgiven *big.Int) {
	tokens, forgiven = big.NewInt(l.capacity), new(big.Int)
	capacity, lowest := big.NewInt(l.capacity), big.NewInt(-l.maxDebt)
	if l.maxDebt == 0 {
		lowest = big.NewInt(-l.capacity)
	}
	last := int64(0)
	add := func(n *big.Int) {
		if tokens.Add(tokens, n); tokens.Cmp(capacity) > 0 {
			tokens.Set(capacity)
		}
	}
	for _, e := range append(slices.Clone(l.entries), entry{tick: tick}) {
		if e.tick > tick {
			continue
		}
		add(big.NewInt((e.tick - last) * l.fill))
		last = e.tick
		add(big.NewInt(-e.tokens))
		if e.settles && l.maxDebt >= 0 && tokens.Cmp(lowest) < 0 {
			forgiven.Add(forgiven, new(big.Int).Sub(lowest, tokens))
			tokens.Set(lowest)
		}
	}
	return tokens, forgiven
}

// A run is a flow that was let in.
type run struct {
	flow            *flowctl.Flow
	user            string
	began           int64
	ended           int64 // -1 while it has not
	estimated, cost int64 // the cost is what it was settled for, less what was forgiven, or the estimate
}

// interleave has flows of two users begin and end as the numbers say, at an engine, and compares all that the engine does
// with the ledgers. Next returns a number below n.
func interleave(t *testing.T, next func(n int) int, steps int) {
	t.Helper()
	type amounts = []int64
	pick := func(of amounts) int64 { return of[next(len(of))] }
	rules := &ledger{capacity: pick(amounts{1, 8, 40, 400}), fill: pick(amounts{0, 1, 3, 20}), maxDebt: pick(amounts{0, 1, 16, 1000, -1})}
	c := policy.Component(policy.RateLimiter{
		Selectors: policy.At("point"), Capacity: float64(rules.capacity), Fill: float64(8 * rules.fill), Interval: time.Second,
		LimitBy: "user", TokensLabel: "tokens", MaxDebt: float64(rules.maxDebt), MaxIdle: time.Minute,
	})
	if next(2) == 0 {
		c = policy.QuotaScheduler{
			Selectors: policy.At("point"), Capacity: float64(rules.capacity), Fill: float64(8 * rules.fill), Interval: time.Second,
			LimitBy: "user", MaxDebt: float64(rules.maxDebt), MaxIdle: time.Minute,
			Scheduler: policy.Scheduler{TokensLabel: "tokens", Default: policy.WorkloadParameters{QueueTimeout: policy.NoQueue}},
		}
	}
	e, client := opened(t, c)
	ledgers := map[string]*ledger{}
	for _, user := range []string{"ann", "bob"} {
		own := *rules
		ledgers[user] = &own
	}
	costs := amounts{0, 1, 2, 7, 30, 300, 5000}
	var flight, runs []*run
	tick := int64(0)
	for range steps {
		user := []string{"ann", "bob"}[next(2)]
		switch next(5) {
		case 0:
			n := pick(amounts{1, 2, 9, 100, 1100}) // the last is long enough to forget keys
			<-time.After(time.Duration(n) * time.Second / 8)
			tick += n
		case 1, 2:
			estimate := pick(costs)
			flow := client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": user, "tokens": strconv.FormatInt(estimate, 10)}})
			l := ledgers[user]
			there, _ := l.balance(tick)
			if want := estimate == 0 || there.Cmp(big.NewInt(estimate)) >= 0; flow.ShouldRun() != want {
				t.Fatalf("tick %d: a flow of %d, with %v there: %v", tick, estimate, there, flow)
			}
			if !flow.ShouldRun() {
				want := time.Duration(0)
				if estimate <= l.capacity && l.fill > 0 {
					missing, _ := new(big.Int).Sub(big.NewInt(estimate), there).Float64()
					want = time.Duration(math.Ceil(missing / float64(l.fill) * float64(time.Second/8)))
				}
				if got := flow.RetryAfter(); (got - want).Abs() > 2 {
					t.Fatalf("tick %d: a flow of %d, with %v there, may come back in %v want %v", tick, estimate, there, got, want)
				}
				flow.Settle("tokens", 0) // which a flow that took nothing does not
				end(flow)
				break
			}
			l.entries = append(l.entries, entry{tick: tick, tokens: estimate})
			r := &run{flow: flow, user: user, began: tick, ended: -1, estimated: estimate, cost: estimate}
			flight, runs = append(flight, r), append(runs, r)
		default:
			if len(flight) == 0 {
				break
			}
			i := next(len(flight))
			r := flight[i]
			flight = slices.Delete(flight, i, i+1)
			r.ended = tick
			if cost := pick(costs); next(4) > 0 { // of the others it is not known
				r.flow.Settle("tokens", 77)
				r.flow.Settle("tokens", float64(cost))
				l := ledgers[r.user]
				_, before := l.balance(tick)
				l.entries = append(l.entries, entry{tick, cost - r.estimated, true})
				_, after := l.balance(tick)
				r.cost = cost - after.Sub(after, before).Int64()
			}
			end(r.flow)
			r.flow.Settle("tokens", 1e6)
			end(r.flow)
		}
		for user, l := range ledgers {
			want, _ := l.balance(tick)
			if there, _ := want.Float64(); left(t, e, user) != there {
				t.Fatalf("tick %d: %s has %v left want %v", tick, user, left(t, e, user), there)
			}
		}
	}
	forgiven := 0.0
	for user, l := range ledgers {
		_, f := l.balance(tick)
		n, _ := f.Float64()
		forgiven += n
		bounded(t, l, user, runs, tick)
	}
	if _, s := first(t, e); s.ForgivenTokens != forgiven {
		t.Errorf("%v forgiven want %v", s.ForgivenTokens, forgiven)
	}
}

// bounded checks the cost of the flows that began within any span. The bound is the capacity, the fill of the span and the
// largest debt. Two things come on top: under-estimates of flows that have not ended when the span ends, and refunds of
// flows from before the span.
func bounded(t *testing.T, l *ledger, user string, runs []*run, last int64) {
	t.Helper()
	lowest := l.maxDebt
	if lowest == 0 {
		lowest = l.capacity
	}
	var ticks []int64
	for _, r := range runs {
		ticks = append(ticks, r.began, r.ended)
	}
	ticks = slices.DeleteFunc(append(ticks, last), func(at int64) bool { return at < 0 })
	slices.Sort(ticks)
	ticks = slices.Compact(ticks)
	for _, to := range ticks {
		debt := lowest
		if l.maxDebt < 0 { // what is owed at the end is all of it
			there, _ := l.balance(to)
			debt = max(-there.Int64(), 0)
		}
		for _, from := range ticks {
			if to < from {
				break
			}
			cost, under, back := int64(0), int64(0), int64(0)
			for _, r := range runs {
				began := r.began >= from && r.began <= to
				ended := r.ended >= 0 && r.ended <= to
				switch {
				case r.user != user:
				case began:
					cost += r.cost
					if !ended {
						under += max(r.cost-r.estimated, 0)
					}
				case r.began < from && ended && r.ended >= from:
					back += max(r.estimated-r.cost, 0)
				}
			}
			if most := l.capacity + l.fill*(to-from) + debt + under + back; cost > most {
				t.Fatalf("flows of %s cost %d from tick %d to %d, want at most %d", user, cost, from, to, most)
			}
		}
	}
}

// Whatever flows take and cost, in whatever order they begin and end, the engine decides, tells and keeps what the ledgers
// say, and the bounds hold.
func TestSettlementsAreExact(t *testing.T) {
	for seed := range uint64(race.Pick(40, 300)) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 16))
			interleave(t, rng.IntN, 60)
			if t.Failed() {
				t.Logf("seed %d", seed)
			}
		})
	}
}

func FuzzSettlements(f *testing.F) {
	for seed := range uint64(8) {
		data := make([]byte, 200)
		rng := rand.New(rand.NewPCG(seed, 17))
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1000 {
			return // the model takes the square of them
		}
		synctest.Test(t, func(t *testing.T) {
			next := func(n int) int {
				if len(data) == 0 {
					return 0
				}
				b := data[0]
				data = data[1:]
				return int(b) % n
			}
			interleave(t, next, len(data)/4)
		})
	})
}

// Flows that say 1 and cost more keep to the fill in the long run, except for the cost that is forgiven beyond MaxDebt.
func TestLongRunRate(t *testing.T) {
	seconds := race.Pick(400.0, 2000)
	for _, tt := range []struct {
		name     string
		maxDebt  float64
		cost     float64
		forgiven bool
	}{
		{"within the debt", 0, 8, false},
		{"beyond the debt", 0, 1000, true},
		{"without a bound", -1, 1000, false},
		{"less than estimated", 0, 0.25, false},
	} {
		for name, c := range settling(tt.maxDebt) {
			if name == "calendar quota" {
				continue // 10 an hour: see the tests of package calendar
			}
			t.Run(fmt.Sprintf("%s/%s", tt.name, name), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					e, client := opened(t, c)
					spent := 0.0
					for over := time.Now().Add(time.Duration(seconds) * time.Second); time.Now().Before(over); <-time.After(100 * time.Millisecond) {
						flow := client.Start(t.Context(), "point", costs("ann", "1"))
						if flow.ShouldRun() {
							spent += tt.cost
						}
						flow.Settle("tokens", tt.cost)
						end(flow)
					}
					_, s := first(t, e)
					most := 10 + 5*seconds + max(-left(t, e, "ann"), 0)
					if charged := spent - s.ForgivenTokens; charged > most || (s.ForgivenTokens > 0) != tt.forgiven {
						t.Errorf("they cost %v, of which %v are forgiven want at most %v charged", spent, s.ForgivenTokens, most)
					}
					if tt.cost >= 1 && spent < 0.95*5*seconds {
						t.Errorf("they cost %v: what comes is not used", spent)
					}
				})
			})
		}
	}
}
