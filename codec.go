package headgate

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
)

// A Codec turns values into bytes for a cache, and back. It must be safe for concurrent use.
type Codec[T any] interface {
	Encode(v T) ([]byte, error)
	Decode(data []byte) (T, error)
}

// jsonCodec is the codec that nil stands for.
type jsonCodec[T any] struct{}

// Encode passes a pointer, so that a MarshalJSON of *T is called too.
func (jsonCodec[T]) Encode(v T) (data []byte, err error) {
	defer noPanic(&err)
	return json.Marshal(&v)
}

func (jsonCodec[T]) Decode(data []byte) (v T, err error) {
	defer noPanic(&err)
	err = json.Unmarshal(data, &v)
	return v, err
}

// errPanics is the error of a type whose JSON methods panic. That of a nil pointer which is embedded does: the value that is decoded has
// such pointers where the one that was encoded has others.
var errPanics = errors.New("its JSON methods panic")

// noPanic has a panic be an error. No caller has chosen the codec by whose panic a call would fail.
func noPanic(err *error) {
	if recover() != nil {
		*err = errPanics
	}
}

// encode makes the bytes that are stored for a value. Unless the codec is exact, it decodes them again: the error says
// why the value is not to be stored. It names types and fields, and nothing of the value.
func encode[T any](codec Codec[T], exact bool, v T) ([]byte, error) {
	data, err := codec.Encode(v)
	if err != nil {
		if unsupported, ok := errors.AsType[*json.UnsupportedTypeError](err); ok {
			return nil, fmt.Errorf("%s cannot be encoded: it holds a %s", reflect.TypeFor[T](), unsupported.Type)
		}
		return nil, fmt.Errorf("%s cannot be encoded: %s", reflect.TypeFor[T](), why(err))
	}
	data = append([]byte{}, data...) // the codec may use its buffer again, and nil would mean no value
	if exact {
		return data, nil
	}
	back, err := codec.Decode(bytes.Clone(data))
	if err != nil {
		return nil, fmt.Errorf("%s cannot be decoded again: %s", reflect.TypeFor[T](), why(err))
	}
	var c comparison
	lost := c.values(reflect.ValueOf(&v).Elem(), reflect.ValueOf(&back).Elem())
	if c.tooDeep {
		return nil, fmt.Errorf("%s is nested more than %d deep", reflect.TypeFor[T](), mostNested)
	}
	if lost != "" {
		return nil, fmt.Errorf("decoding does not give back what was encoded: %s", lost)
	}
	return data, nil
}

// why says what kind of error it is. The texts of errors may have values.
func why(err error) string {
	if errors.Is(err, errPanics) {
		return err.Error()
	}
	return fmt.Sprintf("%T", err)
}
