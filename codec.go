package headgate

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"reflect"
	"time"
)

// A Codec turns values into bytes for a cache, and back. It must be safe for concurrent use.
type Codec[T any] interface {
	Encode(v T) ([]byte, error)
	Decode(data []byte) (T, error)
}

// jsonCodec is the codec that nil stands for.
type jsonCodec[T any] struct{}

// Encode passes a pointer, so that a MarshalJSON of *T is called too.
func (jsonCodec[T]) Encode(v T) ([]byte, error) { return json.Marshal(&v) }

func (jsonCodec[T]) Decode(data []byte) (v T, err error) {
	err = json.Unmarshal(data, &v)
	return v, err
}

// encode makes the bytes that are stored for a value. Unless the codec is exact, it decodes them again: the error says
// why the value is not to be stored. It names types and fields, and nothing of the value.
func encode[T any](codec Codec[T], exact bool, v T) ([]byte, error) {
	data, err := codec.Encode(v)
	if err != nil {
		if unsupported, ok := errors.AsType[*json.UnsupportedTypeError](err); ok {
			return nil, fmt.Errorf("%s cannot be encoded: it holds a %s", reflect.TypeFor[T](), unsupported.Type)
		}
		return nil, fmt.Errorf("%s cannot be encoded: %T", reflect.TypeFor[T](), err)
	}
	data = append([]byte{}, data...) // the codec may use its buffer again, and nil would mean no value
	if exact {
		return data, nil
	}
	back, err := codec.Decode(bytes.Clone(data))
	if err != nil {
		return nil, fmt.Errorf("%s cannot be decoded again: %T", reflect.TypeFor[T](), err)
	}
	var c comparison
	if lost := c.values(reflect.ValueOf(&v).Elem(), reflect.ValueOf(&back).Elem()); lost != "" {
		return nil, fmt.Errorf("decoding does not give back what was encoded: %s", lost)
	}
	return data, nil
}

// A comparison looks for what a value lost when it was encoded and decoded. Values are compared as reflect.DeepEqual
// does, with two exceptions: times are equal if they are the same instant, whatever their locations and monotonic
// readings, and NaN equals NaN. Times in unexported fields and in keys of maps are compared exactly.
type comparison struct {
	seen map[visit]bool
}

// visit is two pointers, maps or slices that have been met.
type visit struct {
	made, back uintptr
	size       int
	typ        reflect.Type
}

// values tells where the value that was made differs from the one that decoding gave back, by types and fields. It
// returns "" if they are equal.
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
		return c.values(made.Elem(), back.Elem())
	case reflect.Struct:
		if made.Type() != reflect.TypeFor[time.Time]() || !made.CanInterface() {
			return c.fields(made, back)
		}
		same = made.Interface().(time.Time).Equal(back.Interface().(time.Time))
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
		if lost := c.values(made.Field(i), back.Field(i)); lost != "" {
			return made.Type().Field(i).Name + ": " + lost
		}
	}
	return ""
}

// elements compares arrays, and slices of one length.
func (c *comparison) elements(made, back reflect.Value) string {
	for i := range made.Len() {
		if lost := c.values(made.Index(i), back.Index(i)); lost != "" {
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
	if v.made == v.back || c.seen[v] {
		return ""
	}
	if c.seen == nil {
		c.seen = make(map[visit]bool)
	}
	c.seen[v] = true
	switch made.Kind() {
	case reflect.Pointer:
		return c.values(made.Elem(), back.Elem())
	case reflect.Map:
		return c.entries(made, back)
	default:
		if made.Type().Elem().Kind() == reflect.Uint8 && bytes.Equal(made.Bytes(), back.Bytes()) {
			return ""
		}
		return c.elements(made, back)
	}
}

// entries compares maps of one length.
func (c *comparison) entries(made, back reflect.Value) string {
	for entries := made.MapRange(); entries.Next(); {
		other := back.MapIndex(entries.Key())
		if !other.IsValid() {
			return made.Type().String() + " has other keys"
		}
		if lost := c.values(entries.Value(), other); lost != "" {
			return lost
		}
	}
	return ""
}
