// Package wire translates between the plain values of package agentapi and the messages of the protocol.
package wire

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
)

// typeLabel is the label that agents add to a flow's telemetry.
const (
	typeLabel   = "aperture.control_point_type"
	typeFeature = "feature"
)

// Request is the message that asks about a flow.
func Request(req *agentapi.Request) *checkv1.CheckRequest {
	m := &checkv1.CheckRequest{
		ControlPoint: req.ControlPoint,
		Labels:       req.Labels.Merged(),
		RampMode:     req.RampMode(),
		ExpectEnd:    true,
		DryRun:       req.DryRun(),
		MaxWait:      maxWait(req),
	}
	if req.Lookup() != nil {
		m.CacheLookupRequest = Lookup(req)
	}
	return m
}

// maxWait is the request's MaxWait; nil where the deadline is the only bound.
func maxWait(req *agentapi.Request) *durationpb.Duration {
	if most := req.MaxWait(); most > 0 {
		return durationpb.New(most)
	}
	return nil
}

// Waiting is what the max_wait of a check says; nil where it says nothing.
func Waiting(maxWait *durationpb.Duration) *agentapi.Waiting {
	if maxWait == nil {
		return nil
	}
	return &agentapi.Waiting{MaxWait: max(maxWait.AsDuration(), agentapi.NoWait)}
}

// Lookup is the message that asks for the request's cache entries.
func Lookup(req *agentapi.Request) *checkv1.CacheLookupRequest {
	asked := req.Lookup()
	return &checkv1.CacheLookupRequest{
		ControlPoint:    req.ControlPoint,
		ResultCacheKey:  asked.Result,
		GlobalCacheKeys: asked.Global,
	}
}

// Response is the message for a verdict. It shares the verdict's cached values.
func Response(req *agentapi.Request, v *agentapi.Verdict) *checkv1.CheckResponse {
	var all []*checkv1.LimiterDecision
	for i := range v.Len() {
		all = append(all, decision(req, v.At(i)))
	}
	return response(req, v, req.Labels.Merged(), all)
}

// response is Response with these labels and decisions.
func response(req *agentapi.Request, v *agentapi.Verdict, labels map[string]string, decisions []*checkv1.LimiterDecision) *checkv1.CheckResponse {
	telemetry := make(map[string]string, len(labels)+1)
	maps.Copy(telemetry, labels)
	telemetry[typeLabel] = typeFeature
	end := v.Start
	if v.Details != nil {
		end += int64(v.Details.Waited)
	}
	m := &checkv1.CheckResponse{
		Start:               timestamppb.New(time.Unix(0, v.Start)),
		End:                 timestamppb.New(time.Unix(0, end)),
		ControlPoint:        req.ControlPoint,
		FlowLabelKeys:       slices.Sorted(maps.Keys(labels)),
		TelemetryFlowLabels: telemetry,
		LimiterDecisions:    decisions,
		ExpectEnd:           true,
	}
	if service := req.Labels.Service(); service != "" {
		m.Services = []string{service}
	}
	if v.Rejected() {
		r := v.Rejection()
		m.DecisionType = checkv1.CheckResponse_DECISION_TYPE_REJECTED
		m.RejectReason = checkv1.CheckResponse_RejectReason(r.Reason)
		m.DeniedResponseStatusCode = deniedStatus(r)
		m.Cause = checkv1.CheckResponse_Cause(r.Cause)
		if r.RetryAfter > 0 {
			m.WaitTime = durationpb.New(r.RetryAfter)
		}
		if !req.DryRun() {
			return m
		}
	}
	if asked := req.Lookup(); asked != nil && v.Details != nil {
		m.CacheLookupResponse = cacheLookup(asked, v.Details)
	}
	return m
}

// deniedStatus is the rejection's status, or that of the stage that rejected. A flow in ramp mode that no ramp matches
// has none, because no stage saw it.
func deniedStatus(r agentapi.Rejection) checkv1.StatusCode {
	switch {
	case r.Status != 0:
		return checkv1.StatusCode(r.Status)
	case r.Reason == agentapi.ReasonNoMatchingRamp && r.By == nil:
		return checkv1.StatusCode_Empty
	default:
		return statusByReason(r.Reason)
	}
}

func statusByReason(r agentapi.Reason) checkv1.StatusCode {
	switch r {
	case agentapi.ReasonRateLimited:
		return http.StatusTooManyRequests
	case agentapi.ReasonNoTokens:
		return http.StatusServiceUnavailable
	case agentapi.ReasonNotSampled, agentapi.ReasonNoMatchingRamp:
		return http.StatusForbidden
	default:
		return checkv1.StatusCode_Empty
	}
}

func decision(req *agentapi.Request, d *agentapi.LimiterDecision) *checkv1.LimiterDecision {
	c := d.Component
	m := &checkv1.LimiterDecision{
		PolicyName:               c.Policy,
		PolicyHash:               c.Hash,
		ComponentId:              c.ID,
		Dropped:                  d.Dropped,
		DeniedResponseStatusCode: checkv1.StatusCode(c.DeniedStatus),
		DryRun:                   c.DryRun,
	}
	info := &infos[c.Info]
	wait := d.Wait()
	if c.DryRun { // then nothing has to be waited for
		wait = 0
	}
	if wait > 0 || info.waits {
		m.WaitTime = durationpb.New(wait)
	}
	if d.Scope == agentapi.ScopeNone {
		m.Reason = checkv1.LimiterDecision_LIMITER_REASON_KEY_NOT_FOUND
	}
	tokens := &checkv1.LimiterDecision_TokensInfo{Remaining: d.Remaining, Consumed: d.Consumed}
	if d.Scope != agentapi.ScopeNone {
		tokens.Current = d.Capacity - d.Remaining
	}
	told := telling{d: d, tokens: tokens}
	if c.Workload != nil {
		told.workload, told.priority = c.Workload(&req.Labels)
	}
	if !hasTokens(d) {
		told.tokens = nil
	}
	info.tell(m, told)
	return m
}

// hasTokens reports whether the component has a quota, and was asked for what is left of it. The probes of a circuit breaker
// are no quota.
func hasTokens(d *agentapi.LimiterDecision) bool {
	return !d.Component.Outcomes && !(d.Dropped && (d.Cause == agentapi.CauseLate || d.Cause == agentapi.CauseLongLabel))
}

// An infoOf encodes the decisions of components with one info.
type infoOf struct {
	tell  func(m *checkv1.LimiterDecision, t telling)
	waits bool // the wait is always there
}

// infos has a row for each info, in their order.
var infos = [...]infoOf{ //nolint:gochecknoglobals // a table, never written to
	{tellRateLimiter, true},
	{tellConcurrencyLimiter, true},
	{tellQuotaScheduler, false},
	{tellConcurrencyScheduler, false},
	{tellLoadScheduler, false},
	{tellSampler, false},
}

// This does not compile if a row is missing, because the table is then shorter than Infos.
var _ [agentapi.Infos]infoOf = infos

// telling is what the wire reports of a decision.
type telling struct {
	d      *agentapi.LimiterDecision
	tokens *checkv1.LimiterDecision_TokensInfo // nil if there is nothing to tell of them

	// Of a scheduler.
	workload string
	priority float64
}

func tellRateLimiter(m *checkv1.LimiterDecision, t telling) {
	m.Details = &checkv1.LimiterDecision_RateLimiterInfo_{RateLimiterInfo: &checkv1.LimiterDecision_RateLimiterInfo{
		Label: Label(t.d), TokensInfo: t.tokens,
	}}
}

func tellConcurrencyLimiter(m *checkv1.LimiterDecision, t telling) {
	m.Details = &checkv1.LimiterDecision_ConcurrencyLimiterInfo_{ConcurrencyLimiterInfo: &checkv1.LimiterDecision_ConcurrencyLimiterInfo{
		Label: Label(t.d), TokensInfo: t.tokens, RequestId: slotID(t.d.Slot()),
	}}
}

func tellQuotaScheduler(m *checkv1.LimiterDecision, t telling) {
	if t.d.Dropped && t.tokens != nil {
		t.tokens.Reset() // as agents have it
	}
	m.Details = &checkv1.LimiterDecision_QuotaSchedulerInfo_{QuotaSchedulerInfo: &checkv1.LimiterDecision_QuotaSchedulerInfo{
		Label: Label(t.d), WorkloadIndex: t.workload, TokensInfo: t.tokens, Priority: t.priority,
	}}
}

func tellConcurrencyScheduler(m *checkv1.LimiterDecision, t telling) {
	m.Details = &checkv1.LimiterDecision_ConcurrencySchedulerInfo_{ConcurrencySchedulerInfo: &checkv1.LimiterDecision_ConcurrencySchedulerInfo{
		Label: Label(t.d), WorkloadIndex: t.workload, TokensInfo: t.tokens, Priority: t.priority, RequestId: slotID(t.d.Slot()),
	}}
}

func tellLoadScheduler(m *checkv1.LimiterDecision, t telling) {
	switch {
	case t.tokens == nil:
	case t.d.Dropped:
		t.tokens.Reset()
	default:
		t.tokens.Current = 0 // what its bucket holds changes with the load
	}
	m.Details = &checkv1.LimiterDecision_LoadSchedulerInfo{LoadSchedulerInfo: &checkv1.LimiterDecision_SchedulerInfo{
		WorkloadIndex: t.workload, TokensInfo: t.tokens, Priority: t.priority,
	}}
}

func tellSampler(m *checkv1.LimiterDecision, t telling) {
	info := &checkv1.LimiterDecision_SamplerInfo{}
	if t.d.Scope == agentapi.ScopeLabel {
		info.Label = Label(t.d)
	}
	m.Details = &checkv1.LimiterDecision_SamplerInfo_{SamplerInfo: info}
}

// Label is how the wire names the bucket that decided.
func Label(d *agentapi.LimiterDecision) string {
	switch d.Scope {
	case agentapi.ScopeDefault:
		return "default"
	case agentapi.ScopeLabel:
		return d.Component.LabelKey + ":" + d.Label
	default:
		return ""
	}
}

// slotID is how the wire names a slot; "" for none.
func slotID(slot uint64) string {
	if slot == 0 {
		return ""
	}
	return strconv.FormatUint(slot, 16)
}

// ReadSlotID reads the wire's name of a slot; 0 when it is none.
func ReadSlotID(id string) uint64 {
	slot, err := strconv.ParseUint(id, 16, 64)
	if err != nil {
		return 0
	}
	return slot
}

func cacheLookup(asked *agentapi.Lookup, x *agentapi.VerdictDetails) *checkv1.CacheLookupResponse {
	m := &checkv1.CacheLookupResponse{}
	if asked.Result != "" {
		m.ResultCacheResponse = KeyLookup(x.Result)
	}
	for _, key := range asked.Global {
		if key == "" {
			continue
		}
		if m.GlobalCacheResponses == nil {
			m.GlobalCacheResponses = make(map[string]*checkv1.KeyLookupResponse, len(asked.Global))
		}
		m.GlobalCacheResponses[key] = KeyLookup(x.Global[key])
	}
	return m
}

// KeyLookup is the message for the outcome of one lookup. It shares the value.
func KeyLookup(a agentapi.CacheAnswer) *checkv1.KeyLookupResponse {
	m := &checkv1.KeyLookupResponse{Value: a.Value}
	if !a.Hit {
		m.LookupStatus = checkv1.CacheLookupStatus_MISS
	}
	if a.Err != nil {
		m.OperationStatus = checkv1.CacheOperationStatus_ERROR
		m.Error = a.Err.Error()
	}
	return m
}

// Read fills the verdict from an agent's answer to req. Every answer makes a verdict: a decision other than ACCEPTED is
// a rejection, as for all clients of the protocol. Of a rejection it reads what the caches had only in dry run, because
// the flow runs then.
func Read(req *agentapi.Request, m *checkv1.CheckResponse, v *agentapi.Verdict) {
	read(req, m, v, matchedNoRamp(m))
}

// read is Read of an answer to a flow that matched no ramp, or did.
func read(req *agentapi.Request, m *checkv1.CheckResponse, v *agentapi.Verdict, noRamp bool) {
	if m.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_ACCEPTED {
		r := agentapi.Rejection{RetryAfter: Wait(m.GetWaitTime())}
		if !noRamp || !req.DryRun() {
			r.By = rejectedBy(m, req.DryRun())
		}
		if reason := m.GetRejectReason(); reason > 0 && reason <= 255 {
			r.Reason = agentapi.Reason(reason)
		}
		if cause := m.GetCause(); cause > 0 && cause < checkv1.CheckResponse_Cause(agentapi.Causes) {
			r.Cause = agentapi.Cause(cause)
		}
		if s := m.GetDeniedResponseStatusCode(); s > 0 && s <= 599 {
			r.Status = int16(s)
		}
		v.Reject(r)
		if !req.DryRun() {
			return
		}
	}
	if req.Lookup() != nil {
		ReadLookup(req, m.GetCacheLookupResponse(), v)
	}
}

// ReadLookup fills the verdict with what an agent found of the request's lookup.
func ReadLookup(req *agentapi.Request, found *checkv1.CacheLookupResponse, v *agentapi.Verdict) {
	x, asked := v.More(), req.Lookup()
	// Only what was asked for is read: an answer that is missing would be a hit, which is the wire's zero value.
	if asked.Result != "" {
		x.Result = cacheAnswer(found.GetResultCacheResponse())
	}
	x.Global = make(map[string]agentapi.CacheAnswer, len(asked.Global))
	for _, key := range asked.Global {
		x.Global[key] = cacheAnswer(found.GetGlobalCacheResponses()[key])
	}
}

// longestWait is half a century. Engines say of a longer wait that no retry can succeed.
const longestWait = 50 * 365 * 24 * time.Hour

// Wait returns the time after which an agent says that a retry can succeed; 0 if it is negative, or so long that none can.
func Wait(d *durationpb.Duration) time.Duration {
	if wait := d.AsDuration(); wait > 0 && wait < longestWait {
		return wait
	}
	return 0
}

// matchedNoRamp reports whether no component rejected the flow, because it is in ramp mode and no ramp matched it: of that an agent of
// Headgate gives no status. In a dry run components of later stages may have dropped the flow all the same.
func matchedNoRamp(m *checkv1.CheckResponse) bool {
	return m.GetRejectReason() == checkv1.CheckResponse_REJECT_REASON_NO_MATCHING_RAMP && m.GetDeniedResponseStatusCode() == checkv1.StatusCode_Empty
}

// rejectedBy is the component that dropped the flow. If several of a stage did, it is the one with the longest wait, which is also the
// answer's. In the request's dry run later stages may have dropped the flow too: the first one has rejected it.
func rejectedBy(m *checkv1.CheckResponse, dryRun bool) *agentapi.Component {
	var by *checkv1.LimiterDecision
	longest := time.Duration(-1)
	for _, d := range m.GetLimiterDecisions() {
		if !d.GetDropped() || d.GetDryRun() {
			continue
		}
		if by != nil && dryRun && stageOf(d) != stageOf(by) {
			break
		}
		if wait := Wait(d.GetWaitTime()); wait > longest {
			by, longest = d, wait
		}
	}
	if by == nil {
		return nil
	}
	return &agentapi.Component{ // for errors; the end of the flow takes names from the answer
		Policy: Clip(by.GetPolicyName()), Hash: Clip(by.GetPolicyHash()), ID: Clip(by.GetComponentId()), LabelKey: Clip(labelKey(by)),
	}
}

// stageOf returns which stage of an engine makes decisions of the kind; they come in the order of the stages. Samplers and ramps are of two
// stages, but no sampler or ramp has a wait, so the first of them counts.
func stageOf(d *checkv1.LimiterDecision) int {
	switch d.GetDetails().(type) {
	case *checkv1.LimiterDecision_SamplerInfo_:
		return 1
	case *checkv1.LimiterDecision_RateLimiterInfo_, *checkv1.LimiterDecision_ConcurrencyLimiterInfo_:
		return 2
	case *checkv1.LimiterDecision_ConcurrencySchedulerInfo_:
		return 3
	default: // quota and load schedulers
		return 4
	}
}

// labelKey is the key of the label that the decision names as "key:value". The value may hold colons, the keys in use
// do not.
func labelKey(d *checkv1.LimiterDecision) string {
	label := cmp.Or(d.GetRateLimiterInfo().GetLabel(), d.GetConcurrencyLimiterInfo().GetLabel(), d.GetQuotaSchedulerInfo().GetLabel(),
		d.GetConcurrencySchedulerInfo().GetLabel(), d.GetSamplerInfo().GetLabel()) // it has one of these
	if key, _, ok := strings.Cut(label, ":"); ok {
		return key
	}
	return ""
}

func cacheAnswer(m *checkv1.KeyLookupResponse) agentapi.CacheAnswer {
	switch {
	case m == nil:
		return agentapi.CacheAnswer{}
	case m.GetOperationStatus() != checkv1.CacheOperationStatus_SUCCESS || m.GetError() != "":
		return agentapi.CacheAnswer{Err: CacheError(m.GetError())}
	default:
		return agentapi.CacheAnswer{Value: m.GetValue(), Hit: m.GetLookupStatus() == checkv1.CacheLookupStatus_HIT}
	}
}

// CacheError is the error for what an agent says of a cache entry.
func CacheError(text string) error {
	if text == "" {
		return errors.New("the agent reports an error")
	}
	return fmt.Errorf("the agent reports: %s", Clip(text))
}

// Held returns references to the slots that the flow holds by the answer. A rejected flow may hold slots too, of a
// stage before the one that rejected it. A dropped decision holds nothing, whatever it says.
func Held(m *checkv1.CheckResponse) []*checkv1.InflightRequestRef {
	var refs []*checkv1.InflightRequestRef
	for _, d := range m.GetLimiterDecisions() {
		if ref := held(d); ref != nil {
			refs = append(refs, ref)
		}
	}
	return refs
}

// Holds returns how many slots the flow can lose: those that it holds by the answer, without slots of components in dry run. No limit is
// broken if others get these.
func Holds(m *checkv1.CheckResponse) (slots int) {
	for _, d := range m.GetLimiterDecisions() {
		if !d.GetDropped() && !d.GetDryRun() && cmp.Or(d.GetConcurrencyLimiterInfo().GetRequestId(), d.GetConcurrencySchedulerInfo().GetRequestId()) != "" {
			slots++
		}
	}
	return slots
}

// held is a reference to the slot that the decision says the flow holds; nil for none.
func held(d *checkv1.LimiterDecision) *checkv1.InflightRequestRef {
	if d.GetDropped() {
		return nil
	}
	limiter, scheduler := d.GetConcurrencyLimiterInfo(), d.GetConcurrencySchedulerInfo() // one of them, or none
	id := cmp.Or(limiter.GetRequestId(), scheduler.GetRequestId())
	if id == "" {
		return nil
	}
	return &checkv1.InflightRequestRef{
		PolicyName:  d.GetPolicyName(),
		PolicyHash:  d.GetPolicyHash(),
		ComponentId: d.GetComponentId(),
		Label:       cmp.Or(limiter.GetLabel(), scheduler.GetLabel()),
		RequestId:   id,
		Tokens:      cmp.Or(limiter.GetTokensInfo().GetConsumed(), scheduler.GetTokensInfo().GetConsumed()),
	}
}

// WithoutValues is the answer without the cached values it may carry; their statuses stay. It is m itself where it
// carries none.
func WithoutValues(m *checkv1.CheckResponse) *checkv1.CheckResponse {
	c := m.GetCacheLookupResponse()
	if c == nil {
		return m
	}
	lean := &checkv1.CacheLookupResponse{}
	if r := c.GetResultCacheResponse(); r != nil {
		lean.ResultCacheResponse = withoutValue(r)
	}
	for key, r := range c.GetGlobalCacheResponses() {
		if lean.GlobalCacheResponses == nil {
			lean.GlobalCacheResponses = make(map[string]*checkv1.KeyLookupResponse)
		}
		lean.GlobalCacheResponses[key] = withoutValue(r)
	}
	return &checkv1.CheckResponse{
		Start:                    m.GetStart(),
		End:                      m.GetEnd(),
		Services:                 m.GetServices(),
		ControlPoint:             m.GetControlPoint(),
		FlowLabelKeys:            m.GetFlowLabelKeys(),
		TelemetryFlowLabels:      m.GetTelemetryFlowLabels(),
		DecisionType:             m.GetDecisionType(),
		RejectReason:             m.GetRejectReason(),
		ClassifierInfos:          m.GetClassifierInfos(),
		FluxMeterInfos:           m.GetFluxMeterInfos(),
		LimiterDecisions:         m.GetLimiterDecisions(),
		WaitTime:                 m.GetWaitTime(),
		DeniedResponseStatusCode: m.GetDeniedResponseStatusCode(),
		CacheLookupResponse:      lean,
		ExpectEnd:                m.GetExpectEnd(),
		Cause:                    m.GetCause(),
		SettlementId:             m.GetSettlementId(),
		AgentId:                  m.GetAgentId(),
		AwaitsOutcome:            m.GetAwaitsOutcome(),
	}
}

func withoutValue(r *checkv1.KeyLookupResponse) *checkv1.KeyLookupResponse {
	return &checkv1.KeyLookupResponse{
		LookupStatus:    r.GetLookupStatus(),
		OperationStatus: r.GetOperationStatus(),
		Error:           r.GetError(),
	}
}
