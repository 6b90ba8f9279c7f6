package policy

import (
	"reflect"
	"slices"
	"strings"
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

// What only some kinds have is found by an interface, which a kind with the field implements.
func TestEachFieldHasItsInterface(t *testing.T) {
	for _, c := range oneOfEach() {
		v := reflect.New(reflect.TypeOf(c)).Elem()
		if when := v.FieldByName("When"); when.IsValid() {
			when.Set(reflect.ValueOf(Escalation{Load: "load"}))
			if e, ok := reflect.TypeAssert[escalating](v); !ok || e.escalation().Load != "load" {
				t.Errorf("%T has a When, and escalation does not return it", c)
			}
		}
		if values := v.FieldByName("PassThroughValues"); values.IsValid() {
			values.Set(reflect.ValueOf([]string{"value"}))
			v.FieldByName("SessionLabel").SetString("label")
			p, ok := reflect.TypeAssert[passing](v)
			if !ok {
				t.Errorf("%T has a PassThroughValues, and passes does not return it", c)
				continue
			}
			if label, values := p.passes(); label != "label" || !slices.Equal(values, []string{"value"}) {
				t.Errorf("%T: passes = %q, %q", c, label, values)
			}
		}
		_, sheds := c.(shedding)
		if loads := v.FieldByName("WorkloadLatencyTokens").IsValid(); loads != sheds { // which load schedulers alone have
			t.Errorf("%T: a load scheduler: %v, sheds: %v, want both or neither", c, loads, sheds)
		}
	}
}

// A kind shares something by a store, or says why it does not. What it does in an outage, and how exact it is, is for kinds that share.
func TestEachKindSharesOrSaysWhyNot(t *testing.T) {
	for i, c := range oneOfEach() {
		keys := sharingKeys(c)
		local := has(keys, "local")
		if local != (kinds[i].store == shares) {
			t.Errorf("%T has the keys %q, and its row says that it shares something: %v", c, keys, !local)
		}
		if !local && keys != "" || has(keys, "share") && !has(keys, "on_outage") {
			t.Errorf("%T has the keys %q", c, keys)
		}
		for _, f := range kinds[i].forms {
			if has(f.keys, headgateKey) != local {
				t.Errorf("files may give %s the key %s: %v, want %v", f.key, headgateKey, !local, local)
			}
		}
	}
}

// Each kind that has a label has overrides, and each of their numbers replaces a field of some kind. The names of the other fields that
// are numbers are here with the reason.
func TestEachLabelHasOverrides(t *testing.T) {
	replaced := map[string]bool{}
	for _, c := range oneOfEach() {
		v := reflect.TypeOf(c)
		_, labelled := v.FieldByName("LimitBy")
		_, has := v.FieldByName("Overrides")
		l, limited := c.(limited)
		if labelled != has || labelled != limited {
			t.Errorf("%T: a label: %v, overrides: %v, limits: %v want all or none", c, labelled, has, limited)
		}
		if !labelled {
			continue
		}
		with := reflect.New(v).Elem()
		with.FieldByName("LimitBy").SetString("label")
		with.FieldByName("Overrides").Set(reflect.ValueOf(map[string]Override{"value": {Capacity: 1}}))
		by, overrides := with.Interface().(interface {
			limits() (string, map[string]Override)
		}).limits()
		if by != "label" || len(overrides) != 1 {
			t.Errorf("%T: limits = %q, %v", c, by, overrides)
		}
		keys := strings.Fields(overrideKeys(l))
		if len(keys) == 0 {
			t.Errorf("%T has no number that an override could replace", c)
		}
		for _, key := range keys {
			replaced[key] = true
		}
	}
	all := strings.Fields(numberKeys)
	if n := reflect.TypeFor[Override]().NumField(); n != len(all) {
		t.Fatalf("%d keys for %d numbers", len(all), n)
	}
	for i, key := range all {
		name := reflect.TypeFor[Override]().Field(i).Name
		if !strings.EqualFold(strings.ReplaceAll(key, "_", ""), name) {
			t.Errorf("the key of %s is %s", name, key)
		}
		if !replaced[key] {
			t.Errorf("no kind has the number %s", name)
		}
	}
}
