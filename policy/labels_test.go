package policy_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/internal/components"
	"github.com/headgate-go/headgate/policy"
)

// Wherever a component of any kind names a label, a name of the policy stands for the flow's label. The policy itself stays as
// it is.
func TestLabelsAreNamesEverywhere(t *testing.T) {
	for seed := range uint64(20) {
		p := random(seed)
		p.Labels = map[string]string{}
		for i, name := range words {
			p.Labels[name] = fmt.Sprint("flow.", i)
		}
		before, err := policy.Format([]policy.Policy{p})
		if err != nil {
			t.Fatal(err)
		}
		read := policy.Policy{Name: p.Name}
		for _, d := range p.Describe() {
			d.Reads(func(role components.Role, label string) {
				if label != "" && !strings.HasPrefix(label, "flow.") {
					t.Errorf("%s %s %q, which is no label of the flow", d.Name, role, label)
				}
			})
			read.Components = append(read.Components, d.Component.(policy.Component))
		}
		if err := read.Validate(); err != nil {
			t.Error(err)
		}
		after, err := policy.Format([]policy.Policy{p})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(before), string(after)); diff != "" {
			t.Errorf("the policy has changed (-before +after):\n%s", diff)
		}
	}
}

// A flow has one value of a label, whatever its names are.
func TestLabelsOfOneLabel(t *testing.T) {
	equal := func(labels map[string]string) []policy.Selector {
		return []policy.Selector{{ControlPoint: "a", Labels: policy.LabelMatcher{Equal: labels}}}
	}
	for _, tt := range []struct {
		name  string
		equal map[string]string
		want  policy.LabelMatcher
	}{
		{"alike", map[string]string{"tier": "gold", "plan": "gold", "x": "y"}, policy.LabelMatcher{Equal: map[string]string{"plan": "gold", "x": "y"}}},
		{"at odds", map[string]string{"tier": "gold", "plan": "free"}, policy.LabelMatcher{
			Equal:   map[string]string{"plan": "free"},
			Require: []policy.Requirement{{Key: "plan", Operator: policy.In, Values: []string{"gold"}}},
		}},
	} {
		p := policy.Policy{Name: "p", Labels: map[string]string{"tier": "plan"}, Components: []policy.Component{
			policy.Sampler{Selectors: equal(tt.equal)},
		}}
		got := p.Describe()[0].Component.(policy.Sampler).Selectors[0].Labels
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

func TestLabelMistakes(t *testing.T) {
	const at = "policies[0].labels"
	for _, tt := range []struct{ name, labels, inGo, inFile string }{
		{"no name", `{"": a}`, `labels[""]: has an empty label name`, `limits.yaml:4:14: ` + at + `[""]: has an empty label name`},
		{"no label", `{a: ""}`, `labels["a"]: needs the name of the label that it copies`, "limits.yaml:4:14: " + at + ".a: needs the name of the label that it copies"},
		{"itself", "{a: a}", `labels["a"]: copies "a", which is a name of this policy's; it needs a label of the flow`, "limits.yaml:4:14: " + at + `.a: copies "a", which is a name of this policy's; it needs a label of the flow`},
		{"a name", "{a: b, b: c}", `labels["a"]: copies "b", which is a name of this policy's; it needs a label of the flow`, "limits.yaml:4:14: " + at + `.a: copies "b", which is a name of this policy's; it needs a label of the flow`},
		{"a long label", "{a: " + strings.Repeat("b", 256) + "}", `labels["a"]: is longer than 255 bytes`, "limits.yaml:4:14: " + at + ".a: is longer than 255 bytes"},
		{"a number", "{a: 1}", "", "limits.yaml:4:17: " + at + ".a: want a string, have a number; quote it"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := policy.Parse("limits.yaml", []byte(editIn(t, short, "components:", "labels: "+tt.labels+"\n    components:")))
			if err == nil || err.Error() != tt.inFile {
				t.Errorf("Parse: %v\nwant %s", err, tt.inFile)
			}
			if tt.inGo == "" {
				return
			}
			labels := map[string]string{"a": ""}
			switch tt.name {
			case "no name":
				labels = map[string]string{"": "a"}
			case "itself":
				labels["a"] = "a"
			case "a name":
				labels["a"], labels["b"] = "b", "c"
			case "a long label":
				labels["a"] = strings.Repeat("b", 256)
			}
			err = (policy.Policy{Name: "p", Labels: labels, Components: []policy.Component{
				policy.RateLimiter{Selectors: policy.At("a"), Interval: time.Second},
			}}).Validate()
			if want := `policy "p": ` + tt.inGo; err == nil || err.Error() != want {
				t.Errorf("Validate: %v\nwant %s", err, want)
			}
		})
	}
}
