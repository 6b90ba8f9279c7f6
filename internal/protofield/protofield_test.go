package protofield_test

import (
	"bytes"
	"errors"
	"testing"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/headgate-go/headgate/internal/protofield"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// message has fields of all kinds: 1 is text, 2 a number, 3 and 4 numbers of fixed size, and 200 a long text.
func message() []byte {
	b := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "a")
	b = protowire.AppendVarint(protowire.AppendTag(b, 2, protowire.VarintType), 300)
	b = protowire.AppendFixed32(protowire.AppendTag(b, 3, protowire.Fixed32Type), 7)
	b = protowire.AppendFixed64(protowire.AppendTag(b, 4, protowire.Fixed64Type), 7)
	b = protowire.AppendString(protowire.AppendTag(b, 1, protowire.BytesType), "")
	return protowire.AppendBytes(protowire.AppendTag(b, 200, protowire.BytesType), make([]byte, 1000))
}

func TestWalk(t *testing.T) {
	var fields []protowire.Number
	ok := protofield.Walk(message(), func(field protowire.Number, data []byte, number uint64) {
		fields = append(fields, field)
		if isNumber := field == 2; isNumber != (data == nil) || isNumber != (number == 300) {
			t.Errorf("field %d has %d bytes and the number %d", field, len(data), number)
		}
	})
	if want := []protowire.Number{1, 2, 1, 200}; !ok || len(fields) != len(want) {
		t.Errorf("Walk() = %t with the fields %d want %d", ok, fields, want)
	}
}

func TestFilter(t *testing.T) {
	whole := message()
	all, err := protofield.Filter(whole, func(protowire.Number, []byte) bool { return true })
	if err != nil || &all[0] != &whole[0] {
		t.Errorf("Filter() that keeps all gave a copy, or the error %v", err)
	}
	kept, err := protofield.Filter(whole, func(field protowire.Number, _ []byte) bool { return field == 1 })
	// What comes before a field, of the other kinds, is kept with it.
	want := []byte{1<<3 | 2, 1, 'a'}
	want = protowire.AppendFixed32(protowire.AppendTag(want, 3, protowire.Fixed32Type), 7)
	want = protowire.AppendFixed64(protowire.AppendTag(want, 4, protowire.Fixed64Type), 7)
	want = append(want, 1<<3|2, 0)
	if err != nil || !bytes.Equal(kept, want) {
		t.Errorf("Filter() = %x, %v want %x", kept, err, want)
	}
	if !bytes.Equal(whole, message()) {
		t.Error("Filter wrote to the message")
	}
}

// A message that is cut short is malformed, unless the cut is between two fields.
func TestMalformed(t *testing.T) {
	whole := message()
	ends := map[int]bool{0: true}
	for rest := whole; len(rest) > 0; {
		_, _, n := protowire.ConsumeField(rest)
		rest = rest[n:]
		ends[len(whole)-len(rest)] = true
	}
	for cut := range whole {
		ok := protofield.Walk(whole[:cut], func(protowire.Number, []byte, uint64) {})
		_, err := protofield.Filter(whole[:cut], func(protowire.Number, []byte) bool { return false })
		if ok != ends[cut] || (err == nil) != ends[cut] || err != nil && !errors.Is(err, protofield.ErrMalformed) {
			t.Errorf("of %d bytes: Walk() = %t, Filter() error = %v; well-formed: %t", cut, ok, err, ends[cut])
		}
	}
}

// Fields are counted up to a number, those of groups too, and what they hold is not looked at.
func TestCount(t *testing.T) {
	group := []byte{0x7b, 0x78, 0, 0x7b, 0x7c, 0x7c} // with a number and a group in it
	for _, tt := range []struct {
		name    string
		message []byte
		most    int
		want    int
	}{
		{"nothing", nil, 10, 0},
		{"all kinds", message(), 10, 6},
		{"as many as may be", message(), 6, 6},
		{"more", message(), 5, 6},
		{"many more", bytes.Repeat([]byte{0x78, 0}, 1000), 5, 6},
		{"a group", group, 10, 5},
		{"deep groups", bytes.Repeat([]byte{0x7b}, 100_000), 10, 11},
		{"malformed", append(message(), 0x7f), 10, 7},
		{"a tag that is cut short", append(message(), 0x80), 10, 6},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := protofield.Count(tt.message, tt.most); got != tt.want {
				t.Errorf("Count() = %d want %d", got, tt.want)
			}
		})
	}
}
