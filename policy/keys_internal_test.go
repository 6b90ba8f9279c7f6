package policy

import (
	"reflect"
	"strings"
	"testing"
)

// structs calls visit with the types of all structs that policies are made of.
func structs(visit func(t reflect.Type)) {
	seen := map[reflect.Type]bool{}
	var walk func(t reflect.Type)
	walk = func(t reflect.Type) {
		switch t.Kind() {
		case reflect.Slice, reflect.Map, reflect.Pointer:
			walk(t.Elem())
		case reflect.Struct:
			if seen[t] {
				return
			}
			seen[t] = true
			visit(t)
			for field := range t.Fields() {
				walk(field.Type)
			}
		case reflect.Interface:
			switch t {
			case reflect.TypeFor[Component]():
				for _, c := range oneOfEach() {
					walk(reflect.TypeOf(c))
				}
			case reflect.TypeFor[Signal]():
				walk(reflect.TypeFor[MeanLatency]())
			case reflect.TypeFor[Expression]():
				walk(reflect.TypeFor[LabelEquals]())
				walk(reflect.TypeFor[LabelMatches]())
			}
		default:
		}
	}
	walk(reflect.TypeFor[Policy]())
}

// Whatever a Go value can say, a short file can say.
func TestEveryFieldHasAKey(t *testing.T) {
	without := map[string]string{
		"Policy.Warnings": "is about the file",
		"Not.Of":          "stands behind the key not",
	}
	used := map[string]bool{}
	structs(func(of reflect.Type) {
		s := shapeOf(of)
		if s == nil {
			t.Errorf("%s has no shape", of)
			return
		}
		have := map[int]keyRow{}
		for _, f := range s.fields {
			have[f.index] = f.keyRow
			used[f.field] = true
		}
		for field := range of.Fields() {
			name := of.Name() + "." + field.Name
			if _, ok := have[field.Index[0]]; !ok && without[name] == "" && field.IsExported() {
				t.Errorf("%s has no row in keyRows", name)
			}
		}
		keys := strings.Fields(s.keys)
		seen := map[string]bool{}
		for _, key := range keys {
			if seen[key] {
				t.Errorf("two fields of %s have the key %s", of.Name(), key)
			}
			seen[key] = true
		}
	})
	for _, row := range keyRows {
		if !used[row.field] {
			t.Errorf("the row of %s is of no use", row.field)
		}
	}
}

func TestSnake(t *testing.T) {
	for name, want := range map[string]string{"ID": "id", "MaxInflight": "max_inflight", "AIMDLoad": "aimd_load", "Max": "max", "TokensID": "tokens_id"} {
		if got := snake(name); got != want {
			t.Errorf("snake(%s) = %s, want %s", name, got, want)
		}
	}
}
