package engine_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

// Stats say on which flows each component acts, and which selectors have picked none, also after the policies have
// changed beside it.
func TestSelectorStats(t *testing.T) {
	gold := policy.LabelMatcher{Equal: map[string]string{"tier": "gold"}}
	limits := policy.RateLimiter{
		ID: "users", Capacity: 100, Fill: 100, Interval: time.Hour, LimitBy: "user", DryRun: true, DeniedStatus: 503,
		Selectors: []policy.Selector{
			{ControlPoint: "search", Labels: gold},
			{ControlPoint: "search"},
			{ControlPoint: "search", Service: "shop"}, // the one before picks its flows
			{ControlPoint: "export", Service: "any"},
		},
	}
	e, client := reloadable(t, []policy.Component{limits})
	flow := func(at string, labels map[string]string) {
		t.Helper()
		end(client.Start(t.Context(), at, flowctl.Params{Labels: labels}))
	}
	check := func(when string, users []engine.SelectorStats, warnings ...string) {
		t.Helper()
		for _, c := range e.Stats().Components {
			if c.ID != "users" {
				continue
			}
			if diff := cmp.Diff(users, c.Selectors); diff != "" {
				t.Errorf("%s: Selectors (-want +got):\n%s", when, diff)
			}
			if !c.DryRun || c.DeniedStatus != 503 || c.Usage != (engine.Usage{Capacity: 100}) {
				t.Errorf("%s: DryRun, DeniedStatus, Usage = %v, %d, %+v", when, c.DryRun, c.DeniedStatus, c.Usage)
			}
		}
		if diff := cmp.Diff(warnings, e.Warnings()); diff != "" {
			t.Errorf("%s: Warnings() (-want +got):\n%s", when, diff)
		}
	}
	selectors := func(gold, all, shop, export engine.SelectorStats) []engine.SelectorStats {
		gold.ControlPoint, gold.Labels = "search", `tier = "gold"`
		all.ControlPoint = "search"
		shop.ControlPoint, shop.Service = "search", "shop"
		export.ControlPoint = "export"
		return []engine.SelectorStats{gold, all, shop, export}
	}
	warning := func(component string, i, flows int) string {
		return fmt.Sprintf("policy \"test\": component %q: selectors[%d] has picked none of the %d flows that the control point \"search\" has accepted since the component came into force",
			component, i, flows)
	}
	type s = engine.SelectorStats

	check("before flows come", selectors(s{}, s{}, s{}, s{}))
	for range 3 {
		flow("search", nil)
	}
	flow("elsewhere", nil)
	check("without gold", selectors(s{Missed: 3}, s{Picked: true}, s{Missed: 3}, s{}), warning("users", 0, 3), warning("users", 2, 3))

	other := policy.RateLimiter{ID: "other", Selectors: []policy.Selector{{ControlPoint: "search", Labels: gold}}, Capacity: 1, Fill: 1, Interval: time.Hour}
	apply(t, e, other, limits)
	check("beside a new one", selectors(s{Missed: 3}, s{Picked: true}, s{Missed: 3}, s{}), warning("users", 0, 3), warning("users", 2, 3))
	flow("search", nil)
	check("with the new one", selectors(s{Missed: 4}, s{Picked: true}, s{Missed: 4}, s{}),
		warning("other", 0, 1), warning("users", 0, 4), warning("users", 2, 4))
	for range 2 { // of which the other one rejects one
		flow("search", gold.Equal)
	}
	flow("export", nil)
	check("with gold", selectors(s{Picked: true}, s{Picked: true}, s{Missed: 5}, s{Picked: true}), warning("users", 2, 5))
}

// A program that shows an engine finds a handle for each component, which says what it is of.
func TestComponentByStats(t *testing.T) {
	e := countedEngine(t)
	for _, c := range e.Stats().Components {
		h, err := e.Component(c.Policy, c.ID)
		if err != nil {
			t.Fatal(err)
		}
		if h.Policy() != c.Policy || h.ID() != c.ID || h.Kind() != c.Kind {
			t.Errorf("the handle is of %q, %q, %q want %q, %q, %q", h.Policy(), h.ID(), h.Kind(), c.Policy, c.ID, c.Kind)
		}
	}
}
