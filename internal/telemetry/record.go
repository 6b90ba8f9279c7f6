package telemetry

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/headgate-go/headgate/internal/protofield"
	"github.com/headgate-go/headgate/internal/version"
)

// A Record is what telemetry reports of a flow that has ended. Times are Unix nanoseconds; 0 is not reported.
type Record struct {
	Start, Work, End int64 // the starts of the flow and of its work, and the end of both

	Status string // OK or Error; "" if it is not reported
	DryRun bool   // the flow ran although the answer is a rejection: its client is in dry run

	Canceled bool // its caller canceled it, or it did not run after all: the status says nothing about the work

	// Check is the answer to the flow's check, as an encoded CheckResponse; nil if it is not reported.
	Check []byte

	// JSON is the answer as JSON, as some SDKs send it; Check is nil then. It is only read.
	JSON []byte
}

// The values of Record.Status.
const (
	OK    = "OK"
	Error = "Error"
)

// The attributes of a record's span.
const (
	keySource = "aperture.source"
	keyStart  = "aperture.flow_start_timestamp"
	keyWork   = "aperture.workload_start_timestamp"
	keyEnd    = "aperture.flow_end_timestamp"
	keyStatus = "aperture.flow.status"
	keyCheck  = "aperture.check_response"

	// Headgate's own; their value is "true".
	keyDryRun   = "headgate.dry_run"
	keyCanceled = "headgate.canceled"

	// Some SDKs send these in milliseconds instead.
	keyWorkMillis = "aperture.workload_start_timestamp_ms"
	keyEndMillis  = "aperture.flow_end_timestamp_ms"
)

// Numbers of fields of opentelemetry.proto.trace.v1 and common.v1, as far as flows are reported in them.
const (
	resourceSpans protowire.Number = 1 // of TracesData
	scopeSpans    protowire.Number = 2 // of ResourceSpans
	spans         protowire.Number = 2 // of ScopeSpans

	spanTraceID   protowire.Number = 1
	spanSpanID    protowire.Number = 2
	spanName      protowire.Number = 5
	spanKind      protowire.Number = 6
	spanStart     protowire.Number = 7
	spanEnd       protowire.Number = 8
	spanAttribute protowire.Number = 9

	attributeKey   protowire.Number = 1
	attributeValue protowire.Number = 2

	valueString protowire.Number = 1
	valueInt    protowire.Number = 3
)

// Read reads the record in a span of any SDK. It shares the span's bytes. The error means that the answer in it is
// neither base64 nor JSON; the rest of the record has been read.
func Read(span []byte) (Record, error) {
	var r Record
	var check []byte
	protofield.Walk(span, func(field protowire.Number, attribute []byte, _ uint64) {
		if field != spanAttribute {
			return
		}
		key, text, number := readAttribute(attribute)
		switch string(key) {
		case keyStart:
			r.Start = number
		case keyWork:
			r.Work = number
		case keyWorkMillis:
			r.Work = ofMillis(number)
		case keyEnd:
			r.End = number
		case keyEndMillis:
			r.End = ofMillis(number)
		case keyStatus:
			r.Status = readStatus(text)
		case keyCheck:
			check = text
		case keyDryRun:
			r.DryRun = string(text) == "true"
		case keyCanceled:
			r.Canceled = string(text) == "true"
		}
	})
	if len(check) > 0 && check[0] == '{' {
		r.JSON = check
		return r, nil
	}
	var err error
	if r.Check, err = base64.StdEncoding.AppendDecode(nil, check); err != nil {
		r.Check = nil
	}
	return r, err
}

// readAttribute reads an attribute whose value is a string or an integer.
func readAttribute(attribute []byte) (key, text []byte, number int64) {
	protofield.Walk(attribute, func(field protowire.Number, data []byte, _ uint64) {
		if field == attributeKey {
			key = data
		}
		if field == attributeValue {
			protofield.Walk(data, func(field protowire.Number, data []byte, n uint64) {
				if field == valueString {
					text = data
				}
				if field == valueInt {
					number = int64(n)
				}
			})
		}
	})
	return key, text, number
}

// readStatus reads a status, which one SDK has in small letters.
func readStatus(text []byte) string {
	if bytes.EqualFold(text, []byte(OK)) {
		return OK
	}
	return Error
}

// ofMillis returns a time in nanoseconds; 0, which is none, if it does not fit.
func ofMillis(n int64) int64 {
	if n <= 0 || n > math.MaxInt64/int64(time.Millisecond) {
		return 0
	}
	return n * int64(time.Millisecond)
}

// A Batch encodes records straight into the bytes of an OTLP request, opentelemetry.proto.trace.v1.TracesData. As
// messages, each would cost more than twenty objects. It uses its buffers again.
type Batch struct {
	message []byte
	span    []byte
}

// kindInternal is a span's kind.
const kindInternal = 1

// appendResource appends the resource of the request, which names this library: a field of ResourceSpans.
func appendResource(b []byte) []byte {
	var resource []byte
	resource = appendText(resource, 1, "service.name", "headgate-go")
	resource = appendText(resource, 1, "service.version", version.Version)
	return appendBytes(b, 1, resource)
}

// headroom is for what goes before the spans: the resource and three lengths.
const headroom = 128

// Encode returns a request with as many of the records as fit into most bytes, but at least one, and their number. The
// request is valid until the next call.
func (x *Batch) Encode(records []Record, most int) (message []byte, n int) {
	x.message = append(x.message[:0], make([]byte, headroom)...)
	for n = range records {
		x.span = appendSpan(x.span[:0], &records[n])
		if n > 0 && len(x.message)+len(x.span) > most {
			return x.wrap(), n
		}
		x.message = appendBytes(x.message, spans, x.span)
	}
	return x.wrap(), len(records)
}

// wrap puts the enclosing messages around the spans: their tags and lengths go into the headroom.
func (x *Batch) wrap() []byte {
	var room [2 * headroom]byte
	scope := len(x.message) - headroom
	head := appendResource(room[:0])
	head = protowire.AppendTag(head, scopeSpans, protowire.BytesType)
	head = protowire.AppendVarint(head, uint64(scope))
	outer := protowire.AppendTag(nil, resourceSpans, protowire.BytesType)
	outer = protowire.AppendVarint(outer, uint64(len(head)+scope))
	begin := headroom - len(outer) - len(head)
	copy(x.message[begin:], outer)
	copy(x.message[begin+len(outer):], head)
	return x.message[begin:]
}

// Size is the most bytes that a record has in a request, if its answer has check bytes.
func Size(check int) int { return base64.StdEncoding.EncodedLen(check) + spanBytes }

// spanBytes is the most that a span has besides the answer to its check.
const spanBytes = 384

// appendSpan appends the span of a record.
func appendSpan(b []byte, r *Record) []byte {
	var ids [24]byte
	binary.LittleEndian.PutUint64(ids[:], rand.Uint64())
	binary.LittleEndian.PutUint64(ids[8:], rand.Uint64())
	binary.LittleEndian.PutUint64(ids[16:], rand.Uint64()|1) // never the zero that stands for none
	b = appendBytes(b, spanTraceID, ids[:16])
	b = appendBytes(b, spanSpanID, ids[16:])
	b = protowire.AppendTag(b, spanName, protowire.BytesType)
	b = protowire.AppendString(b, "Aperture Check")
	b = protowire.AppendTag(b, spanKind, protowire.VarintType)
	b = protowire.AppendVarint(b, kindInternal)
	b = protowire.AppendTag(b, spanStart, protowire.Fixed64Type)
	b = protowire.AppendFixed64(b, uint64(r.Start))
	b = protowire.AppendTag(b, spanEnd, protowire.Fixed64Type)
	b = protowire.AppendFixed64(b, uint64(r.End))
	b = appendText(b, spanAttribute, keySource, "sdk")
	b = appendNumber(b, spanAttribute, keyStart, r.Start)
	b = appendNumber(b, spanAttribute, keyWork, r.Work)
	b = appendNumber(b, spanAttribute, keyEnd, r.End)
	b = appendText(b, spanAttribute, keyStatus, r.Status)
	if r.DryRun {
		b = appendText(b, spanAttribute, keyDryRun, "true")
	}
	if r.Canceled {
		b = appendText(b, spanAttribute, keyCanceled, "true")
	}
	b = appendTextHead(b, spanAttribute, keyCheck, base64.StdEncoding.EncodedLen(len(r.Check)))
	return base64.StdEncoding.AppendEncode(b, r.Check)
}

func appendBytes(b []byte, field protowire.Number, data []byte) []byte {
	b = protowire.AppendTag(b, field, protowire.BytesType)
	return protowire.AppendBytes(b, data)
}

// appendText appends an attribute with a string as the field.
func appendText(b []byte, field protowire.Number, key, value string) []byte {
	b = appendTextHead(b, field, key, len(value))
	return append(b, value...)
}

// appendTextHead appends such an attribute up to its string, which has that length.
func appendTextHead(b []byte, field protowire.Number, key string, length int) []byte {
	b = appendKey(b, field, key, protowire.SizeTag(valueString)+protowire.SizeBytes(length))
	b = protowire.AppendTag(b, valueString, protowire.BytesType)
	return protowire.AppendVarint(b, uint64(length))
}

// appendNumber appends an attribute with an integer as the field.
func appendNumber(b []byte, field protowire.Number, key string, value int64) []byte {
	b = appendKey(b, field, key, protowire.SizeTag(valueInt)+protowire.SizeVarint(uint64(value)))
	b = protowire.AppendTag(b, valueInt, protowire.VarintType)
	return protowire.AppendVarint(b, uint64(value))
}

// appendKey appends an attribute up to its value, which has that size.
func appendKey(b []byte, field protowire.Number, key string, value int) []byte {
	size := protowire.SizeTag(attributeKey) + protowire.SizeBytes(len(key)) + protowire.SizeTag(attributeValue) + protowire.SizeBytes(value)
	b = protowire.AppendTag(b, field, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(size))
	b = protowire.AppendTag(b, attributeKey, protowire.BytesType)
	b = protowire.AppendString(b, key)
	b = protowire.AppendTag(b, attributeValue, protowire.BytesType)
	return protowire.AppendVarint(b, uint64(value))
}
