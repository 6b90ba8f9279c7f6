package flowctl_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

type hookKey struct{}

// The hook gets every flow as Start returns it, whatever was decided and whatever the agent is.
func TestOnDecision(t *testing.T) {
	for _, dry := range []bool{false, true} {
		type seen struct {
			Decision  flowctl.Decision
			ShouldRun bool
		}
		var got []seen
		var last *flowctl.Flow
		opts := []flowctl.Option{flowctl.WithOnDecision(func(ctx context.Context, f *flowctl.Flow) {
			got = append(got, seen{f.Decision(), f.ShouldRun()})
			last = f
			if ctx.Value(hookKey{}) != "caller" {
				t.Error("the hook did not get the context of the caller")
			}
		})}
		if dry {
			opts = append(opts, flowctl.WithDryRun())
		}
		sides.Setup{Options: opts}.Over(t, sides.All, func(t *testing.T, side *sides.Side) {
			got = nil
			start := func(ctx context.Context, controlPoint string) {
				t.Helper()
				flow := side.Client.Start(context.WithValue(ctx, hookKey{}, "caller"), controlPoint, flowctl.Params{})
				if last != flow {
					t.Error("the hook did not get the flow")
				}
				_, _ = flow.End(t.Context())
			}
			start(t.Context(), "point")
			side.Answer(flowtest.Answer{Reason: flowctl.ReasonRateLimited, RetryAfter: time.Second})
			start(t.Context(), "point")
			canceled, cancel := context.WithCancel(t.Context())
			cancel()
			start(canceled, "point")
			start(t.Context(), "")
			side.Silence()
			side.Answer(flowtest.Answer{Fail: errors.New("gone")})
			start(t.Context(), "point")
			want := []seen{
				{flowctl.Accepted, true}, {flowctl.Rejected, dry}, {flowctl.Canceled, dry}, {flowctl.Invalid, dry}, {flowctl.Unreachable, true},
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("dry run %v: decisions (-want +got):\n%s", dry, diff)
			}
		})
	}
}

// A panic of the hook's is the caller's, who never gets the flow: the flow gives back what it holds.
func TestOnDecisionPanics(t *testing.T) {
	setup := sides.Setup{
		Policies: sides.Policies(policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour}),
		Options:  []flowctl.Option{flowctl.WithOnDecision(func(context.Context, *flowctl.Flow) { panic("hook") })},
	}
	setup.Over(t, sides.EnginesAndStored, func(t *testing.T, side *sides.Side) {
		func() {
			defer func() {
				if p := recover(); p != "hook" {
					t.Errorf("recovered %v want the hook's panic", p)
				}
			}()
			side.Client.Start(t.Context(), "point", flowctl.Params{CheckTimeout: time.Minute})
		}()
		if held := side.Held(); held != 0 {
			t.Errorf("%d slots are held", held)
		}
		if u := peekSlots(t, side.Engine); u.InFlight != 0 {
			t.Errorf("%d flows are in flight", u.InFlight)
		}
	})
}

func peekSlots(t *testing.T, e *engine.Engine) engine.Usage {
	t.Helper()
	c, err := e.Component("test", "concurrency_limiter.0")
	if err != nil {
		t.Fatal(err)
	}
	u, err := c.Peek(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	return u
}
