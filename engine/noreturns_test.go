package engine_test

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

// While no slot has come back, the log says why a rejection for want of a slot has no time to retry.
func TestWhyThereIsNoEstimate(t *testing.T) {
	at := policy.At("point")
	noQueue := policy.Scheduler{Default: policy.WorkloadParameters{QueueTimeout: policy.NoQueue}}
	for _, tt := range []struct {
		name    string
		c       policy.Component
		unknown bool // until a flow has ended
	}{
		{"limiter", policy.ConcurrencyLimiter{Selectors: at, Max: 1, MaxInflight: time.Hour}, true},
		{"scheduler", policy.ConcurrencyScheduler{Selectors: at, Max: 1, MaxInflight: time.Hour, Scheduler: noQueue}, true},
		{"scheduler, after a wait", policy.ConcurrencyScheduler{Selectors: at, Max: 1, MaxInflight: time.Hour}, true},
		{"no slots at all", policy.ConcurrencyLimiter{Selectors: at, MaxInflight: time.Hour}, false},
		{"tokens", policy.RateLimiter{Selectors: at, Capacity: 1, Fill: 1, Interval: time.Hour}, false},
		{"tokens that never come", policy.RateLimiter{Selectors: at, Capacity: 1, Interval: time.Hour}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, client := opened(t, tt.c)
				logged := func() string {
					t.Helper()
					flow := client.Start(t.Context(), "point", flowctl.Params{CheckTimeout: time.Second})
					defer end(flow)
					if flow.ShouldRun() {
						t.Fatal("the flow is not rejected")
					}
					var text bytes.Buffer
					slog.New(slog.NewTextHandler(&text, nil)).Info("", "error", flow.Err())
					return text.String()
				}
				const why = `error.retry_after_unknown="no flow has given a slot back yet"`
				first := client.Start(t.Context(), "point", flowctl.Params{})
				if text := logged(); strings.Contains(text, why) != tt.unknown || tt.unknown && strings.Contains(text, "retry_after=") {
					t.Errorf("log = %s want retry_after_unknown: %v", text, tt.unknown)
				}
				<-time.After(time.Second)
				end(first)
				second := client.Start(t.Context(), "point", flowctl.Params{})
				defer end(second)
				if text := logged(); strings.Contains(text, "unknown") || tt.unknown && !strings.Contains(text, "retry_after=") {
					t.Errorf("after a flow has ended, log = %s want an estimate", text)
				}
			})
		})
	}
}
