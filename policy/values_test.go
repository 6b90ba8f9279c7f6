package policy_test

import (
	"strings"
	"testing"

	"github.com/headgate-go/headgate/policy"
)

// A value that a file has by accident, such as a comma too many, selects no flow, and nothing is wrong with the file. It is
// warned about with its place wherever flows are compared with values.
func TestWarningsOfOddValues(t *testing.T) {
	const selectors = "[{control_point: checkout}]"
	for _, tt := range []struct {
		name, file, want string // want is of a value with a comma too many
	}{
		{"match_labels", edit(t, selectors, "\n            - control_point: checkout\n              label_matcher:\n                match_labels:\n"+
			"                  plan: VALUE"), "limits.yaml:9:25: " + limiter + ".selectors[0].label_matcher.match_labels.plan"},
		{"match_list", edit(t, selectors, "\n            - control_point: checkout\n              label_matcher:\n                match_list:\n"+
			"                  - {key: plan, operator: NotIn, values: [free, 'VALUE']}"), "limits.yaml:9:65: " + limiter + ".selectors[0].label_matcher.match_list[0].values[1]"},
		{
			"label_equals", edit(t, selectors, "[{control_point: checkout, label_matcher: {expression: {label_equals: {label: plan, value: 'VALUE'}}}}]"),
			"limits.yaml:5:113: " + limiter + ".selectors[0].label_matcher.expression.label_equals.value",
		},
		{"service", edit(t, selectors, "[{control_point: checkout, service: 'VALUE'}]"), "limits.yaml:5:58: " + limiter + ".selectors[0].service"},
		{
			"pass_through_label_values", "circuit:\n  components:\n    - flow_control:\n        sampler:\n          in_ports: {accept_percentage: {constant_signal: {value: 10}}}\n" +
				"          parameters: {selectors: [{control_point: a}], session_label_key: user}\n          pass_through_label_values:\n            - VALUE\n",
			"limits.yaml:8:15: circuit.components[0].flow_control.sampler.pass_through_label_values[0]",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for value, why := range map[string]string{
				"gold,": `it ends with ","`, "gold}": "it holds a quote or a bracket by accident, as it seems", "gold;": `it ends with ";"`,
				"gold // the best": `it holds "//", which begins no comment there`, "gold": "", "example.com.": "", "O\u2019Brien": "",
			} {
				policies, err := policy.Parse("limits.yaml", []byte(strings.Replace(tt.file, "VALUE", value, 1)))
				if err != nil {
					t.Fatal(err)
				}
				got, want := strings.Join(policies[0].Warnings, "\n"), ""
				if why != "" {
					want = tt.want + ": flows hardly have this value: " + why
				}
				if got != want {
					t.Errorf("%q: Warnings = %q want %q", value, got, want)
				}
			}
		})
	}
}

// Values that always pass are of no use without the label, except "", which is the value of all flows then.
func TestWarningsOfValuesWithoutLabel(t *testing.T) {
	for _, tt := range []struct{ label, values, want string }{
		{"session_label_key: user", "[gold]", ""},
		{"ramp_mode: false", "[gold]", "limits.yaml:6:38: circuit.components[0].flow_control.sampler.pass_through_label_values: not used, because there is no session_label_key"},
		{"ramp_mode: false", "['']", ""},
		{"ramp_mode: false", "[]", ""},
	} {
		policies, err := policy.Parse("limits.yaml", []byte("circuit:\n  components:\n    - flow_control:\n        sampler:\n"+
			"          parameters: {selectors: [{control_point: a}], "+tt.label+"}\n          pass_through_label_values: "+tt.values+"\n"))
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(policies[0].Warnings, "\n"); got != tt.want {
			t.Errorf("%s, %s: Warnings = %q want %q", tt.label, tt.values, got, tt.want)
		}
	}
}
