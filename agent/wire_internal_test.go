package agent

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/internal/wire"
)

// dropUnread removes what a check has and is not read: fields that Headgate does not know, and those of CheckHTTP that
// nothing looks at.
func dropUnread(m proto.Message) {
	var drop func(m protoreflect.Message)
	drop = func(m protoreflect.Message) {
		m.SetUnknown(nil)
		m.Range(func(d protoreflect.FieldDescriptor, v protoreflect.Value) bool {
			if d.Kind() == protoreflect.MessageKind && !d.IsMap() && !d.IsList() {
				drop(v.Message())
			}
			return true
		})
	}
	drop(m.ProtoReflect())
	if m, ok := m.(*checkhttpv1.CheckHTTPRequest); ok {
		m.Source, m.Destination = nil, nil
		if r := m.GetRequest(); r != nil {
			r.Body = ""
			delete(r.Headers, "") // no label
			for name := range r.Headers {
				if strings.HasPrefix(name, ":") {
					delete(r.Headers, name)
				}
			}
		}
	}
}

// differs compares what is read by hand with what protobuf reads, for a message in which nothing is too many or too
// long. It is empty where protobuf refuses the message: what is read by hand is then as much as is in order.
func differs(data []byte, m proto.Message) string {
	want, got := m.ProtoReflect().New().Interface(), m.ProtoReflect().New().Interface()
	err := readRequest(data, got, nil)
	if unmarshal(data, want) != nil {
		return ""
	}
	if err != nil {
		return err.Error()
	}
	dropUnread(want)
	dropUnread(got)
	for _, value := range textsOf(want.ProtoReflect()) {
		if !utf8.ValidString(value) {
			return "text that is not UTF-8"
		}
	}
	return cmp.Diff(want, got, protocmp.Transform())
}

func textsOf(m protoreflect.Message) (texts []string) {
	m.Range(func(d protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case d.IsMap():
			v.Map().Range(func(key protoreflect.MapKey, v protoreflect.Value) bool {
				texts = append(texts, key.String(), v.String())
				return true
			})
		case d.Kind() == protoreflect.MessageKind && !d.IsList():
			texts = append(texts, textsOf(v.Message())...)
		case d.Kind() == protoreflect.StringKind && !d.IsList():
			texts = append(texts, v.String())
		}
		return true
	})
	return texts
}

func varint(number protowire.Number, n uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, number, protowire.VarintType), n)
}

// What a message may have twice, out of order, of another type, or beside what Headgate knows, is read as protobuf reads
// it.
func TestOddMessagesAreReadAsProtobufReadsThem(t *testing.T) {
	check, checkHTTP := new(checkv1.CheckRequest), new(checkhttpv1.CheckHTTPRequest)
	group := func(number protowire.Number, fields ...[]byte) []byte {
		m := protowire.AppendTag(nil, number, protowire.StartGroupType)
		return protowire.AppendTag(append(m, slices.Concat(fields...)...), number, protowire.EndGroupType)
	}
	fixed := protowire.AppendFixed64(protowire.AppendTag(nil, 77, protowire.Fixed64Type), 1)
	a, b := bytesField(1, []byte("a")), bytesField(1, []byte("b"))
	x, y := bytesField(2, []byte("x")), bytesField(2, []byte("y"))
	for _, tt := range []struct {
		name string
		m    proto.Message
		data []byte
	}{
		{"text twice", check, slices.Concat(a, b)},
		{"text, then a number in its place", check, slices.Concat(a, varint(1, 7))},
		{"a number, then text in its place", check, slices.Concat(varint(3, 1), bytesField(3, []byte("b")))},
		{"a number, then a group in its place", check, slices.Concat(varint(3, 1), group(3, varint(1, 1)))},
		{"numbers twice", check, slices.Concat(varint(3, 1), varint(5, 1), varint(3, 0), varint(1001, 1))},
		{"a number that is larger than a bool", check, slices.Concat(varint(3, 1<<40))},
		{"an entry with a number in the place of its key", check, bytesField(2, slices.Concat(a, varint(1, 7), x))},
		{"an entry without a key", check, bytesField(2, x)},
		{"an entry without a value", check, bytesField(2, a)},
		{"an empty entry", check, bytesField(2, nil)},
		{"a number in the place of an entry", check, varint(2, 1)},
		{"an entry with two keys and two values", check, bytesField(2, slices.Concat(a, x, b, y))},
		{"an entry with a field that is not known", check, bytesField(2, slices.Concat(a, fixed, x))},
		{"a key twice", check, slices.Concat(bytesField(2, slices.Concat(a, x)), bytesField(2, slices.Concat(b, x)), bytesField(2, slices.Concat(a, y)))},
		{"a key twice, without a value at last", check, slices.Concat(bytesField(2, slices.Concat(a, x)), bytesField(2, a))},
		{"keys that become one as UTF-8", check, slices.Concat(bytesField(2, slices.Concat(bytesField(1, []byte{0xff}), x)), bytesField(2, slices.Concat(bytesField(1, []byte{0xfe}), y)))},
		{"values that are not UTF-8", check, bytesField(2, slices.Concat(a, bytesField(2, []byte("x\xff\xfey\xed\xa0\x80"))))},
		{"fields that are not known", check, slices.Concat(fixed, a, group(9, group(10, x)), varint(500, 3))},
		{"a lookup twice", check, slices.Concat(bytesField(4, slices.Concat(a, x, bytesField(3, []byte("g")))), bytesField(4, slices.Concat(b, bytesField(3, []byte("g")), bytesField(3, nil))))},
		{"a number in the place of a lookup", check, varint(4, 1)},
		{"a lookup with a number in the place of a key", check, bytesField(4, slices.Concat(a, varint(3, 1), x, varint(2, 1)))},
		{"a request twice", checkHTTP, slices.Concat(bytesField(3, slices.Concat(a, bytesField(2, slices.Concat(a, x)), varint(6, 9))), bytesField(3, slices.Concat(bytesField(3, []byte("/")), bytesField(2, slices.Concat(b, y)), bytesField(2, slices.Concat(a, y)))))},
		{"a number in the place of a request", checkHTTP, varint(3, 1)},
		{"a number in the place of a method", checkHTTP, bytesField(3, slices.Concat(a, varint(1, 1), bytesField(6, nil)))},
		{"a size, then text in its place", checkHTTP, bytesField(3, slices.Concat(varint(6, 7), bytesField(6, []byte("b"))))},
		{"a number in the place of a header", checkHTTP, bytesField(3, varint(2, 1))},
		{"names of headers that become one as UTF-8", checkHTTP, bytesField(3, slices.Concat(bytesField(2, slices.Concat(bytesField(1, []byte("n\xff")), x)), bytesField(2, slices.Concat(bytesField(1, []byte("n\xfe")), y))))},
		{"baggage twice", checkHTTP, bytesField(3, slices.Concat(bytesField(2, slices.Concat(bytesField(1, []byte("baggage")), x)), bytesField(2, slices.Concat(bytesField(1, []byte("baggage")), y))))},
		{"baggage without a value", checkHTTP, bytesField(3, bytesField(2, bytesField(1, []byte("baggage"))))},
		{"labels beside a request", checkHTTP, slices.Concat(bytesField(1003, slices.Concat(a, x)), bytesField(3, a), bytesField(1003, b), bytesField(1003, slices.Concat(a, y)))},
		{"a number in the place of labels beside a request", checkHTTP, varint(1003, 1)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := unmarshal(tt.data, tt.m.ProtoReflect().New().Interface()); err != nil {
				t.Fatalf("protobuf refuses the message: %v", err)
			}
			if diff := differs(tt.data, tt.m); diff != "" {
				t.Errorf("(-protobuf +by hand):\n%s", diff)
			}
		})
	}
}

// FuzzRead reads messages by hand and by protobuf, made of what seed says and of the bytes themselves.
func FuzzRead(f *testing.F) {
	f.Add(uint64(1), []byte("\x0a\x05point"))
	f.Add(uint64(2), []byte("\x12\x06\x0a\x01a\x12\x01x\x13\x14"))
	f.Fuzz(func(t *testing.T, seed uint64, data []byte) {
		if len(data) > 1<<10 {
			return // more may be too many
		}
		r := rand.New(rand.NewPCG(seed, 0))
		for _, data := range [][]byte{data, randomMessage(r, 3)} {
			for _, m := range []proto.Message{new(checkv1.CheckRequest), new(checkhttpv1.CheckHTTPRequest), new(checkv1.FlowEndRequest), new(checkv1.CacheUpsertRequest)} {
				if crowded(data) {
					continue
				}
				if diff := differs(data, m); diff != "" {
					t.Errorf("%T of %x (-protobuf +by hand):\n%s", m, data, diff)
				}
			}
		}
	})
}

// crowded reports whether the message may have more labels than are read.
func crowded(data []byte) bool {
	return strings.Count(string(data), "\x12")+strings.Count(string(data), "\x0a") > wire.MaxReported
}

// randomMessage has fields with few numbers of any type, and messages among them.
func randomMessage(r *rand.Rand, depth int) (m []byte) {
	for range r.IntN(6) {
		number := protowire.Number(1 + r.IntN(8))
		if r.IntN(10) == 0 {
			number = requestDryRun
		}
		switch kind := r.IntN(10); {
		case kind < 4 && depth > 0:
			m = append(m, bytesField(number, randomMessage(r, depth-1))...)
		case kind < 7:
			m = append(m, bytesField(number, []byte("ab-_:\xff\xc3A"[r.IntN(8):][:1]))...)
		case kind < 8 && depth > 0:
			m = protowire.AppendTag(m, number, protowire.StartGroupType)
			m = append(m, randomMessage(r, depth-1)...)
			m = protowire.AppendTag(m, number, protowire.EndGroupType)
		case kind < 9:
			m = append(m, varint(number, r.Uint64N(3))...)
		default:
			m = protowire.AppendFixed32(protowire.AppendTag(m, number, protowire.Fixed32Type), 1)
		}
	}
	return m
}
