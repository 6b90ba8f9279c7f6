package agent

import (
	"bytes"
	"context"
	"slices"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/protofield"
	"github.com/headgate-go/headgate/internal/telemetry"
	"github.com/headgate-go/headgate/internal/wire"
)

// read tells the engine how long the flow of the span took, and how it ended. If the client does not end its flows itself,
// read ends the flow too, because no other message comes. A slot is freed once, by its name in the check's answer, which
// only the client with that answer has. A latency counts once for each answer, and is at most the time since that answer.
func (s *Service) read(ctx context.Context, span []byte) {
	measured, awaited := s.engine.Measures(""), s.outcomes.any()
	r, err := telemetry.Read(span)
	if err != nil || r.Check == nil && r.JSON == nil || !measured && !awaited && expectsEnd(&r) {
		return
	}
	latency, waited, ok := latencyOf(&r)
	m := readCheck(&r, func(controlPoint string, expectEnd bool) bool {
		return !expectEnd || awaited || measured && ok && s.engine.Measures(controlPoint)
	})
	if m == nil {
		return
	}
	if !m.GetExpectEnd() {
		s.engine.EndSlots(ctx, slotNames(wire.Held(m)))
	}
	if awaited && m.GetStart().IsValid() {
		s.outcomes.settle(ctx, m.GetStart().AsTime(), m.GetLimiterDecisions(), outcomeOf(&r, m))
	}
	if start := m.GetStart(); measured && ok && worked(m, r.DryRun) && start.IsValid() && s.issued.take(start.AsTime()) {
		s.engine.Observe(m.GetControlPoint(), m.GetTelemetryFlowLabels(), believable(m, latency, waited))
	}
}

// believable is the latency of the work, of which latencyOf tells, as far as it can be.
func believable(m *checkv1.CheckResponse, latency time.Duration, waited bool) time.Duration {
	latency = min(latency, max(time.Since(m.GetStart().AsTime()), 0))
	if waited {
		latency = max(latency-checked(m), 0)
	}
	return latency
}

// outcomeOf returns how the flow ended, by its span. The outcome is unknown if the flow had no work to do, or if its
// caller canceled it. Work that took no time counts as a nanosecond, because zero means that the time is not known.
func outcomeOf(r *telemetry.Record, m *checkv1.CheckResponse) agentapi.Outcome {
	switch {
	case r.Canceled || !worked(m, r.DryRun):
		return agentapi.Outcome{Ended: agentapi.EndedUnknown}
	case r.Status != telemetry.OK:
		return agentapi.Outcome{Ended: agentapi.EndedFailed}
	}
	o := agentapi.Outcome{Ended: agentapi.EndedOK, Took: 1}
	if latency, waited, ok := latencyOf(r); ok {
		o.Took = max(believable(m, latency, waited), 1)
	}
	return o
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

// longest is the longest latency that counts. Beyond it, a clock is wrong.
const longest = 24 * time.Hour

// latencyOf returns how long the work of a flow took. ok is false if the flow did not run, did not end well, or has
// times that make no sense. waited is true if the latency includes the time of the check, because the work of one SDK
// starts with the flow.
func latencyOf(r *telemetry.Record) (latency time.Duration, waited, ok bool) {
	latency = time.Duration(r.End - r.Work)
	ok = r.Status == telemetry.OK && r.Work > 0 && r.End >= r.Work && latency <= longest
	return latency, r.Work == r.Start, ok
}

// expectsEnd reports whether the client of an answer ends the flow itself, as most do. Where that is easy, it does not
// decode the rest of the answer.
func expectsEnd(r *telemetry.Record) bool {
	if r.Check != nil {
		_, expects := glance(r.Check)
		return expects
	}
	for _, name := range []string{`"expectEnd"`, `"expect_end"`} {
		if _, after, ok := bytes.Cut(r.JSON, []byte(name)); ok {
			return bytes.HasPrefix(bytes.TrimLeft(after, ": \t\r\n"), []byte("true"))
		}
	}
	return false
}

// glance reads what is needed of every answer.
func glance(check []byte) (controlPoint string, expectEnd bool) {
	protofield.Walk(check, func(field protowire.Number, value []byte, number uint64) {
		switch field { //nolint:exhaustive // of the numbers of fields that there are, two are of interest
		case checkControlPoint:
			controlPoint = string(value)
		case checkExpectEnd:
			expectEnd = number != 0
		}
	})
	return controlPoint, expectEnd
}

// The bounds of an answer in a span. Three bytes of JSON can become a large object, so JSON is bounded by its size. In
// the other form, elements beyond the bounds are left out.
const (
	maxCheckJSON = 256 << 10
	maxDecisions = 1 << 10
	maxTelemetry = 1 << 12 // labels
)

// readCheck reads an answer in either of its forms, if it is wanted; nil if not.
func readCheck(r *telemetry.Record, wanted func(controlPoint string, expectEnd bool) bool) *checkv1.CheckResponse {
	m := new(checkv1.CheckResponse)
	if r.Check == nil {
		if len(r.JSON) > maxCheckJSON || (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(r.JSON, m) != nil || !wanted(m.GetControlPoint(), m.GetExpectEnd()) {
			return nil
		}
		return m
	}
	if !wanted(glance(r.Check)) {
		return nil
	}
	decisions, labels := 0, 0
	data, err := protofield.Filter(r.Check, func(field protowire.Number, _ []byte) bool {
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

// withoutValues returns an answer without its part about the global cache.
func withoutValues(check []byte) []byte {
	var lookups [][]byte
	rest, err := protofield.Filter(check, func(field protowire.Number, data []byte) bool {
		if field == checkLookup {
			lookups = append(lookups, data)
		}
		return field != checkLookup
	})
	if err != nil || len(lookups) == 0 {
		return check
	}
	for _, lookup := range lookups {
		result, err := protofield.Filter(lookup, func(field protowire.Number, _ []byte) bool { return field == lookupResponseResult })
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

// worked reports whether the flow had work to do. It had none if it was rejected, except in dry run, or if its result
// was in the cache. Some SDKs end rejected flows as "OK" too.
func worked(m *checkv1.CheckResponse, dryRun bool) bool {
	if m.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_ACCEPTED && !dryRun {
		return false
	}
	r := m.GetCacheLookupResponse().GetResultCacheResponse()
	return r == nil || r.GetLookupStatus() != checkv1.CacheLookupStatus_HIT || r.GetOperationStatus() != checkv1.CacheOperationStatus_SUCCESS
}
