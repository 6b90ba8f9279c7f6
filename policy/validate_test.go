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
		{"pointer", &policy.RateLimiter{}, ": is a *policy.RateLimiter; want a RateLimiter or a ConcurrencyLimiter"},
		{
			"embedded",
			struct{ policy.ConcurrencyLimiter }{},
			": is a struct { policy.ConcurrencyLimiter }; want a RateLimiter or a ConcurrencyLimiter",
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
				l.Selectors = policy.At("", strings.Repeat("a", 255), strings.Repeat("a", 256))
			}),
			".Selectors[0].ControlPoint: is required\n.Selectors[2].ControlPoint: is longer than 255 bytes",
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
			policy.Policy{Name: "p", Components: []policy.Component{limiter("root.1"), limiter("")}},
			`policy "p": components[1].ID: "root.1" is the ID of components[0] too`,
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
