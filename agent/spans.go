package agent

import (
	"encoding/base64"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/collector"
)

// read tells the engine how long the flow took that the span is about.
func (s *Server) read(span []byte) {
	if !s.engine.Measures("") {
		return
	}
	if check, latency, waited, ok := ranFor(span); ok {
		if m := readCheck(check, s.engine.Measures); m != nil && worked(m) {
			if waited {
				latency = max(latency-checked(m), 0)
			}
			s.engine.Observe(m.GetControlPoint(), m.GetTelemetryFlowLabels(), latency)
		}
	}
}

// checkControlPoint is the number of a field of CheckResponse.
const checkControlPoint protowire.Number = 5

// longest is beyond what a flow takes: clocks are wrong then.
const longest = 24 * time.Hour

// ranFor gives the answer to the flow's check, as the span has it, and how long the flow's work took. It is not ok where
// the flow did not run, or not end well. Waited says that the time is that of the check too: one SDK has the work start
// with the flow.
func ranFor(span []byte) (check []byte, latency time.Duration, waited, ok bool) {
	var start, begin, end int64
	good := false
	walk(span, func(field protowire.Number, attribute []byte, _ uint64) {
		if field != collector.SpanAttribute {
			return
		}
		var key, text []byte
		var number int64
		walk(attribute, func(field protowire.Number, data []byte, _ uint64) {
			if field == collector.AttributeKey {
				key = data
			}
			if field == collector.AttributeValue {
				walk(data, func(field protowire.Number, data []byte, n uint64) {
					if field == collector.ValueString {
						text = data
					}
					if field == collector.ValueInt {
						number = int64(n)
					}
				})
			}
		})
		switch string(key) {
		case "aperture.flow_start_timestamp":
			start = number
		case "aperture.workload_start_timestamp":
			begin = number
		case "aperture.workload_start_timestamp_ms":
			begin = number * int64(time.Millisecond)
		case "aperture.flow_end_timestamp":
			end = number
		case "aperture.flow_end_timestamp_ms":
			end = number * int64(time.Millisecond)
		case "aperture.flow.status":
			good = strings.EqualFold(string(text), "OK") // one SDK has it in small letters
		case "aperture.check_response":
			check = text
		}
	})
	latency = time.Duration(end - begin)
	return check, latency, begin == start, good && check != nil && begin != 0 && latency >= 0 && latency <= longest
}

// walk calls visit with each field of the message, up to where it is malformed: with its bytes, or its number.
func walk(message []byte, visit func(field protowire.Number, data []byte, number uint64)) {
	for len(message) > 0 {
		field, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return
		}
		message = message[n:]
		var data []byte
		var number uint64
		switch kind {
		case protowire.BytesType:
			data, n = protowire.ConsumeBytes(message)
		case protowire.VarintType:
			number, n = protowire.ConsumeVarint(message)
		default:
			n = protowire.ConsumeFieldValue(field, kind, message)
		}
		if n < 0 {
			return
		}
		visit(field, data, number)
		message = message[n:]
	}
}

// readCheck reads an answer in either of its forms, if it is about a control point that is wanted; nil if not.
func readCheck(text []byte, wanted func(controlPoint string) bool) *checkv1.CheckResponse {
	m := new(checkv1.CheckResponse)
	if len(text) > 0 && text[0] == '{' {
		if (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(text, m) != nil || !wanted(m.GetControlPoint()) {
			return nil
		}
		return m
	}
	data, err := base64.StdEncoding.AppendDecode(nil, text)
	if err != nil {
		return nil
	}
	found := false
	walk(data, func(field protowire.Number, value []byte, _ uint64) {
		if field == checkControlPoint {
			found = wanted(string(value))
		}
	})
	if !found || proto.Unmarshal(data, m) != nil {
		return nil
	}
	return m
}

// checked is how long the check took in the agent, with the time in queues.
func checked(m *checkv1.CheckResponse) time.Duration {
	if m.GetStart() == nil || m.GetEnd() == nil {
		return 0
	}
	return min(max(m.GetEnd().AsTime().Sub(m.GetStart().AsTime()), 0), longest)
}

// worked says whether the flow had work to do: not if it was rejected, which some SDKs end as "OK" all the same, and
// not if its result was in the cache.
func worked(m *checkv1.CheckResponse) bool {
	if m.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_ACCEPTED {
		return false
	}
	r := m.GetCacheLookupResponse().GetResultCacheResponse()
	return r == nil || r.GetLookupStatus() != checkv1.CacheLookupStatus_HIT || r.GetOperationStatus() != checkv1.CacheOperationStatus_SUCCESS
}
