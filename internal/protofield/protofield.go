// Package protofield reads encoded messages field by field, for code that needs few of the fields.
package protofield

import (
	"errors"

	"google.golang.org/protobuf/encoding/protowire"
)

// ErrMalformed means that bytes are no message.
var ErrMalformed = errors.New("malformed message")

// Next reads the first field of a message that holds bytes or a number, and returns what comes after it. The data of a
// number are nil, and those of bytes are not. If the message holds no such field, the field's number is 0. It is not ok if
// the message is malformed; where a group ends, its number is not looked at.
//
// A message can have two million fields, which are read before policies decide. So this costs a few nanoseconds, also for
// groups in groups, and returns what fits into registers: a struct would not.
func Next(message []byte) (field protowire.Number, data []byte, n uint64, rest []byte, ok bool) {
	// Most fields have a tag and a size, or a tag and a number, of a byte each.
	if len(message) > 1 && message[0] > 7 && message[0] < 0x80 && message[1] < 0x80 {
		field, end := protowire.Number(message[0]>>3), 2+int(message[1])
		switch protowire.Type(message[0] & 7) { //nolint:exhaustive // nextOf reads the others
		case protowire.BytesType:
			if end <= len(message) {
				return field, message[2:end:end], 0, message[end:], true
			}
		case protowire.VarintType:
			return field, nil, uint64(message[1]), message[2:], true
		}
	}
	return nextOf(message)
}

// nextOf is Next for any field.
func nextOf(message []byte) (field protowire.Number, data []byte, n uint64, rest []byte, ok bool) {
	groups := 0
	for len(message) > 0 {
		tag, n := uint64(message[0]), 1
		if tag >= 0x80 {
			tag, n = protowire.ConsumeVarint(message)
		}
		if n < 0 || tag>>3 == 0 || tag>>3 > uint64(protowire.MaxValidNumber) {
			return 0, nil, 0, nil, false
		}
		message = message[n:]
		switch protowire.Type(tag & 7) {
		case protowire.BytesType:
			if len(message) == 0 {
				return 0, nil, 0, nil, false
			}
			size, n := uint64(message[0]), 1
			if size >= 0x80 {
				size, n = protowire.ConsumeVarint(message)
			}
			if n < 0 || size > uint64(len(message)-n) {
				return 0, nil, 0, nil, false
			}
			end := n + int(size)
			if groups == 0 {
				return protowire.Number(tag >> 3), message[n:end:end], 0, message[end:], true
			}
			message = message[end:]
		case protowire.VarintType:
			value, n := protowire.ConsumeVarint(message)
			if n < 0 {
				return 0, nil, 0, nil, false
			}
			if groups == 0 {
				return protowire.Number(tag >> 3), nil, value, message[n:], true
			}
			message = message[n:]
		case protowire.Fixed32Type:
			if len(message) < 4 {
				return 0, nil, 0, nil, false
			}
			message = message[4:]
		case protowire.Fixed64Type:
			if len(message) < 8 {
				return 0, nil, 0, nil, false
			}
			message = message[8:]
		case protowire.StartGroupType:
			groups++
		case protowire.EndGroupType:
			if groups--; groups < 0 {
				return 0, nil, 0, nil, false
			}
		default:
			return 0, nil, 0, nil, false
		}
	}
	return 0, nil, 0, nil, groups == 0
}

// Count returns how many fields the message has, up to where it is malformed, and most+1 if there are more than most. Fields
// in groups count, and so do the beginnings and ends of groups. It does not look into fields that hold bytes, and stops
// when it has seen enough, so it costs little whatever the message is.
func Count(message []byte, most int) (n int) {
	for len(message) > 0 && n <= most {
		tag, size := protowire.ConsumeVarint(message)
		if size < 0 {
			return n
		}
		n++
		message = message[size:]
		switch protowire.Type(tag & 7) {
		case protowire.StartGroupType, protowire.EndGroupType:
			continue
		default:
			size = protowire.ConsumeFieldValue(1, protowire.Type(tag&7), message)
		}
		if size < 0 {
			return n
		}
		message = message[size:]
	}
	return n
}

// Walk calls visit with each field of the message that has bytes or a number, up to where the message is malformed. The
// data of a number are nil, and those of bytes are not. It reports whether the message is well-formed.
func Walk(message []byte, visit func(field protowire.Number, data []byte, number uint64)) bool {
	for len(message) > 0 {
		field, data, n, rest, ok := Next(message)
		if !ok {
			return false
		}
		if field != 0 {
			visit(field, data, n)
		}
		message = rest
	}
	return true
}

// Filter gives the message without the fields of bytes or numbers that are not kept, and what comes right before them of
// other kinds, which no message of the protocol has. It copies only if there are such.
func Filter(message []byte, keep func(number protowire.Number, data []byte) bool) ([]byte, error) {
	kept, copied := message[:0:0], false
	for rest := message; len(rest) > 0; {
		field, data, _, after, ok := Next(rest)
		if !ok {
			return nil, ErrMalformed
		}
		one := rest[:len(rest)-len(after)]
		switch keeps := field == 0 || keep(field, data); {
		case keeps && copied:
			kept = append(kept, one...)
		case !keeps && !copied:
			kept, copied = append(kept, message[:len(message)-len(rest)]...), true
		}
		rest = after
	}
	if !copied {
		return message, nil
	}
	return kept, nil
}
