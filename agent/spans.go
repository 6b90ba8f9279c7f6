package agent

import (
	"bytes"
	"encoding/base64"
	"math"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/collector"
	"github.com/headgate-go/headgate/internal/wire"
)

// read tells the engine how long the flow took that the span is about, and ends it if its client said that it would not:
// then the span is all that comes when the flow ends. A slot is freed by its name in the check's answer, which only the
// client has that was given it, and once. A latency counts for an answer that was given, once, and is no longer than the
// time since then.
func (s *Service) read(span []byte) {
	measured := s.engine.Measures("")
	r := reportOf(span)
	if r.check == nil || !measured && expectsEnd(r.check) {
		return
	}
	m := readCheck(r.check, func(controlPoint string, expectEnd bool) bool {
		return !expectEnd || measured && r.ok && s.engine.Measures(controlPoint)
	})
	if m == nil {
		return
	}
	if !m.GetExpectEnd() {
		for _, ref := range wire.Held(m) {
			s.end(ref)
		}
	}
	if start := m.GetStart(); measured && r.ok && worked(m, r.dryRun) && start.IsValid() && s.issued.take(start.AsTime()) {
		latency := min(r.latency, max(time.Since(start.AsTime()), 0))
		if r.waited {
			latency = max(latency-checked(m), 0)
		}
		s.engine.Observe(m.GetControlPoint(), m.GetTelemetryFlowLabels(), latency)
	}
}

// Numbers of fields of CheckResponse.
const (
	checkStart        protowire.Number = 1
	checkEnd          protowire.Number = 2
	checkControlPoint protowire.Number = 5
	checkTelemetry    protowire.Number = 7
	checkDecisionType protowire.Number = 8
	checkDecisions    protowire.Number = 12
	checkLookup       protowire.Number = 15
	checkExpectEnd    protowire.Number = 16

	lookupResponseResult protowire.Number = 1 // of CacheLookupResponse
)

// longest is beyond what a flow takes: clocks are wrong then.
const longest = 24 * time.Hour

// A report is what a span tells of a flow.
type report struct {
	check   []byte        // the answer to the flow's check; nil for none
	latency time.Duration // how long its work took
	waited  bool          // the latency has the check's time in it: one SDK has the work start with the flow
	ok      bool          // the flow ran and ended well, and the times make sense
	dryRun  bool          // the flow ran whatever was decided
}

func reportOf(span []byte) report {
	var check []byte
	var start, begin, end int64
	good, dryRun := false, false
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
			begin = ofMillis(number)
		case "aperture.flow_end_timestamp":
			end = number
		case "aperture.flow_end_timestamp_ms":
			end = ofMillis(number)
		case "aperture.flow.status":
			good = strings.EqualFold(string(text), "OK") // one SDK has it in small letters
		case "aperture.check_response":
			check = text
		case collector.DryRun:
			dryRun = string(text) == "true"
		}
	})
	r := report{check: check, latency: time.Duration(end - begin), waited: begin == start, dryRun: dryRun}
	r.ok = good && check != nil && begin > 0 && end >= begin && r.latency <= longest
	return r
}

// ofMillis is a time in nanoseconds; 0, which is none, where it has no room for it.
func ofMillis(n int64) int64 {
	if n <= 0 || n > math.MaxInt64/int64(time.Millisecond) {
		return 0
	}
	return n * int64(time.Millisecond)
}

// expectsEnd reports whether an answer says that its client ends the flow itself, as most do, without decoding the rest
// of it where that is easy.
func expectsEnd(text []byte) bool {
	if len(text) > 0 && text[0] == '{' {
		for _, name := range []string{`"expectEnd"`, `"expect_end"`} {
			if _, after, ok := bytes.Cut(text, []byte(name)); ok {
				return bytes.HasPrefix(bytes.TrimLeft(after, ": \t\r\n"), []byte("true"))
			}
		}
		return false
	}
	data, err := base64.StdEncoding.AppendDecode(nil, text)
	if err != nil {
		return true // nothing can be read from it
	}
	_, expects := glance(data)
	return expects
}

// glance reads what is of interest of every answer.
func glance(check []byte) (controlPoint string, expectEnd bool) {
	walk(check, func(field protowire.Number, value []byte, number uint64) {
		switch field { //nolint:exhaustive // of the numbers of fields that there are, two are of interest
		case checkControlPoint:
			controlPoint = string(value)
		case checkExpectEnd:
			expectEnd = number != 0
		}
	})
	return controlPoint, expectEnd
}

// maxCheckJSON is how many bytes of JSON are decoded of an answer, in which three bytes can be a large object. In the other
// form such elements are left out.
const (
	maxCheckJSON = 256 << 10
	maxDecisions = 1 << 10
	maxTelemetry = 1 << 12 // labels
)

// readCheck reads an answer in either of its forms, if it is wanted; nil if not.
func readCheck(text []byte, wanted func(controlPoint string, expectEnd bool) bool) *checkv1.CheckResponse {
	m := new(checkv1.CheckResponse)
	if len(text) > 0 && text[0] == '{' {
		if len(text) > maxCheckJSON || (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(text, m) != nil || !wanted(m.GetControlPoint(), m.GetExpectEnd()) {
			return nil
		}
		return m
	}
	data, err := base64.StdEncoding.AppendDecode(nil, text)
	if err != nil || !wanted(glance(data)) {
		return nil
	}
	decisions, labels := 0, 0
	data, err = filter(data, func(field protowire.Number, _ []byte) bool {
		switch field { //nolint:exhaustive // of the numbers of fields that there are, a few are of interest
		case checkStart, checkEnd, checkControlPoint, checkDecisionType, checkLookup, checkExpectEnd:
			return true
		case checkDecisions:
			decisions++
			return decisions <= maxDecisions
		case checkTelemetry:
			labels++
			return labels <= maxTelemetry
		}
		return false
	})
	if err != nil || proto.Unmarshal(withoutValues(data), m) != nil {
		return nil
	}
	return m
}

// withoutValues is an answer without what it has of the global cache.
func withoutValues(check []byte) []byte {
	var lookups [][]byte
	rest, err := filter(check, func(field protowire.Number, data []byte) bool {
		if field == checkLookup {
			lookups = append(lookups, data)
		}
		return field != checkLookup
	})
	if err != nil || len(lookups) == 0 {
		return check
	}
	for _, lookup := range lookups {
		result, err := filter(lookup, func(field protowire.Number, _ []byte) bool { return field == lookupResponseResult })
		if err != nil {
			return check
		}
		rest = protowire.AppendBytes(protowire.AppendTag(slices.Clip(rest), checkLookup, protowire.BytesType), result)
	}
	return rest
}

// checked is how long the check took in the agent, with the time in queues.
func checked(m *checkv1.CheckResponse) time.Duration {
	if m.GetStart() == nil || m.GetEnd() == nil {
		return 0
	}
	return min(max(m.GetEnd().AsTime().Sub(m.GetStart().AsTime()), 0), longest)
}

// worked reports whether the flow had work to do: not if it was rejected, which some SDKs end as "OK" all the same, unless
// its client was in dry run, and not if its result was in the cache.
func worked(m *checkv1.CheckResponse, dryRun bool) bool {
	if m.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_ACCEPTED && !dryRun {
		return false
	}
	r := m.GetCacheLookupResponse().GetResultCacheResponse()
	return r == nil || r.GetLookupStatus() != checkv1.CacheLookupStatus_HIT || r.GetOperationStatus() != checkv1.CacheOperationStatus_SUCCESS
}
