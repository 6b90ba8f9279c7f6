package flowctl_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// budget is a bucket of 100 tokens that never refills, of which a flow takes what its label says.
func budget() []policy.Policy {
	return sides.Policies(policy.RateLimiter{
		Selectors: policy.At("point"), Capacity: 100, Interval: time.Hour, TokensLabel: "tokens",
	})
}

func estimated(tokens string) flowctl.Params {
	return flowctl.Params{Labels: map[string]string{"tokens": tokens}}
}

// remaining is what is left of the budget.
func remaining(t *testing.T, side *sides.Side) float64 {
	t.Helper()
	c, err := side.Engine.Component("test", "rate_limiter.0")
	if err != nil {
		t.Fatal(err)
	}
	usage, err := c.Peek(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	return usage.Remaining
}

// What is left of 100 tokens after a flow that took 10 of them, by what it said, over all agents. Those that know no
// sessions take no settlements.
func TestSettle(t *testing.T) {
	for _, tt := range []struct {
		name    string
		say     func(f *flowctl.Flow)
		settled bool
		left    float64
	}{
		{"nothing", func(*flowctl.Flow) {}, false, 90},
		{"less", func(f *flowctl.Flow) { f.Settle("tokens", 2.5) }, true, 97.5},
		{"more", func(f *flowctl.Flow) { f.Settle("tokens", 70) }, true, 30},
		{"more than there is", func(f *flowctl.Flow) { f.Settle("tokens", 130) }, true, -30},
		{"more than may be owed", func(f *flowctl.Flow) { f.Settle("tokens", 1e9) }, true, -100},
		{"it never began", func(f *flowctl.Flow) { f.Settle("tokens", 0) }, true, 100},
		{"the last counts", func(f *flowctl.Flow) { f.Settle("tokens", 99); f.Settle("tokens", 5) }, true, 95},
		{"another label", func(f *flowctl.Flow) { f.Settle("bytes", 50) }, true, 90},
		{"two labels", func(f *flowctl.Flow) { f.Settle("tokens", 5); f.Settle("bytes", 50) }, true, 95},
		{"as an error", func(f *flowctl.Flow) { f.SetError(errors.New("failed")); f.Settle("tokens", 5) }, true, 95},
		{"a negative number", func(f *flowctl.Flow) { f.Settle("tokens", -5) }, false, 90},
		{"no number", func(f *flowctl.Flow) { f.Settle("tokens", math.NaN()) }, false, 90},
		{"infinite", func(f *flowctl.Flow) { f.Settle("tokens", math.Inf(1)) }, false, 90},
		{"infinitely little", func(f *flowctl.Flow) { f.Settle("tokens", math.Inf(-1)) }, false, 90},
		{"no label", func(f *flowctl.Flow) { f.Settle("", 5) }, false, 90},
		{"a bad number after a good one", func(f *flowctl.Flow) { f.Settle("tokens", 40); f.Settle("tokens", math.NaN()) }, true, 60},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sides.Setup{Policies: budget()}.InBubbles(t, sides.AllAndStored, func(t *testing.T, side *sides.Side) {
				synctest.Wait() // for the session
				flow := side.Client.Start(t.Context(), "point", estimated("10"))
				if flow.Decision() != flowctl.Accepted {
					t.Fatal(flow)
				}
				tt.say(flow)
				r, err := flow.End(t.Context())
				if err != nil || r.Settled != (tt.settled && side.Kind != sides.Scripted) {
					t.Errorf("End() = %+v, %v want Settled %v", r, err, tt.settled)
				}
				flow.Settle("tokens", 1)
				if r, err := flow.End(t.Context()); r.Settled || !errors.Is(err, flowctl.ErrEnded) {
					t.Errorf("the second End() = %+v, %v", r, err)
				}
				if side.Engine == nil {
					return
				}
				if got := remaining(t, side); got != tt.left {
					t.Errorf("%v left want %v", got, tt.left)
				}
			})
		})
	}
}

// Flows that did not run, or that no limit is in force for, settle nothing.
func TestSettleOfFlowsThatTookNothing(t *testing.T) {
	limited := policy.RateLimiter{Selectors: policy.At("point"), Capacity: 100, Interval: time.Hour, TokensLabel: "tokens"}
	change := func(f func(*policy.RateLimiter)) policy.RateLimiter {
		l := limited
		f(&l)
		return l
	}
	for _, tt := range []struct {
		name     string
		limit    policy.RateLimiter
		options  []flowctl.Option
		estimate string
		run      bool
		settled  bool
		left     float64
	}{
		{"rejected", limited, nil, "101", false, false, 100},
		{"dry run of the component", change(func(l *policy.RateLimiter) { l.DryRun = true }), nil, "10", true, true, 90},
		{"dropped in a dry run of the component", change(func(l *policy.RateLimiter) { l.DryRun = true }), nil, "101", true, true, 100},
		{"dry run of the client", limited, []flowctl.Option{flowctl.WithDryRun()}, "10", true, false, 90},
		{"dropped in a dry run of the client", limited, []flowctl.Option{flowctl.WithDryRun()}, "101", true, false, 100},
		{"pass through", change(func(l *policy.RateLimiter) { l.PassThrough = true }), nil, "10", true, true, 100},
		{"without the label", change(func(l *policy.RateLimiter) { l.LimitBy = "user" }), nil, "10", true, true, 100},
		{"no tokens by a label", change(func(l *policy.RateLimiter) { l.TokensLabel = "" }), nil, "10", true, true, 99},
		{"no label, but tokens by it", limited, nil, "", true, true, 50},
		{"estimated at nothing", limited, nil, "0", true, true, 50},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sides.Setup{Policies: sides.Policies(tt.limit), Options: tt.options}.InBubbles(t, sides.EnginesAndStored,
				func(t *testing.T, side *sides.Side) {
					synctest.Wait() // for the session
					params := flowctl.Params{}
					if tt.estimate != "" {
						params = estimated(tt.estimate)
					}
					flow := side.Client.Start(t.Context(), "point", params)
					if flow.ShouldRun() != tt.run {
						t.Fatal(flow)
					}
					flow.Settle("tokens", 50)
					if r, err := flow.End(t.Context()); err != nil || r.Settled != tt.settled {
						t.Errorf("End() = %+v, %v want Settled %v", r, err, tt.settled)
					}
					if got := remaining(t, side); got != tt.left {
						t.Errorf("%v left want %v", got, tt.left)
					}
				})
		})
	}
}

// A flow that nobody decided about, and one without flow control, can be settled for nothing.
func TestSettleWithoutAgent(t *testing.T) {
	sides.Setup{}.InBubbles(t, sides.AllAndStored, func(t *testing.T, side *sides.Side) {
		side.Silence()
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		for name, flow := range map[string]*flowctl.Flow{
			"unreachable": side.Client.Start(t.Context(), "point", estimated("1")),
			"canceled":    side.Client.Start(ended, "point", estimated("1")),
			"invalid":     side.Client.Start(t.Context(), "", estimated("1")),
			"off":         (*flowctl.Client)(nil).Start(t.Context(), "point", estimated("1")),
		} {
			flow.Settle("tokens", 5)
			if r, err := flow.End(t.Context()); err != nil || r.Settled {
				t.Errorf("%s: End() = %+v, %v", name, r, err)
			}
		}
	})
}

// What cannot be a settlement is logged, once a minute.
func TestSettleLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var logged bytes.Buffer
		side := sides.Setup{Options: []flowctl.Option{flowctl.WithLogger(slog.New(slog.NewTextHandler(&logged, nil)))}}.New(t, sides.Embedded)
		settle := func() {
			flow := side.Client.Start(t.Context(), "point", flowctl.Params{})
			flow.Settle("tokens", -1)
			flow.Settle("", 1)
			_, _ = flow.End(t.Context())
			flow.Settle("tokens", -1)
		}
		settle()
		settle()
		<-time.After(time.Minute)
		settle()
		const want = "headgate: a flow was not settled"
		if got := strings.Count(logged.String(), want); got != 2 || !strings.Contains(logged.String(), "unlogged_before=3") {
			t.Errorf("logged %d times want 2:\n%s", got, &logged)
		}
	})
}

// However Settle and End meet, the flow is settled once, for one of the numbers that were said, or what it took stays taken.
func TestSettleAndEndAtOnce(t *testing.T) {
	side := sides.Setup{Policies: budget()}.New(t, sides.Embedded)
	for range 300 {
		flow := side.Client.Start(t.Context(), "point", estimated("10"))
		var wg sync.WaitGroup
		for _, tokens := range []float64{2, 3, 4} {
			wg.Go(func() { flow.Settle("tokens", tokens) })
		}
		var ends, settled atomic.Int32
		for range 2 {
			wg.Go(func() {
				r, err := flow.End(t.Context())
				if err == nil {
					ends.Add(1)
				}
				if r.Settled {
					settled.Add(1)
				}
			})
		}
		wg.Wait()
		cost := 100 - remaining(t, side)
		if ends.Load() != 1 || (settled.Load() == 1) != (cost != 10) || !slices.Contains([]float64{2, 3, 4, 10}, cost) {
			t.Fatalf("it ended %d times, was settled %d times, and cost %v", ends.Load(), settled.Load(), cost)
		}
		reset(t, side)
	}
}

// reset fills the budget.
func reset(t *testing.T, side *sides.Side) {
	t.Helper()
	c, err := side.Engine.Component("test", "rate_limiter.0")
	if err == nil {
		err = c.Reset(t.Context(), "")
	}
	if err != nil {
		t.Fatal(err)
	}
}
