package policy_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/headgate-go/headgate/policy"
)

// ofOwn is a file in Headgate's own shape with a rate limiter that has these keys besides its numbers.
func ofOwn(keys string) string {
	return "headgate: 1\npolicies:\n  - name: p\n    components:\n      - rate_limiter: {capacity: 1, fill: 1, interval: 1s, " + keys + "}\n"
}

// scheduled is the same of a quota scheduler.
func scheduled(keys string) string {
	return strings.Replace(ofOwn(keys), "rate_limiter", "quota_scheduler", 1)
}

// naming are files with NAME where a control point or a label is named, and the paths to it.
func naming(t *testing.T) map[string]string {
	t.Helper()
	const own, queue = "policies[0].components[0].rate_limiter.", "policies[0].components[0].quota_scheduler."
	const when = "label_matcher: {match_list: [{key: NAME, operator: Exists}]}"
	return map[string]string{
		ofOwn("at: [a, NAME]"):                                                                                 own + "at[1]",
		ofOwn("selectors: [{control_point: NAME}]"):                                                            own + "selectors[0].control_point",
		ofOwn("at: [a], limit_by: NAME"):                                                                       own + "limit_by",
		ofOwn("at: [a], tokens_label: NAME"):                                                                   own + "tokens_label",
		scheduled("at: [a], priority_label: NAME"):                                                             queue + "priority_label",
		scheduled("at: [a], workload_label: NAME"):                                                             queue + "workload_label",
		scheduled("at: [a], fairness_label: NAME"):                                                             queue + "fairness_label",
		edit(t, "checkout", "NAME"):                                                                            limiter + ".selectors[0].control_point",
		edit(t, "checkout}", "a, "+when+"}"):                                                                   limiter + ".selectors[0].label_matcher.match_list[0].key",
		edit(t, "interval: 1s", "{interval: 1s, limit_by_label_key: NAME}"):                                    limiter + ".parameters.limit_by_label_key",
		ofOwn("selectors: [{control_point: a, require: [{key: NAME, operator: Exists}]}]"):                     own + "selectors[0].require[0].key",
		ofOwn("selectors: [{control_point: a, expression: {label_exists: NAME}}]"):                             own + "selectors[0].expression.label_exists",
		ofOwn("selectors: [{control_point: a, expression: {label_equals: {label: NAME, value: x}}}]"):          own + "selectors[0].expression.label_equals.label",
		ofOwn("selectors: [{control_point: a, expression: {label_matches: {label: NAME, regex: x}}}]"):         own + "selectors[0].expression.label_matches.label",
		strings.Replace(ofOwn("at: [a], limit_by: alias"), "name: p", "name: p\n    labels: {alias: NAME}", 1): "policies[0].labels.alias",
	}
}

// A name of several lines is mostly two names without a comma between them, so that the limit would be missing in silence.
func TestNamesOfSeveralLines(t *testing.T) {
	for file, path := range naming(t) {
		before, _, _ := strings.Cut(file, "NAME")
		line := 1 + strings.Count(before, "\n")
		column := len(before) - strings.LastIndex(before, "\n")
		for _, tt := range []struct {
			name, text string
			on         int // lines further; 0 is no error
		}{
			{"one word", "search", 0},
			{"two words", "GET /search", 0},
			{"two words in quotes", `"GET /search"`, 0},
			{"two words in single quotes", "'GET /search'", 0},
			{"a comment behind", "GET /search # find\n                       ", 0},
			{"lines behind", "GET /search\n\n                       ", 0},
			{"with an anchor", "&a GET /search", 0},
			{"with a longer anchor", "&anchor GET /s", 0},
			{"in quotes with an anchor", `&a "GET /search"`, 0},
			{"below an anchor", "&a # find\n                       GET /search", 0},
			{"in quotes below an anchor", "&a\n\n                       'GET /search'", 0},
			{"quotes in quotes", `'GET /''search'''`, 0},
			{"escapes in quotes", `"GET /\"search\\"`, 0},
			{"a line break that is escaped", "\"GET \\\n                       /search\"", 0},
			{"on another line", "\n                       GET /search", 0},
			{"two lines", "search\n                       find", 1},
			{"two words and one", "GET /search\n                       find", 1},
			{"three lines", "search\n                       find\n                       seek", 1},
			{"two lines with an empty one between", "search\n\n                       find", 2},
			{"two lines with a long anchor", "&quite_a_long_anchor a\n                       find", 1},
			{"two lines below an anchor", "&a # find\n                       search\n                       find", 2},
			{"two lines in quotes", "\"search\n                       find\"", 1},
			{"two lines in single quotes", "'search\n                       find'", 1},
			{"two lines in quotes with an empty one between", "'search\n  \n                       find'", 2},
			{"two lines in quotes below an anchor", "&a\n                       'search\n                       find'", 2},
			{"quotes in quotes of two lines", "'it''s\n                       find'", 1},
			{"escapes in quotes of two lines", "\"GET \\\n                       /search\n                       find\"", 2},
		} {
			for _, end := range []string{"\n", "\r\n"} {
				t.Run(path+" "+tt.name, func(t *testing.T) {
					data := strings.ReplaceAll(strings.Replace(file, "NAME", tt.text, 1), "\n", end)
					at := fmt.Sprintf("limits.yaml:%d:%d: ", line, column)
					_, err := policy.Parse("limits.yaml", []byte(data))
					if tt.on == 0 {
						if err != nil {
							t.Errorf("Parse(%s) = %v", data, err)
						}
						return
					}
					want := fmt.Sprintf(`%s%s: goes on in line %d; is a comma or a "- " missing? If not, write it in one line`, at, path, line+tt.on)
					if err == nil || err.Error() != want {
						t.Errorf("Parse(%s) = %v want %s", data, err, want)
					}
				})
			}
		}
	}
}

// The places of names are those of the file, whatever stands before them.
func TestNamesOfSeveralLinesInLists(t *testing.T) {
	list := func(at string) string {
		return "headgate: 1\npolicies:\n  - name: p\n    components:\n      - rate_limiter:\n          capacity: 1\n          fill: 1\n          interval: 1s\n          at:" + at + "\n"
	}
	const json = `{"headgate": 1, "policies": [{"name": "p q", "components": [{"rate_limiter": {"at": ["GET /ü", "a` + "\n  " + `b"],
 "capacity": 1, "fill": 1, "interval": "1s"}}]}]}`
	for name, tt := range map[string]struct{ data, want string }{
		"a comma":                   {list(" [search\n               find]"), "9:16: policies[0].components[0].rate_limiter.at[0]: goes on in line 10"},
		"a dash":                    {list("\n            - search\n              find"), "10:15: policies[0].components[0].rate_limiter.at[0]: goes on in line 11"},
		"a dash's space":            {list("\n            - a\n            - search\n             -find"), "11:15: policies[0].components[0].rate_limiter.at[1]: goes on in line 12"},
		"in a second document":      {list(" [a]") + "---\n" + strings.Replace(list(" [b\n               c]"), "name: p", "name: q", 1), "19:16: policies[0].components[0].rate_limiter.at[0]: goes on in line 20"},
		"in JSON":                   {json, "1:96: policies[0].components[0].rate_limiter.at[1]: goes on in line 2"},
		"behind a name in brackets": {list(" [ü, \"GET /a\", b\n               c]"), "9:29: policies[0].components[0].rate_limiter.at[2]: goes on in line 10"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := policy.Parse("limits.yaml", []byte(tt.data))
			if err == nil || !strings.HasPrefix(err.Error(), "limits.yaml:"+tt.want) {
				t.Errorf("Parse = %v want %s", err, tt.want)
			}
		})
	}
}

// A block stands on lines of its own, and its name is as likely two without a "- " between them.
func TestNamesInBlocks(t *testing.T) {
	const (
		head    = "headgate: 1\npolicies:\n  - name: p\n    components:\n      - rate_limiter:\n          capacity: 1\n          fill: 1\n          interval: 1s\n"
		aliased = "headgate: 1\npolicies:\n  - name: p\n    components:\n      - rate_limiter: {at: [a], limit_by: label, capacity: 1, fill: 1, interval: 1s}\n    labels:\n      label: NAME"
	)
	for file, path := range map[string]string{
		head + "          at:\n            - NAME":                       "policies[0].components[0].rate_limiter.at[0]",
		head + "          selectors:\n            - control_point: NAME": "policies[0].components[0].rate_limiter.selectors[0].control_point",
		head + "          at: [a]\n          limit_by: NAME":             "policies[0].components[0].rate_limiter.limit_by",
		aliased: "policies[0].labels.label",
		edit(t, "[{control_point: checkout}]", "\n            - control_point: NAME"): limiter + ".selectors[0].control_point",
		edit(t, "interval: 1s", "interval: 1s\n            limit_by_label_key: NAME"): limiter + ".parameters.limit_by_label_key",
	} {
		before, _, _ := strings.Cut(file, "NAME")
		begins := 1 + strings.Count(before, "\n")
		for _, tt := range []struct {
			name, text string
			on         int // lines further; 0 is no error
		}{
			{"one line", ">-\n                GET /search", 0},
			{"one line of a literal block", "|-\n                GET /search", 0},
			{"one line below an anchor", "&a # find\n                >- # more\n\n                GET /search\n\n", 0},
			{"folded", ">-\n                search\n                find", 2},
			{"literal", "|-\n                search\n                find", 2},
			{"folded, with the last line end", ">\n                search\n                find", 2},
			{"literal, with the last line end", "|\n                search\n                find", 2},
			{"folded, with empty lines", ">-\n\n                search\n\n                find", 4},
			{"folded, below an anchor", "&a # find\n                >- # more\n                search\n                find", 3},
			{"folded, three lines", ">-\n                search\n                find\n                seek", 2},
			{"folded, a word and two", ">-\n                GET\n                /search find", 2},
		} {
			for _, end := range []string{"\n", "\r\n", "\r"} {
				t.Run(fmt.Sprintf("%s/%s/%q", path, tt.name, end), func(t *testing.T) {
					data := strings.ReplaceAll(strings.Replace(file, "NAME", tt.text, 1), "\n", end)
					_, err := policy.Parse("limits.yaml", []byte(data))
					if tt.on == 0 {
						if err != nil {
							t.Errorf("Parse(%s) = %v", data, err)
						}
						return
					}
					want := fmt.Sprintf(`%s: goes on in line %d; is a comma or a "- " missing? If not, write it in one line`, path, begins+tt.on)
					if err == nil || !strings.Contains(err.Error(), want) {
						t.Errorf("Parse(%s) = %v want %s", data, err, want)
					}
				})
			}
		}
	}
}

// A value of a label may be any text, so one of several lines gives a warning. A block of text and a regular expression have several
// lines on purpose.
func TestValuesOfSeveralLines(t *testing.T) {
	const where = "limits.yaml:5:133: policies[0].components[0].rate_limiter.selectors[0].require[0].values[0]: flows hardly have this value: " +
		`it goes on in line 6; is a comma or a "- " missing?`
	for values, want := range map[string]string{
		"[eu\n              us]":       where,
		"['eu\n              us']":     where,
		"[eu, us]":                     "",
		"[eu us]":                      "",
		"[\"eu \\\n             us\"]": "",
	} {
		policies, err := policy.Parse("limits.yaml", []byte(ofOwn("selectors: [{control_point: a, require: [{key: k, operator: In, values: "+values+"}]}]")))
		if err != nil {
			t.Errorf("%s: %v", values, err)
			continue
		}
		if got := strings.Join(policies[0].Warnings, "\n"); got != want {
			t.Errorf("%s: Warnings = %q want %q", values, got, want)
		}
	}
	const block = "headgate: 1\npolicies:\n  - name: p\n    components:\n      - rate_limiter:\n          capacity: 1\n          fill: 1\n          interval: 1s\n" +
		"          selectors:\n            - control_point: a\n              when:\n                k: >-\n                  eu\n                  us\n"
	if policies, err := policy.Parse("limits.yaml", []byte(block)); err != nil || len(policies[0].Warnings) > 0 {
		t.Errorf("Parse(%s) = %v, %v, want no warning", block, policies, err)
	}
	for _, regex := range []string{"a\n              b", "'a\n              b'"} {
		if _, err := policy.Parse("limits.yaml", []byte(ofOwn("selectors: [{control_point: a, expression: {label_matches: {label: k, regex: "+regex+"}}}]"))); err != nil {
			t.Error(err)
		}
	}
}
