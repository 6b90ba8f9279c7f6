package engine

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"

	"github.com/headgate-go/headgate/policy"
)

// configHash returns the hash of a component's configuration and of its policy's name. Equal configurations have equal
// hashes. It uses reflection, so that no field is forgotten. The format %#v would do too, but takes three times as
// long, which matters with 100,000 components.
func configHash(policyName string, c policy.Component) string {
	b := make([]byte, 0, 512)
	b = appendText(b, policyName)
	v := reflect.ValueOf(c)
	if v.Kind() == reflect.Pointer { // of an equal value
		v = v.Elem()
	}
	b = appendValue(appendText(b, v.Type().String()), v)
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:16])
}

// appendValue appends an encoding of the value. Of two different values of one type, neither encoding begins with the
// other.
func appendValue(b []byte, v reflect.Value) []byte {
	switch v.Kind() {
	case reflect.Bool:
		if v.Bool() {
			return append(b, 1)
		}
		return append(b, 0)
	case reflect.Int, reflect.Int64:
		return binary.AppendVarint(b, v.Int())
	case reflect.Float64:
		return binary.BigEndian.AppendUint64(b, math.Float64bits(v.Float()))
	case reflect.String:
		return appendText(b, v.String())
	case reflect.Slice:
		b = binary.AppendUvarint(b, uint64(v.Len()))
		for i := range v.Len() {
			b = appendValue(b, v.Index(i))
		}
		return b
	case reflect.Struct:
		for i := range v.NumField() { //nolint:modernize // Fields makes a StructField of each
			b = appendValue(b, v.Field(i))
		}
		return b
	case reflect.Interface:
		if v.IsNil() {
			return appendText(b, "")
		}
		return appendValue(appendText(b, v.Elem().Type().String()), v.Elem())
	default:
		if all, ok := reflect.TypeAssert[map[string]policy.Override](v); ok {
			b = binary.AppendUvarint(b, uint64(len(all)))
			for _, key := range slices.Sorted(maps.Keys(all)) {
				b = appendValue(appendText(b, key), reflect.ValueOf(all[key]))
			}
			return b
		}
		m, ok := reflect.TypeAssert[map[string]string](v)
		if !ok {
			return appendText(b, fmt.Sprintf("%#v", v)) // of a type that no component has
		}
		b = binary.AppendUvarint(b, uint64(len(m)))
		if len(m) == 0 {
			return b // most are, and Sorted would allocate
		}
		for _, key := range slices.Sorted(maps.Keys(m)) {
			b = appendText(appendText(b, key), m[key])
		}
		return b
	}
}

// appendText appends the length of the text, and the text.
func appendText(b []byte, text string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(text))), text...)
}
