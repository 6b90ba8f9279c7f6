package engine_test

import (
	"context"
	"testing"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

// anyKind makes a component of the kind that lets all flows of the selector pass.
func anyKind(kind string, dry bool, selector policy.Selector) policy.Component {
	at := []policy.Selector{selector}
	switch kind {
	case "rate":
		return policy.RateLimiter{Selectors: at, Capacity: 9, Interval: 1, DryRun: dry}
	case "slots":
		return policy.ConcurrencyLimiter{Selectors: at, Max: 9, MaxInflight: time.Hour, DryRun: dry}
	case "quota":
		return policy.QuotaScheduler{Selectors: at, Capacity: 9, Interval: 1, DryRun: dry}
	case "places":
		return policy.ConcurrencyScheduler{Selectors: at, Max: 9, MaxInflight: time.Hour, DryRun: dry}
	case "load":
		return policy.LoadScheduler{Selectors: at, LoadMultiplier: policy.Constant(9), DryRun: dry}
	case "aimd":
		return policy.AIMDLoadScheduler{Selectors: at, Signal: policy.Constant(1), Setpoint: policy.Constant(2), DryRun: dry}
	case "sampler":
		return policy.Sampler{Selectors: at, AcceptPercentage: 100, DryRun: dry}
	case "calendar":
		return policy.CalendarQuota{Selectors: at, Amount: 9, Period: policy.PeriodDay, DryRun: dry}
	case "breaker":
		return policy.CircuitBreaker{Selectors: at, FailureCount: 9, Window: time.Minute, OpenDuration: time.Minute, DryRun: dry}
	default:
		return policy.LoadRamp{Selectors: at, Steps: []policy.RampStep{{Target: 100}}, Start: true, DryRun: dry}
	}
}

// withScheduler gives the component a scheduler.
func withScheduler(c policy.Component, s policy.Scheduler) policy.Component {
	switch c := c.(type) {
	case policy.QuotaScheduler:
		c.Scheduler = s
		return c
	case policy.ConcurrencyScheduler:
		c.Scheduler = s
		return c
	case policy.LoadScheduler:
		c.Scheduler = s
		return c
	case policy.AIMDLoadScheduler:
		c.Scheduler = s
		return c
	default:
		return c
	}
}

// opened makes an engine of one policy, with a client, until the test ends.
func opened(t *testing.T, components ...policy.Component) (*engine.Engine, *flowctl.Client) {
	t.Helper()
	e, err := engine.New([]policy.Policy{{Name: "p", Components: components}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	client, err := flowctl.New(e)
	if err != nil {
		t.Fatal(err)
	}
	return e, client
}

// checked asks an engine as package agent does, whose labels have no bound.
func checked(t *testing.T, e *engine.Engine, labels map[string]string) (cause flowctl.RejectCause, accepted bool) {
	t.Helper()
	var v agentapi.Verdict
	if err := e.Agent().Check(t.Context(), &agentapi.Request{ControlPoint: "point", Labels: agentapi.Labels{Params: labels}}, &v); err != nil {
		t.Fatal(err)
	}
	return flowctl.RejectCause(v.Rejection().Cause), !v.Rejected()
}

func b2u(b bool) uint64 {
	if b {
		return 1
	}
	return 0
}

func peekAt(e *engine.Engine, policyName, id, value string) (engine.Usage, error) {
	c, err := e.Component(policyName, id)
	if err != nil {
		return engine.Usage{}, err
	}
	return c.Peek(context.Background(), value)
}

func resetAt(e *engine.Engine, policyName, id, value string) error {
	c, err := e.Component(policyName, id)
	if err != nil {
		return err
	}
	return c.Reset(context.Background(), value)
}

func rampOf(e *engine.Engine, policyName, id string) (*engine.Ramp, bool) {
	c, err := e.Component(policyName, id)
	if err != nil {
		return nil, false
	}
	return c.Ramp()
}
