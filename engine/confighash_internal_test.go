package engine

import (
	"fmt"
	"reflect"
	"testing"

	"github.com/headgate-go/headgate/internal/testing/allkinds"
	"github.com/headgate-go/headgate/policy"
)

// TestConfigHash changes each field of each component, however deep it is, and expects another hash each time.
func TestConfigHash(t *testing.T) {
	seen := map[string]string{}
	note := func(path, hash string) {
		t.Helper()
		if first, ok := seen[hash]; ok {
			t.Errorf("%s has the hash of %s", path, first)
		}
		seen[hash] = path
	}
	for _, kind := range allkinds.Components() {
		c := allkinds.Zero(kind)
		name := fmt.Sprintf("%T", c)
		note(name, configHash("p", c))
		note(name+" in another policy", configHash("q", c))
		root := reflect.New(reflect.TypeOf(c)).Elem()
		changes(t, name, root, func(path string) {
			hash := configHash("p", root.Interface().(policy.Component))
			note(path, hash)
			if again := configHash("p", root.Interface().(policy.Component)); again != hash {
				t.Errorf("%s: hash %s, then %s", path, hash, again)
			}
		})
		if !root.IsZero() {
			t.Fatalf("%s: the test has left a change", name)
		}
	}
}

// changes gives each part of v another value for the time of a call.
func changes(t *testing.T, path string, v reflect.Value, changed func(path string)) {
	set := func(values ...any) {
		for _, value := range values {
			v.Set(reflect.ValueOf(value).Convert(v.Type()))
			changed(fmt.Sprintf("%s = %#v", path, value))
		}
		v.SetZero()
	}
	switch v.Kind() {
	case reflect.Bool:
		set(true)
	case reflect.Int, reflect.Int64:
		set(1, -1, 1<<30)
	case reflect.Float64:
		set(1.0, 0.5, -1.0)
	case reflect.String:
		set("a", "b", "ab")
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		changed(path + " = two")
		changes(t, path+"[1]", v.Index(1), changed)
		v.Set(v.Slice(0, 1))
		changed(path + " = one")
		changes(t, path+"[0]", v.Index(0), changed)
		v.SetZero()
	case reflect.Struct:
		for i := range v.NumField() {
			changes(t, path+"."+v.Type().Field(i).Name, v.Field(i), changed)
		}
	case reflect.Map:
		if v.Type() == reflect.TypeFor[map[string]policy.Override]() {
			one, two := policy.Override{Capacity: 1}, policy.Override{Fill: 1}
			set(map[string]policy.Override{"a": one}, map[string]policy.Override{"a": two}, map[string]policy.Override{"b": one},
				map[string]policy.Override{"a": one, "b": two}, map[string]policy.Override{"a": two, "b": one})
			return
		}
		set(map[string]string{"a": "b"}, map[string]string{"a": "c"}, map[string]string{"a": "b", "c": "d"}, map[string]string{"ab": ""})
	default:
		var values []any
		switch v.Type() {
		case reflect.TypeFor[policy.Expression]():
			a := policy.LabelExists("a")
			values = []any{
				a,
				policy.Not{Of: a},
				policy.All{a},
				policy.Any{a},
				policy.All{a, a},
				policy.All{policy.All{a}, a},
				policy.LabelEquals{Label: "a", Value: "bc"},
				policy.LabelEquals{Label: "ab", Value: "c"},
				policy.LabelMatches{Label: "a", Regex: "bc"},
				policy.LabelMatches{Label: "ab", Regex: "c"},
			}
		case reflect.TypeFor[policy.Signal]():
			values = []any{
				policy.Constant(0),
				policy.Constant(1),
				policy.Named("a"),
				policy.MeanLatency{},
				policy.MeanLatency{Over: 1},
				policy.MeanLatency{Times: 1},
				policy.MeanLatency{Selectors: policy.At("a")},
			}
		default:
			t.Fatalf("%s: the test knows no values of %s", path, v.Type())
		}
		set(values...)
	}
}

// TestConfigHashOfEqual compares configurations that are equal and were written in other ways.
func TestConfigHashOfEqual(t *testing.T) {
	labels := func(from, step int) map[string]string {
		m := map[string]string{}
		for i := range 20 {
			m[fmt.Sprint((from+i*step)%20)] = "x"
		}
		return m
	}
	of := func(m map[string]string, values []string) string {
		return configHash("p", policy.Sampler{
			Selectors:         []policy.Selector{{Labels: policy.LabelMatcher{Equal: m}}},
			PassThroughValues: values,
		})
	}
	if a, b := of(labels(0, 1), nil), of(labels(7, 3), []string{}); a != b {
		t.Errorf("hashes %s and %s", a, b)
	}
}
