package policy_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/headgate-go/headgate/policy"
)

func TestLabelMatcherString(t *testing.T) {
	many := make([]string, 10_000)
	for i := range many {
		many[i] = fmt.Sprint("value-", i)
	}
	deep := policy.Expression(policy.LabelExists("x"))
	for range 10_000 {
		deep = policy.Not{Of: deep}
	}
	for _, tt := range []struct {
		name string
		m    policy.LabelMatcher
		want string // its beginning, where it ends with …
	}{
		{"everything", policy.LabelMatcher{}, ""},
		{"equal", policy.LabelMatcher{Equal: map[string]string{"tier": "gold", "plan": ""}}, `plan = "" and tier = "gold"`},
		{"require", policy.LabelMatcher{Require: []policy.Requirement{
			{Key: "region", Operator: policy.In, Values: []string{"eu", "us"}},
			{Key: "tier", Operator: policy.NotIn, Values: []string{"free"}},
			{Key: "user", Operator: policy.Exists},
			{Key: "bot", Operator: policy.DoesNotExist},
			{Key: "odd"},
		}}, `region in ["eu", "us"] and tier not in ["free"] and user exists and bot does not exist and odd `},
		{"expression", policy.LabelMatcher{Equal: map[string]string{"tier": "gold"}, Expression: policy.Any{
			policy.Not{Of: policy.LabelMatches{Label: "path", Regex: "^/api"}},
			policy.All{policy.LabelExists("user"), policy.LabelEquals{Label: "plan", Value: "pro"}},
			policy.All{},
			policy.Any{},
			policy.Not{},
		}}, `tier = "gold" and (not (path matches "^/api") or (user exists and plan = "pro") or true or false or not ())`},
		{"lines", policy.LabelMatcher{Equal: map[string]string{"a\nb": "c\n\"d"}}, `a\nb = "c\n\"d"`},
		{"credentials", policy.LabelMatcher{
			Equal:      map[string]string{"http.request.header.authorization": "sesame"},
			Require:    []policy.Requirement{{Key: "http.request.header.cookie", Operator: policy.In, Values: []string{"sesame"}}},
			Expression: policy.LabelMatches{Label: "http.request.header.authorization", Regex: "sesame"},
		}, "http.request.header.authorization = (hidden) and http.request.header.cookie in [(hidden)] and " +
			"http.request.header.authorization matches (hidden)"},
		{"credentials that are no headers", policy.LabelMatcher{
			Equal:      map[string]string{"x-api-key": "sesame"},
			Require:    []policy.Requirement{{Key: "Cookie", Operator: policy.NotIn, Values: []string{"sesame"}}},
			Expression: policy.LabelEquals{Label: "api_key", Value: "sesame"},
		}, "x-api-key = (hidden) and Cookie not in [(hidden)] and api_key = (hidden)"},
		{"a long value", policy.LabelMatcher{Equal: map[string]string{"a": strings.Repeat("x", 101)}}, `a = "` + strings.Repeat("x", 100) + `…"`},
		{"many values", policy.LabelMatcher{Require: []policy.Requirement{{Key: "a", Operator: policy.In, Values: many}}}, `a in ["value-0", "value-1", …`},
		{"many parts", policy.LabelMatcher{Expression: policy.Any(func() (all []policy.Expression) {
			for range many {
				all = append(all, policy.LabelExists("a"))
			}
			return all
		}())}, `(a exists or a exists or …`},
		{"deep", policy.LabelMatcher{Expression: deep}, `not (not (…`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := tt.m.String()
			if begin, cut := strings.CutSuffix(tt.want, "…"); cut {
				if !strings.HasPrefix(got, begin) || !strings.HasSuffix(got, "…") || len(got) > 1010 {
					t.Errorf("String() = %s, of %d bytes, want %s", got, len(got), tt.want)
				}
				return
			}
			if got != tt.want {
				t.Errorf("String() = %s want %s", got, tt.want)
			}
		})
	}
}
