package engine_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

// matching names a label in each way that a matcher can.
func matching(prefix string) policy.LabelMatcher {
	return policy.LabelMatcher{
		Equal:   map[string]string{prefix + "equal": "1"},
		Require: []policy.Requirement{{Key: prefix + "require", Operator: policy.Exists}},
		Expression: policy.Any{
			policy.Not{Of: policy.LabelExists(prefix + "exists")},
			policy.All{policy.LabelEquals{Label: prefix + "equals", Value: "1"}, policy.LabelMatches{Label: prefix + "matches", Regex: "1"}},
		},
	}
}

func TestNamedLabels(t *testing.T) {
	const measured = true
	selectors := func(prefix string) []policy.Selector {
		return []policy.Selector{{ControlPoint: "point"}, {ControlPoint: "point", Labels: matching(prefix)}}
	}
	scheduler := policy.Scheduler{
		TokensLabel: "tokens", PriorityLabel: "priority", WorkloadLabel: "workload", FairnessLabel: "fairness",
		Workloads: []policy.Workload{{Name: "w", Labels: matching("w-")}},
	}
	named := func(prefixes ...string) map[string]bool {
		m := make(map[string]bool)
		for _, p := range prefixes {
			for _, of := range []string{"equal", "require", "exists", "equals", "matches"} {
				m[p+of] = false
			}
		}
		return m
	}
	with := func(m map[string]bool, keys ...string) map[string]bool {
		for _, key := range keys {
			m[key] = false
		}
		return m
	}
	scheduled := []string{"tokens", "priority", "workload", "fairness"}
	latencies := func(m map[string]bool, prefixes ...string) map[string]bool {
		for key := range m {
			m[key] = slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(key, p) })
		}
		return m
	}
	for name, tt := range map[string]struct {
		component policy.Component
		want      map[string]bool
	}{
		"rate limiter": {
			policy.RateLimiter{Selectors: selectors("s-"), Interval: time.Second, LimitBy: "by", TokensLabel: "tokens"},
			with(named("s-"), "by", "tokens"),
		},
		"concurrency limiter": {
			policy.ConcurrencyLimiter{Selectors: selectors("s-"), MaxInflight: time.Second, LimitBy: "by", TokensLabel: "tokens"},
			with(named("s-"), "by", "tokens"),
		},
		"quota scheduler": {
			policy.QuotaScheduler{Selectors: selectors("s-"), Interval: time.Second, LimitBy: "by", Scheduler: scheduler},
			with(with(named("s-", "w-"), scheduled...), "by"),
		},
		"concurrency scheduler": {
			policy.ConcurrencyScheduler{Selectors: selectors("s-"), MaxInflight: time.Second, LimitBy: "by", Scheduler: scheduler},
			with(with(named("s-", "w-"), scheduled...), "by"),
		},
		"load scheduler": {
			policy.LoadScheduler{
				Selectors: selectors("s-"), Scheduler: scheduler,
				LoadMultiplier: policy.MeanLatency{Selectors: selectors("m-"), Over: time.Minute},
			},
			latencies(with(named("s-", "w-", "m-"), scheduled...), "m-"),
		},
		"load scheduler by latency": {
			policy.LoadScheduler{Selectors: selectors("s-"), Scheduler: scheduler, LoadMultiplier: policy.Constant(1), WorkloadLatencyTokens: measured},
			latencies(with(named("s-", "w-"), scheduled...), "s-", "w-"),
		},
		"AIMD load scheduler": {
			policy.AIMDLoadScheduler{
				Selectors: selectors("s-"), Scheduler: scheduler, Gradient: policy.Gradient{Slope: -1},
				Signal: policy.MeanLatency{Selectors: selectors("m-"), Over: time.Minute}, Setpoint: policy.MeanLatency{Selectors: selectors("n-"), Over: time.Hour},
			},
			latencies(with(named("s-", "w-", "m-", "n-"), scheduled...), "m-", "n-"),
		},
		"sampler":   {policy.Sampler{Selectors: selectors("s-"), SessionLabel: "session"}, with(named("s-"), "session")},
		"load ramp": {policy.LoadRamp{Selectors: selectors("s-"), SessionLabel: "session", Steps: []policy.RampStep{{Target: 1}}}, with(named("s-"), "session")},
		"nothing":   {policy.RateLimiter{Selectors: policy.At("point"), Interval: time.Second}, map[string]bool{}},
	} {
		t.Run(name, func(t *testing.T) {
			e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{tt.component}}})
			if err != nil {
				t.Fatal(err)
			}
			defer e.Close()
			if diff := cmp.Diff(tt.want, e.Agent().NamedLabels()); diff != "" {
				t.Errorf("NamedLabels() (-want +got):\n%s", diff)
			}
			if err := e.Apply(nil); err != nil || len(e.Agent().NamedLabels()) != 0 {
				t.Errorf("NamedLabels() = %v, %v after policies have gone", e.Agent().NamedLabels(), err)
			}
		})
	}
}

// Labels that do not arrive are warned about: first those that a limit goes by, and all before the warnings of files.
func TestWarningsOfLabelsThatDoNotArrive(t *testing.T) {
	limiter := func(by string) policy.Component {
		return policy.RateLimiter{Selectors: policy.At("point"), Interval: time.Second, LimitBy: by}
	}
	for key, want := range map[string]string{
		"user_id": "", "api_key": "", "http.target": "", "http.request.header.x_user": "",
		"http.request.header.x-user":            `it is "http.request.header.x_user"`,
		"http.request.header.X_User":            `it is "http.request.header.x_user"`,
		"Http.request.header.x_user":            `it is "http.request.header.x_user"`,
		"HTTP.Request.Header.X-User":            `it is "http.request.header.x_user"`,
		"http.request.Header.x_api_key":         `it is "http.request.header.x_api_key"`,
		"Http.Request.Header.":                  "no header has this label",
		"http.request.header.host":              `use "http.host"`,
		"http.request.header.Host":              `it is "http.request.header.host"`,
		"http.request.header.transfer_encoding": "keeps this header apart",
		"http.request.header.trailer":           "keeps this header apart",
		"http.request.header.connection":        "", // over HTTP/1
		"http.request.header.te":                "",
		"te":                                    "not in the metadata of a call",
		"x-tenant-bin":                          "no label of binary metadata",
		"X-Tenant-Bin":                          "no label of binary metadata",
		"x-tenant":                              "",
		"grpc-timeout":                          "not in the metadata of a call",
		"http.Target":                           `it is "http.target"`,
		"HTTP.METHOD":                           `it is "http.method"`,
		"rpc.Method":                            `it is "rpc.method"`,
		"rpc.method":                            "",
		"Tenant":                                "",
		"http.request.header.:authority":        "no header has this label",
		"http.request.header.":                  "no header has this label",
		"http.request.header.user_id]":          "no header has a name with such characters",
		"http.request.header.x_api_key]":        "no header has a name with such characters",
		"http.request.header.user id":           "no header has a name with such characters",
		"http.request.header.user_id ":          "no header has a name with such characters",
		"http.request.header.user_id,":          "no header has a name with such characters",
		"http.request.header.user/id":           "no header has a name with such characters",
		"http.request.header.user.id!":          "",
		"http.request.header.baggage":           "the members of this header",
		"http.request.header.x_api_key":         "carries credentials",
		"http.request.header.authorization":     "carries credentials",
		"x-api-key":                             "carries credentials",
		"Authorization":                         "carries credentials",
		"http.request.headers.x_user":           `misspelt "http.request.header.x_user"`,
		"http.requests.header.X-User":           `misspelt "http.request.header.x_user"`,
		"htpp.request.header.x_user":            `misspelt "http.request.header.x_user"`,
		"http.request.hedaer.x_user":            `misspelt "http.request.header.x_user"`,
		"http.header.x_user":                    `misspelt "http.request.header.x_user"`,
		"request.headers.x_user":                `misspelt "http.request.header.x_user"`,
		"http.metod":                            `misspelt "http.method"`,
		"http.targets":                          `misspelt "http.target"`,
		"rpc.services":                          `misspelt "rpc.service"`,
		"http.request.body.size":                "",
		"http.response.header.x_user":           "",
		"http.request.method":                   "",
		"http.route":                            "",
		"headers.x_user":                        "",
		"request.id":                            "",
	} {
		e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{limiter(key)}}})
		if err != nil {
			t.Fatal(err)
		}
		got := e.Warnings()
		_ = e.Close()
		if want == "" && len(got) != 0 || want != "" && (len(got) != 1 || !strings.Contains(got[0], want) ||
			!strings.HasPrefix(got[0], `policy "p": component "rate_limiter.0" limits by the label "`+key+`": `)) {
			t.Errorf("%q: Warnings() = %q want %q", key, got, want)
		}
	}

	const header = "http.request.header.X-"
	e, err := engine.New([]policy.Policy{
		{Name: "a", Warnings: []string{"file"}, Components: []policy.Component{policy.ConcurrencyScheduler{
			Selectors:   []policy.Selector{{ControlPoint: "point", Labels: policy.LabelMatcher{Equal: map[string]string{header + "C": ""}}}},
			MaxInflight: time.Second, Scheduler: policy.Scheduler{TokensLabel: header + "B", FairnessLabel: header + "D"},
		}}},
		{Name: "b", Components: []policy.Component{limiter(header + "A")}},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	var order []string
	for _, w := range e.Warnings() {
		_, key, _ := strings.Cut(w, header)
		key, _, _ = strings.Cut(key, `"`)
		order = append(order, key)
	}
	if !slices.Equal(order, []string{"A", "B", "C", "D", ""}) {
		t.Errorf("Warnings() = %q", e.Warnings())
	}
}

// Names that files get by accident are warned about, of control points before those of labels: the limit would be missing
// in silence. Names that programs give are not.
func TestWarningsOfOddNames(t *testing.T) {
	const space, template, unseen, bracket = "white space", "part of a template", "cannot be seen", "a quote or a bracket"
	for name, want := range map[string]string{
		"search": "", "GET /orders/{id}": "", "/pkg.Service/Method": "", "a b": "", "it's": "", "suche-für-alle": "", "f(x)[0]": "", `a "b"`: "",
		"search]": bracket, "search}": bracket, "(search": bracket, "[search)": bracket, `search"`: bracket, "“search”": bracket, "}{": bracket,
		"search,": `ends with ","`, "search.": `ends with "."`, "search;": `ends with ";"`, "search'": bracket, "search // the search": "no comment",
		"search; find": `holds ";"`, "search;find": `holds ";"`, "a, b": `holds ","`, "a,b": `holds ","`, "GET /a b": "", "/a,b": "",
		"#search": `begins with "#"`, "[search]": "is in brackets", "control_point: search": `holds ": "`, "search|find": `holds "|"`,
		"search\n": space, " search": space, "search\u00a0": space, "search\t": space,
		"sea\u200brch": unseen, "sea\u00a0rch": unseen, "sea\nrch": unseen, "sea\x00rch": unseen,
		"${POINT}": template, "{{ .Values.point }}": template,
	} {
		e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{policy.RateLimiter{
			Selectors: append(policy.At(name), policy.At(name, "other")...), Capacity: 1, Fill: 1, Interval: time.Second, LimitBy: name,
		}}}})
		if err != nil {
			t.Fatal(err)
		}
		got := e.Warnings()
		_ = e.Close()
		if want == "" && len(got) == 0 {
			continue
		}
		if want == "" || len(got) != 2 || !strings.Contains(got[0], want) || !strings.Contains(got[1], want) ||
			!strings.HasPrefix(got[0], fmt.Sprintf("policy \"p\": component \"rate_limiter.0\" acts at the control point %q: it ", name)) ||
			!strings.HasPrefix(got[1], fmt.Sprintf("policy \"p\": component \"rate_limiter.0\" limits by the label %q: it ", name)) {
			t.Errorf("%q: Warnings() = %q want %q of the control point and the label", name, got, want)
		}
	}
}

// Services are compared as they are, except "any".
func TestWarningsOfOddServices(t *testing.T) {
	for service, want := range map[string]string{
		"": "", "any": "", "shop": "", "shop cart": "", "shop.example.com": "", "*": `holds "*"`, "shop*": `holds "*"`, "Any": "in lower case", "shop,cart": `holds ","`, "$SERVICE": `begins with "$"`,
	} {
		e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{policy.RateLimiter{
			Selectors: []policy.Selector{{ControlPoint: "search", Service: service}}, Capacity: 1, Fill: 1, Interval: time.Second, LimitBy: "user",
		}}}})
		if err != nil {
			t.Fatal(err)
		}
		got := strings.Join(e.Warnings(), "; ")
		_ = e.Close()
		if want == "" && got != "" || want != "" && (!strings.Contains(got, want) || !strings.Contains(got, fmt.Sprintf("acts at the service %q", service))) {
			t.Errorf("%q: Warnings() = %q want %q", service, got, want)
		}
	}
}

// Control points whose flows a signal measures are checked as those of selectors are.
func TestWarningsOfOddMeasuredControlPoints(t *testing.T) {
	for _, at := range []string{"ingress", "ingress]"} {
		mean := policy.MeanLatency{Selectors: policy.At(at), Over: time.Minute}
		for name, c := range map[string]policy.Component{
			"multiplier": policy.LoadScheduler{ID: "x", Selectors: policy.At("point"), LoadMultiplier: mean},
			"signal": policy.AIMDLoadScheduler{
				ID: "x", Selectors: policy.At("point"), Signal: mean, Setpoint: policy.Constant(9), OverloadConfirmation: policy.Constant(1),
				Gradient: policy.Gradient{Slope: -1, Min: 0.1, Max: 1}, MaxLoadMultiplier: 2, LinearIncrement: 0.1,
			},
		} {
			t.Run(name+" "+at, func(t *testing.T) {
				e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{c}}})
				if err != nil {
					t.Fatal(err)
				}
				defer e.Close()
				want := `policy "p": component "x" measures the control point "ingress]": it holds a quote or a bracket by accident, as it seems`
				if got := e.Warnings(); slices.Contains(got, want) != (at == "ingress]") {
					t.Errorf("Warnings() = %q", got)
				}
			})
		}
	}
}

// credentials are labels that carry them: of headers, of metadata and baggage, and of applications.
var credentials = []string{"http.request.header.x_api_key", "x-api-key", "authorization", "Cookie", "api_key"}

// A label that carries credentials limits, and its value is in nothing that the engine returns. Peek and Reset take it as it is.
func TestCredentialsAreHidden(t *testing.T) {
	for _, key := range credentials {
		t.Run(key, func(t *testing.T) {
			const secret = "sesame"
			at := policy.At("point")
			e, client := reloadable(t, []policy.Component{
				policy.ConcurrencyLimiter{ID: "slots", Selectors: at, Max: 1, MaxInflight: time.Hour, LimitBy: key},
				policy.ConcurrencyScheduler{Selectors: at, Max: 9, MaxInflight: time.Hour, Scheduler: policy.Scheduler{WorkloadLabel: key}},
				policy.Sampler{Selectors: []policy.Selector{{ControlPoint: "point", Labels: policy.LabelMatcher{Equal: map[string]string{key: secret}}}}, AcceptPercentage: 0, SessionLabel: key, PassThroughValues: []string{secret}},
			})
			params := flowctl.Params{Labels: map[string]string{key: secret}}
			first, second := client.Start(t.Context(), "point", params), client.Start(t.Context(), "point", params)
			if !first.ShouldRun() || second.ShouldRun() {
				t.Fatalf("%v, %v want one flow", first, second)
			}
			for _, d := range first.CheckResponse().GetLimiterDecisions() {
				if strings.Contains(d.String(), secret) {
					t.Errorf("a decision tells the key: %v", d)
				}
			}
			if u, err := peekAt(e, "test", "slots", secret); err != nil || u.InFlight != 1 {
				t.Errorf("Peek() = %+v, %v", u, err)
			}
			if got, err := first.End(t.Context()); err != nil || got.Returned != 2 {
				t.Errorf("End() = %+v, %v", got, err)
			}
			if u, err := peekAt(e, "test", "slots", secret); err != nil || u.InFlight != 0 {
				t.Errorf("Peek() = %+v, %v", u, err)
			}
			if text := fmt.Sprint(e.Stats(), e.Warnings()); strings.Contains(text, secret) {
				t.Errorf("the engine's numbers or warnings tell the key: %s", text)
			}
		})
	}
}
