package headgate

import (
	"bytes"
	"fmt"
	"math"
	"reflect"
	"time"
	"unsafe"

	"google.golang.org/protobuf/proto"
)

// A comparison looks for what a value lost when it was encoded and decoded. Values are compared as reflect.DeepEqual
// does, with these exceptions. Times are equal if they are the same instant, whatever their locations and monotonic
// readings. So are values of types that are defined as time.Time. Protobuf messages are compared by proto.Equal. NaN equals NaN,
// but a map has no NaN as a key.
type comparison struct {
	seen    map[visit]bool
	depth   int
	tooDeep bool
}

// mostNested is how many interfaces, pointers, slices and maps may be nested in a value. encoding/json reads 10,000 objects and lists in
// each other, and each of them counts twice in an any.
const mostNested = 30_000

// longestPath is how many bytes the place of a difference has at most before an outer field is added to it.
const longestPath = 256

// visit is two pointers, maps or slices, or what two interfaces hold, that have been met.
type visit struct {
	made, back uintptr
	size       int
	typ        reflect.Type
}

// values tells where the value that was made differs from the one that decoding gave back, by types and fields. It
// returns "" if they are equal. Structs and arrays must be addressable, and nothing may be an unexported field: see whole and field.
func (c *comparison) values(made, back reflect.Value) string {
	if !made.IsValid() || !back.IsValid() {
		if made.IsValid() == back.IsValid() {
			return ""
		}
		return "an interface is nil once"
	}
	if made.Type() != back.Type() {
		return fmt.Sprintf("%s became %s", made.Type(), back.Type())
	}
	same := false
	switch made.Kind() {
	case reflect.Invalid: // it was returned above
	case reflect.Bool:
		same = made.Bool() == back.Bool()
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		same = made.Int() == back.Int()
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64, reflect.Uintptr:
		same = made.Uint() == back.Uint()
	case reflect.Float32, reflect.Float64:
		same = sameFloat(made.Float(), back.Float())
	case reflect.Complex64, reflect.Complex128:
		a, b := made.Complex(), back.Complex()
		same = sameFloat(real(a), real(b)) && sameFloat(imag(a), imag(b))
	case reflect.String:
		same = made.String() == back.String()
	case reflect.Chan, reflect.UnsafePointer:
		same = made.Pointer() == back.Pointer()
	case reflect.Func:
		same = made.IsNil() && back.IsNil()
	case reflect.Interface:
		if c.met(made, back) {
			return ""
		}
		return c.inside(whole(made.Elem()), whole(back.Elem()))
	case reflect.Struct:
		if !isTime(made.Type()) {
			return c.fields(made, back)
		}
		same = timeOf(made).Equal(timeOf(back))
	case reflect.Array:
		return c.elements(made, back)
	case reflect.Pointer, reflect.Slice, reflect.Map:
		return c.behind(made, back)
	}
	if same {
		return ""
	}
	return made.Type().String() + " has another value"
}

// sameFloat reports whether a equals b, where NaN equals NaN.
func sameFloat(a, b float64) bool { return a == b || math.IsNaN(a) && math.IsNaN(b) }

func (c *comparison) fields(made, back reflect.Value) string {
	for i := range made.NumField() {
		if lost := c.values(field(made, i), field(back, i)); lost != "" {
			if len(lost) > longestPath {
				return lost
			}
			return made.Type().Field(i).Name + ": " + lost
		}
	}
	return ""
}

// inside compares what interfaces, pointers, slices and maps hold. All that is nested without a bound goes through it.
func (c *comparison) inside(made, back reflect.Value) string {
	if c.depth == mostNested {
		c.tooDeep = true
		return "it is nested too deep"
	}
	c.depth++
	lost := c.values(made, back)
	c.depth--
	return lost
}

// elements compares arrays, and slices of one length.
func (c *comparison) elements(made, back reflect.Value) string {
	for i := range made.Len() {
		if lost := c.inside(made.Index(i), back.Index(i)); lost != "" {
			return lost
		}
	}
	return ""
}

// behind compares what two pointers, slices or maps refer to. It skips pairs that refer to the same, and pairs that it
// has met before.
func (c *comparison) behind(made, back reflect.Value) string {
	if made.IsNil() || back.IsNil() {
		if made.IsNil() == back.IsNil() {
			return ""
		}
		return made.Type().String() + " is nil once"
	}
	v := visit{made: made.Pointer(), back: back.Pointer(), typ: made.Type()}
	if made.Kind() != reflect.Pointer {
		if v.size = made.Len(); v.size != back.Len() {
			return made.Type().String() + " has another length"
		}
	}
	if c.visits(v) {
		return ""
	}
	switch made.Kind() {
	case reflect.Pointer:
		if a, b := message(made), message(back); a != nil && b != nil {
			if proto.Equal(a, b) {
				return ""
			}
			return made.Type().String() + " has another value"
		}
		return c.inside(made.Elem(), back.Elem())
	case reflect.Map:
		return c.entries(made, back)
	default:
		if made.Type().Elem().Kind() == reflect.Uint8 && bytes.Equal(made.Bytes(), back.Bytes()) {
			return ""
		}
		return c.elements(made, back)
	}
}

// visits notes a pair, and reports whether both are the same, or have been met before.
func (c *comparison) visits(v visit) bool {
	if v.made == v.back || c.seen[v] {
		return true
	}
	if c.seen == nil {
		c.seen = make(map[visit]bool)
	}
	c.seen[v] = true
	return false
}

// met is visits for what two interfaces hold, if both hold a struct or an array of one type. Several interfaces may hold the same one, and
// to compare it each time could take exponential time.
func (c *comparison) met(made, back reflect.Value) bool {
	a, b := made.Elem(), back.Elem()
	if !a.IsValid() || !b.IsValid() || a.Type() != b.Type() || a.Kind() != reflect.Struct && a.Kind() != reflect.Array || isTime(a.Type()) {
		return false
	}
	return c.visits(visit{made: held(made), back: held(back), typ: a.Type()})
}

// held returns the word by which an interface refers to what it holds, the second of its two.
func held(v reflect.Value) uintptr {
	if !v.CanAddr() {
		v = copied(v)
	}
	return (*[2]uintptr)(v.Addr().UnsafePointer())[1]
}

// entries compares maps of one length.
func (c *comparison) entries(made, back reflect.Value) string {
	find := back.MapIndex
	if holdsTimes(made.Type().Key()) {
		mine, theirs := c.byKey(made), c.byKey(back)
		if c.tooDeep || len(mine) != made.Len() || len(theirs) != back.Len() { // two keys of one instant
			return made.Type().String() + " has keys that cannot be told apart"
		}
		find = func(key reflect.Value) reflect.Value { return theirs[c.key(key)] }
	}
	for entries := made.MapRange(); entries.Next(); {
		other := find(entries.Key())
		if !other.IsValid() {
			return made.Type().String() + " has other keys"
		}
		if lost := c.inside(whole(entries.Value()), whole(other)); lost != "" {
			return lost
		}
	}
	return ""
}

// byKey returns the entries of a map by their unified keys.
func (c *comparison) byKey(m reflect.Value) map[any]reflect.Value {
	entries := make(map[any]reflect.Value, m.Len())
	for all := m.MapRange(); all.Next(); {
		entries[c.key(all.Key())] = all.Value()
	}
	return entries
}

// key returns a unified copy of a map's key. Keys that differ only in how they write the same instants have equal copies.
func (c *comparison) key(v reflect.Value) any {
	key := copied(v)
	c.unify(key)
	return key.Interface()
}

// unify removes from the times in a map's key what [time.Time.Equal] does not compare.
func (c *comparison) unify(key reflect.Value) {
	switch {
	case key.Kind() == reflect.Interface && !key.IsNil():
		if c.depth == mostNested {
			c.tooDeep = true
			return
		}
		c.depth++
		elem := copied(key.Elem())
		c.unify(elem)
		key.Set(elem)
		c.depth--
	case isTime(key.Type()):
		key.Set(reflect.ValueOf(timeOf(key).UTC().Round(0)).Convert(key.Type()))
	case key.Kind() == reflect.Struct:
		for i := range key.NumField() {
			c.unify(field(key, i))
		}
	case key.Kind() == reflect.Array && holdsTimes(key.Type()):
		for i := range key.Len() {
			c.unify(key.Index(i))
		}
	}
}

// isTime reports whether a type is time.Time, or is defined as it.
func isTime(t reflect.Type) bool {
	return t.Kind() == reflect.Struct && t.ConvertibleTo(reflect.TypeFor[time.Time]())
}

func timeOf(v reflect.Value) time.Time {
	return v.Convert(reflect.TypeFor[time.Time]()).Interface().(time.Time)
}

// holdsTimes reports whether keys of the type may hold times.
func holdsTimes(key reflect.Type) bool {
	switch key.Kind() {
	case reflect.Interface:
		return true
	case reflect.Array:
		return holdsTimes(key.Elem())
	case reflect.Struct:
		for f := range key.Fields() {
			if holdsTimes(f.Type) {
				return true
			}
		}
		return isTime(key)
	default:
		return false
	}
}

// message returns the protobuf message that a pointer is; nil if it is none. A struct that embeds a message is none: it has more to
// compare.
func message(v reflect.Value) proto.Message {
	if v.Type().Elem().Kind() != reflect.Struct || !v.Type().Implements(reflect.TypeFor[proto.Message]()) {
		return nil
	}
	for f := range v.Type().Elem().Fields() {
		if f.Anonymous {
			return nil
		}
	}
	return v.Interface().(proto.Message)
}

// field returns a field of an addressable struct. Unlike [reflect.Value.Field], it gives access to an unexported one, for its times.
func field(v reflect.Value, i int) reflect.Value {
	f := v.Field(i)
	if f.CanInterface() {
		return f
	}
	return reflect.NewAt(f.Type(), unsafe.Pointer(f.UnsafeAddr())).Elem()
}

// whole returns the value, or a copy if its fields could not be reached otherwise.
func whole(v reflect.Value) reflect.Value {
	if k := v.Kind(); k != reflect.Struct && k != reflect.Array {
		return v
	}
	return copied(v)
}

func copied(v reflect.Value) reflect.Value {
	c := reflect.New(v.Type()).Elem()
	c.Set(v)
	return c
}
