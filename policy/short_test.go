package policy_test

import (
	"math"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/policy"
)

// short is a valid short file, for tests to break.
const short = `headgate: 1
policies:
  - name: orders
    components:
      - rate_limiter:
          at: [checkout]
          capacity: 10
          fill: 5
          interval: 30s
          limit_by: user
`

func TestShortFile(t *testing.T) {
	bucket := policy.RateLimiter{Selectors: policy.At("checkout"), Capacity: 10, Fill: 5, Interval: 30 * time.Second, LimitBy: "user"}
	one := func(c policy.Component) []policy.Policy {
		return []policy.Policy{{Name: "orders", Components: []policy.Component{c}}}
	}
	change := func(change func(l *policy.RateLimiter)) []policy.Policy {
		l := bucket
		change(&l)
		return one(l)
	}
	component := func(text string) string {
		return "headgate: 1\npolicies: [{name: orders, components: [{" + text + "}]}]\n"
	}
	slots := policy.ConcurrencyScheduler{Selectors: policy.At("export"), Max: 8, MaxInflight: 2 * time.Minute, LimitBy: "tenant"}
	queue := func(s policy.Scheduler) []policy.Policy {
		slots := slots
		slots.Scheduler = s
		return one(slots)
	}
	matching := func(m policy.LabelMatcher) []policy.Policy {
		return change(func(l *policy.RateLimiter) { l.Selectors = []policy.Selector{{ControlPoint: "checkout", Labels: m}} })
	}
	const inSlots = "concurrency_scheduler: {at: [export], max: 8, max_inflight: 2m, limit_by: tenant, "
	for _, tt := range []struct {
		name, file string
		want       []policy.Policy
	}{
		{"a limiter", short, one(bucket)},
		{"JSON", `{"headgate": 1, "policies": [{"name": "orders", "components": [{"rate_limiter": {"at": ["checkout"], "capacity": 10, ` +
			`"fill": 5, "interval": "30s", "limit_by": "user"}}]}]}`, one(bucket)},
		{"anchors", "x-limit: &limit {at: [checkout], capacity: 10, fill: 5}\n" + editIn(t, short, "at: [checkout]\n          capacity: 10\n          fill: 5", "<<: *limit"), one(bucket)},
		{"several documents", short + "---\n" + editIn(t, short, "orders", "exports"), append(one(bucket), policy.Policy{Name: "exports", Components: []policy.Component{bucket}})},
		{"an ID", editIn(t, short, "at:", "id: mine\n          at:"), change(func(l *policy.RateLimiter) { l.ID = "mine" })},
		{"selectors", editIn(t, short, "at: [checkout]", "selectors: [{control_point: checkout}, {control_point: pay, service: shop}]"), change(func(l *policy.RateLimiter) {
			l.Selectors = []policy.Selector{{ControlPoint: "checkout"}, {ControlPoint: "pay", Service: "shop"}}
		})},
		{
			"conditions", editIn(t, short, "at: [checkout]", `selectors: [{control_point: checkout, when: {plan: free}, require: [{key: region, operator: NotIn, values: [eu, ""]}]}]`),
			matching(policy.LabelMatcher{
				Equal: map[string]string{"plan": "free"}, Require: []policy.Requirement{{Key: "region", Operator: policy.NotIn, Values: []string{"eu", ""}}},
			}),
		},
		{
			"an expression", editIn(t, short, "at: [checkout]", "selectors: [{control_point: checkout, expression: {any: [{label_exists: bot}, "+
				"{not: {label_equals: {label: mode, value: ''}}}, {all: [{label_matches: {label: agent, regex: ^x}}]}]}}]"),
			matching(policy.LabelMatcher{Expression: policy.Any{
				policy.LabelExists("bot"), policy.Not{Of: policy.LabelEquals{Label: "mode"}}, policy.All{policy.LabelMatches{Label: "agent", Regex: "^x"}},
			}}),
		},
		{"zeros", component("rate_limiter: {at: [checkout], capacity: 0, fill: 0, interval: 1s, max_idle: 0s, max_debt: 0, tokens_label: cost}"), one(policy.RateLimiter{
			Selectors: policy.At("checkout"), Interval: time.Second, MaxIdle: policy.KeepIdle, MaxDebt: math.SmallestNonzeroFloat64, TokensLabel: "cost",
		})},
		{"a queue", component(inSlots + "workloads: [{name: interactive, when: {kind: ui}, priority: 3}, {name: batch, priority: 1}]}"), queue(policy.Scheduler{
			Workloads: []policy.Workload{
				{Name: "interactive", Labels: policy.LabelMatcher{Equal: map[string]string{"kind": "ui"}}, WorkloadParameters: policy.WorkloadParameters{Priority: 3}},
				{Name: "batch", WorkloadParameters: policy.WorkloadParameters{Priority: 1}},
			},
		})},
		{"zeros of a queue", component(inSlots + "default: {tokens: 0, queue_timeout: 0s}, margin: 0s, max_queue: 5}"), queue(policy.Scheduler{
			Default: policy.WorkloadParameters{Tokens: policy.NoTokens, QueueTimeout: policy.NoQueue}, Margin: 1, MaxQueue: 5,
		})},
		{"a share", component("load_scheduler: {at: [db], load_multiplier: 0.5}"), one(policy.LoadScheduler{Selectors: policy.At("db"), LoadMultiplier: policy.Constant(0.5)})},
		{
			"signals", component("aimd_load_scheduler: {at: [db], signal: {mean_latency: {at: [db], over: 30s}}, setpoint: {mean_latency: {at: [db], over: 30m, times: 1.1}}, overload_confirmation: CPU}"),
			one(policy.AIMDLoadScheduler{
				Selectors: policy.At("db"), Signal: policy.MeanLatency{Selectors: policy.At("db"), Over: 30 * time.Second},
				Setpoint:             policy.MeanLatency{Selectors: policy.At("db"), Over: 30 * time.Minute, Times: 1.1},
				OverloadConfirmation: policy.Named("CPU"),
			}),
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := policy.Parse("limits.yaml", []byte(tt.file))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// Mistakes are reported with their place, as in Aperture's files.
func TestMistakesInShortFiles(t *testing.T) {
	const (
		at    = "limits.yaml:5:9: policies[0].components[0].rate_limiter"
		queue = "headgate: 1\npolicies:\n  - name: q\n    components:\n      - quota_scheduler: {at: [a], capacity: 1, fill: 1, interval: 1s, "
		inQ   = "policies[0].components[0].quota_scheduler"
	)
	for _, tt := range []struct{ name, file, want string }{
		{"no version", editIn(t, short, "headgate: 1\n", ""), "limits.yaml:1:1: headgate: is required"},
		{"another version", editIn(t, short, "headgate: 1", "headgate: 2", "capacity", "bursts"), "limits.yaml:1:11: headgate: is version 2 of the format; this Headgate reads version 1"},
		{"a quoted version", editIn(t, short, "headgate: 1", `headgate: "1"`), `limits.yaml:1:11: headgate: want a number, have a string; write it without quotes`},
		{"no policies", "headgate: 1\n", "limits.yaml:1:1: policies: is required"},
		{"an empty list", "headgate: 1\npolicies: []\n", "limits.yaml:2:11: policies: needs at least one policy"},
		{"a list with nothing", "headgate: 1\npolicies: [~]\n", "limits.yaml:2:12: policies[0]: want a policy, have nothing"},
		{"a mapping of policies", "headgate: 1\npolicies: {orders: {}}\n", "limits.yaml:2:11: policies: want a sequence, have a mapping"},
		{"a misspelt top", editIn(t, short, "policies:", "policys:"), "limits.yaml:1:1: policies: is required\nlimits.yaml:2:1: policys: unknown key; did you mean \"policies\"?"},
		{"a misspelt version", editIn(t, short, "headgate:", "headgat:"), "limits.yaml:1:1: headgat: unknown key; did you mean \"headgate\"?\nlimits.yaml:1:1: headgate: is required"},
		{"another file's key", editIn(t, short, "headgate: 1", "headgate: 1\nkind: Policy"), "limits.yaml:2:1: kind: unknown key"},
		{"no name", editIn(t, short, "name: orders\n    ", ""), "limits.yaml:3:5: policies[0].name: is required"},
		{"no components", editIn(t, short, shortFrom(t, "    components"), ""), "limits.yaml:3:5: policies[0].components: is required"},
		{"a component without a kind", editIn(t, short, shortFrom(t, "rate_limiter"), "{}\n"), "limits.yaml:5:9: policies[0].components[0]: wants one of rate_limiter, concurrency_limiter, quota_scheduler, concurrency_scheduler, load_scheduler, aimd_load…"},
		{"a misspelt kind", editIn(t, short, "rate_limiter", "rate-limitr"), `limits.yaml:5:9: policies[0].components[0].rate-limitr: unknown key; did you mean "rate_limiter"?`},
		{"a misspelt key", editIn(t, short, "limit_by", "limitby"), `limits.yaml:10:11: policies[0].components[0].rate_limiter.limitby: unknown key; did you mean "limit_by"?`},
		{"a Go name", editIn(t, short, "limit_by", "LimitBy"), `limits.yaml:10:11: policies[0].components[0].rate_limiter.LimitBy: unknown key; did you mean "limit_by"?`},
		{"Aperture's key", editIn(t, short, "limit_by", "limit_by_label_key"), `limits.yaml:10:11: policies[0].components[0].rate_limiter.limit_by_label_key: unknown key; did you mean "limit_by"?`},
		{"a key of another kind", editIn(t, short, "limit_by: user", "max_inflight: 3s"), "limits.yaml:10:11: policies[0].components[0].rate_limiter.max_inflight: unknown key; it belongs in concurrency_limiter or concurrency_scheduler"},
		{"a key of what is above", editIn(t, short, "limit_by: user", "components: []"), "limits.yaml:10:11: policies[0].components[0].rate_limiter.components: unknown key; it belongs in policies[]"},
		{"no selectors", editIn(t, short, "at: [checkout]\n          ", ""), at + ".at: is required"},
		{"an empty list of points", editIn(t, short, "[checkout]", "[]"), "limits.yaml:6:15: policies[0].components[0].rate_limiter.at: needs at least one selector"},
		{"an empty point", editIn(t, short, "[checkout]", "[a, '']"), "limits.yaml:6:19: policies[0].components[0].rate_limiter.at[1]: is required"},
		{"a selector among points", editIn(t, short, "[checkout]", "[a, {control_point: b}]"), "limits.yaml:6:19: policies[0].components[0].rate_limiter.at[1]: want a string, have a mapping; selectors, instead of at, can say more"},
		{"a point among selectors", editIn(t, short, "at: [checkout]", "selectors: [a]"), "limits.yaml:6:23: policies[0].components[0].rate_limiter.selectors[0]: want a mapping, have a string; control points alone stand in at"},
		{"two lists", editIn(t, short, "at: [checkout]", "at: [a]\n          selectors: [{control_point: b}]"), "limits.yaml:7:22: policies[0].components[0].rate_limiter.selectors: at says which flows already; use one of them"},
		{"a selector without a point", editIn(t, short, "at: [checkout]", "selectors: [{when: {a: b}}]"), "limits.yaml:6:23: policies[0].components[0].rate_limiter.selectors[0].control_point: is required"},
		{"no capacity", editIn(t, short, "capacity: 10\n          ", ""), at + ".capacity: is required"},
		{"a negative capacity", editIn(t, short, "10", "-1"), "limits.yaml:7:21: policies[0].components[0].rate_limiter.capacity: must be a number from 0 up, is -1"},
		{"a number as a duration", editIn(t, short, "30s", "30"), `limits.yaml:9:21: policies[0].components[0].rate_limiter.interval: want a duration such as "1.5s", have a number`},
		{"no duration", editIn(t, short, "30s", "0s"), "limits.yaml:9:21: policies[0].components[0].rate_limiter.interval: must be positive, is 0s"},
		{"a status by name", editIn(t, short, "limit_by: user", "denied_status: TooManyRequests"), "limits.yaml:10:26: policies[0].components[0].rate_limiter.denied_status: want an HTTP status, as in 429; have a string"},
		{"the status 0", editIn(t, short, "limit_by: user", "denied_status: 0"), "limits.yaml:10:26: policies[0].components[0].rate_limiter.denied_status: must not be 0"},
		{"a success", editIn(t, short, "limit_by: user", "denied_status: 200"), "limits.yaml:10:26: policies[0].components[0].rate_limiter.denied_status: must be an HTTP status from 400 to 599, is 200"},
		{"a debt without a label", editIn(t, short, "limit_by: user", "max_debt: 5"), "limits.yaml:10:21: policies[0].components[0].rate_limiter.max_debt: needs a TokensLabel: without one no flow owes anything"},
		{"negative idleness", editIn(t, short, "limit_by: user", "max_idle: -1s"), "limits.yaml:10:21: policies[0].components[0].rate_limiter.max_idle: must not be negative, is -1s"},
		{"no room", queue + "max_queue: 0}\n", "limits.yaml:5:83: " + inQ + ".max_queue: must not be 0"},
		{"negative tokens", queue + "default: {tokens: -1}}\n", "limits.yaml:5:90: " + inQ + ".default.tokens: must be a number from 0 up, is -1"},
		{"a priority of nothing", queue + "workloads: [{priority: 0}]}\n", "limits.yaml:5:95: " + inQ + ".workloads[0].priority: must not be 0"},
		{"a workload that is nothing", queue + "workloads: [~]}\n", "limits.yaml:5:84: " + inQ + ".workloads[0]: want a mapping, have nothing"},
		{"an operator", queue + "workloads: [{require: [{key: a, operator: in}]}]}\n", "limits.yaml:5:114: " + inQ + `.workloads[0].require[0].operator: unknown operator "in"; did you mean "In"?`},
		{"a label's number", queue + "workloads: [{when: {a: 1}}]}\n", "limits.yaml:5:95: " + inQ + ".workloads[0].when.a: want a string, have a number; quote it"},
		{"a long label", queue + "workloads: [{when: {" + strings.Repeat("a", 256) + ": b}}]}\n", "limits.yaml:5:92: " + inQ + ".workloads[0].when." + strings.Repeat("a", 40) + "…: name is longer than 255 bytes"},
		{"an expression", queue + "workloads: [{expression: {any: {of: []}}}]}\n", "limits.yaml:5:103: " + inQ + ".workloads[0].expression.any: want a sequence, have a mapping"},
		{"a regular expression", queue + "workloads: [{expression: {label_matches: {label: a, regex: '('}}}]}\n", "limits.yaml:5:131: " + inQ + ".workloads[0].expression.label_matches.regex: error parsing regexp: missing closing ): `(`"},
		{"a signal", "headgate: 1\npolicies:\n  - name: q\n    components:\n      - load_scheduler: {at: [a], load_multiplier: true}\n", "limits.yaml:5:52: policies[0].components[0].load_scheduler.load_multiplier: want a number, the name of a signal, or mean_latency; have a boolean"},
		{"a latency", "headgate: 1\npolicies:\n  - name: q\n    components:\n      - load_scheduler: {at: [a], load_multiplier: {mean_latency: {at: [b], over: 48h}}}\n", "limits.yaml:5:83: policies[0].components[0].load_scheduler.load_multiplier.mean_latency.over: must be positive and at most 24h0m0s, is 48h0m0s"},
		{"a duplicate key", editIn(t, short, "fill: 5", "capacity: 5"), at + ".fill: is required\nlimits.yaml:8:11: duplicate key, first at line 7, column 11"},
		{"a tab", editIn(t, short, "          fill", "\tfill"), "limits.yaml:8:1: bad YAML: tab in the indentation; indent with spaces"},
		{"a placeholder", editIn(t, short, "user", "__REQUIRED_FIELD__"), "limits.yaml:10:21: policies[0].components[0].rate_limiter.limit_by: __REQUIRED_FIELD__ is to be replaced by a value"},
		{"a name twice", short + shortFrom(t, "  - name"), "limits.yaml:11:11: policies[1].name: policy \"orders\" is at limits.yaml:3:11 already"},
		{"an ID twice", short + strings.Replace(shortFrom(t, "      - rate"), "at:", "id: rate_limiter.0\n          at:", 1), "limits.yaml:12:15: policies[0].components[1].rate_limiter.id: \"rate_limiter.0\" is the ID of components[0] too"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			policies, err := policy.Parse("limits.yaml", []byte(tt.file))
			if err == nil {
				t.Fatalf("Parse = %+v, want an error", policies)
			}
			if got := err.Error(); got != tt.want {
				t.Errorf("have %s\nwant %s", got, tt.want)
			}
		})
	}
}

// A byte order mark is no part of the first key.
func TestShortFileWithMark(t *testing.T) {
	if _, err := policy.Parse("limits.yaml", []byte("\ufeff"+short)); err != nil {
		t.Error(err)
	}
}

// A comma that is missing in a list in brackets makes one name of two. Names of requests have spaces, and so has what is in quotes.
func TestWarningsOfMissingCommas(t *testing.T) {
	for at, want := range map[string]string{
		"[search, find]": "", "[&a search find, *a]": "search find", "[search find]": "search find", "[a, search  find, b]": "search  find", "['search find']": "", `["search find"]`: "",
		"[GET /search, POST /search]": "", "\n          - search find": "",
	} {
		file := strings.Replace(short, "at: [checkout]", "at: "+at, 1)
		policies, err := policy.Parse("limits.yaml", []byte(file))
		if err != nil {
			t.Fatalf("%s: %v", at, err)
		}
		got := strings.Join(policies[0].Warnings, "; ")
		if want == "" && got != "" || want != "" && !strings.HasSuffix(got, "is one name with a space in it; is a comma missing? If not, put it in quotes") {
			t.Errorf("at: %s: Warnings = %q", at, got)
		}
	}
}

// A regular expression in a block ends with a line end, and an escape in double quotes is not the expression's.
func TestWarningsOfRegexes(t *testing.T) {
	for regex, want := range map[string]string{
		"(?i)googlebot|bingbot": "", `'\bbot\b'`: "", "'^a b|c #$'": "",
		">-\n                  (?i)googlebot|bingbot": "",
		">\n                  (?i)googlebot|bingbot":  "it begins or ends with white space",
		"|\n                  (?i)googlebot|bingbot":  "it begins or ends with white space",
		`"\bbot\b"`: "it holds U+0008, which cannot be seen",
		">-\n                  (?i)googlebot|\n                  bingbot": "it goes on in line 13, and has a space or a line break there",
		"(?i)googlebot|\n                  bingbot":                       "it goes on in line 12, and has a space or a line break there",
		`"a\nb"`: "it holds U+000A, which cannot be seen",
	} {
		file := strings.Replace(short, "at: [checkout]",
			"selectors:\n          - control_point: checkout\n            expression:\n              label_matches:\n                label: agent\n                regex: "+regex, 1)
		policies, err := policy.Parse("limits.yaml", []byte(file))
		if err != nil {
			t.Fatalf("%s: %v\n%s", regex, err, file)
		}
		if got := strings.Join(policies[0].Warnings, "; "); want == "" && got != "" || !strings.Contains(got, want) ||
			want != "" && !strings.Contains(got, ".regex: hardly any value matches this: ") {
			t.Errorf("regex: %s: Warnings = %q want %q", regex, got, want)
		}
	}
}

// Values that flows hardly have are warned about, at the policy that has them.
func TestWarningsOfShortFiles(t *testing.T) {
	file := short + strings.Replace(shortFrom(t, "  - name"), "orders", "exports", 1)
	file = strings.Replace(file, "at: [checkout]", "selectors: [{control_point: checkout, service: 'a,', when: {plan: 'free,'}, require: [{key: a, operator: In, values: ['b;']}],\n"+
		"            expression: {label_equals: {label: a, value: 'c}'}}}]", 1)
	file += "      - sampler: {at: [a], accept_percentage: 10, pass_through_values: [gold]}\n"
	policies, err := policy.Parse("limits.yaml", []byte(file))
	if err != nil {
		t.Fatal(err)
	}
	const limiter = "policies[0].components[0].rate_limiter.selectors[0]"
	want := [][]string{
		{
			"limits.yaml:6:58: " + limiter + `.service: flows hardly have this value: it ends with ","`,
			"limits.yaml:6:77: " + limiter + `.when.plan: flows hardly have this value: it ends with ","`,
			"limits.yaml:6:129: " + limiter + `.require[0].values[0]: flows hardly have this value: it ends with ";"`,
			"limits.yaml:7:58: " + limiter + ".expression.label_equals.value: flows hardly have this value: it holds a quote or a bracket by accident, as it seems",
		},
		{"limits.yaml:20:72: policies[1].components[1].sampler.pass_through_values: not used, because there is no session_label"},
	}
	for i, p := range policies {
		if diff := cmp.Diff(want[i], p.Warnings); diff != "" {
			t.Errorf("Warnings of %s (-want +got):\n%s", p.Name, diff)
		}
	}
}

// Every file that can be read can be written as a short file.
func TestFilesAsShortFiles(t *testing.T) {
	var files []string
	for _, pattern := range []string{"testdata/*.yaml", "../engine/testdata/*.yaml", "../examples/*/*.yaml"} {
		found, err := filepath.Glob(pattern)
		if err != nil || len(found) == 0 {
			t.Fatalf("%s: %v, %v", pattern, found, err)
		}
		files = append(files, found...)
	}
	for _, file := range files {
		t.Run(file, func(t *testing.T) {
			policies, err := policy.Load(file)
			if err != nil {
				t.Skip("cannot be read, as is intended")
			}
			roundTrip(t, policies)
		})
	}
}

// shortFrom returns the rest of short from the text on.
func shortFrom(t *testing.T, text string) string {
	t.Helper()
	_, rest, ok := strings.Cut(short, text)
	if !ok {
		t.Fatalf("%q is not in the file", text)
	}
	return text + rest
}
