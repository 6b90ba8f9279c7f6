package engine_test

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/allkinds"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/policy"
)

// Stats of every kind of component encode as JSON, however extreme its numbers are and however long it has run.
func TestStatsEncodeAsJSON(t *testing.T) {
	at := policy.At("point")
	all := policy.Scheduler{TokensLabel: "tokens", PriorityLabel: "priority", FairnessLabel: "user"}
	var components []policy.Component
	for _, n := range []float64{0, 0.5, 1, math.MaxFloat64, math.SmallestNonzeroFloat64} {
		components = append(components,
			policy.RateLimiter{Selectors: at, Capacity: n, Fill: n, Interval: 1, TokensLabel: "tokens", DryRun: true},
			policy.RateLimiter{Selectors: at, Capacity: n, Fill: n, Interval: math.MaxInt64, LimitBy: "user", StepFill: true, DryRun: true},
			policy.ConcurrencyLimiter{Selectors: at, Max: n, MaxInflight: math.MaxInt64, TokensLabel: "tokens", DryRun: true},
			policy.QuotaScheduler{Selectors: at, Capacity: n, Fill: n, Interval: 1, Scheduler: all, DryRun: true},
			policy.ConcurrencyScheduler{Selectors: at, Max: n, MaxInflight: 1, Scheduler: all, DryRun: true},
			policy.LoadScheduler{Selectors: at, LoadMultiplier: policy.Constant(n), Scheduler: all, DryRun: true},
			policy.LoadScheduler{Selectors: at, LoadMultiplier: policy.Named("odd"), WorkloadLatencyTokens: true, Scheduler: all, DryRun: true},
			policy.AIMDLoadScheduler{
				Selectors: at, Signal: policy.Constant(n), Setpoint: policy.Constant(1), Gradient: policy.Gradient{Slope: -1},
				MaxLoadMultiplier: n, LinearIncrement: n, Scheduler: all, DryRun: true,
			},
			policy.Sampler{Selectors: at, AcceptPercentage: min(n, 100), DryRun: true},
			policy.CalendarQuota{Selectors: at, Amount: n, Period: policy.PeriodHour, TokensLabel: "tokens", DryRun: true},
			policy.CircuitBreaker{Selectors: at, FailureRatio: min(n, 1), FailureCount: 1, Window: math.MaxInt64, OpenDuration: math.MaxInt64, DryRun: true},
			policy.LoadRamp{Selectors: at, Steps: []policy.RampStep{{Target: min(n, 100), Duration: math.MaxInt64}}, DryRun: true},
		)
	}
	allkinds.Covered(t, "TestStatsEncodeAsJSON", allkinds.Any, components...)
	for _, odd := range []float64{math.NaN(), math.Inf(1), math.Inf(-1), -1} {
		synctest.Test(t, func(t *testing.T) {
			e, err := engine.New([]policy.Policy{{Name: "p", Components: components}}, engine.WithSignal("odd", func() float64 { return odd }))
			if err != nil {
				t.Fatal(err)
			}
			defer e.Close()
			client, err := flowctl.New(e)
			if err != nil {
				t.Fatal(err)
			}
			for i := range race.Pick(10, 50) {
				flow := client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{
					"tokens": []string{"1", "0", "1e308", "5e-324", "-1"}[i%5], "user": "u", "priority": "1e300",
				}})
				if i%2 == 0 {
					end(flow)
				}
				<-time.After(time.Second)
				text, err := json.Marshal(e.Stats())
				if err != nil {
					t.Fatal(err)
				}
				var back engine.Stats
				if err := json.Unmarshal(text, &back); err != nil || len(back.Components) != len(components) {
					t.Fatalf("%d components of %d came back: %v", len(back.Components), len(components), err)
				}
			}
		})
	}
}

// An unlimited number is null, and all others are what they are.
func TestUnlimitedIsNull(t *testing.T) {
	text, err := json.Marshal(engine.ComponentStats{
		ID: "x", LoadMultiplier: math.Inf(1), Usage: engine.Usage{Capacity: math.Inf(1), Remaining: 2.5, Waiting: 3},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"LoadMultiplier":null`, `"Capacity":null`, `"Remaining":2.5`, `"Waiting":3`, `"ID":"x"`} {
		if !strings.Contains(string(text), want) {
			t.Errorf("JSON = %s want %s", text, want)
		}
	}
	if strings.Count(string(text), "LoadMultiplier") != 1 {
		t.Errorf("JSON = %s want each field once", text)
	}
}

func TestUnlimitedComesBack(t *testing.T) {
	for name, want := range map[string]engine.ComponentStats{
		"unlimited": {ID: "x", LoadMultiplier: math.Inf(1), Usage: engine.Usage{Capacity: math.Inf(1), Remaining: math.Inf(1), InFlight: 2, State: "open"}},
		"limited":   {ID: "x", LoadMultiplier: 0.5, Usage: engine.Usage{Capacity: 3, Remaining: -1}},
		"zero":      {},
	} {
		text, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		var got engine.ComponentStats
		if err := json.Unmarshal(text, &got); err != nil || !cmp.Equal(got, want, cmpopts.EquateEmpty()) {
			t.Errorf("%s: %s came back as %+v, %v", name, text, got, err)
		}
	}
	var none engine.Usage
	if err := json.Unmarshal([]byte("{}"), &none); err != nil || none != (engine.Usage{}) {
		t.Errorf("{} is %+v, %v want nothing", none, err)
	}
	if err := json.Unmarshal([]byte(`{"Capacity": "x"}`), &none); err == nil {
		t.Error("a text is a Capacity")
	}
}
