package policy_test

import (
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/policy"
)

func TestValidate(t *testing.T) {
	rate := func(change func(*policy.RateLimiter)) policy.Component {
		l := policy.RateLimiter{Selectors: policy.At("a"), Capacity: 1, Fill: 1, Interval: time.Second}
		change(&l)
		return l
	}
	slots := func(change func(*policy.ConcurrencyLimiter)) policy.Component {
		l := policy.ConcurrencyLimiter{Selectors: policy.At("a"), Max: 1, MaxInflight: time.Minute}
		change(&l)
		return l
	}
	matching := func(m policy.LabelMatcher) policy.Component {
		return rate(func(l *policy.RateLimiter) { l.Selectors[0].Labels = m })
	}
	expression := func(e policy.Expression) policy.Component { return matching(policy.LabelMatcher{Expression: e}) }

	for _, tt := range []struct {
		name      string
		component policy.Component
		want      string // after `policy "p": components[0]`, a line each
	}{
		{"good rate limiter", rate(func(*policy.RateLimiter) {}), ""},
		{"good concurrency limiter", slots(func(*policy.ConcurrencyLimiter) {}), ""},
		{"limits of zero", rate(func(l *policy.RateLimiter) { l.Capacity, l.Fill = 0, 0 }), ""},
		{"keeps idle keys", rate(func(l *policy.RateLimiter) { l.MaxIdle = policy.KeepIdle }), ""},
		{"empty parts", expression(policy.Any{policy.All{}, policy.LabelEquals{Label: "l"}}), ""},
		{"nil", nil, ": is nil"},
		{"nil pointer", (*policy.RateLimiter)(nil), ": is a nil *policy.RateLimiter"},
		{"pointer", &policy.RateLimiter{}, ".Selectors: needs at least one selector\n.Interval: must be positive, is 0s"},
		{
			"embedded nil pointer",
			struct{ *policy.Sampler }{},
			": is a struct { *policy.Sampler }; want one of this package's components, or a pointer to one",
		},
		{
			"embedded",
			struct{ policy.ConcurrencyLimiter }{},
			": is a struct { policy.ConcurrencyLimiter }; want one of this package's components, or a pointer to one",
		},
		{"zero rate limiter", policy.RateLimiter{}, ".Selectors: needs at least one selector\n.Interval: must be positive, is 0s"},
		{
			"zero concurrency limiter",
			policy.ConcurrencyLimiter{},
			".Selectors: needs at least one selector\n.MaxInflight: must be positive, is 0s",
		},
		{"negative capacity", rate(func(l *policy.RateLimiter) { l.Capacity = -1 }), ".Capacity: must be a number from 0 up, is -1"},
		{"fill is not a number", rate(func(l *policy.RateLimiter) { l.Fill = math.NaN() }), ".Fill: must be a number from 0 up, is NaN"},
		{"infinite max", slots(func(l *policy.ConcurrencyLimiter) { l.Max = math.Inf(1) }), ".Max: must be a number from 0 up, is +Inf"},
		{"negative interval", rate(func(l *policy.RateLimiter) { l.Interval = -time.Second }), ".Interval: must be positive, is -1s"},
		{"status", slots(func(l *policy.ConcurrencyLimiter) { l.DeniedStatus = 600 }), ".DeniedStatus: must be an HTTP status from 400 to 599, is 600"},
		{
			"control points", rate(func(l *policy.RateLimiter) {
				l.Selectors = policy.At("", strings.Repeat("a", 255), strings.Repeat("a", 256), "\xff")
			}),
			".Selectors[0].ControlPoint: is required\n.Selectors[2].ControlPoint: is longer than 255 bytes\n" +
				".Selectors[3].ControlPoint: is not valid UTF-8",
		},
		{
			"placeholders", rate(func(l *policy.RateLimiter) {
				l.Selectors, l.LimitBy = policy.At("__REQUIRED_FIELD__"), "http.request.header.__REQUIRED_FIELD__"
			}),
			".Selectors[0].ControlPoint: has __REQUIRED_FIELD__, which is to be replaced\n.LimitBy: has __REQUIRED_FIELD__, which is to be replaced",
		},
		{
			"longest labels of a rate limiter",
			rate(func(l *policy.RateLimiter) {
				l.LimitBy, l.TokensLabel = strings.Repeat("a", 255), strings.Repeat("é", 127)
			}), "",
		},
		{
			"labels of a rate limiter that no flow has",
			rate(func(l *policy.RateLimiter) { l.LimitBy, l.TokensLabel = strings.Repeat("a", 256), "\xff" }),
			".LimitBy: is longer than 255 bytes\n.TokensLabel: is not valid UTF-8",
		},
		{
			"labels of a concurrency limiter that no flow has",
			slots(func(l *policy.ConcurrencyLimiter) { l.LimitBy, l.TokensLabel = "\xff", strings.Repeat("a", 256) }),
			".LimitBy: is not valid UTF-8\n.TokensLabel: is longer than 255 bytes",
		},
		{
			"labels to match that no flow has", matching(policy.LabelMatcher{
				Equal:      map[string]string{strings.Repeat("a", 255): "x", strings.Repeat("a", 256): "x", "\xff.[": "x"},
				Require:    []policy.Requirement{{Key: strings.Repeat("a", 256), Operator: policy.Exists}},
				Expression: policy.Any{policy.LabelExists("\xff"), policy.LabelEquals{Label: strings.Repeat("a", 256)}, policy.LabelMatches{Label: "\xff", Regex: "x"}},
			}),
			`.Selectors[0].Labels.Equal["` + strings.Repeat("a", 40) + `…"]: name is longer than 255 bytes` + "\n" +
				`.Selectors[0].Labels.Equal["\xff.["]: name is not valid UTF-8` + "\n" +
				".Selectors[0].Labels.Require[0].Key: is longer than 255 bytes\n" +
				".Selectors[0].Labels.Expression[0]: is not valid UTF-8\n.Selectors[0].Labels.Expression[1].Label: is longer than 255 bytes\n" +
				".Selectors[0].Labels.Expression[2].Label: is not valid UTF-8",
		},
		{
			"label names", matching(policy.LabelMatcher{Equal: map[string]string{"": "x"}, Require: []policy.Requirement{{Operator: policy.Exists}}}),
			".Selectors[0].Labels.Equal: has an empty label name\n.Selectors[0].Labels.Require[0].Key: is required",
		},
		{
			"operators", matching(policy.LabelMatcher{Require: []policy.Requirement{{Key: "k"}, {Key: "k", Operator: "notin"}, {Key: "k", Operator: "~"}}}),
			".Selectors[0].Labels.Require[0].Operator: is required\n" +
				`.Selectors[0].Labels.Require[1].Operator: unknown operator "notin"; did you mean "NotIn"?` + "\n" +
				`.Selectors[0].Labels.Require[2].Operator: unknown operator "~"`,
		},
		{"values", matching(policy.LabelMatcher{Require: []policy.Requirement{
			{Key: "k", Operator: policy.In}, {Key: "k", Operator: policy.DoesNotExist, Values: []string{"x"}},
		}}), ".Selectors[0].Labels.Require[0].Values: needs at least one value for In\n" +
			".Selectors[0].Labels.Require[1].Values: must be empty for DoesNotExist"},
		{
			"nil parts", expression(policy.All{nil, policy.Not{}}),
			".Selectors[0].Labels.Expression[0]: is required\n.Selectors[0].Labels.Expression[1].Of: is required",
		},
		{
			"expressions without labels", expression(policy.Any{policy.LabelExists(""), policy.LabelEquals{}, policy.LabelMatches{}}),
			".Selectors[0].Labels.Expression[0]: is required\n.Selectors[0].Labels.Expression[1].Label: is required\n" +
				".Selectors[0].Labels.Expression[2].Label: is required\n.Selectors[0].Labels.Expression[2].Regex: is required",
		},
		{
			"regex", expression(policy.LabelMatches{Label: "l", Regex: "a**"}),
			".Selectors[0].Labels.Expression.Regex: error parsing regexp: invalid nested repetition operator: `**`",
		},
		{
			"regex that takes too long", expression(policy.LabelMatches{Label: "l", Regex: "x{999}"}),
			".Selectors[0].Labels.Expression.Regex: compiles to 1001 instructions, more than 1000: it would take too long to match",
		},
		{"regex that is as large as may be", expression(policy.LabelMatches{Label: "l", Regex: "x{998}"}), ""},
		{
			"pointer expression", expression(&policy.Not{}),
			".Selectors[0].Labels.Expression: is a *policy.Not; want Not, All, Any, LabelExists, LabelEquals or LabelMatches",
		},
		{
			"regex that forges a line", expression(policy.LabelMatches{Label: "l", Regex: "(a\n\x1b[2J"}),
			".Selectors[0].Labels.Expression.Regex: error parsing regexp: missing closing ]: `[2J`",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := policy.Policy{Name: "p", Components: []policy.Component{tt.component}}.Validate()
			var got []string
			for _, err := range each(err) {
				var e *policy.Error
				if !errors.As(err, &e) || e.File != "" || e.Line != 0 {
					t.Errorf("%#v is no *policy.Error without a position", err)
				}
				got = append(got, strings.TrimPrefix(err.Error(), `policy "p": components[0]`))
			}
			if diff := cmp.Diff(tt.want, strings.Join(got, "\n")); diff != "" {
				t.Errorf("Validate (-want +got):\n%s", diff)
			}
		})
	}
}

func TestValidateSchedulers(t *testing.T) {
	quota := func(change func(*policy.QuotaScheduler)) policy.Component {
		s := policy.QuotaScheduler{Selectors: policy.At("a"), Capacity: 1, Fill: 1, Interval: time.Second}
		change(&s)
		return s
	}
	scheduling := func(s policy.Scheduler) policy.Component {
		return quota(func(q *policy.QuotaScheduler) { q.Scheduler = s })
	}
	named := func(names ...string) policy.Component {
		var s policy.Scheduler
		for _, name := range names {
			s.Workloads = append(s.Workloads, policy.Workload{Name: name})
		}
		return scheduling(s)
	}
	slots := func(change func(*policy.ConcurrencyScheduler)) policy.Component {
		s := policy.ConcurrencyScheduler{Selectors: policy.At("a"), Max: 1, MaxInflight: time.Minute}
		change(&s)
		return s
	}
	load := func(multiplier policy.Signal) policy.Component {
		return policy.LoadScheduler{Selectors: policy.At("a"), LoadMultiplier: multiplier}
	}
	aimd := func(change func(*policy.AIMDLoadScheduler)) policy.Component {
		s := policy.AIMDLoadScheduler{Selectors: policy.At("a"), Signal: policy.Named("latency"), Setpoint: policy.Constant(80)}
		change(&s)
		return s
	}
	gradient := func(g policy.Gradient) policy.Component {
		return aimd(func(s *policy.AIMDLoadScheduler) { s.Gradient = g })
	}
	sampler := func(percentage float64) policy.Component {
		return policy.Sampler{Selectors: policy.At("a"), AcceptPercentage: percentage}
	}
	ramp := func(steps ...policy.RampStep) policy.Component {
		return policy.LoadRamp{Selectors: policy.At("a"), Steps: steps}
	}
	nan, inf := math.NaN(), math.Inf(1)

	for _, tt := range []struct {
		name      string
		component policy.Component
		want      string // after `policy "p": components[0]`, a line each
	}{
		{"good quota scheduler", quota(func(*policy.QuotaScheduler) {}), ""},
		{"good concurrency scheduler", slots(func(*policy.ConcurrencyScheduler) {}), ""},
		{"good load schedulers", aimd(func(*policy.AIMDLoadScheduler) {}), ""},
		{"good sampler", sampler(100), ""},
		{"good ramp", ramp(policy.RampStep{}, policy.RampStep{Target: 100, Duration: time.Hour}), ""},
		{"good scheduler", scheduling(policy.Scheduler{
			Workloads: []policy.Workload{
				{Name: "x", WorkloadParameters: policy.WorkloadParameters{Priority: 0.5, Tokens: policy.NoTokens, QueueTimeout: policy.NoQueue}},
				{Name: "1"},
				{},
				{Name: "04"},
				{Name: "5"},
			},
			Margin: time.Second, MaxQueue: 1, DeniedStatus: 429,
		}), ""},
		{
			"zero quota scheduler",
			policy.QuotaScheduler{},
			".Selectors: needs at least one selector\n.Interval: must be positive, is 0s",
		},
		{
			"zero concurrency scheduler",
			policy.ConcurrencyScheduler{},
			".Selectors: needs at least one selector\n.MaxInflight: must be positive, is 0s",
		},
		{"zero load scheduler", policy.LoadScheduler{}, ".Selectors: needs at least one selector\n.LoadMultiplier: is required"},
		{
			"zero AIMD load scheduler",
			policy.AIMDLoadScheduler{},
			".Selectors: needs at least one selector\n.Signal: is required\n.Setpoint: is required",
		},
		{"zero sampler", policy.Sampler{}, ".Selectors: needs at least one selector"},
		{"zero ramp", policy.LoadRamp{}, ".Selectors: needs at least one selector\n.Steps: needs at least one step"},
		{
			"quota amounts", quota(func(s *policy.QuotaScheduler) { s.Capacity, s.Fill, s.Interval = nan, -1, -1 }),
			".Capacity: must be a number from 0 up, is NaN\n.Fill: must be a number from 0 up, is -1\n.Interval: must be positive, is -1ns",
		},
		{"slots", slots(func(s *policy.ConcurrencyScheduler) { s.Max = inf }), ".Max: must be a number from 0 up, is +Inf"},
		{
			"scheduler", scheduling(policy.Scheduler{Margin: -1, MaxQueue: -1, DeniedStatus: 200}),
			".Scheduler.Margin: must not be negative, is -1ns\n.Scheduler.MaxQueue: must be a whole number from 0 to 2147483647, is -1\n" +
				".Scheduler.DeniedStatus: must be an HTTP status from 400 to 599, is 200",
		},
		{
			"scheduler of a concurrency scheduler",
			slots(func(s *policy.ConcurrencyScheduler) { s.Scheduler.MaxQueue = -1 }),
			".Scheduler.MaxQueue: must be a whole number from 0 to 2147483647, is -1",
		},
		{
			"scheduler of a load scheduler",
			policy.LoadScheduler{Selectors: policy.At("a"), LoadMultiplier: policy.Constant(1), Scheduler: policy.Scheduler{MaxQueue: -1}},
			".Scheduler.MaxQueue: must be a whole number from 0 to 2147483647, is -1",
		},
		{
			"scheduler of an AIMD load scheduler", aimd(func(s *policy.AIMDLoadScheduler) { s.Scheduler.MaxQueue = -1 }),
			".Scheduler.MaxQueue: must be a whole number from 0 to 2147483647, is -1",
		},
		{
			"workload parameters", scheduling(policy.Scheduler{
				Workloads: []policy.Workload{{WorkloadParameters: policy.WorkloadParameters{Priority: -1, Tokens: inf}}},
				Default:   policy.WorkloadParameters{Priority: nan, Tokens: nan},
			}),
			".Scheduler.Workloads[0].Priority: must be a number from 0 up, is -1\n" +
				".Scheduler.Workloads[0].Tokens: must be a finite number, is +Inf\n" +
				".Scheduler.Default.Priority: must be a number from 0 up, is NaN\n" +
				".Scheduler.Default.Tokens: must be a finite number, is NaN",
		},
		{
			"workload labels",
			scheduling(policy.Scheduler{Workloads: []policy.Workload{{Labels: policy.LabelMatcher{Equal: map[string]string{"": "x"}}}}}),
			".Scheduler.Workloads[0].Labels.Equal: has an empty label name",
		},
		{
			"labels of a scheduler that no flow has", scheduling(policy.Scheduler{
				Workloads:   []policy.Workload{{Labels: policy.LabelMatcher{Equal: map[string]string{"\xff": "x"}}}},
				TokensLabel: strings.Repeat("a", 256), PriorityLabel: "\xff", WorkloadLabel: strings.Repeat("a", 256), FairnessLabel: "\xff",
			}),
			`.Scheduler.Workloads[0].Labels.Equal["\xff"]: name is not valid UTF-8` + "\n" +
				".Scheduler.TokensLabel: is longer than 255 bytes\n.Scheduler.PriorityLabel: is not valid UTF-8\n" +
				".Scheduler.WorkloadLabel: is longer than 255 bytes\n.Scheduler.FairnessLabel: is not valid UTF-8",
		},
		{"label of a quota scheduler that no flow has", quota(func(s *policy.QuotaScheduler) { s.LimitBy = "\xff" }), ".LimitBy: is not valid UTF-8"},
		{"label of a concurrency scheduler that no flow has", slots(func(s *policy.ConcurrencyScheduler) { s.LimitBy = "\xff" }), ".LimitBy: is not valid UTF-8"},
		{"label of a sampler that no flow has", policy.Sampler{Selectors: policy.At("a"), SessionLabel: "\xff"}, ".SessionLabel: is not valid UTF-8"},
		{
			"label of a ramp that no flow has",
			policy.LoadRamp{Selectors: policy.At("a"), Steps: make([]policy.RampStep, 1), SessionLabel: "\xff"},
			".SessionLabel: is not valid UTF-8",
		},
		{"workload named default", named("", "default"), `.Scheduler.Workloads[1].Name: "default" is what flows without a workload have`},
		{"workloads of one name", named("x", "", "x"), `.Scheduler.Workloads[2].Name: "x" is the name of workload 0 too`},
		{"workload named like another's index", named("1", "x"), `.Scheduler.Workloads[0].Name: "1" is the index of another workload`},

		{"signal that is not a number", load(policy.Constant(nan)), ".LoadMultiplier: must be a finite number, is NaN"},
		{"infinite signal", load(policy.Constant(inf)), ".LoadMultiplier: must be a finite number, is +Inf"},
		{"signal without a name", load(policy.Named("")), ".LoadMultiplier: needs a name"},
		{
			"pointer to a signal", load(&policy.MeanLatency{}),
			".LoadMultiplier: is a *policy.MeanLatency; want a Constant, a Named or a MeanLatency",
		},
		{
			"mean of nothing", load(policy.MeanLatency{Times: -1}),
			".LoadMultiplier.Selectors: needs at least one selector\n" +
				".LoadMultiplier.Over: must be positive and at most 24h0m0s, is 0s\n" +
				".LoadMultiplier.Times: must be a number from 0 up, is -1",
		},
		{
			"mean of days", load(policy.MeanLatency{Selectors: policy.At("a", "", "\xff"), Over: 25 * time.Hour}),
			".LoadMultiplier.Selectors[1].ControlPoint: is required\n.LoadMultiplier.Selectors[2].ControlPoint: is not valid UTF-8\n.LoadMultiplier.Over: must be positive and at most 24h0m0s, is 25h0m0s",
		},
		{
			"signals of an AIMD load scheduler", aimd(func(s *policy.AIMDLoadScheduler) {
				s.Signal, s.Setpoint, s.OverloadConfirmation = policy.Named(""), policy.Constant(nan), policy.Named("")
			}),
			".Signal: needs a name\n.Setpoint: must be a finite number, is NaN\n.OverloadConfirmation: needs a name",
		},
		{
			"amounts of an AIMD load scheduler", aimd(func(s *policy.AIMDLoadScheduler) { s.MaxLoadMultiplier, s.LinearIncrement = -1, inf }),
			".MaxLoadMultiplier: must be a number from 0 up, is -1\n.LinearIncrement: must be a number from 0 up, is +Inf",
		},
		{"gradient without bounds", gradient(policy.Gradient{Slope: 1, Min: -math.MaxFloat64, Max: math.MaxFloat64}), ""},
		{
			"gradient", gradient(policy.Gradient{Slope: inf, Min: nan, Max: -1}),
			".Gradient.Slope: must be a finite number, is +Inf\n.Gradient.Min: must be a finite number, is NaN\n" +
				".Gradient.Max: must be a number from 0 up, is -1",
		},
		{"gradient's minimum", gradient(policy.Gradient{Min: 1.5}), ".Gradient.Min: must not be above the maximum of 1, is 1.5"},
		{"gradient's maximum", gradient(policy.Gradient{Max: 0.05}), ".Gradient.Min: must not be above the maximum of 0.05, is 0.1"},

		{"percentage", sampler(100.5), ".AcceptPercentage: must be a percentage from 0 to 100, is 100.5"},
		{"percentage that is not a number", sampler(nan), ".AcceptPercentage: must be a percentage from 0 to 100, is NaN"},
		{
			"status of a sampler",
			policy.Sampler{Selectors: policy.At("a"), DeniedStatus: 1},
			".DeniedStatus: must be an HTTP status from 400 to 599, is 1",
		},
		{
			"step", ramp(policy.RampStep{Target: 1}, policy.RampStep{Target: -1, Duration: -1}),
			".Steps[1].Target: must be a percentage from 0 to 100, is -1\n.Steps[1].Duration: must not be negative, is -1ns",
		},
		{
			"status of a ramp",
			policy.LoadRamp{Selectors: policy.At("a"), Steps: make([]policy.RampStep, 1), DeniedStatus: 1},
			".DeniedStatus: must be an HTTP status from 400 to 599, is 1",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := policy.Policy{Name: "p", Components: []policy.Component{tt.component}}.Validate()
			var got []string
			for _, err := range each(err) {
				got = append(got, strings.TrimPrefix(err.Error(), `policy "p": components[0]`))
			}
			if diff := cmp.Diff(tt.want, strings.Join(got, "\n")); diff != "" {
				t.Errorf("Validate (-want +got):\n%s", diff)
			}
		})
	}
}

func TestValidatePolicy(t *testing.T) {
	limiter := func(id string) policy.Component {
		return policy.RateLimiter{ID: id, Selectors: policy.At("a"), Interval: time.Second}
	}
	for _, tt := range []struct {
		name   string
		policy policy.Policy
		want   string
	}{
		{"zero", policy.Policy{}, "policy \"\": name: is required\npolicy \"\": components: needs at least one flow-control component"},
		{"default IDs", policy.Policy{Name: "p", Components: []policy.Component{limiter(""), limiter(""), limiter("x")}}, ""},
		{
			"same ID",
			policy.Policy{Name: "p", Components: []policy.Component{limiter("x"), limiter("x")}},
			`policy "p": components[1].ID: "x" is the ID of components[0] too`,
		},
		{
			"default ID taken",
			policy.Policy{Name: "p", Components: []policy.Component{limiter("rate_limiter.1"), limiter("")}},
			`policy "p": components[1].ID: "rate_limiter.1" is the ID of components[0] too`,
		},
		{
			"same ID of all kinds",
			policy.Policy{Name: "p", Components: []policy.Component{
				limiter("x"),
				policy.ConcurrencyLimiter{ID: "x", Selectors: policy.At("a"), MaxInflight: time.Second},
				policy.QuotaScheduler{ID: "x", Selectors: policy.At("a"), Interval: time.Second},
				policy.ConcurrencyScheduler{ID: "x", Selectors: policy.At("a"), MaxInflight: time.Second},
				policy.LoadScheduler{ID: "x", Selectors: policy.At("a"), LoadMultiplier: policy.Constant(1)},
				policy.AIMDLoadScheduler{ID: "x", Selectors: policy.At("a"), Signal: policy.Named("s"), Setpoint: policy.Constant(1)},
				policy.Sampler{ID: "x", Selectors: policy.At("a")},
				policy.LoadRamp{ID: "x", Selectors: policy.At("a"), Steps: make([]policy.RampStep, 1)},
			}},
			strings.Join([]string{
				`policy "p": components[1].ID: "x" is the ID of components[0] too`,
				`policy "p": components[2].ID: "x" is the ID of components[0] too`,
				`policy "p": components[3].ID: "x" is the ID of components[0] too`,
				`policy "p": components[4].ID: "x" is the ID of components[0] too`,
				`policy "p": components[5].ID: "x" is the ID of components[0] too`,
				`policy "p": components[6].ID: "x" is the ID of components[0] too`,
				`policy "p": components[7].ID: "x" is the ID of components[0] too`,
			}, "\n"),
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := ""
			if err := tt.policy.Validate(); err != nil {
				got = err.Error()
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("Validate (-want +got):\n%s", diff)
			}
		})
	}
}
