package engine_test

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// settling are components of 10 tokens, of which 5 come each second or hour, with a bucket for each user.
func settling(maxDebt float64) map[string]policy.Component {
	at := policy.At("point")
	return map[string]policy.Component{
		"rate limiter": policy.RateLimiter{
			Selectors: at, Capacity: 10, Fill: 5, Interval: time.Second, LimitBy: "user", TokensLabel: "tokens", MaxDebt: maxDebt,
		},
		"quota scheduler": policy.QuotaScheduler{
			Selectors: at, Capacity: 10, Fill: 5, Interval: time.Second, LimitBy: "user", MaxDebt: maxDebt,
			Scheduler: policy.Scheduler{TokensLabel: "tokens", Default: policy.WorkloadParameters{QueueTimeout: policy.NoQueue}},
		},
		"calendar quota": policy.CalendarQuota{
			Selectors: at, Amount: 10, Period: policy.PeriodHour, LimitBy: "user", TokensLabel: "tokens", MaxDebt: maxDebt,
		},
	}
}

func costs(user, tokens string) flowctl.Params {
	return flowctl.Params{Labels: map[string]string{"user": user, "tokens": tokens}}
}

// settle runs a flow that took so many tokens, and cost so many.
func settle(t *testing.T, c *flowctl.Client, user, took string, cost float64) {
	t.Helper()
	flow := c.Start(t.Context(), "point", costs(user, took))
	if !flow.ShouldRun() {
		t.Fatal(flow.Err())
	}
	flow.Settle("tokens", cost)
	if r := end(flow); !r.Settled {
		t.Errorf("End() = %+v want it settled", r)
	}
}

// refused starts a flow that is rejected, and returns when it may come back.
func refused(t *testing.T, c *flowctl.Client, user, tokens string) time.Duration {
	t.Helper()
	flow := c.Start(t.Context(), "point", costs(user, tokens))
	defer end(flow)
	r, ok := errors.AsType[*flowctl.RejectedError](flow.Err())
	if !ok {
		t.Fatalf("%v want it rejected", flow)
	}
	return r.RetryAfter()
}

func first(t *testing.T, e *engine.Engine) (*engine.Component, engine.ComponentStats) {
	t.Helper()
	s := e.Stats().Components[0]
	c, err := e.Component(s.Policy, s.ID)
	if err != nil {
		t.Fatal(err)
	}
	return c, s
}

func left(t *testing.T, e *engine.Engine, user string) float64 {
	t.Helper()
	c, _ := first(t, e)
	u, err := c.Peek(t.Context(), user)
	if err != nil {
		t.Fatal(err)
	}
	return u.Remaining
}

// A debt rejects flows until it is paid, and RetryAfter is exact. Flows that cost nothing pass, and forgive nothing.
func TestDebt(t *testing.T) {
	for name, c := range settling(0) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, client := opened(t, c)
				settle(t, client, "ann", "4", 17)
				if got := left(t, e, "ann"); got != -7 {
					t.Errorf("%v left want -7", got)
				}
				for range 3 {
					free := client.Start(t.Context(), "point", costs("ann", "0"))
					if !free.ShouldRun() {
						t.Errorf("%v want it to pass", free)
					}
					end(free)
				}
				if got := left(t, e, "ann"); got != -7 {
					t.Errorf("%v left after flows of cost 0 want -7", got)
				}
				retry, want := refused(t, client, "ann", "3"), 2*time.Second // 10 tokens
				if name == "calendar quota" {
					want = time.Hour // of the bubble's first hour
				}
				if retry != want {
					t.Errorf("a flow of 3 may come back in %v want %v", retry, want)
				}
				if got := left(t, e, "bob"); got != 10 {
					t.Errorf("bob has %v left want 10", got)
				}
				<-time.After(retry - time.Millisecond)
				refused(t, client, "ann", "3")
				<-time.After(time.Millisecond)
				settle(t, client, "ann", "3", 3)
				if _, s := first(t, e); s.Settled != 2 || s.Unsettled != 0 || s.ForgivenTokens != 0 {
					t.Errorf("stats = %+v want two settlements", s)
				}
			})
		})
	}
}

// What is beyond MaxDebt is forgiven, and counted.
func TestMaxDebt(t *testing.T) {
	for _, tt := range []struct{ maxDebt, left, forgiven float64 }{
		{0, -10, 91}, {3, -3, 98}, {200, -101, 0}, {-1, -101, 0},
	} {
		for name, c := range settling(tt.maxDebt) {
			t.Run(fmt.Sprintf("%s/%v", name, tt.maxDebt), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					e, client := opened(t, c)
					settle(t, client, "ann", "1", 111)
					_, s := first(t, e)
					if got := left(t, e, "ann"); got != tt.left || s.ForgivenTokens != tt.forgiven || s.Settled != 1 {
						t.Errorf("%v left, %v forgiven by %d settlements want %v, %v by one", got, s.ForgivenTokens, s.Settled, tt.left, tt.forgiven)
					}
				})
			})
		}
	}
}

// A key that was forgotten, because its bucket was full, is made again for a debt, and not for a refund. One in debt is not
// forgotten.
func TestDebtOfForgottenKeys(t *testing.T) {
	for name, c := range settling(-1) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, client := opened(t, c)
				owes := client.Start(t.Context(), "point", costs("ann", "4"))
				owes.Settle("tokens", 1e6)
				gives := client.Start(t.Context(), "point", costs("bob", "4"))
				gives.Settle("tokens", 1)
				<-time.After(4 * time.Hour)
				if _, s := first(t, e); s.Keys != 0 {
					t.Fatalf("%d keys after 4 hours want them forgotten", s.Keys)
				}
				end(owes)
				end(gives)
				if _, s := first(t, e); s.Keys != 1 || s.Settled != 2 || left(t, e, "ann") != 10-(1e6-4) || left(t, e, "bob") != 10 {
					t.Errorf("%d keys, %v and %v left want one, which owes", s.Keys, left(t, e, "ann"), left(t, e, "bob"))
				}
				<-time.After(4 * time.Hour)
				if _, s := first(t, e); s.Keys != 1 {
					t.Error("a key in debt was forgotten")
				}
			})
		})
	}
}

// Values that share a bucket beyond the cap do not pay for each other, and this is counted.
func TestDebtOfSpilledKeys(t *testing.T) {
	for name, c := range settling(0) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, err := engine.New(sides.Policies(c), engine.WithKeyCap(1))
				if err != nil {
					t.Fatal(err)
				}
				defer e.Close()
				client, err := flowctl.New(e)
				if err != nil {
					t.Fatal(err)
				}
				held := client.Start(t.Context(), "point", costs("ann", "1"))
				settle(t, client, "bob", "2", 9)
				settle(t, client, "bob", "2", 1)
				if _, s := first(t, e); left(t, e, "bob") != 6 || s.Unsettled != 2 || s.Settled != 0 || s.ForgivenTokens != 7 {
					t.Errorf("%v left, %+v want 6, and two that were not settled", left(t, e, "bob"), s)
				}
				end(held)
			})
		})
	}
}

// After a reset a settlement refunds no more than the bucket holds.
func TestSettleAfterReset(t *testing.T) {
	for name, c := range settling(0) {
		for _, tt := range []struct{ cost, left float64 }{{1, 10}, {9, 5}} {
			t.Run(fmt.Sprintf("%s/%v", name, tt.cost), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					e, client := opened(t, c)
					flow := client.Start(t.Context(), "point", costs("ann", "4"))
					c, _ := first(t, e)
					if err := c.Reset(t.Context(), "ann"); err != nil {
						t.Fatal(err)
					}
					flow.Settle("tokens", tt.cost)
					end(flow)
					if got := left(t, e, "ann"); got != tt.left {
						t.Errorf("%v left want %v", got, tt.left)
					}
				})
			})
		}
	}
}

// A flow that another component rejected, or that ends by the new policies, settles nothing twice.
func TestSettleOfUndoneFlows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, client := opened(t, settling(0)["rate limiter"],
			policy.RateLimiter{Selectors: policy.At("point"), Interval: time.Second})
		flow := client.Start(t.Context(), "point", costs("ann", "4"))
		flow.Settle("tokens", 1)
		if r := end(flow); r.Settled || flow.ShouldRun() {
			t.Errorf("End() = %+v want nothing settled of %v", r, flow)
		}
		if _, s := first(t, e); left(t, e, "ann") != 10 || s.Settled != 0 || s.Refunded != 1 {
			t.Errorf("%v left, %+v want all of it back, once", left(t, e, "ann"), s)
		}
	})
}

// A bucket that a refund fills delays its fill anew.
func TestSettleWithDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, client := opened(t, policy.RateLimiter{
			Selectors: policy.At("point"), Capacity: 10, Fill: 5, Interval: time.Second, TokensLabel: "tokens", DelayInitialFill: true,
		})
		flow := client.Start(t.Context(), "point", costs("", "10"))
		<-time.After(1900 * time.Millisecond) // the delay of 2 s is about to end
		flow.Settle("tokens", 0)
		end(flow)
		settle(t, client, "", "10", 10)
		<-time.After(1900 * time.Millisecond)
		if got := left(t, e, ""); got != 0 {
			t.Errorf("%v left want none during the new delay", got)
		}
		<-time.After(300 * time.Millisecond)
		if got := left(t, e, ""); got < 0.99 || got > 1.01 {
			t.Errorf("%v left want 1", got)
		}
	})
}

// Slots are not tokens: they come back when the flow ends, whatever it cost.
func TestSettleOfSlots(t *testing.T) {
	at := policy.At("point")
	for name, c := range map[string]policy.Component{
		"limiter":   policy.ConcurrencyLimiter{Selectors: at, Max: 10, MaxInflight: time.Hour, TokensLabel: "tokens"},
		"scheduler": policy.ConcurrencyScheduler{Selectors: at, Max: 10, MaxInflight: time.Hour, Scheduler: policy.Scheduler{TokensLabel: "tokens"}},
	} {
		t.Run(name, func(t *testing.T) {
			e, client := opened(t, c)
			flow := client.Start(t.Context(), "point", costs("", "4"))
			flow.Settle("tokens", 9)
			if r := end(flow); r.Held != 1 || r.Returned != 1 {
				t.Errorf("End() = %+v want the slot back", r)
			}
			if _, s := first(t, e); s.Usage.Remaining != 10 || s.Settled != 0 {
				t.Errorf("stats = %+v want 10 slots, and no settlement", s)
			}
		})
	}
}

// A refund serves waiting flows, and a debt makes them wait longer.
func TestSettleServesTheQueue(t *testing.T) {
	for _, tt := range []struct {
		name string
		cost float64
		wait time.Duration // of a flow that wants 5 of the 5 tokens a second
	}{
		{"as estimated", 10, time.Second},
		{"less", 4, 500 * time.Millisecond}, // when it is settled
		{"a little less", 9, 800 * time.Millisecond},
		{"more", 15, 2 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, client := opened(t, policy.QuotaScheduler{
					Selectors: policy.At("point"), Capacity: 10, Fill: 5, Interval: time.Second, Scheduler: policy.Scheduler{TokensLabel: "tokens"},
				})
				flow := client.Start(t.Context(), "point", costs("", "10"))
				begin, waited := time.Now(), make(chan time.Duration)
				go func() {
					params := costs("", "5")
					params.CheckTimeout = time.Minute
					next := client.Start(t.Context(), "point", params)
					waited <- time.Since(begin)
					end(next)
				}()
				<-time.After(500 * time.Millisecond)
				flow.Settle("tokens", tt.cost)
				end(flow)
				if got := <-waited; got.Round(time.Microsecond) != tt.wait {
					t.Errorf("it waited for %v want %v", got, tt.wait)
				}
			})
		})
	}
}

// shares has two users, or two workloads, with flows that wait at all times. Those of cheat say 1 and cost 4, those of fair
// say 1 and cost 1. It returns what each got of the tokens.
func shares(t *testing.T, s policy.Scheduler) (cheat, fair float64) {
	synctest.Test(t, func(t *testing.T) {
		s.TokensLabel = "tokens"
		_, client := opened(t, policy.QuotaScheduler{
			Selectors: policy.At("point"), Capacity: 20, Fill: 10, Interval: time.Second, Scheduler: s, MaxDebt: -1,
		})
		got := make(map[string]float64)
		results := make(chan func())
		over := time.Now().Add(1000 * time.Second)
		for range 20 {
			for user, cost := range map[string]float64{"cheat": 4, "fair": 1} {
				go func() {
					for time.Now().Before(over) {
						params := costs(user, "1")
						params.CheckTimeout = -1
						flow := client.Start(t.Context(), "point", params)
						flow.Settle("tokens", cost)
						end(flow)
						results <- func() { got[user] += cost }
					}
					results <- nil
				}()
			}
		}
		for running := 40; running > 0; {
			if note := <-results; note != nil {
				note()
			} else {
				running--
			}
		}
		cheat, fair = got["cheat"], got["fair"]
	})
	return cheat, fair
}

// Flows that estimate too little get no more of the tokens than their share, and all of them together no more than comes.
func TestFairQueueLearnsCosts(t *testing.T) {
	for _, tt := range []struct {
		name string
		s    policy.Scheduler
	}{
		{"fairness values", policy.Scheduler{FairnessLabel: "user"}},
		{"workloads", policy.Scheduler{Workloads: []policy.Workload{
			{Name: "cheat", Labels: policy.LabelMatcher{Equal: map[string]string{"user": "cheat"}}},
			{Name: "fair", Labels: policy.LabelMatcher{Equal: map[string]string{"user": "fair"}}},
		}}},
		{"workloads by a label", policy.Scheduler{WorkloadLabel: "user"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cheat, fair := shares(t, tt.s)
			t.Logf("cheat %v, fair %v", cheat, fair)
			if all := cheat + fair; all < 9900 || all > 10_250 {
				t.Errorf("%v tokens in 1000 s want 10 a second", all)
			}
			if share := cheat / (cheat + fair); share < 0.45 || share > 0.55 {
				t.Errorf("the flows that estimate too little got %v of the tokens want a half", share)
			}
		})
	}
}

// A load scheduler takes a settlement for its queue, and lets in the same share of what comes.
func TestSettleOfLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, client := opened(t, policy.LoadScheduler{
			Selectors: policy.At("point"), LoadMultiplier: policy.Constant(0.5),
			Scheduler: policy.Scheduler{TokensLabel: "tokens", Default: policy.WorkloadParameters{QueueTimeout: policy.NoQueue}},
		})
		admitted := 0
		for i := range 20_000 {
			flow := client.Start(t.Context(), "point", costs("", "1"))
			if flow.ShouldRun() && i >= 10_000 {
				admitted++
			}
			flow.Settle("tokens", 1000)
			end(flow)
			<-time.After(10 * time.Millisecond)
		}
		if _, s := first(t, e); admitted < 4900 || admitted > 5100 || s.Settled == 0 {
			t.Errorf("%d of 10000 were let in, with %d settlements want a half", admitted, s.Settled)
		}
	})
}
