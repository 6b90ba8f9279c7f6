package flowctl

import (
	"encoding/base64"
	"encoding/binary"
	"math/rand/v2"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/headgate-go/headgate/internal/collector"
	"github.com/headgate-go/headgate/internal/version"
)

// A batch encodes flow records straight into the bytes of an OTLP request, opentelemetry.proto.trace.v1.TracesData: as
// messages each would cost more than twenty objects. Its buffers are used again.
type batch struct {
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

// encode gives a request with as many of the records as it may hold, and says how many. It is good until the next call.
func (x *batch) encode(records []record) (message []byte, n int) {
	x.message = append(x.message[:0], make([]byte, headroom)...)
	for n = range records {
		x.span = appendSpan(x.span[:0], &records[n])
		if n > 0 && len(x.message)+len(x.span) > batchBytes {
			return x.wrap(), n
		}
		x.message = appendBytes(x.message, collector.Spans, x.span)
	}
	return x.wrap(), len(records)
}

// wrap puts the enclosing messages around the spans: their tags and lengths go into the headroom.
func (x *batch) wrap() []byte {
	var room [2 * headroom]byte
	scope := len(x.message) - headroom
	head := appendResource(room[:0])
	head = protowire.AppendTag(head, collector.ScopeSpans, protowire.BytesType)
	head = protowire.AppendVarint(head, uint64(scope))
	outer := protowire.AppendTag(nil, collector.ResourceSpans, protowire.BytesType)
	outer = protowire.AppendVarint(outer, uint64(len(head)+scope))
	begin := headroom - len(outer) - len(head)
	copy(x.message[begin:], outer)
	copy(x.message[begin+len(outer):], head)
	return x.message[begin:]
}

// spanBytes is what a span has at the most besides the answer to its check.
const spanBytes = 384

// appendSpan appends the span of one record, as protocol.md's telemetry says.
func appendSpan(b []byte, r *record) []byte {
	var ids [24]byte
	binary.LittleEndian.PutUint64(ids[:], rand.Uint64())
	binary.LittleEndian.PutUint64(ids[8:], rand.Uint64())
	binary.LittleEndian.PutUint64(ids[16:], rand.Uint64()|1) // never the zero that stands for none
	st := StatusOK
	if r.failed {
		st = StatusError
	}
	b = appendBytes(b, collector.SpanTraceID, ids[:16])
	b = appendBytes(b, collector.SpanSpanID, ids[16:])
	b = protowire.AppendTag(b, collector.SpanName, protowire.BytesType)
	b = protowire.AppendString(b, "Aperture Check")
	b = protowire.AppendTag(b, collector.SpanKind, protowire.VarintType)
	b = protowire.AppendVarint(b, kindInternal)
	b = protowire.AppendTag(b, collector.SpanStart, protowire.Fixed64Type)
	b = protowire.AppendFixed64(b, uint64(r.start))
	b = protowire.AppendTag(b, collector.SpanEnd, protowire.Fixed64Type)
	b = protowire.AppendFixed64(b, uint64(r.end))
	b = appendText(b, collector.SpanAttribute, "aperture.source", "sdk")
	b = appendNumber(b, collector.SpanAttribute, "aperture.flow_start_timestamp", r.start)
	b = appendNumber(b, collector.SpanAttribute, "aperture.workload_start_timestamp", r.workload)
	b = appendNumber(b, collector.SpanAttribute, "aperture.flow_end_timestamp", r.end)
	b = appendText(b, collector.SpanAttribute, "aperture.flow.status", st.String())
	if r.dryRun {
		b = appendText(b, collector.SpanAttribute, collector.DryRun, "true")
	}
	b = appendTextHead(b, collector.SpanAttribute, "aperture.check_response", base64.StdEncoding.EncodedLen(len(r.check)))
	return base64.StdEncoding.AppendEncode(b, r.check)
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

// appendTextHead appends all of such an attribute but the string, of which it needs the length.
func appendTextHead(b []byte, field protowire.Number, key string, length int) []byte {
	b = appendKey(b, field, key, protowire.SizeTag(collector.ValueString)+protowire.SizeBytes(length))
	b = protowire.AppendTag(b, collector.ValueString, protowire.BytesType)
	return protowire.AppendVarint(b, uint64(length))
}

// appendNumber appends an attribute with an integer as the field.
func appendNumber(b []byte, field protowire.Number, key string, value int64) []byte {
	b = appendKey(b, field, key, protowire.SizeTag(collector.ValueInt)+protowire.SizeVarint(uint64(value)))
	b = protowire.AppendTag(b, collector.ValueInt, protowire.VarintType)
	return protowire.AppendVarint(b, uint64(value))
}

// appendKey appends an attribute up to its value, which has that size.
func appendKey(b []byte, field protowire.Number, key string, value int) []byte {
	size := protowire.SizeTag(collector.AttributeKey) + protowire.SizeBytes(len(key)) + protowire.SizeTag(collector.AttributeValue) + protowire.SizeBytes(value)
	b = protowire.AppendTag(b, field, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(size))
	b = protowire.AppendTag(b, collector.AttributeKey, protowire.BytesType)
	b = protowire.AppendString(b, key)
	b = protowire.AppendTag(b, collector.AttributeValue, protowire.BytesType)
	return protowire.AppendVarint(b, uint64(value))
}
