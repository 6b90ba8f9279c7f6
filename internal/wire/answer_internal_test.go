package wire

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
)

// full is a decision of a component with the info, with as much in it as there can be.
func full(info agentapi.Info) *agentapi.LimiterDecision {
	d := &agentapi.LimiterDecision{
		Component: &agentapi.Component{
			Policy: "p", Hash: "h", ID: "root.0", Info: info, LabelKey: "user", Capacity: 3, DeniedStatus: 429,
			Workload: func(*agentapi.Labels) (string, float64) { return "workload", 0.1 },
		},
		Label: "ann", Remaining: 0.1, Consumed: 0.1, Scope: agentapi.ScopeLabel,
	}
	return d
}

// eachInfo calls f with decisions of components with each info: one that drops the flow, and one that holds a slot.
func eachInfo(f func(agentapi.Info, *checkv1.LimiterDecision)) {
	for info := range agentapi.Infos {
		dropped, held := full(info), full(info)
		dropped.Drop(time.Second)
		held.Hold(1<<64 - 1)
		f(info, decision(new(agentapi.Request), dropped))
		f(info, decision(new(agentapi.Request), held))
	}
}

// elements counts as package flowctl does.
func elements(m protoreflect.Message) (n int) {
	m.Range(func(field protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if field.Message() != nil && !field.IsList() && !field.IsMap() {
			n += 1 + elements(v.Message())
		}
		return true
	})
	return n
}

// Clients count the elements of an answer, and agents its decisions.
func TestElementsOfDecisions(t *testing.T) {
	most := 0
	eachInfo(func(info agentapi.Info, m *checkv1.LimiterDecision) {
		n := 1 + elements(m.ProtoReflect())
		if most = max(most, n); n > decisionElements {
			t.Errorf("a decision with info %d has %d elements want at most %d", info, n, decisionElements)
		}
	})
	if most != decisionElements {
		t.Errorf("decisions have %d elements at the most want %d", most, decisionElements)
	}
}

// All slots of an answer fit into a FlowEnd, because none takes more than its decision.
func TestSlotsAreSmallerThanDecisions(t *testing.T) {
	holding := 0
	eachInfo(func(info agentapi.Info, m *checkv1.LimiterDecision) {
		ref := held(m)
		if ref == nil {
			return
		}
		holding++
		if sizeIn(ref) > sizeIn(m) {
			t.Errorf("a slot with info %d has %d bytes, its decision %d", info, sizeIn(ref), sizeIn(m))
		}
	})
	if holding != 2 {
		t.Errorf("%d infos hold slots want 2", holding)
	}
}

// As many slots go into a FlowEnd as fit.
func TestEnded(t *testing.T) {
	for _, tt := range []struct {
		name        string
		refs, label int
		want        int
	}{
		{"one", 1, 3, 1},
		{"many", 800, 3, 800},
		{"as many as a call has", 2000, 3, mostEnded},
		{"large ones", 800, 1000, MaxEnd / 1036},
		{"one that is too large", 2, MaxEnd, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			refs := make([]*checkv1.InflightRequestRef, tt.refs)
			for i := range refs {
				refs[i] = &checkv1.InflightRequestRef{PolicyName: "p", Label: strings.Repeat("x", tt.label), RequestId: fmt.Sprintf("%016x", i), Tokens: 1}
			}
			got := Ended("point", refs)
			if got != tt.want {
				t.Errorf("Ended() = %d want %d", got, tt.want)
			}
			if size := proto.Size(&checkv1.FlowEndRequest{ControlPoint: "point", InflightRequests: refs[:got]}); got > 1 && size > MaxEnd {
				t.Errorf("a FlowEnd of %d bytes want at most %d", size, MaxEnd)
			}
		})
	}
}

// Of decisions that do not all fit, those that matter most are kept, in order.
func TestFit(t *testing.T) {
	drops, holds, passes := "drops", "holds", "passes"
	takes, awaits := "takes", "awaits" // what needs no end by name: tokens of a quota, the outcome at a circuit breaker
	build := func(rejected bool, all ...string) *agentapi.Verdict {
		v := new(agentapi.Verdict)
		for i, what := range all {
			c := *full(agentapi.InfoConcurrencyLimiter).Component
			c.ID, c.Slots, c.Outcomes = fmt.Sprint(what, i), what == holds, what == awaits
			d := v.Add(&c)
			switch what {
			case drops:
				d.Drop(time.Second)
				if rejected { // the last one decides
					v.Reject(agentapi.Rejection{By: &c})
				}
			case holds, takes, awaits:
				d.Hold(uint64(i + 1))
			}
		}
		return v
	}
	for _, tt := range []struct {
		name string
		v    *agentapi.Verdict
		room int // for so many decisions
		want string
	}{
		{"none", build(false), 0, "[]"},
		{"all", build(true, passes, drops, drops), 3, "[passes0 drops1 drops2]"},
		{"the one that decides", build(true, passes, drops, drops), 1, "[drops2]"},
		{"those that drop", build(true, drops, passes, drops), 2, "[drops0 drops2]"},
		{"those that hold", build(false, passes, holds, drops, passes, holds), 2, "[holds1 holds4]"},
		{"those that hold, in a dry run", build(true, holds, passes, drops), 2, "[holds0 drops2]"},
		{"too many that hold", build(false, holds, passes, holds), 1, "not ok"},
		{"decisions with an awaited outcome", build(false, passes, takes, awaits, holds), 2, "[awaits2 holds3]"},
		{"too many that hold no slot", build(false, takes, awaits, takes), 1, "[awaits1]"},
		{"no room", build(true, drops), 0, "[]"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			size := 0
			for i := range tt.v.Len() {
				size = max(size, sizeIn(decision(new(agentapi.Request), tt.v.At(i))))
			}
			kept, _, ok := fit(new(agentapi.Request), tt.v, tt.room*size)
			ids := []string{}
			for _, m := range kept {
				ids = append(ids, m.GetComponentId())
			}
			got := fmt.Sprint(ids)
			if !ok {
				got = "not ok"
			}
			if got != tt.want {
				t.Errorf("fit() = %v want %v", got, tt.want)
			}
		})
	}
}
