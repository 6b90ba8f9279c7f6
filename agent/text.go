package agent

import (
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Some SDKs send text that is not UTF-8, such as half of a surrogate pair. Go's decoder would refuse it, and an SDK
// runs the flow on an error. So text is repaired.

const replacement = "\uFFFD"

// text copies a text of a message, as UTF-8.
func text(data []byte) string {
	if utf8.Valid(data) {
		return string(data)
	}
	return string(appendText(make([]byte, 0, 2*len(data)+len(replacement)), data))
}

// appendText appends data as strings.ToValidUTF8 repairs it, at less cost. The text becomes at most twice as long, if
// every other byte is wrong.
func appendText(to, data []byte) []byte {
	wrong := false // the bytes before are wrong
	for i := 0; i < len(data); {
		if b := data[i]; b < utf8.RuneSelf {
			to, wrong = append(to, b), false
			i++
			continue
		}
		r, size := utf8.DecodeRune(data[i:])
		switch {
		case r != utf8.RuneError || size > 1:
			to, wrong = append(to, data[i:i+size]...), false
		case !wrong:
			to, wrong = append(to, replacement...), true
		}
		i += size
	}
	return to
}

// unmarshal is proto.Unmarshal for messages with any text.
func unmarshal(data []byte, m proto.Message) error {
	err := proto.Unmarshal(data, m)
	if err == nil {
		return nil
	}
	repaired, ok := repairText(data, m.ProtoReflect().Descriptor())
	if !ok {
		return err
	}
	return proto.Unmarshal(repaired, m)
}

// repairText returns the message with its text made UTF-8, as far as the descriptor knows the fields. ok is false if
// the bytes are no message.
func repairText(message []byte, d protoreflect.MessageDescriptor) (repaired []byte, ok bool) {
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return nil, false
		}
		size := protowire.ConsumeFieldValue(number, kind, message[n:])
		if size < 0 {
			return nil, false
		}
		field := d.Fields().ByNumber(number)
		if kind != protowire.BytesType || field == nil || field.Kind() != protoreflect.StringKind && field.Kind() != protoreflect.MessageKind {
			repaired = append(repaired, message[:n+size]...)
		} else {
			data, _ := protowire.ConsumeBytes(message[n:])
			switch {
			case field.Kind() == protoreflect.MessageKind:
				if data, ok = repairText(data, field.Message()); !ok {
					return nil, false
				}
			case !utf8.Valid(data):
				data = []byte(strings.ToValidUTF8(string(data), replacement))
			}
			repaired = protowire.AppendBytes(append(repaired, message[:n]...), data)
		}
		message = message[n+size:]
	}
	return repaired, true
}
