package flowctl_test

import (
	"context"
	"testing"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// grace is how much longer than its caller a check may take.
const grace = 200 * time.Millisecond

// The ways in which a caller's context ends after a while.
var leaves = []struct {
	name string
	by   func(ctx context.Context, after time.Duration) (context.Context, context.CancelFunc)
}{
	{"canceled", func(ctx context.Context, after time.Duration) (context.Context, context.CancelFunc) {
		ctx, cancel := context.WithCancel(ctx)
		timer := time.AfterFunc(after, cancel)
		return ctx, func() {
			timer.Stop()
			cancel()
		}
	}},
	{"deadline", context.WithTimeout},
}

// An answer that comes soon after the caller has gone tells which slots its flow holds. They come back when it ends.
func TestLateAnswer(t *testing.T) {
	const gone, travel = 15 * time.Millisecond, 20 * time.Millisecond
	components := map[string]policy.Component{
		"limiter":   policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour},
		"scheduler": policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour},
	}
	for name, component := range components {
		for _, leave := range leaves {
			for question, params := range map[string]flowctl.Params{"Check": {}, "CheckHTTP": {HTTP: get(nil)}} {
				t.Run(name+"/"+leave.name+"/"+question, func(t *testing.T) {
					setup := sides.Setup{Policies: sides.Policies(component), Travel: travel}
					setup.InBubbles(t, []sides.Kind{sides.Served}, func(t *testing.T, side *sides.Side) {
						if err := side.Client.Ready(t.Context()); err != nil {
							t.Fatal(err)
						}
						ctx, cancel := leave.by(t.Context(), gone)
						defer cancel()
						begin := time.Now()
						flow := side.Client.Start(ctx, "point", params)
						if got := time.Since(begin); got < travel || got > gone+grace {
							t.Errorf("Start() took %v want between %v and %v", got, travel, gone+grace)
						}
						wantUndecided(t, flow)
						if got, err := flow.End(ctx); got != (flowctl.EndResponse{Held: 1, Returned: 1}) || err != nil {
							t.Errorf("End() = %+v, %v want one slot back", got, err)
						}
						if ends := side.Ends(); len(ends) != 0 {
							t.Errorf("telemetry of a flow that did not run: %v", ends)
						}
						if held := side.Held(); held != 0 {
							t.Errorf("%d slots are held", held)
						}
					})
				})
			}
		}
	}
}

// wantUndecided checks that nothing is seen of an answer.
func wantUndecided(t *testing.T, flow *flowctl.Flow) {
	t.Helper()
	if flow.Decision() != flowctl.Canceled || flow.ShouldRun() || flow.Success() {
		t.Errorf("%v, %v want it canceled", flow, flow.Err())
	}
	if flow.CheckResponse() != nil || flow.RejectReason() != flowctl.ReasonNone || flow.RetryAfter() != 0 {
		t.Errorf("the flow has the answer %v, %v, %v", flow.CheckResponse(), flow.RejectReason(), flow.RetryAfter())
	}
	if answer, ok := flow.HTTPAnswer(); ok {
		t.Errorf("HTTPAnswer() = %+v", answer)
	}
}

// A rejection that comes late is none of the flow's.
func TestLateRejection(t *testing.T) {
	setup := sides.Setup{
		Answers: []flowtest.Answer{{Reason: flowctl.ReasonRateLimited, RetryAfter: time.Minute}}, Travel: 40 * time.Millisecond,
	}
	setup.InBubbles(t, []sides.Kind{sides.Served}, func(t *testing.T, side *sides.Side) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		flow := side.Client.Start(ctx, "point", flowctl.Params{})
		wantUndecided(t, flow)
		if got, err := flow.End(ctx); got.Held != 0 || err != nil {
			t.Errorf("End() = %+v, %v want nothing held", got, err)
		}
	})
}

// Start does not wait for long when the caller has gone and nothing comes from the agent, and never beyond the check timeout.
func TestNoLateAnswer(t *testing.T) {
	const gone = 100 * time.Millisecond
	for _, leave := range leaves {
		for _, tt := range []struct {
			name        string
			check, want time.Duration // the check timeout, and how long Start takes
		}{
			{"no check timeout", -1, gone + grace},
			{"the check timeout is later", time.Second, gone + grace},
			{"the check timeout is near", gone + grace/2, gone + grace/2},
		} {
			t.Run(leave.name+"/"+tt.name, func(t *testing.T) {
				setup := sides.Setup{Options: []flowctl.Option{flowctl.WithCheckTimeout(tt.check), flowctl.WithoutTelemetry()}, Travel: time.Minute}
				setup.InBubbles(t, []sides.Kind{sides.Served}, func(t *testing.T, side *sides.Side) {
					ctx, cancel := leave.by(t.Context(), gone)
					defer cancel()
					begin := time.Now()
					flow := side.Client.Start(ctx, "point", flowctl.Params{})
					if got := time.Since(begin); flow.Decision() != flowctl.Canceled || got != tt.want {
						t.Errorf("%v after %v want it canceled after %v", flow, got, tt.want)
					}
					if got, err := flow.End(ctx); got.Held != 0 || err != nil {
						t.Errorf("End() = %+v, %v want nothing held", got, err)
					}
				})
			})
		}
	}
}
