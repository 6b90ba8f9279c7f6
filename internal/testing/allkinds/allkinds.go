// Package allkinds has a component of each kind, for tests that go over all kinds, and finds the kinds that the table of a test lacks.
package allkinds

import (
	"reflect"
	"testing"
	"time"

	"github.com/headgate-go/headgate/policy"
)

// Components returns a component of each kind, in the order of package policy's table. The components act on the flows of the selectors, and
// let them pass.
func Components(at ...policy.Selector) [policy.Kinds]policy.Component {
	return [...]policy.Component{
		policy.RateLimiter{Selectors: at, Capacity: 9, Interval: 1},
		policy.ConcurrencyLimiter{Selectors: at, Max: 9, MaxInflight: time.Hour},
		policy.QuotaScheduler{Selectors: at, Capacity: 9, Interval: 1},
		policy.ConcurrencyScheduler{Selectors: at, Max: 9, MaxInflight: time.Hour},
		policy.LoadScheduler{Selectors: at, LoadMultiplier: policy.Constant(9)},
		policy.AIMDLoadScheduler{Selectors: at, Signal: policy.Constant(1), Setpoint: policy.Constant(2)},
		policy.Sampler{Selectors: at, AcceptPercentage: 100},
		policy.LoadRamp{Selectors: at, Steps: []policy.RampStep{{Target: 100}}, Start: true},
		policy.CalendarQuota{Selectors: at, Amount: 9, Period: policy.PeriodDay},
		policy.CircuitBreaker{Selectors: at, FailureCount: 9, Window: time.Minute, OpenDuration: time.Minute},
	}
}

// Name returns what files call the kind of the component.
func Name(c policy.Component) string {
	return policy.Policy{Name: "p", Components: []policy.Component{c}}.Describe()[0].Name
}

// Zero returns the zero value of the component's kind.
func Zero(c policy.Component) policy.Component {
	return reflect.Zero(reflect.TypeOf(c)).Interface().(policy.Component)
}

// Has reports whether components of the kind have the field.
func Has(c policy.Component, field string) bool {
	_, ok := reflect.TypeOf(c).FieldByName(field)
	return ok
}

// With returns the component with another value of the field. It ends the test if there is no such field.
func With(tb testing.TB, c policy.Component, field string, value any) policy.Component {
	tb.Helper()
	if !Has(c, field) {
		tb.Fatalf("a %s has no field %s: the test needs a way of its own to do this for the kind", Name(c), field)
	}
	v := reflect.New(reflect.TypeOf(c)).Elem()
	v.Set(reflect.ValueOf(c))
	v.FieldByName(field).Set(reflect.ValueOf(value))
	return v.Interface().(policy.Component)
}

// Covered reports each kind that is not among the components of the table, although which says that the table should have it, as an error of
// the test.
func Covered(tb testing.TB, table string, which func(policy.Component) bool, components ...policy.Component) {
	tb.Helper()
	found := make(map[string]bool)
	for _, c := range components {
		found[Name(c)] = true
	}
	for _, c := range Components() {
		if which(c) && !found[Name(c)] {
			tb.Errorf("%s has no %s: add one", table, Name(c))
		}
	}
}

// Any is for a table of all kinds; see [Covered].
func Any(policy.Component) bool { return true }

// Having is for a table of the kinds that have the field; see [Covered].
func Having(field string) func(policy.Component) bool {
	return func(c policy.Component) bool { return Has(c, field) }
}
