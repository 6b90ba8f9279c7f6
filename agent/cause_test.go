package agent_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

// What a rejection was caused by is the same whether the engine is in the process or served.
func TestCausesTravel(t *testing.T) {
	scheduler := func(s policy.Scheduler) []policy.Policy {
		return []policy.Policy{{Name: "queue", Components: []policy.Component{policy.ConcurrencyScheduler{
			Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour, Scheduler: s,
		}}}}
	}
	queue := scheduler(policy.Scheduler{})
	for _, tt := range []struct {
		name     string
		policies []policy.Policy
		timeout  time.Duration
		want     flowctl.RejectCause
	}{
		{"none", scheduler(policy.Scheduler{Default: policy.WorkloadParameters{QueueTimeout: policy.NoQueue}}), time.Second, flowctl.CauseNone},
		{"timeout", queue, time.Second, flowctl.CauseTimeout},
		{"queue full", scheduler(policy.Scheduler{MaxQueue: 1}), time.Second, flowctl.CauseQueueFull},
		{"queue too long", []policy.Policy{{Name: "queue", Components: []policy.Component{policy.QuotaScheduler{
			Selectors: policy.At("point"), Capacity: 1, Fill: 1, Interval: time.Hour,
		}}}}, time.Second, flowctl.CauseQueueTooLong},
		{"label too long", []policy.Policy{{Name: "rate", Components: []policy.Component{policy.RateLimiter{
			Selectors: []policy.Selector{{ControlPoint: "point", Labels: policy.LabelMatcher{
				Expression: policy.LabelMatches{Label: "l", Regex: "(?:x?){490}y"},
			}}},
			Capacity: 9, Interval: time.Hour,
		}}}}, time.Second, flowctl.CauseLabelTooLong},
		{"circuit open", []policy.Policy{{Name: "breaker", Components: []policy.Component{policy.CircuitBreaker{
			Selectors: policy.At("point"), FailureCount: 1, Window: time.Hour, OpenDuration: time.Hour,
		}}}}, time.Second, flowctl.CauseCircuitOpen},
	} {
		t.Run(tt.name, func(t *testing.T) {
			overEngines(t, tt.policies, func(t *testing.T, _ *engine.Engine, client *flowctl.Client) {
				params := flowctl.Params{CheckTimeout: tt.timeout, Labels: map[string]string{"l": strings.Repeat("x", 300)}}
				first := client.Start(t.Context(), "point", params)
				defer func() { _, _ = first.End(t.Context()) }()
				if tt.want == flowctl.CauseQueueFull {
					ctx, cancel := context.WithCancel(t.Context())
					done := make(chan struct{})
					go func() {
						defer close(done)
						_, _ = client.Start(ctx, "point", flowctl.Params{CheckTimeout: time.Minute}).End(t.Context())
					}()
					synctest.Wait() // it waits
					defer func() { <-done }()
					defer cancel()
				}
				if tt.want == flowctl.CauseCircuitOpen {
					first.SetStatus(flowctl.StatusError)
					_, _ = first.End(t.Context())
					<-time.After(3 * time.Second) // until its end is known
				}
				flow := client.Start(t.Context(), "point", params)
				defer func() { _, _ = flow.End(t.Context()) }()
				rejected, ok := errors.AsType[*flowctl.RejectedError](flow.Err())
				if !ok || rejected.Cause() != tt.want {
					t.Fatalf("%v: %v want %v", flow, flow.Err(), tt.want)
				}
			})
		})
	}
}
