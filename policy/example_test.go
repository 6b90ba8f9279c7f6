package policy_test

import (
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/headgate-go/headgate/policy"
)

// Limits need no file.
func Example() {
	p := policy.Policy{Name: "checkout", Components: []policy.Component{
		policy.RateLimiter{
			Selectors: policy.At("checkout", "refund"),
			Capacity:  10, Fill: 10, Interval: 30 * time.Second,
			LimitBy: "user_id",
		},
		policy.ConcurrencyLimiter{
			Selectors: policy.At("checkout"),
			Max:       64, MaxInflight: time.Minute,
		},
	}}
	fmt.Println(p.Validate())
	// Output: <nil>
}

func ExampleLoad() {
	policies, err := policy.Load("testdata/rl-basic.yaml", "testdata/cl-basic.yaml")
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, p := range policies {
		switch c := p.Components[0].(type) {
		case policy.RateLimiter:
			fmt.Printf("%s: %g tokens every %s for each %s\n", p.Name, c.Fill, c.Interval, c.LimitBy)
		case policy.ConcurrencyLimiter:
			fmt.Printf("%s: %g flows at once for each %s\n", p.Name, c.Max, c.LimitBy)
		}
	}
	// Output:
	// rl-basic: 2 tokens every 1s for each user_id
	// cl-basic: 2 flows at once for each user_id
}

// Policies in Aperture's format become a file in Headgate's own.
func ExampleFormat() {
	policies, err := policy.Load("testdata/rl-basic.yaml")
	if err != nil {
		fmt.Println(err)
		return
	}
	text, err := policy.Format(policies)
	fmt.Print(string(text), err)
	// Output:
	// headgate: 1
	// policies:
	//   - name: rl-basic
	//     components:
	//       - rate_limiter:
	//           id: root.0
	//           at: [rl-basic]
	//           capacity: 5
	//           fill: 2
	//           interval: 1s
	//           limit_by: user_id
	//           tokens_label: tokens
	// <nil>
}

// A port may take its number from a variable, and dynamicConfig may set that. What a file says that is of no use here is
// a warning.
func ExampleLoad_variables() {
	policies, err := policy.Load("testdata/variables.yaml")
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, p := range policies {
		if l, ok := p.Components[0].(policy.RateLimiter); ok {
			fmt.Printf("%s/%s: capacity %g, pass through: %v\n", p.Name, l.ID, l.Capacity, l.PassThrough)
		}
		for _, warning := range p.Warnings {
			fmt.Println("warning:", warning)
		}
	}
	// Output:
	// orders/root.2: capacity 25, pass through: true
	// warning: testdata/variables.yaml:6:5: spec.circuit.evaluation_interval: not used
}

// The same rules hold for policies written in Go.
func ExamplePolicy_Validate() {
	p := policy.Policy{Name: "per-user", Components: []policy.Component{
		policy.RateLimiter{Selectors: policy.At("checkout"), Capacity: 10, Fill: 10},
	}}
	fmt.Println(p.Validate())
	// Output: policy "per-user": components[0].Interval: must be positive, is 0s
}

// The values of a blueprint are a policy.
func ExampleParse_blueprint() {
	policies, err := policy.Parse("ramp.yaml", []byte(`blueprint: load-ramping/base
policy:
  policy_name: new-ui
  start: true
  load_ramp:
    sampler: {selectors: [{control_point: new-ui}], session_label_key: user}
    steps:
      - {target_accept_percentage: 1, duration: 10m}
      - {target_accept_percentage: 100, duration: 1h}
`))
	if err != nil {
		fmt.Println(err)
		return
	}
	if ramp, ok := policies[0].Components[0].(policy.LoadRamp); ok {
		for _, step := range ramp.Steps {
			fmt.Printf("%s: %g%% in %s\n", policies[0].Name, step.Target, step.Duration)
		}
	}
	// Output:
	// new-ui: 1% in 10m0s
	// new-ui: 100% in 1h0m0s
}

// A file says a calendar quota by a key that Aperture does not have.
func ExampleCalendarQuota() {
	policies, err := policy.Load("testdata/monthly.yaml")
	if err != nil {
		fmt.Println(err)
		return
	}
	if q, ok := policies[0].Components[0].(policy.CalendarQuota); ok {
		fmt.Printf("%g tokens a %s of %s for each %s\n", q.Amount, q.Period, q.TimeZone, q.LimitBy)
	}
	// Output: 1e+06 tokens a month of Europe/Berlin for each tenant
}

// A file says a circuit breaker by a key that Aperture does not have.
func ExampleCircuitBreaker() {
	policies, err := policy.Load("testdata/breaker.yaml")
	if err != nil {
		fmt.Println(err)
		return
	}
	if b, ok := policies[0].Components[0].(policy.CircuitBreaker); ok {
		fmt.Printf("opens for %v when %g of %d flows to a %s fail in %v\n", b.OpenDuration, b.FailureRatio, b.MinFlows, b.LimitBy, b.Window)
	}
	// Output: opens for 10s when 0.5 of 20 flows to a provider fail in 30s
}

func ExampleParse() {
	_, err := policy.Parse("limits.yaml", []byte(`circuit:
  components:
    - flow_control:
        concurrency_limiter:
          selectors: [{controlpoint: export, control_point: export}]
          in_ports: {max_concurrency: {constant_signal: {value: 5}}}
          parameters: {max_inflight_duration: 120}
`))
	fmt.Println(err)
	if first, ok := errors.AsType[*policy.Error](err); ok {
		fmt.Println("first in line", first.Line)
	}
	// Output:
	// limits.yaml:5:24: circuit.components[0].flow_control.concurrency_limiter.selectors[0].controlpoint: unknown key; did you mean "control_point"?
	// limits.yaml:7:47: circuit.components[0].flow_control.concurrency_limiter.parameters.max_inflight_duration: want a duration such as "1.5s", have a number
	// first in line 5
}

// Each of these components is for another kind of limit. A policy has those that a control point needs.
func ExampleComponent() {
	components := []policy.Component{
		policy.RateLimiter{
			Selectors: policy.At("search"), LimitBy: "user_id",
			Capacity: 20, Fill: 10, Interval: time.Minute,
		},
		policy.ConcurrencyLimiter{
			Selectors: policy.At("export"), LimitBy: "tenant",
			Max: 2, MaxInflight: 5 * time.Minute,
		},
		policy.QuotaScheduler{
			Selectors: policy.At("geocode"), Capacity: 100, Fill: 100, Interval: time.Second,
			Scheduler: policy.Scheduler{PriorityLabel: "priority"},
		},
		policy.ConcurrencyScheduler{
			Selectors: policy.At("query"), Max: 8, MaxInflight: time.Minute,
			Scheduler: policy.Scheduler{FairnessLabel: "tenant"},
		},
		policy.AIMDLoadScheduler{
			Selectors: policy.At("checkout"),
			Signal:    policy.Named("in_flight"), Setpoint: policy.Constant(64),
		},
		policy.LoadRamp{
			Selectors: policy.At("new-page"), SessionLabel: "user_id",
			Steps: []policy.RampStep{{Target: 1}, {Target: 100, Duration: time.Hour}},
		},
		policy.CalendarQuota{
			Selectors: policy.At("prompt"), LimitBy: "tenant", TokensLabel: "tokens",
			Amount: 1_000_000, Period: policy.PeriodMonth, TimeZone: "Europe/Berlin",
		},
		policy.CircuitBreaker{
			Selectors: policy.At("payment"), LimitBy: "provider",
			FailureRatio: 0.5, MinFlows: 20, Window: 30 * time.Second, OpenDuration: 10 * time.Second,
		},
	}
	p := policy.Policy{Name: "all-kinds", Components: components}
	fmt.Println(p.Validate())
	// Output: <nil>
}

// Two tenants with numbers of their own: one that may do more, and one that may do nothing.
func ExampleOverride() {
	search := policy.RateLimiter{
		Selectors: policy.At("search"), LimitBy: "tenant",
		Capacity: 20, Fill: 10, Interval: time.Minute,
		Overrides: map[string]policy.Override{
			"acme":    {Capacity: 200, Fill: 100},
			"trial-7": {Capacity: math.SmallestNonzeroFloat64}, // which means 0
		},
	}
	p := policy.Policy{Name: "search", Components: []policy.Component{search}}
	fmt.Println(p.Validate())
	// Output: <nil>
}
