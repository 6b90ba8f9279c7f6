package policy

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// oneOfEach are components of all kinds, in the order of the table.
func oneOfEach() [Kinds]Component {
	return [...]Component{
		RateLimiter{},
		ConcurrencyLimiter{},
		QuotaScheduler{},
		ConcurrencyScheduler{},
		LoadScheduler{},
		AIMDLoadScheduler{},
		Sampler{},
		LoadRamp{},
		CalendarQuota{},
		CircuitBreaker{},
	}
}

// Each row of the table is in the place that components of its kind name.
func TestKindsAreInTheirPlaces(t *testing.T) {
	for i, c := range oneOfEach() {
		if int(c.kind()) != i {
			t.Errorf("%T has the index %d, and the place %d", c, c.kind(), i)
		}
		if _, ok := kinds[i].value(c); !ok {
			t.Errorf("the row %s is not that of a %T", kinds[i].name, c)
		}
		if _, ok := formOf(kinds[i].name); !ok {
			t.Errorf("files cannot say %s, which is what a %T is called", kinds[i].name, c)
		}
	}
}

// A component without an ID gets one from its kind and its index within the kind. Components of other kinds do not
// shift it, nor does the ID of another component.
func TestDefaultIDs(t *testing.T) {
	for _, tt := range []struct {
		name       string
		components []Component
		want       []string
	}{
		{"of each kind", slice(oneOfEach()), []string{
			"rate_limiter.0", "concurrency_limiter.0", "quota_scheduler.0", "concurrency_scheduler.0", "load_scheduler.0",
			"aimd_load_scheduler.0", "sampler.0", "load_ramp.0", "calendar_quota.0", "circuit_breaker.0",
		}},
		{"of one kind", []Component{RateLimiter{}, &RateLimiter{}, RateLimiter{}}, []string{"rate_limiter.0", "rate_limiter.1", "rate_limiter.2"}},
		{"insertion of another kind", []Component{RateLimiter{}, Sampler{}, RateLimiter{}}, []string{"rate_limiter.0", "sampler.0", "rate_limiter.1"}},
		{"own IDs", []Component{RateLimiter{}, &RateLimiter{ID: "mine"}, RateLimiter{}}, []string{"rate_limiter.0", "mine", "rate_limiter.2"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			for _, d := range (Policy{Name: "p", Components: tt.components}).Describe() {
				got = append(got, d.ID)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("IDs (-want +got):\n%s", diff)
			}
		})
	}
}

func slice(all [Kinds]Component) []Component { return all[:] }
