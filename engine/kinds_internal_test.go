package engine

import (
	"testing"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/testing/allkinds"
	"github.com/headgate-go/headgate/policy"
)

// oneOfEach are components of all kinds that let flows pass, in the order of the table.
func oneOfEach() [policy.Kinds]policy.Component { return allkinds.Components(policy.At("point")...) }

// Each kind has its row in its place, decides about a flow, learns how the flow ended, and shows itself in Stats by the name
// that files have for it. Flows hold slots where the row says so.
func TestKindsDecide(t *testing.T) {
	for i, c := range oneOfEach() {
		e := openEngine(t, c)
		d := policy.Policy{Name: "test", Components: []policy.Component{c}}.Describe()[0]
		if d.Kind != i {
			t.Errorf("%T has the place %d in package policy, and %d here", c, d.Kind, i)
		}
		req := &agentapi.Request{ControlPoint: "point"}
		var v agentapi.Verdict
		if err := e.Agent().Check(t.Context(), req, &v); err != nil || v.Rejected() || v.Len() != 1 {
			t.Errorf("%s: Check = %v, %+v want it accepted by one decision", d.Name, err, v)
			continue
		}
		held := 0
		if kinds[i].about().slots {
			held = 1
		}
		if r, err := e.Agent().End(t.Context(), req, &v, agentapi.Outcome{Ended: agentapi.EndedFailed}); err != nil || r != (agentapi.Returns{Held: held, Returned: held}) {
			t.Errorf("%s: End = %+v, %v want %d slots", d.Name, r, err, held)
		}
		if got := e.Stats().Components[0]; got.Kind != d.Name || got.ID != d.Name+".0" || got.Accepted != 1 {
			t.Errorf("Stats = %+v want one flow accepted by %s.0", got, d.Name)
		}
	}
}
