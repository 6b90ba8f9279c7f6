package engine_test

import (
	"slices"
	"testing"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// A label of a policy is another one's copy, whatever the flow has under its name, for selectors, keys and costs alike, and
// for that policy only.
func TestPolicyLabels(t *testing.T) {
	free := []policy.Selector{{ControlPoint: "a", Labels: policy.LabelMatcher{Equal: map[string]string{"tier": "free"}}}}
	limit := policy.RateLimiter{Selectors: free, Capacity: 10, Interval: time.Hour, LimitBy: "user", TokensLabel: "cost"}
	other := limit
	other.Selectors, other.LimitBy, other.TokensLabel, other.Capacity = policy.At("b"), "tier", "", 1
	setup := sides.Setup{Policies: []policy.Policy{
		{
			Name: "copies", Components: []policy.Component{limit},
			Labels: map[string]string{"tier": "request.tier", "user": "request.user", "cost": "request.cost"},
		},
		{Name: "own", Components: []policy.Component{other}},
	}}
	setup.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) {
		for _, tt := range []struct {
			name, at string
			labels   map[string]string
			rejected bool
		}{
			{"a free user", "a", map[string]string{"request.tier": "free", "request.user": "ann", "request.cost": "7"}, false},
			{"the same, who claims to be another one", "a", map[string]string{"request.tier": "free", "request.user": "ann", "user": "bob", "request.cost": "7"}, true},
			{"the same, who claims to pay", "a", map[string]string{"request.tier": "free", "tier": "gold", "request.user": "ann", "request.cost": "7"}, true},
			{"the same, who claims to cost nothing", "a", map[string]string{"request.tier": "free", "request.user": "ann", "cost": "0", "request.cost": "7"}, true},
			{"who pays", "a", map[string]string{"request.tier": "gold", "tier": "free", "request.user": "ann", "request.cost": "7"}, false},
			{"without a user", "a", map[string]string{"request.tier": "free", "user": "ann", "request.cost": "7"}, false},
			{"another policy", "b", map[string]string{"request.tier": "gold", "tier": "free"}, false},
			{"another policy again", "b", map[string]string{"request.tier": "silver", "tier": "free"}, true},
		} {
			f := side.Client.Start(t.Context(), tt.at, flowctl.Params{Labels: tt.labels})
			if got := f.Decision() == flowctl.Rejected; got != tt.rejected {
				t.Errorf("%s: rejected = %t, want %t", tt.name, got, tt.rejected)
			}
			end(f)
		}
	})
}

// A policy that only gives labels other names has the same components as before.
func TestApplyKeepsWithOtherNames(t *testing.T) {
	limit := func(by string) policy.Component {
		return policy.RateLimiter{ID: "limit", Selectors: policy.At("point"), Capacity: 1, Interval: time.Hour, LimitBy: by}
	}
	e, c := reloadable(t, []policy.Component{limit("user")})
	flow := func() bool {
		f := c.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": "ann"}})
		end(f)
		return f.Decision() == flowctl.Rejected
	}
	got := []bool{flow()}
	if err := e.Apply([]policy.Policy{{Name: "test", Labels: map[string]string{"who": "user"}, Components: []policy.Component{limit("who")}}}); err != nil {
		t.Fatal(err)
	}
	if got = append(got, flow()); !slices.Equal(got, []bool{false, true}) {
		t.Errorf("rejected = %t, want the second flow", got)
	}
}
