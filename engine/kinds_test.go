package engine_test

import (
	"context"
	"maps"
	"reflect"
	"slices"
	"testing"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/testing/allkinds"
	"github.com/headgate-go/headgate/policy"
)

// The tables that others go over have all kinds: limiters and schedulers with a store, and what flows settle.
func TestTablesHaveAllKinds(t *testing.T) {
	values := func(table map[string]policy.Component) []policy.Component { return slices.Collect(maps.Values(table)) }
	shared := func(queue bool) func(policy.Component) bool {
		return func(c policy.Component) bool {
			return allkinds.Has(c, "OnOutage") && allkinds.Has(c, "Scheduler") == queue
		}
	}
	allkinds.Covered(t, "settling", allkinds.Having("MaxDebt"), values(settling(0))...)
	allkinds.Covered(t, "limiters", shared(false), values(limiters())...)
	allkinds.Covered(t, "sharedSchedulers", shared(true), values(sharedSchedulers())...)
	for name, c := range limiters() {
		if want := allkinds.With(t, c, "OnOutage", policy.OutageOpen); !reflect.DeepEqual(onOutage(c, policy.OutageOpen), want) {
			t.Errorf("onOutage does not set what a %s does in an outage: add a case", name)
		}
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
