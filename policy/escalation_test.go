package policy_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/policy"
)

func TestEscalationInFiles(t *testing.T) {
	file := editIn(t, short, "limit_by: user", "when: {load: protect, below: 1, for: 30s, capacity: 0, fill: 0}") +
		"      - load_scheduler: {id: protect, at: [db], load_multiplier: SHARE}\n"
	policies, err := policy.Parse("limits.yaml", []byte(file))
	if err != nil {
		t.Fatal(err)
	}
	want := policy.Escalation{Load: "protect", Below: 1, For: 30 * time.Second}
	if diff := cmp.Diff(want, policies[0].Components[0].(policy.RateLimiter).When); diff != "" {
		t.Errorf("When (-want +got):\n%s", diff)
	}
	roundTrip(t, policies)
	const at = "limits.yaml:10:17: policies[0].components[0].rate_limiter.when"
	for _, tt := range []struct{ name, old, new, want string }{
		{"another ID", "load: protect", "load: protct", "limits.yaml:10:24: policies[0].components[0].rate_limiter.when.load: " + `no load scheduler of the policy has the ID "protct"; did you mean "protect"?`},
		{"a limiter's ID", "load: protect", "load: rate_limiter.0", "limits.yaml:10:24: policies[0].components[0].rate_limiter.when.load: " + `no load scheduler of the policy has the ID "rate_limiter.0"`},
		{"no ID", "load: protect, ", "", at + ".load: is required"},
		{"no bound", "below: 1, ", "", at + ".below: is required"},
		{"a bound of 0", "below: 1", "below: 0", "limits.yaml:10:40: policies[0].components[0].rate_limiter.when.below: must be positive, is 0: no multiplier is below"},
		{"no capacity", ", capacity: 0", "", at + ".capacity: is required"},
		{"less than no capacity", "capacity: 0", "capacity: -1", "limits.yaml:10:63: policies[0].components[0].rate_limiter.when.capacity: must be a number from 0 up, is -1"},
		{"less than no time", "for: 30s", "for: -1s", "limits.yaml:10:48: policies[0].components[0].rate_limiter.when.for: must not be negative, is -1s"},
		{"a misspelt key", "below", "belw", at + ".below: is required\nlimits.yaml:10:33: policies[0].components[0].rate_limiter.when.belw: unknown key; did you mean \"below\"?"},
		{"a list", "{load: protect, below: 1, for: 30s, capacity: 0, fill: 0}", "[]", "limits.yaml:10:17: policies[0].components[0].rate_limiter.when: want a mapping, have a sequence"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := policy.Parse("limits.yaml", []byte(editIn(t, file, tt.old, tt.new)))
			if err == nil || err.Error() != tt.want {
				t.Errorf("Parse: %v\nwant %s", err, tt.want)
			}
		})
	}
}

func TestEscalationInGo(t *testing.T) {
	for _, tt := range []struct {
		name string
		when policy.Escalation
		want string
	}{
		{"none", policy.Escalation{}, ""},
		{"by the default ID", policy.Escalation{Load: "load_scheduler.0", Below: 1}, ""},
		{"by nothing", policy.Escalation{Capacity: 1}, `policy "p": components[0].When.Load: is required` + "\n" + `policy "p": components[0].When.Below: must be positive, is 0: no multiplier is below`},
	} {
		c := policy.QuotaScheduler{
			Selectors: policy.At("a"), Interval: time.Second, When: tt.when,
			LimitBy: "user", Overrides: map[string]policy.Override{"ann": {Capacity: 1}},
		}
		load := policy.LoadScheduler{Selectors: policy.At("a"), LoadMultiplier: policy.Constant(1)}
		err := (policy.Policy{Name: "p", Components: []policy.Component{&c, &load}}).Validate()
		if got := message(err); got != tt.want {
			t.Errorf("%s: Validate = %s, want %s", tt.name, got, tt.want)
		}
	}
}

func message(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
