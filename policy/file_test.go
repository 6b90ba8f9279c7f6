package policy_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/goleak"

	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// base is a valid plain policy, for tests to break.
const base = `circuit:
  components:
    - flow_control:
        rate_limiter:
          selectors: [{control_point: checkout}]
          in_ports:
            bucket_capacity: {constant_signal: {value: 10}}
            fill_amount: {constant_signal: {value: 5}}
          parameters:
            interval: 1s
`

// limiter is where base has its rate limiter.
const limiter = "circuit.components[0].flow_control.rate_limiter"

// edit replaces text of base.
func edit(t *testing.T, oldNew ...string) string {
	t.Helper()
	return editIn(t, base, oldNew...)
}

// editIn replaces text of a policy.
func editIn(t *testing.T, text string, oldNew ...string) string {
	t.Helper()
	for i := 0; i < len(oldNew); i += 2 {
		if !strings.Contains(text, oldNew[i]) {
			t.Fatalf("the policy has no %q", oldNew[i])
		}
	}
	return strings.NewReplacer(oldNew...).Replace(text)
}

// resource is a policy resource around base.
func resource(name string) string {
	return fmt.Sprintf("apiVersion: fluxninja.com/v1alpha1\nkind: Policy\nmetadata: {name: %s}\nspec:\n  %s",
		name, strings.ReplaceAll(base, "\n", "\n  "))
}

// values is a policy as the values of a blueprint.
const values = `blueprint: rate-limiting/base
policy:
  policy_name: per-tenant
  rate_limiter:
    bucket_capacity: 10
    fill_amount: 5
    selectors: [{control_point: checkout}]
    parameters: {interval: 1s, limit_by_label_key: tenant}
`

func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func names(policies []policy.Policy) []string {
	var names []string
	for _, p := range policies {
		names = append(names, p.Name)
	}
	return names
}

func TestLoadTestdata(t *testing.T) {
	for _, want := range []policy.Policy{
		{Name: "rl-basic", Components: []policy.Component{policy.RateLimiter{
			ID: "root.0", Selectors: policy.At("rl-basic"),
			Capacity: 5, Fill: 2, Interval: time.Second, LimitBy: "user_id", TokensLabel: "tokens",
		}}},
		{Name: "rl-delay", Components: []policy.Component{policy.RateLimiter{
			ID: "root.0", Selectors: policy.At("rl-delay"),
			Capacity: 4, Fill: 4, Interval: 2 * time.Second, LimitBy: "user_id", DelayInitialFill: true,
		}}},
		{Name: "rl-global", Components: []policy.Component{policy.RateLimiter{
			ID: "root.0", Selectors: policy.At("rl-global"),
			Capacity: 3, Fill: 1, Interval: time.Minute, DeniedStatus: 503,
		}}},
		{Name: "cl-basic", Components: []policy.Component{policy.ConcurrencyLimiter{
			ID: "root.0", Selectors: policy.At("cl-basic"),
			Max: 2, MaxInflight: 3 * time.Second, LimitBy: "user_id", TokensLabel: "tokens",
		}}},
		{Name: "every-key", Components: []policy.Component{
			policy.RateLimiter{
				ID: "root.0", Selectors: []policy.Selector{{ControlPoint: "search", Service: "any"}},
				Capacity: 40, Fill: 20, Interval: time.Second, LimitBy: "tenant", MaxIdle: policy.DefaultMaxIdle,
				TokensLabel: "cost", DeniedStatus: 429,
			},
			policy.ConcurrencyLimiter{
				ID: "root.1", Selectors: policy.At("search"),
				Max: 64, MaxInflight: 30 * time.Second, LimitBy: "tenant", MaxIdle: policy.DefaultMaxIdle,
				TokensLabel: "slots", DeniedStatus: 429,
			},
		}},
		{Name: "qs-basic", Components: []policy.Component{policy.QuotaScheduler{
			ID: "root.0", Selectors: policy.At("qs-basic"), Capacity: 2, Fill: 2, Interval: time.Second,
			Scheduler: policy.Scheduler{
				PriorityLabel: "priority",
				Default:       policy.WorkloadParameters{Priority: 10},
				Workloads: []policy.Workload{
					{
						Name: "subscriber", Labels: policy.LabelMatcher{Equal: map[string]string{"tier": "gold"}},
						WorkloadParameters: policy.WorkloadParameters{Priority: 200},
					},
					{
						Name: "impatient", Labels: policy.LabelMatcher{Equal: map[string]string{"tier": "impatient"}},
						WorkloadParameters: policy.WorkloadParameters{Priority: 50, QueueTimeout: policy.NoQueue},
					},
				},
			},
		}}},
		{Name: "cs-basic", Components: []policy.Component{policy.ConcurrencyScheduler{
			ID: "root.0", Selectors: policy.At("cs-basic"), Max: 2, MaxInflight: time.Minute,
			Scheduler: policy.Scheduler{PriorityLabel: "priority", TokensLabel: "tokens", WorkloadLabel: "workload"},
		}}},
		{Name: "sampler", Components: []policy.Component{policy.Sampler{
			ID: "root.0", Selectors: policy.At("sampler"), AcceptPercentage: 50, SessionLabel: "user_id", PassThroughValues: []string{"vip"},
		}}},
		{Name: "ramp", Components: []policy.Component{policy.Sampler{
			ID: "root.0", Selectors: policy.At("ramp"), AcceptPercentage: 100, SessionLabel: "user_id", RampMode: true,
		}}},
		{Name: "match", Components: []policy.Component{policy.RateLimiter{
			ID: "root.0", Interval: time.Second,
			Selectors: []policy.Selector{
				{ControlPoint: "match", Labels: policy.LabelMatcher{
					Equal: map[string]string{"tier": "free"},
					Require: []policy.Requirement{
						{Key: "region", Operator: policy.In, Values: []string{"eu", "us"}},
						{Key: "blocked", Operator: policy.Exists},
						{Key: "vip", Operator: policy.DoesNotExist},
						{Key: "plan", Operator: policy.NotIn, Values: []string{"trial"}},
					},
				}},
				{ControlPoint: "match", Labels: policy.LabelMatcher{Expression: policy.Any{
					policy.LabelEquals{Label: "mode", Value: "deny"},
					policy.All{
						policy.LabelExists("robot"),
						policy.Not{Of: policy.LabelMatches{Label: "agent", Regex: "^good"}},
					},
				}}},
			},
		}}},
	} {
		t.Run(want.Name, func(t *testing.T) {
			file := filepath.Join("testdata", want.Name+".yaml")
			want.Warnings = []string{file + ":6:5: spec.circuit.evaluation_interval: not used"}
			got, err := policy.Load(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]policy.Policy{want}, got); diff != "" {
				t.Errorf("Load(%s) (-want +got):\n%s", file, diff)
			}
		})
	}
}

func TestLoadDirectory(t *testing.T) {
	dir, empty := t.TempDir(), t.TempDir()
	write(t, dir, map[string]string{
		"b.yaml": resource("second") + "\n---\n" + resource("third"), "a.yml": base, "c.yaml": resource("fourth"),
		".hidden.yaml": "{", "d.yaml.orig": "{", "notes.txt": "{",
	})
	if err := os.Mkdir(filepath.Join(dir, "e.yaml"), 0o700); err != nil {
		t.Fatal(err)
	}
	got, err := policy.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"a", "second", "third", "fourth"}, names(got)); diff != "" {
		t.Errorf("Load (-want +got):\n%s", diff)
	}

	_, err = policy.Load(empty)
	if want := empty + ": the directory has no .yaml or .yml file"; err == nil || err.Error() != want {
		t.Errorf("Load = %v, want %s", err, want)
	}
	if got, err := policy.Load(); got != nil || err != nil {
		t.Errorf("Load() = %v, %v, want none", got, err)
	}
}

func TestLoadReportsEveryPath(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"a.yaml": base, "b.yaml": resource("a"), "c.yaml": "{", "d.yaml": ""})
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := os.Symlink("nowhere", in("e.yaml")); err != nil {
		t.Skip(err)
	}

	policies, err := policy.Load(in("none"), dir, in("a.yaml"))
	if policies != nil || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Load = %v, %v, want no policies and %v", policies, err, fs.ErrNotExist)
	}
	var first *policy.Error
	if !errors.As(err, &first) || first.File != in("b.yaml") || first.Line != 3 || first.Field != "metadata.name" {
		t.Errorf("As = %+v, want the name in b.yaml", first)
	}
	want := []string{
		"stat " + in("none") + ": no such file or directory",
		in("b.yaml") + `:3:18: metadata.name: policy "a" is at ` + in("a.yaml") + ":1:1 already",
		in("c.yaml") + `:1:1: bad YAML: "{" is not closed; "}" is missing`,
		in("d.yaml") + ":1:1: holds no policy",
		"open " + in("e.yaml") + ": no such file or directory",
		in("a.yaml") + `:1:1: policy "a" is at ` + in("a.yaml") + ":1:1 already; a plain policy has the name of its file",
	}
	if diff := cmp.Diff(strings.Join(want, "\n"), err.Error()); diff != "" {
		t.Errorf("Load (-want +got):\n%s", diff)
	}
}

func TestParseShapes(t *testing.T) {
	for _, tt := range []struct {
		name, data, want string // names, or the error
	}{
		{"plain", base, "limits"},
		{"resource", resource("x"), "x"},
		{"documents", "# first\n---\n" + resource("x") + "\n---\n---\nnull\n...\n" + resource("y") + "\n---\n" + base, "x y limits"},
		{"JSON", `{"circuit": {"components": [{"flow_control": {"concurrency_limiter": {"selectors": [{"control_point": "a"}], ` +
			`"in_ports": {"max_concurrency": {"constant_signal": {"value": 1.5}}}, "parameters": {"max_inflight_duration": "1s"}}}}]}}`, "limits"},
		{"Windows line ends and byte order mark", "\ufeff" + strings.ReplaceAll(base, "\n", "\r\n"), "limits"},
		{"two plain", base + "---\n" + base, `dir/limits.yaml:12:1: policy "limits" is at dir/limits.yaml:1:1 already; a plain policy has the name of its file`},
		{"same name", resource("x") + "\n---\n" + resource("x"), `dir/limits.yaml:19:18: metadata.name: policy "x" is at dir/limits.yaml:3:18 already`},
		{"nothing", "", "dir/limits.yaml:1:1: holds no policy"},
		{"empty documents", "---\n# none\n---\n~\n", "dir/limits.yaml:1:1: holds no policy"},
		{"scalar", "hello", "dir/limits.yaml:1:1: want a policy, have a string"},
		{"blueprint values", values, "per-tenant"},
		{"documents of all shapes", values + "---\n" + resource("x") + "\n---\n" + base, "per-tenant x limits"},
		{
			"blueprint values of one name", values + "---\n" + values,
			`dir/limits.yaml:12:16: policy.policy_name: policy "per-tenant" is at dir/limits.yaml:3:16 already`,
		},
		{
			"other kind", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\nspec: {resources: {}}\n",
			`dir/limits.yaml:1:13: apiVersion: want fluxninja.com/v1alpha1, have "v1"` + "\n" +
				`dir/limits.yaml:2:7: kind: want Policy, have "ConfigMap"`,
		},
		{"no name", strings.Replace(resource("x"), "name: x", "labels: {}", 1), "dir/limits.yaml:3:11: metadata.name: is required"},
		{
			"no metadata, no spec", "apiVersion: fluxninja.com/v1alpha1\nkind: Policy\n",
			"dir/limits.yaml:1:1: metadata.name: is required\ndir/limits.yaml:1:1: spec.circuit.components: is required",
		},
		{
			"no limiter", "circuit: {components: [{decider: {}}]}",
			"dir/limits.yaml:1:23: circuit.components: needs at least one flow-control component",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			policies, err := policy.Parse("dir/limits.yaml", []byte(tt.data))
			got := strings.Join(names(policies), " ")
			if err != nil {
				got = err.Error()
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("Parse (-want +got):\n%s", diff)
			}
		})
	}
}

func TestParseErrors(t *testing.T) {
	const (
		request = "            interval: 1s\n"
		comma   = `bad YAML: want "," or "}", have ":"; is a comma missing?`
	)
	for _, tt := range []struct {
		name string
		edit []string // old and new text of base
		want string
	}{
		{
			"unknown key",
			[]string{"interval:", "intervall:"},
			"limits.yaml:9:11: " + limiter + ".parameters.interval: is required\n" +
				"limits.yaml:10:13: " + limiter + `.parameters.intervall: unknown key; did you mean "interval"?`,
		},
		{
			"unknown key in another style",
			[]string{"bucket_capacity", "bucketCapacity"},
			"limits.yaml:6:11: " + limiter + ".in_ports.bucket_capacity: is required\n" +
				"limits.yaml:7:13: " + limiter + `.in_ports.bucketCapacity: unknown key; did you mean "bucket_capacity"?`,
		},
		{"unknown key like nothing", []string{"circuit:", "zzz: 1\ncircuit:"}, "limits.yaml:1:1: zzz: unknown key"},
		{
			"duplicate key",
			[]string{request, request + request, "10", "-1"},
			"limits.yaml:7:30: " + limiter + ".in_ports.bucket_capacity: must be a number from 0 up, is -1\n" +
				`limits.yaml:11:13: duplicate key, first at line 10, column 13`,
		},
		{"missing", []string{"interval: 1s", "{}"}, "limits.yaml:9:11: " + limiter + ".parameters.interval: is required"},
		{"null", []string{"interval: 1s", "interval:"}, "limits.yaml:10:13: " + limiter + ".parameters.interval: is required"},
		{
			"missing port",
			[]string{"bucket_capacity: {constant_signal: {value: 10}}", "pass_through: {constant_signal: {value: 0}}"},
			"limits.yaml:6:11: " + limiter + ".in_ports.bucket_capacity: is required",
		},
		{"no unit", []string{"1s", "30"}, "limits.yaml:10:23: " + limiter + `.parameters.interval: want a duration such as "1.5s", have a number`},
		{"bad duration", []string{"1s", "1 hour"}, "limits.yaml:10:23: " + limiter + `.parameters.interval: bad duration "1 hour"; want a duration such as "1.5s"`},
		{"zero interval", []string{"1s", "0"}, "limits.yaml:10:23: " + limiter + ".parameters.interval: must be positive, is 0s"},
		{
			"negative idle time",
			[]string{"interval: 1s", "{interval: 1s, max_idle_time: -1s}"},
			"limits.yaml:10:43: " + limiter + ".parameters.max_idle_time: must not be negative, is -1s",
		},
		{
			"wrong type",
			[]string{"{value: 10}", "[10]", "1s", "{}"},
			"limits.yaml:7:48: " + limiter + ".in_ports.bucket_capacity.constant_signal: want a mapping, have a sequence\n" +
				"limits.yaml:10:23: " + limiter + `.parameters.interval: want a duration such as "1.5s", have a mapping`,
		},
		{"quoted number", []string{"10", `"10"`}, "limits.yaml:7:56: " + limiter + ".in_ports.bucket_capacity.constant_signal.value: want a number, have a string; write it without quotes"},
		{"text for a number", []string{"10", "ten"}, "limits.yaml:7:56: " + limiter + ".in_ports.bucket_capacity.constant_signal.value: want a number, have a string"},
		{
			"quoted boolean",
			[]string{request, request + "          dry_run: \"true\"\n"},
			"limits.yaml:11:20: " + limiter + ".dry_run: want a boolean, have a string; write it without quotes",
		},
		{
			"number for a string",
			[]string{"control_point: checkout", "control_point: 7"},
			"limits.yaml:5:39: " + limiter + ".selectors[0].control_point: want a string, have a number; quote it",
		},
		{"negative", []string{"10", "-0.5"}, "limits.yaml:7:30: " + limiter + ".in_ports.bucket_capacity: must be a number from 0 up, is -0.5"},
		{"not a number", []string{"10", ".nan"}, "limits.yaml:7:30: " + limiter + ".in_ports.bucket_capacity: must be a number from 0 up, is NaN"},
		{"infinite", []string{"10", ".inf"}, "limits.yaml:7:30: " + limiter + ".in_ports.bucket_capacity: must be a number from 0 up, is +Inf"},
		{"too large", []string{"10", "1e999"}, "limits.yaml:7:30: " + limiter + ".in_ports.bucket_capacity: must be a number from 0 up, is +Inf"},
		{
			"special value",
			[]string{"{value: 10}", "{special_value: NaN}"},
			"limits.yaml:7:64: " + limiter + ".in_ports.bucket_capacity.constant_signal.special_value: special_value is not supported",
		},
		{
			"unknown signal",
			[]string{"{constant_signal: {value: 10}}", "{signal_name: CAP}"},
			"limits.yaml:7:44: " + limiter + `.in_ports.bucket_capacity.signal_name: unsupported circuit: signal "CAP" is not constant`,
		},
		{
			"two variants",
			[]string{"{constant_signal: {value: 10}}", "{signal_name: CAP, constant_signal: {value: 10}}"},
			"limits.yaml:7:30: " + limiter + ".in_ports.bucket_capacity: has signal_name and constant_signal; want one of them",
		},
		{
			"no variant",
			[]string{"{constant_signal: {value: 10}}", "{}"},
			"limits.yaml:7:30: " + limiter + ".in_ports.bucket_capacity: wants one of constant_signal, signal_name",
		},
		{
			"no selectors",
			[]string{"[{control_point: checkout}]", "[]"},
			"limits.yaml:5:22: " + limiter + ".selectors: needs at least one selector",
		},
		{
			"no control point",
			[]string{"{control_point: checkout}", "{service: any}"},
			"limits.yaml:5:23: " + limiter + ".selectors[0].control_point: is required",
		},
		{
			"long control point",
			[]string{"checkout", strings.Repeat("c", 256)},
			"limits.yaml:5:39: " + limiter + ".selectors[0].control_point: is longer than 255 bytes",
		},
		{
			"long label to limit by",
			[]string{"interval: 1s", "{interval: 1s, limit_by_label_key: " + strings.Repeat("l", 256) + "}"},
			"limits.yaml:10:48: " + limiter + ".parameters.limit_by_label_key: is longer than 255 bytes",
		},
		{
			"long label to limit by, by its old name",
			[]string{"interval: 1s", "{interval: 1s, label_key: " + strings.Repeat("l", 256) + "}"},
			"limits.yaml:10:39: " + limiter + ".parameters.label_key: is longer than 255 bytes",
		},
		{
			"long label for tokens",
			[]string{request, request + "          request_parameters: {tokens_label_key: " + strings.Repeat("l", 256) + "}\n"},
			"limits.yaml:11:50: " + limiter + ".request_parameters.tokens_label_key: is longer than 255 bytes",
		},
		{
			"long label to match, beside one that begins like it",
			[]string{"checkout}", "a, label_matcher: {match_labels: {a: x, " + strings.Repeat("l", 256) + ": x, " + strings.Repeat("l", 255) + ": x}}}"},
			"limits.yaml:5:79: " + limiter + ".selectors[0].label_matcher.match_labels." + strings.Repeat("l", 40) + "…: name is longer than 255 bytes",
		},
		{
			"long label to require",
			[]string{"checkout}", "a, label_matcher: {match_list: [{operator: Exists, key: " + strings.Repeat("l", 256) + "}]}}"},
			"limits.yaml:5:95: " + limiter + ".selectors[0].label_matcher.match_list[0].key: is longer than 255 bytes",
		},
		{
			"long labels in expressions",
			[]string{"checkout}", "a, label_matcher: {expression: {all: {of: [{label_exists: " + strings.Repeat("l", 256) + "}, {label_equals: {label: " + strings.Repeat("l", 256) + "}}]}}}}"},
			"limits.yaml:5:97: " + limiter + ".selectors[0].label_matcher.expression.all.of[0].label_exists: is longer than 255 bytes\n" +
				"limits.yaml:5:379: " + limiter + ".selectors[0].label_matcher.expression.all.of[1].label_equals.label: is longer than 255 bytes",
		},
		{
			"unknown operator",
			[]string{"checkout}", "a, label_matcher: {match_list: [{key: k, operator: DoesNotExists}]}}"},
			"limits.yaml:5:90: " + limiter + `.selectors[0].label_matcher.match_list[0].operator: unknown operator "DoesNotExists"; did you mean "DoesNotExist"?`,
		},
		{
			"no values",
			[]string{"checkout}", "a, label_matcher: {match_expressions: [{key: k, operator: NotIn, values: []}]}}"},
			"limits.yaml:5:112: " + limiter + ".selectors[0].label_matcher.match_expressions[0].values: needs at least one value for NotIn",
		},
		{
			"values of Exists",
			[]string{"checkout}", "a, label_matcher: {match_list: [{key: k, operator: Exists, values: [x]}]}}"},
			"limits.yaml:5:106: " + limiter + ".selectors[0].label_matcher.match_list[0].values: must be empty for Exists",
		},
		{
			"bad regex",
			[]string{"checkout}", "a, label_matcher: {expression: {not: {label_matches: {label: l, regex: '(a'}}}}}"},
			"limits.yaml:5:110: " + limiter + ".selectors[0].label_matcher.expression.not.label_matches.regex: error parsing regexp: missing closing ): `(a`",
		},
		{
			"regex that takes too long",
			[]string{"checkout}", "a, label_matcher: {expression: {not: {label_matches: {label: l, regex: 'x{999}'}}}}}"},
			"limits.yaml:5:110: " + limiter + ".selectors[0].label_matcher.expression.not.label_matches.regex: compiles to 1001 instructions, more than 1000: it would take too long to match",
		},
		{
			"unknown expression",
			[]string{"checkout}", "a, label_matcher: {expression: {any: {of: [{label_equal: {}}]}}}}"},
			"limits.yaml:5:83: " + limiter + `.selectors[0].label_matcher.expression.any.of[0].label_equal: unknown key; did you mean "label_equals"?`,
		},
		{
			"empty expressions",
			[]string{"checkout}", "a, label_matcher: {expression: {all: {of: [~, {}, {label_exists: ''}]}}}}"},
			"limits.yaml:5:82: " + limiter + ".selectors[0].label_matcher.expression.all.of[0]: is required\n" +
				"limits.yaml:5:85: " + limiter + ".selectors[0].label_matcher.expression.all.of[1]: wants one of not, all, any, label_exists, label_equals, label_matches\n" +
				"limits.yaml:5:104: " + limiter + ".selectors[0].label_matcher.expression.all.of[2].label_exists: is required",
		},
		{
			"unknown status",
			[]string{request, request + "          request_parameters: {denied_response_status_code: ToManyRequests}\n"},
			"limits.yaml:11:61: " + limiter + `.request_parameters.denied_response_status_code: unknown error status "ToManyRequests"; did you mean "TooManyRequests"?`,
		},
		{
			"quoted status",
			[]string{request, request + "          request_parameters: {denied_response_status_code: \"429\"}\n"},
			"limits.yaml:11:61: " + limiter + `.request_parameters.denied_response_status_code: unknown error status "429"; write it without quotes`,
		},
		{
			"status of success",
			[]string{request, request + "          request_parameters: {denied_response_status_code: 200}\n"},
			"limits.yaml:11:61: " + limiter + ".request_parameters.denied_response_status_code: must be an HTTP status from 400 to 599, is 200",
		},
		{
			"fraction of a status",
			[]string{request, request + "          request_parameters: {denied_response_status_code: 429.5}\n"},
			"limits.yaml:11:61: " + limiter + ".request_parameters.denied_response_status_code: want an HTTP status, as in TooManyRequests or 429; have a number",
		},
		{
			"later kind",
			[]string{"rate_limiter:", "aiad_load_scheduler:"},
			"limits.yaml:4:9: circuit.components[0].flow_control.aiad_load_scheduler: aiad_load_scheduler is not supported yet",
		},
		{
			"unknown kind",
			[]string{"rate_limiter:", "rate_limitter:"},
			`limits.yaml:4:9: circuit.components[0].flow_control.rate_limitter: unknown key; did you mean "rate_limiter"?`,
		},
		{
			"nested circuit",
			[]string{"components:", "components:\n    - nested_circuit: {}"},
			"limits.yaml:3:23: circuit.components[0].nested_circuit: nested_circuit is not supported yet",
		},
		{
			"classifiers",
			[]string{"circuit:", "resources: {flow_control: {classifiers: [{}]}}\ncircuit:"},
			"limits.yaml:1:41: resources.flow_control.classifiers: classifiers are not supported",
		},
		{
			"syntax",
			[]string{"[{control_point: checkout}]", "[{control_point: checkout}"},
			`limits.yaml:5:22: bad YAML: "[" is not closed; "]" is missing`,
		},
		{
			"missing comma in a selector",
			[]string{"{control_point: checkout}", "{control_point: checkout service: shop}"},
			"limits.yaml:5:55: " + comma,
		},
		{"missing comma among parameters", []string{"interval: 1s", "{interval: 1s, limit_by_label_key: tenant delay_initial_fill: true}"}, "limits.yaml:10:73: " + comma},
		{"missing comma between lines", []string{"checkout}", "checkout\n            service: shop}"}, "limits.yaml:6:20: " + comma},
		{"missing comma before nothing", []string{"checkout}", "checkout service:}"}, "limits.yaml:5:55: " + comma},
		{"tab in a key", []string{"circuit:", "ci\trcuit:"}, `limits.yaml:1:1: ["ci\trcuit"]: unknown key; did you mean "circuit"?`},
		{
			"tab in a number",
			[]string{"10", "1\t0"},
			"limits.yaml:7:56: " + limiter + ".in_ports.bucket_capacity.constant_signal.value: want a number, have a string",
		},
		{
			"bracket that is not closed",
			[]string{"[{control_point: checkout}]", "[{control_point: checkout}", request, request + "    - flow_control: {}\n"},
			`limits.yaml:5:22: bad YAML: "[" is not closed; "]" is missing`,
		},
		{"missing comma before a blank line", []string{"checkout}", "checkout service:\n\n            shop}"}, "limits.yaml:5:55: " + comma},
		{
			"label names with dots",
			[]string{"checkout}", "a, label_matcher: {match_labels: {app: 1, app.version: 2, app.name: 3}}}"},
			"limits.yaml:5:78: " + limiter + ".selectors[0].label_matcher.match_labels.app: want a string, have a number; quote it\n" +
				"limits.yaml:5:94: " + limiter + ".selectors[0].label_matcher.match_labels.app.version: want a string, have a number; quote it\n" +
				"limits.yaml:5:107: " + limiter + ".selectors[0].label_matcher.match_labels.app.name: want a string, have a number; quote it",
		},
		{
			"keys that forge lines",
			[]string{"circuit:", "\"a\\nb: \\e[2J\": 1\nz\u200b: 1\n'': 1\ncircuit:"},
			`limits.yaml:1:1: ["a\nb: \x1b[2J"]: unknown key` + "\n" + `limits.yaml:2:1: ["z\u200b"]: unknown key` + "\n" + `limits.yaml:3:1: [""]: unknown key`,
		},
		{
			"extension below the top",
			[]string{"interval: 1s", "{interval: 1s, x-a: 1}"},
			"limits.yaml:10:28: " + limiter + ".parameters.x-a: unknown key",
		},
		{"tag", []string{"1s", "!!str 1s"}, "limits.yaml:10:23: YAML tags are not supported"},
		{"directive", []string{"circuit:", "%YAML 1.2\n---\ncircuit:"}, "limits.yaml:1:1: YAML directives are not supported"},
		{"unknown alias", []string{"1s", "*second"}, `limits.yaml:10:23: unknown alias "second"`},
		{"alias as a key", []string{"circuit:", "a: &x b\n*x : 1\ncircuit:"}, "limits.yaml:2:1: want a plain key, have an alias"},
		{"merge of a number", []string{"{value: 5}", "{<<: 5}"}, "limits.yaml:8:49: want a mapping to merge, have a number"},
		{
			"null among strings",
			[]string{"checkout}", "a, label_matcher: {match_labels: {a: }, match_list: [{key: k, operator: In, values: [~]}]}}"},
			"limits.yaml:5:73: " + limiter + ".selectors[0].label_matcher.match_labels.a: want a string, have nothing\n" +
				"limits.yaml:5:124: " + limiter + ".selectors[0].label_matcher.match_list[0].values[0]: want a string, have nothing",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			policies, err := policy.Parse("limits.yaml", []byte(edit(t, tt.edit...)))
			if err == nil {
				t.Fatalf("Parse = %+v, want an error", policies)
			}
			if diff := cmp.Diff(tt.want, err.Error()); diff != "" {
				t.Errorf("Parse (-want +got):\n%s", diff)
			}
			for _, err := range each(err) {
				var e *policy.Error
				if !errors.As(err, &e) || e.File != "limits.yaml" {
					t.Errorf("%v is no *policy.Error of the file", err)
				}
			}
		})
	}
}

func TestParseValues(t *testing.T) {
	want := func(change func(*policy.RateLimiter)) policy.RateLimiter {
		l := policy.RateLimiter{ID: "root.0", Selectors: policy.At("checkout"), Capacity: 10, Fill: 5, Interval: time.Second}
		if change != nil {
			change(&l)
		}
		return l
	}
	parameters := func(more string) []string { return []string{"interval: 1s", "{interval: 1s, " + more + "}"} }
	const ports = "bucket_capacity: {constant_signal: {value: 10}}"
	const end = "interval: 1s"
	for _, tt := range []struct {
		name string
		edit []string
		want policy.RateLimiter
	}{
		{"base", nil, want(nil)},
		{"continuous", parameters("continuous_fill: true"), want(nil)},
		{"in steps", parameters("continuous_fill: false"), want(func(l *policy.RateLimiter) { l.StepFill = true })},
		{"idle time", parameters("max_idle_time: 0.5s"), want(func(l *policy.RateLimiter) { l.MaxIdle = 500 * time.Millisecond })},
		{"idle for ever", parameters("max_idle_time: 0s"), want(func(l *policy.RateLimiter) { l.MaxIdle = policy.KeepIdle })},
		{"idle for ever, bare", parameters("max_idle_time: 0"), want(func(l *policy.RateLimiter) { l.MaxIdle = policy.KeepIdle })},
		{"old label key", parameters("label_key: user"), want(func(l *policy.RateLimiter) { l.LimitBy = "user" })},
		{"both label keys", parameters("limit_by_label_key: user, label_key: x"), want(func(l *policy.RateLimiter) { l.LimitBy = "user" })},
		{"literal block", []string{"1s", "|-\n              1s"}, want(nil)},
		{"numbers", []string{"10", "0xA", "5", "0.5e1"}, want(nil)},
		{"tiny number", []string{"10", "1e-999"}, want(func(l *policy.RateLimiter) { l.Capacity = 0 })},
		{
			"status by name",
			[]string{end, end + "\n          request_parameters: {denied_response_status_code: NetworkAuthenticationRequired, tokens_label_key: n}"},
			want(func(l *policy.RateLimiter) { l.DeniedStatus, l.TokensLabel = 511, "n" }),
		},
		{
			"status by number",
			[]string{end, end + "\n          request_parameters: {denied_response_status_code: 400}"},
			want(func(l *policy.RateLimiter) { l.DeniedStatus = 400 }),
		},
		{"status unset", []string{end, end + "\n          request_parameters: {denied_response_status_code: Empty}"}, want(nil)},
		{"dry run", []string{end, end + "\n          dry_run: true"}, want(func(l *policy.RateLimiter) { l.DryRun = true })},
		{"service", []string{"checkout}", "checkout, service: shop}"}, want(func(l *policy.RateLimiter) { l.Selectors[0].Service = "shop" })},
		{
			"old match list",
			[]string{"checkout}", "checkout, label_matcher: {match_expressions: [{key: k, operator: Exists}]}}"},
			want(func(l *policy.RateLimiter) {
				l.Selectors[0].Labels.Require = []policy.Requirement{{Key: "k", Operator: policy.Exists}}
			}),
		},
		{
			"both match lists",
			[]string{"checkout}", "checkout, label_matcher: {match_expressions: [{key: a}], match_list: [{key: k, operator: Exists}]}}"},
			want(func(l *policy.RateLimiter) {
				l.Selectors[0].Labels.Require = []policy.Requirement{{Key: "k", Operator: policy.Exists}}
			}),
		},
		{
			"both match lists, the new one empty",
			[]string{"checkout}", "checkout, label_matcher: {match_expressions: [{key: k, operator: Exists}], match_list: []}}"},
			want(func(l *policy.RateLimiter) {
				l.Selectors[0].Labels.Require = []policy.Requirement{{Key: "k", Operator: policy.Exists}}
			}),
		},
		{
			"colons and tabs in their places",
			[]string{"checkout}", "'a: b', service:\t\"c:\", label_matcher: {match_labels: {d: http://e:1, \"f\":\"g\\th\", i: 'j\tk'}}}"},
			want(func(l *policy.RateLimiter) {
				l.Selectors = []policy.Selector{{
					ControlPoint: "a: b", Service: "c:",
					Labels: policy.LabelMatcher{Equal: map[string]string{"d": "http://e:1", "f": "g\th", "i": "j\tk"}},
				}}
			}),
		},
		{
			"colons and tabs in a block",
			[]string{"[{control_point: checkout}]", "\n            - control_point: >- # a: b\n                a: b\tc:"},
			want(func(l *policy.RateLimiter) { l.Selectors = policy.At("a: b\tc:") }),
		},
		{
			"anchor in an extension",
			[]string{"circuit:", "x-limits: &five {value: 5}\ncircuit:", "{value: 10}", "*five"},
			want(func(l *policy.RateLimiter) { l.Capacity = 5 }),
		},
		{
			"pass through",
			[]string{ports, ports + "\n            pass_through: {constant_signal: {value: 0.5}}"},
			want(func(l *policy.RateLimiter) { l.PassThrough = true }),
		},
		{"variables", []string{
			"components:", "components:\n" +
				"    - bool_variable: {constant_output: true, out_ports: {output: {signal_name: PASS}}}",
			"{constant_signal: {value: 10}}", "{signal_name: CAP}\n            pass_through: {signal_name: PASS}",
			end, end + "\n    - variable: {constant_output: {value: 3}, config_key: cap, out_ports: {output: {signal_name: CAP}}}",
		}, want(func(l *policy.RateLimiter) { l.ID, l.Capacity, l.PassThrough = "root.1", 3, true })},
		{"alias", []string{"{value: 10}", "&ten {value: 10}", "{value: 5}", "*ten"}, want(func(l *policy.RateLimiter) { l.Fill = 10 })},
		{"merge", []string{
			"{constant_signal: {value: 10}}", "&c {constant_signal: {value: 10}}",
			"{constant_signal: {value: 5}}", "{<<: *c}",
		}, want(func(l *policy.RateLimiter) { l.Fill = 10 })},
		{"merge several", []string{
			"{constant_signal: {value: 10}}", "&c {constant_signal: {value: 10}}",
			"{constant_signal: {value: 5}}", "{<<: [*c, {constant_signal: {value: 4}}]}",
		}, want(func(l *policy.RateLimiter) { l.Fill = 10 })},
		{"merge over", []string{
			"{constant_signal: {value: 10}}", "&c {constant_signal: {value: 10}}",
			"{constant_signal: {value: 5}}", "{<<: *c, constant_signal: {value: 4}}",
		}, want(func(l *policy.RateLimiter) { l.Fill = 4 })},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := policy.Parse("limits.yaml", []byte(edit(t, tt.edit...)))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]policy.Component{tt.want}, got[0].Components, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("Parse (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDynamicConfig(t *testing.T) {
	const data = `apiVersion: fluxninja.com/v1alpha1
kind: Policy
metadata: {name: x}
spec:
  circuit:
    components:
      - flow_control:
          concurrency_limiter:
            selectors: [{control_point: a}]
            in_ports: {max_concurrency: {signal_name: MAX}, pass_through: {signal_name: PASS}}
            parameters: {max_inflight_duration: 60s, limit_by_label_key: user, max_idle_time: 1m}
            request_parameters: {tokens_label_key: n, denied_response_status_code: 503}
            dry_run: true
      - variable: {constant_output: {value: 3}, config_key: max, out_ports: {output: {signal_name: MAX}}}
      - bool_variable: {config_key: pass, out_ports: {output: {signal_name: PASS}}}
dynamicConfig:
  max: {value: 4}
  pass: true
  start: true
`
	want := []policy.Policy{{
		Name: "x",
		Components: []policy.Component{policy.ConcurrencyLimiter{
			ID: "root.0", Selectors: policy.At("a"), Max: 4, MaxInflight: time.Minute, LimitBy: "user", MaxIdle: time.Minute,
			TokensLabel: "n", DeniedStatus: 503, PassThrough: true, DryRun: true,
		}},
		Warnings: []string{"x.yaml:19:10: dynamicConfig.start: not used: nothing has this config key"},
	}}
	got, err := policy.Parse("x.yaml", []byte(data))
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("Parse: %v (-want +got):\n%s", err, diff)
	}

	broken := strings.NewReplacer("signal_name: PASS}}}", "}}}", "config_key: pass", "config_key: [a]", "value: 4", "special_value: NaN",
		"- variable", "- variable: {out_ports: {output: {signal_name: MAX}}}\n      - variable").Replace(data)
	_, err = policy.Parse("x.yaml", []byte(broken))
	wantErr := `x.yaml:10:89: spec.circuit.components[0].flow_control.concurrency_limiter.in_ports.pass_through.signal_name: unsupported circuit: signal "PASS" is not constant
x.yaml:14:19: spec.circuit.components[1].variable.constant_output: is required
x.yaml:15:100: spec.circuit.components[2].variable.out_ports.output.signal_name: signal "MAX" has two sources
x.yaml:16:37: spec.circuit.components[3].bool_variable.config_key: want a string, have a sequence
x.yaml:16:62: spec.circuit.components[3].bool_variable.out_ports.output.signal_name: is required
x.yaml:18:24: dynamicConfig.max.special_value: special_value is not supported`
	if err == nil {
		t.Fatal("Parse of the broken circuit gave no error")
	}
	if diff := cmp.Diff(wantErr, err.Error()); diff != "" {
		t.Errorf("Parse (-want +got):\n%s", diff)
	}
}

func TestWarnings(t *testing.T) {
	data := `apiVersion: fluxninja.com/v1alpha1
kind: Policy
metadata: {name: x, namespace: apps, labels: {a: b}}
status: {}
spec:
  resources:
    infra_meters: {}
    flow_control: {classifiers: [], flux_meters: {latency: {}}}
  circuit:
    evaluation_interval: 1s
    components:
      - decider: {operator: gt}
      - flow_control:
          rate_limiter:
            selectors: [{control_point: a, agent_group: default}]
            in_ports: {bucket_capacity: {constant_signal: {value: 1}}, fill_amount: {constant_signal: {value: 1}}}
            out_ports: ~
            parameters: {interval: 1s, lazy_sync: {enabled: true, num_sync: 4}, limit_by_label_key: a, label_key: b}
`
	got, err := policy.Parse("x.yaml", []byte(data))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"x.yaml:4:1: status: not used",
		"x.yaml:3:21: metadata.namespace: not used",
		"x.yaml:3:38: metadata.labels: not used",
		"x.yaml:7:5: spec.resources.infra_meters: not used",
		"x.yaml:10:5: spec.circuit.evaluation_interval: not used",
		"x.yaml:12:18: spec.circuit.components[0].decider: not used",
		"x.yaml:18:67: spec.circuit.components[1].flow_control.rate_limiter.parameters.lazy_sync.num_sync: not used",
		"x.yaml:18:115: spec.circuit.components[1].flow_control.rate_limiter.parameters.label_key: not used: limit_by_label_key is set",
		"x.yaml:15:44: spec.circuit.components[1].flow_control.rate_limiter.selectors[0].agent_group: not used",
		"x.yaml:8:60: spec.resources.flow_control.flux_meters.latency: not used: no port of a load scheduler names it",
	}
	if diff := cmp.Diff(want, got[0].Warnings); diff != "" {
		t.Errorf("Warnings (-want +got):\n%s", diff)
	}
	if id := got[0].Components[0].(policy.RateLimiter).ID; id != "root.1" {
		t.Errorf("ID = %s, want root.1: every component of the circuit counts", id)
	}
}

func TestErrorsAreCapped(t *testing.T) {
	var b strings.Builder
	for i := range 30 {
		fmt.Fprintf(&b, "k%d: %d\n", i, i)
	}
	_, err := policy.Parse("x.yaml", []byte(b.String()))
	lines := strings.Split(err.Error(), "\n")
	if len(lines) != 21 || lines[20] != "and 10 more" {
		t.Errorf("%d lines, the last %q, want 21 and 10 more", len(lines), lines[len(lines)-1])
	}
}

func TestErrorsQuoteLittle(t *testing.T) {
	huge := strings.Repeat("x", 10_000)
	for _, data := range []string{
		edit(t, "1s", huge), edit(t, "1s", "\"\\q"+huge), edit(t, "checkout}", "a, label_matcher: {match_list: [{key: k, operator: "+huge+"}]}}"),
		edit(t, "checkout}", "a, label_matcher: {expression: {label_matches: {label: l, regex: \"("+huge+"\"}}}"),
		edit(t, "10", huge), edit(t, "{constant_signal: {value: 10}}", "{signal_name: "+huge+"}"), "kind: " + huge,
		"? " + huge + "\n: a", huge + ": a", "*" + huge, base + huge[:250] + ": 1",
	} {
		_, err := policy.Parse("x.yaml", []byte(data))
		if err == nil || len(err.Error()) > 600 {
			t.Errorf("Parse = an error of %d bytes: %.100v", len(fmt.Sprint(err)), err)
		}
	}
}

func TestHostile(t *testing.T) {
	bomb := "a: &a [x, x, x, x, x, x, x, x, x]\n"
	for c := 'b'; c <= 'z'; c++ {
		bomb += fmt.Sprintf("%c: &%[1]c [%s]\n", c, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*%c, ", c-1), 9), ", "))
	}
	// schedulers is a policy of that many quota schedulers with the same workloads, each of which has a matcher.
	schedulers := func(components, workloads int, regex string) string {
		var b strings.Builder
		b.WriteString("x-workloads: &w\n")
		for i := range workloads {
			fmt.Fprintf(&b, "- {name: w%d, label_matcher: {expression: {label_matches: {label: l, regex: '%s'}}}}\n", i, regex)
		}
		b.WriteString("circuit:\n  components:\n")
		for range components {
			b.WriteString("  - flow_control: {quota_scheduler: {scheduler: {workloads: *w}}}\n")
		}
		return b.String()
	}
	many := race.Pick(1_000, 20_000)
	repeat := func(format string) string {
		var b strings.Builder
		for i := range many {
			fmt.Fprintf(&b, format, i)
		}
		return b.String()
	}
	settings := "apiVersion: fluxninja.com/v1alpha1\nkind: Policy\nmetadata: {name: x}\nspec:\n  circuit:\n    components:\n" +
		repeat("    - bool_variable: {config_key: k%d, out_ports: {output: {signal_name: s%[1]d}}}\n") + "dynamicConfig:\n" + repeat("  k%d: true\n")
	meters := "resources:\n  flow_control:\n    flux_meters:\n" + repeat("      m%d: {selectors: []}\n") + "circuit:\n  components:\n" +
		repeat("  - flow_control: {load_scheduler: {in_ports: {load_multiplier: {signal_name: m%d}}}}\n")
	indented := ""
	for i := range 100 {
		indented += strings.Repeat(" ", i) + "a:\n"
	}
	chain := "x: &a0 [x]\n"
	for i := range 100 {
		chain += fmt.Sprintf("x%d: &a%d [*a%d]\n", i, i+1, i)
	}
	long := race.Pick(1<<19, 1<<20)                                                       // beyond the bound of commas
	full := race.Pick(2<<20, 16<<20)                                                      // beyond the bounds, too
	fill := func(text string) string { return strings.Repeat(text, (full-64)/len(text)) } // a file with room for little more
	numbered := func(format string) string {
		var b strings.Builder
		for i := 0; b.Len() < full-64; i++ {
			fmt.Fprintf(&b, format, i)
		}
		return b.String()
	}
	for _, tt := range []struct{ name, data, want string }{
		{"aliases of aliases", bomb, "aliases stand for more than 32 MiB"},
		{"aliases of long text", "a: &a '" + strings.Repeat("a|b", 1<<18) + "'\nb: [" + strings.Repeat("*a, ", 50) + "]", "aliases stand for more than 32 MiB"},
		{"aliases of workloads", schedulers(4000, 200, "x"), "aliases stand for more than 32 MiB"},
		{"merges of merges", "a: &a {<<: [" + strings.Repeat("{b: c}, ", 1000) + "]}\nb: [" + strings.Repeat("*a, ", 10_000) + "]", "aliases stand for more than 32 MiB"},
		{"alias of itself", "a: &a [*a]", `alias "a" stands within what it stands for`},
		{"alias of itself in a merge", "a: &a {<<: *a}", `alias "a" stands within what it stands for`},
		{"aliases in aliases", chain, "nested more than 64 levels deep"},
		{"17 MiB", strings.Repeat("a: b\n", 17<<20/5), "larger than 16 MiB; split it"},
		{"flow sequences", strings.Repeat("[", 10_000), "nested more than 64 levels deep"},
		{"flow mappings", strings.Repeat("{a: ", 2_000), "nested more than 64 levels deep"},
		{"block mappings", indented, "nested more than 64 levels deep"},
		{"block sequences", strings.Repeat("- ", 5_000), "nested more than 64 levels deep"},
		{"keys in keys", strings.Repeat("? ", 5_000), "nested more than 64 levels deep"},
		{"many keys", strings.Repeat("a:\n", race.Pick(5_000, 30_000)), `duplicate key, first at line 1, column 1`},
		{"list that may be a key", "a: [[" + strings.Repeat("x,", long) + "]]", "x.yaml:1:5: bad YAML: more than 300000 commas"},
		{"list in a list", "a:\n- [" + strings.Repeat("x,", long) + "]", "x.yaml:2:3: bad YAML: more than 300000 commas"},
		{"unclosed brackets", strings.Repeat("[", 60) + strings.Repeat("a: ", long), "x.yaml:1:2: bad YAML: more than 300000 commas"},
		{"block sequences in flow", "a: [" + strings.Repeat("- ", long), `want a value, have "-"`},
		{"unclosed quote", `a: "` + strings.Repeat("\t", long), "x.yaml:1:4: bad YAML: the quote that closes this text is missing"},
		{"many flow sequences", fill("["), "nested more than 64 levels deep"},
		{"many flow mappings", fill("{a: "), "nested more than 64 levels deep"},
		{"many flow mappings in a mapping", "a: " + fill("{a: "), "nested more than 64 levels deep"},
		{"many flow collections by turns", "- " + fill("[{a: "), "x.yaml:1:3: bad YAML: more than 300000 commas"},
		{"many unclosed brackets", fill("a: [b\n"), "nested more than 64 levels deep"},
		{"many unclosed brackets in a list", fill("- [a\n"), "x.yaml:1:3: bad YAML: more than 300000 commas"},
		{"many anchors and tags", fill("&a !b "), "x.yaml:1:900004: bad YAML: more than 300000 anchors, tags and quotes in this line"},
		{"many quotes", fill("'a' "), "bad YAML: more than 300000 anchors, tags and quotes in this line"},
		{"many aliases", "a: b\n" + fill("*a "), "bad YAML: more than 300000 anchors, tags and quotes in this line"},
		{"many closing brackets", fill("]"), `bad YAML: want a value, have "]"`},
		{"many directives", numbered("%%TAG !%d! a\n"), "x.yaml:1:1: YAML directives are not supported"},
		{"many directives of many documents", fill("%YAML 1.2\n---\na: b\n...\n"), "x.yaml:1:1: YAML directives are not supported"},
		{"many broken documents", fill("---\n}\n"), `x.yaml:2:1: bad YAML: want a value, have "}"`},
		{"many broken documents in brackets", fill("[a\n---\n"), `x.yaml:1:1: bad YAML: "[" is not closed; "]" is missing`},
		{"many documents with an open quote", fill("---\na: '\n"), "x.yaml:2:4: bad YAML: the quote that closes this text is missing"},
		{"long key", fill("k"), "x.yaml:1:1: want a policy, have a string"},
		{"deep indentation", "a:\n" + fill(" ") + "b: c", "a: unknown key"},
		{"many line ends", fill("\r"), "holds no policy"},
		{"many comments", fill("# a\n"), "holds no policy"},
		{"binary", "\x7fELF\xff", "x.yaml:1:5: is not UTF-8"},
		{"tags", strings.Repeat("- !a\n", 10_000), "YAML tags are not supported"},
		{"broken documents", strings.Repeat("---\n}\n", 100_000), `x.yaml:2:1: bad YAML: want a value, have "}"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := soon(t, func() ([]policy.Policy, error) { return policy.Parse("x.yaml", []byte(tt.data)) })
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Parse = %.300v, want %s", err, tt.want)
			}
		})
	}

	// What is within the bounds must not take long either.
	size := race.Pick(1<<15, 1<<20)
	for _, tt := range []struct{ name, data string }{
		{"many keys", strings.Repeat("k:\n", size/10)},
		{"blank lines", "a: |\n b" + strings.Repeat("\n", size) + " c\n"},
		{"run of <", strings.Repeat("<", size)},
		{"tabs", `a: "` + strings.Repeat("\t", size) + `"`},
		{"comments", strings.Repeat("a: # b\n\n # c\n\n", size/16)},
		{"anchors", strings.Repeat("- &a b\n", size/8)},
		{"documents", strings.Repeat("a: b\n---\n", size/8)},
		{"long line", strings.Repeat("a ", size/2)},
		{"aliases of long text", "x-a: &a '" + strings.Repeat("a|b", size/12) + "'\ncircuit: {components: [{flow_control: {rate_limiter: {selectors: [" +
			strings.Repeat("{label_matcher: {expression: {label_matches: {label: l, regex: *a}}}}, ", 2) + "]}}}]}"},
		{"aliases of workloads", schedulers(50, race.Pick(10, 40), strings.Repeat("(a|b)*", 40))},
		{"settings", settings},
		{"flux meters", meters},
	} {
		t.Run("within bounds: "+tt.name, func(t *testing.T) {
			_, err := soon(t, func() ([]policy.Policy, error) { return policy.Parse("x.yaml", []byte(tt.data)) })
			if err == nil || strings.Contains(err.Error(), " more than ") {
				t.Errorf("Parse = %.300v, want another error than that it is too much", err)
			}
		})
	}
}

// TestBrokenDocuments expects that what is behind a broken document is read on from there, and not copied for each.
func TestBrokenDocuments(t *testing.T) {
	for name, data := range map[string]string{
		"of blocks":   strings.Repeat("---\n}\n", 1<<20/6),
		"in brackets": strings.Repeat("---\n{}}\n", 1<<20/8),
	} {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err := policy.Parse("x.yaml", []byte(data))
			runtime.ReadMemStats(&after)
			if err == nil || !strings.HasSuffix(err.Error(), "and at least 180 more") {
				t.Errorf("Parse = %.300v, want 200 errors", err)
			}
			if got, most := after.TotalAlloc-before.TotalAlloc, uint64(60*len(data)); got > most {
				t.Errorf("Parse of %d bytes allocates %d, want at most %d", len(data), got, most)
			}
		})
	}
}

// soon returns what load returns, and fails the test if that takes much longer than any file may.
func soon(t *testing.T, load func() ([]policy.Policy, error)) ([]policy.Policy, error) {
	t.Helper()
	var policies []policy.Policy
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		policies, err = load()
	}()
	select {
	case <-done:
		return policies, err
	case <-time.After(2 * time.Minute): // a second, on a machine with nothing else to do
		t.Fatal("still not read")
		return nil, nil
	}
}

// TestLarge reads files as large as anyone may want.
func TestLarge(t *testing.T) {
	tenants := func(format string, n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, format, fmt.Sprintf("tenant-%08d", i))
		}
		return b.String()
	}
	const (
		matcher = "checkout, label_matcher: {match_list: [{key: tenant, operator: In, values: %s}]}}"
		json    = `{"flow_control":{"rate_limiter":{"selectors":[{"control_point":"a"}],"in_ports":{"bucket_capacity":` +
			`{"constant_signal":{"value":10}},"fill_amount":{"constant_signal":{"value":5}}},"parameters":{"interval":"1s"}}}}`
	)
	block := "\n                  - "
	for _, tt := range []struct {
		name, data string
	}{
		{"5000 tenants in a line", edit(t, "checkout}", fmt.Sprintf(matcher, "["+tenants("%s, ", 5_000)+"]"))},
		{"9000 tenants in lines", edit(t, "[{control_point: checkout}]", "\n            - control_point: a\n              label_matcher:\n"+
			"                match_list:\n                - key: tenant\n                  operator: In\n                  values:"+tenants(block+"%s", 9_000))},
		{"250 limiters in a line", `{"circuit":{"components":[` + strings.TrimSuffix(strings.Repeat(json+",", 250), ",") + "]}}"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := soon(t, func() ([]policy.Policy, error) { return policy.Parse("x.yaml", []byte(tt.data)) }); err != nil {
				t.Errorf("Parse of %d bytes = %v", len(tt.data), err)
			}
		})
	}
}

func TestTruncated(t *testing.T) {
	for _, file := range []string{
		"testdata/match.yaml", "testdata/rl-global.yaml", "testdata/kinds.yaml", "testdata/shop.yaml", "testdata/slow-search.yaml",
	} {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for n := 0; n < len(data); n += 1 + len(data)/race.Pick(80, 400) {
			_, err := policy.Parse(file, data[:n])
			for _, err := range each(err) {
				var e *policy.Error
				if !errors.As(err, &e) || e.Line < 1 || e.Column < 1 {
					t.Fatalf("Parse of %d bytes of %s = %v, want a position", n, file, err)
				}
			}
		}
	}
}

// A device is no file of policies.
func TestLoadOfADevice(t *testing.T) {
	const file = "/dev/zero"
	if _, err := os.Stat(file); err != nil {
		t.Skip(err)
	}
	_, err := soon(t, func() ([]policy.Policy, error) { return policy.Load(file) })
	if want := "open " + file + ": it is not a regular file"; err == nil || err.Error() != want {
		t.Errorf("Load = %v, want %s", err, want)
	}
}

func TestParseWithoutName(t *testing.T) {
	for _, name := range []string{"", ".", "..", ".yaml", "dir/.yml"} {
		_, err := policy.Parse(name, []byte(base))
		want := fmt.Sprintf("1:1: a plain policy has the name of its file, and %q has none", name)
		if err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("Parse(%q) = %v, want %s", name, err, want)
		}
		if _, err := policy.Parse(name, []byte(resource("x"))); err != nil {
			t.Errorf("Parse(%q) of a resource = %v", name, err)
		}
	}
}
