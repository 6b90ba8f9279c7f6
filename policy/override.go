package policy

import (
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/headgate-go/headgate/internal/slip"
)

// An Override has other numbers for one value of a component's label. Each number replaces the component's field of the same
// name. Zero means the component's own number. math.SmallestNonzeroFloat64 means 0, for a value whose flows are all to be
// rejected. In a MaxDebt it is as good as no debt. In files, 0 has this meaning.
//
// A flow gets the numbers of its label's value. If callers set the label themselves, they can claim any override. So use
// overrides only with labels that callers do not control.
//
// While a limiter has the numbers of an [Escalation], a value with an override has the lesser of these and its own.
//
// An override with a number that the kind of component does not have is an error. So is an override without a number. Errors name
// an override by its index in the order of the values, because a value may be a customer's name.
type Override struct {
	// Of a RateLimiter or a QuotaScheduler, and MaxDebt of a CalendarQuota too.
	Capacity, Fill float64
	Interval       time.Duration
	MaxDebt        float64

	// Of a ConcurrencyLimiter or a ConcurrencyScheduler.
	Max         float64
	MaxInflight time.Duration

	// Of a CalendarQuota.
	Amount float64

	// Of a CircuitBreaker.
	FailureRatio           float64
	FailureCount, MinFlows int
	OpenDuration           time.Duration
}

// A limited component has a state for each value of a label.
type limited interface {
	Component
	limits() (by string, overrides map[string]Override)
	numbers(wrong report) // checks those that overrides may replace
}

// overriding returns the component with the numbers of the override, and the fields that the component does not have.
func overriding(c Component, o Override) (with Component, foreign []string) {
	v := reflect.New(reflect.TypeOf(c)).Elem()
	v.Set(reflect.ValueOf(c))
	from := reflect.ValueOf(o)
	for i := range from.NumField() {
		number := from.Field(i)
		if number.IsZero() {
			continue
		}
		name := from.Type().Field(i).Name
		to := v.FieldByName(name)
		switch {
		case !to.IsValid():
			foreign = append(foreign, name)
		case number.Kind() == reflect.Float64 && number.Float() == math.SmallestNonzeroFloat64 && name != "MaxDebt":
			to.SetZero()
		default:
			to.Set(number)
		}
	}
	return v.Interface().(Component), foreign //nolint:forcetypeassert // it has the type of c
}

// checkOverrides checks those of a component.
func checkOverrides(wrong report, c limited) {
	by, all := c.limits()
	if len(all) == 0 {
		return
	}
	if by == "" {
		wrong(".Overrides", "needs a LimitBy: without a label there are no values that could have other numbers")
		return
	}
	for i, value := range slices.Sorted(maps.Keys(all)) {
		checkOverride(wrong.at(".Overrides", i), c, all[value])
	}
}

// checkOverride checks the override's numbers as those of the component itself.
func checkOverride(wrong report, c limited, o Override) {
	if o == (Override{}) {
		wrong("", "names no number")
		return
	}
	with, foreign := overriding(c, o)
	for _, name := range foreign {
		wrong("."+name, "a %s has no such number", kinds[c.kind()].name)
	}
	named := reflect.ValueOf(o)
	with.(limited).numbers(func(field, format string, args ...any) { //nolint:forcetypeassert // it has the type of c
		if field == "" || !named.FieldByName(field[1:]).IsZero() {
			wrong(field, format, args...)
		}
	})
}

// withOf returns the function With of the component's description; nil if it has no label. It keeps none of the component's maps and
// slices.
func withOf(c limited) func(any) (any, error) {
	if by, _ := c.limits(); by == "" {
		return nil
	}
	v := reflect.New(reflect.TypeOf(c)).Elem()
	v.Set(reflect.ValueOf(c))
	v.FieldByName("Selectors").SetZero()
	v.FieldByName("Overrides").SetZero()
	if s := v.FieldByName("Scheduler"); s.IsValid() {
		s.FieldByName("Workloads").SetZero()
	}
	bare := v.Interface().(limited)                                     //nolint:forcetypeassert // it has the type of c
	return func(o any) (any, error) { return with(bare, o.(Override)) } //nolint:forcetypeassert // package engine has no other
}

// with returns the component with the numbers of the override, or what is wrong with it.
func with(c limited, o Override) (Component, error) {
	if o == (Override{}) {
		return c, nil
	}
	var errs []error
	checkOverride(func(field, format string, args ...any) {
		errs = append(errs, &Error{Field: strings.TrimPrefix(field, "."), Message: fmt.Sprintf(format, args...)})
	}, c, o)
	if errs != nil {
		return nil, join(errs)
	}
	changed, _ := overriding(c, o)
	return changed, nil
}

// overridesKey is the key of overrides in files, in either format.
const overridesKey = "overrides"

// numberKeys are the keys of an override in files, in the order of its fields.
const numberKeys = "capacity fill interval max_debt max max_inflight amount failure_ratio failure_count min_flows open_duration"

// overrideKeys returns those of an override of the component, separated by spaces.
func overrideKeys(c Component) string {
	var keys []string
	of, fields := reflect.TypeOf(c), reflect.TypeFor[Override]()
	for i, key := range strings.Fields(numberKeys) {
		if _, ok := of.FieldByName(fields.Field(i).Name); ok {
			keys = append(keys, key)
		}
	}
	return strings.Join(keys, " ")
}

// overrides reads the key of that name in the parameters of a component like c.
func (d *decoder) overrides(of value, c Component) map[string]Override {
	all := d.fill(of, "Overrides", overridesKey)
	if d.learned != nil {
		d.override(value{up: d.keep(all)}, overrideKeys(c))
		return nil
	}
	if !d.is(all, mapping) {
		return nil
	}
	keys := overrideKeys(c)
	all.here = d.keep(all)
	m := make(map[string]Override, len(all.entries))
	sorted := slices.SortedFunc(slices.Values(all.entries), func(a, b entry) int { return strings.Compare(a.key, b.key) })
	for i, e := range sorted {
		one := all.part(e)
		one.named, one.index = false, i // without the value, which may be a customer's name
		if d.sources != nil {
			one.field = all.field + "[" + strconv.Itoa(i) + "]"
			d.note(one.field, one)
		}
		if why := slip.In(e.key); why != "" {
			d.warn(one, "flows hardly have this value: "+why)
		}
		m[e.key] = d.override(one, keys)
	}
	return m
}

// override reads one of them. A 0 says 0, and not that the number is the component's own.
func (d *decoder) override(v value, keys string) Override {
	failed := len(d.failed)
	f := d.fields(v, keys, "")
	var o Override
	to := reflect.ValueOf(&o).Elem()
	for i, key := range strings.Fields(numberKeys) {
		if !has(keys, key) {
			continue
		}
		number := d.fill(f, to.Type().Field(i).Name, key)
		if number.node == nil {
			continue
		}
		switch field := to.Field(i).Addr().Interface().(type) {
		case *float64:
			*field = d.explicit(number)
		case *time.Duration:
			if *field = d.duration(number); *field == 0 {
				d.errorf(number, "must be positive, is 0s")
			}
		case *int:
			if *field = d.count(number); *field == 0 {
				d.errorf(number, "must be a whole number above 0")
			}
		}
	}
	if len(d.failed) > failed {
		d.failed[v.path()] = true // that it names no number now is no news
	}
	return o
}
