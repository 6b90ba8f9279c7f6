// Package agent serves an engine to other processes. It speaks the Aperture flow-control protocol over gRPC, so that
// any number of clients, of Headgate and of other SDKs, share one set of limits.
//
//	server := grpc.NewServer(agent.ServerOptions()...)
//	agent.Register(server, limits)
//	err := server.Serve(listener)
//
// It also speaks CheckHTTP, for clients that send an HTTP request and let the agent make the labels. An engine has no
// classifiers: the labels are those of labels.FromRequest with all headers, and the members of the baggage header. A
// member never replaces a label of the request, because a peer can send baggage through a proxy that sets the headers
// by which policies limit. Aperture's agent lets baggage replace labels of the request.
//
// SDKs run a flow if its check ends with an error. So for its content a check is refused only if it is malformed, has
// no control point, or exceeds the size of a message. Everything else is bounded:
//
//   - Labels: the engine sees each label that a policy names, with its whole value. Of other labels it sees what an
//     answer can report: at most 64, headers last, none from the 1024th on, and 4096 bytes of a value.
//   - Cache keys: a key that is empty, longer than 255 bytes or beyond the 1024th is not looked up, and the answer says
//     so. All cached values of an answer have at most 3 MiB.
//   - Decisions: if an answer has no room for all of them, those that hold no slot are left out first. A flow whose
//     slots alone do not fit is rejected: see [Service.Warnings].
//   - Waits: a check waits in queues until its deadline, less a margin for the answer to arrive, and no longer than its
//     max_wait, a field of Headgate's own. If it comes with less than 10 ms left, the limiters and schedulers that it meets reject it. Otherwise it would cost tokens and slots
//     although its client does not see the answer.
//   - Compression: answers of up to 1 KiB are compressed as the questions are, by gzip or not.
package agent

import (
	"context"
	"fmt"
	"net/http"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	_ "google.golang.org/grpc/encoding/gzip" // for clients that compress, as other SDKs can be told to
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/bounds"
	"github.com/headgate-go/headgate/internal/telemetry"
	"github.com/headgate-go/headgate/internal/wire"
)

const margin = 10 * time.Millisecond // what an answer needs to arrive

// answerTime is the cost of an answer, for agent and client, when hundreds of checks wait for one deadline. If all were
// answered at the last moment, most answers would be too late. So the more checks are under way when a check comes, the
// earlier it ends its wait: by a twentieth of its time at least, because more may come, and by a quarter at most. The
// first few of a burst end theirs a twentieth earlier too.
const answerTime = 500 * time.Microsecond

// A Service offers an engine over gRPC. Make one with [Register] or [New]. It is safe for concurrent use. It has a goroutine of
// its own only if it keeps a state, see [WithState].
type Service struct {
	engine agentapi.Local
	memory memory
	spans  atomic.Uint64
	starts starts
	issued issued
	asking crowd

	outcomes outcomes
	sessions *sessions
}

// Register registers the engine's services on s, such as a *grpc.Server that does not serve yet. The caller still has
// to close the engine. Closing it rejects the checks that wait, so that a graceful stop of s can end. Later checks end
// with the status Unavailable, so begin the graceful stop first.
func Register(s grpc.ServiceRegistrar, e *engine.Engine) *Service {
	svc := newService(e)
	svc.Register(s)
	return svc
}

// New makes a Service with options, for [Service.Register]. Call it before the engine decides about flows, because with
// [WithState] it reads the state from before the restart. The caller still has to close the engine, and then the Service. The
// error joins what is wrong with the options.
func New(e *engine.Engine, opts ...ServiceOption) (*Service, error) {
	var o serviceOptions
	for _, opt := range opts {
		if opt != nil {
			opt(&o)
		}
	}
	if err := o.check(); err != nil {
		return nil, fmt.Errorf("headgate: agent: %w", err)
	}
	svc := newService(e)
	svc.memory.agent = svc.sessions.agentID
	svc.memory.start(svc.engine, o)
	svc.sessions.agentID = svc.memory.agent
	return svc, nil
}

func newService(e *engine.Engine) *Service {
	a := e.Agent()
	return &Service{engine: a, memory: memory{engine: a}, sessions: newSessions(a), starts: starts{epoch: time.Now()}}
}

// Register registers the engine's services on s, as the function [Register] does. Call it once.
func (s *Service) Register(r grpc.ServiceRegistrar) {
	services := registrar{r, s.engine.NamedLabels}
	services.RegisterService(&checkv1.FlowControlService_ServiceDesc, handler{service: s})
	services.RegisterService(&checkhttpv1.FlowControlServiceHTTP_ServiceDesc, handler{service: s})
	services.RegisterService(&sessionv1.SessionService_ServiceDesc, handler{service: s})
	telemetry.RegisterCounter(services, func(spans int) { s.spans.Add(uint64(spans)) }, s.read)
}

// Close writes the state for the last time, see [WithState]. Call it after the server has stopped and the engine is closed.
// Otherwise a flow that is admitted later would be missing in the file. So if Close is called earlier, the next start counts as
// one after a kill. The error says why the state could not be written. A second Close does nothing. Without a state, Close is not
// needed.
func (s *Service) Close() error {
	drained := false
	select {
	case <-s.engine.Closed():
		drained = s.asking.none()
	default:
	}
	return s.memory.close(drained)
}

// State says what the agent has read from its file, and how it has written copies; see [WithState].
func (s *Service) State() State { return s.memory.now() }

// A registrar registers services that are bounded.
type registrar struct {
	grpc.ServiceRegistrar
	named func() map[string]bool
}

func (r registrar) RegisterService(service *grpc.ServiceDesc, impl any) {
	r.ServiceRegistrar.RegisterService(bounded(*service, r.named), impl)
}

// Spans returns how many flow records clients have sent so far. The agent accepts them from every SDK, and keeps none.
// It reads them to measure flows if a policy needs that, to tell circuit breakers how flows end, and to free the slots of
// clients that do not end their flows.
func (s *Service) Spans() uint64 { return s.spans.Load() }

// handler is what gRPC calls: the service's side of the protocol.
type handler struct {
	checkv1.UnimplementedFlowControlServiceServer
	checkhttpv1.UnimplementedFlowControlServiceHTTPServer
	sessionv1.UnimplementedSessionServiceServer
	service *Service
}

func (s handler) Check(ctx context.Context, m *checkv1.CheckRequest) (*checkv1.CheckResponse, error) {
	own := &agentapi.Shared{Options: agentapi.Options{
		RampMode: m.GetRampMode(), DryRun: m.GetDryRun(), Waiting: wire.Waiting(m.GetMaxWait()),
	}}
	req := agentapi.Request{
		ControlPoint: m.GetControlPoint(),
		Labels:       agentapi.Labels{Params: m.GetLabels(), Shared: own},
	}
	var refused refusal
	if lookup := m.GetCacheLookupRequest(); lookup != nil { // also one without keys, as other SDKs send: it gets an answer
		// The control point is the check's; one in the lookup would read another's results.
		own.Lookup, refused = lookupOf(ctx, m.GetControlPoint(), lookup)
	}
	response, err := s.decide(ctx, &req, m.GetSessionCheck(), wire.MaxDecisions)
	if err != nil {
		return nil, err
	}
	response.ExpectEnd = m.GetExpectEnd()
	if found := response.GetCacheLookupResponse(); found != nil {
		refused.fill(found)
	}
	return response, nil
}

// decide asks the engine about a flow. The request shares nothing with others. number is that of the check in its session, or 0.
// room is the most bytes of decisions in the answer.
func (s handler) decide(ctx context.Context, req *agentapi.Request, number uint64, room int) (*checkv1.CheckResponse, error) {
	c := callOf(ctx)
	if c != nil && c.full { // it may not have been read
		return rejection(req.ControlPoint, agentapi.ReasonNoTokens, http.StatusServiceUnavailable), nil
	}
	if req.ControlPoint == "" {
		return nil, invalid(bounds.CheckControlPoint(""))
	}
	asking, crowded := s.service.asking.enter()
	defer s.service.asking.leave()
	req.Labels.Shared.Crowded = crowded
	if deadline, ok := ctx.Deadline(); ok {
		left := time.Until(deadline)
		req.Labels.Shared.Late = left < margin
		if asking > few {
			req.Timeout = left - left/20 - min(time.Duration(asking)*answerTime, left/5)
		}
	}
	if c != nil && c.still {
		req.Timeout = 1 // the shortest; zero is none
	}
	req.Labels.Shared.Closing = s.service.sessions.draining
	session := s.service.sessions.of(ctx)
	if session != nil {
		req.Labels.Shared.Session = session.id
	}
	begin := time.Now()
	start := s.service.starts.next(begin)
	var v agentapi.Verdict
	if err := s.service.engine.Check(ctx, req, &v); err != nil && ctx.Err() == nil {
		return nil, closed(err)
	}
	if ctx.Err() != nil {
		// The client never hears of it.
		s.service.engine.Revert(ctx, req, &v)
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	if session != nil && !s.service.sessions.grant(session, number, &v) {
		s.service.engine.Revert(ctx, req, &v)
		return nil, errGivenUp
	}
	v.Start = start
	s.service.sessions.comesBack(&v)
	named := s.service.engine.NamedLabels()
	response, unnamed, ok := wire.Answer(req, &v, named, room)
	if !ok {
		// A client can give back only slots that the answer names. If the answer named all of these, clients would take
		// it for an error, and run the flow.
		s.service.engine.Revert(ctx, req, &v)
		if !v.Rejected() { // as one in dry run may be
			v.Reject(agentapi.Rejection{Reason: agentapi.ReasonNoTokens, Status: http.StatusServiceUnavailable})
		}
		response, unnamed, _ = wire.Answer(req, &v, named, room)
	}
	var ends []agentapi.Settling
	for _, d := range unnamed { // no end names them
		ends = append(ends, agentapi.Settling{By: d.Component.Settler, Decision: d, Outcome: agentapi.Outcome{Ended: agentapi.EndedOK}})
	}
	s.service.engine.Settle(ctx, ends)
	for _, d := range unnamed {
		d.Hold(0)
	}
	response.End = timestamppb.New(response.GetStart().AsTime().Add(time.Since(begin)))
	if s.service.engine.Measures(req.ControlPoint) {
		s.service.issued.add(response.GetStart().AsTime())
	}
	awaited := s.service.outcomes.add(&v)
	if session != nil && (!v.Rejected() || req.DryRun()) { // else it holds nothing
		response.AgentId = s.service.sessions.agentID
		response.SettlementId = s.service.sessions.charge(session, req, &v, awaited)
		response.AwaitsOutcome = response.GetSettlementId() != 0 && len(awaited) > 0
		if stored, ok := s.service.engine.(agentapi.Leaser); ok && stored.Leases() {
			response.StoredSlots = stored.Leased(&v) > 0
		}
	}
	return response, nil
}

// rejection is the answer to a check that no policy decides about.
func rejection(controlPoint string, reason agentapi.Reason, denied checkv1.StatusCode) *checkv1.CheckResponse {
	now := timestamppb.Now()
	return &checkv1.CheckResponse{
		Start: now, End: now,
		ControlPoint:             controlPoint,
		DecisionType:             checkv1.CheckResponse_DECISION_TYPE_REJECTED,
		RejectReason:             checkv1.CheckResponse_RejectReason(reason),
		DeniedResponseStatusCode: denied,
	}
}

// FlowEnd gives back the slots that the client names, up to maxSlots.
func (s handler) FlowEnd(ctx context.Context, m *checkv1.FlowEndRequest) (*checkv1.FlowEndResponse, error) {
	refs := m.GetInflightRequests()
	refs = refs[:min(len(refs), maxSlots)]
	response := &checkv1.FlowEndResponse{TokenReturnStatuses: make([]*checkv1.TokenReturnStatus, 0, len(refs))}
	for i, end := range s.service.engine.EndSlots(ctx, slotNames(refs)) {
		one := &checkv1.TokenReturnStatus{InflightRequestRef: refs[i], Returned: end.Returned}
		if !end.Known {
			one.Error = "flow ender not found for limiter id"
		}
		response.TokenReturnStatuses = append(response.TokenReturnStatuses, one)
	}
	return response, nil
}

// slotNames returns what the slots are called that a client names.
func slotNames(refs []*checkv1.InflightRequestRef) []agentapi.SlotName {
	names := make([]agentapi.SlotName, 0, len(refs))
	for _, ref := range refs {
		names = append(names, agentapi.SlotName{
			Policy: ref.GetPolicyName(), Hash: ref.GetPolicyHash(), Component: ref.GetComponentId(), Label: ref.GetLabel(),
			Slot: wire.ReadSlotID(ref.GetRequestId()),
		})
	}
	return names
}

func invalid(err error) error { return status.Error(codes.InvalidArgument, wire.Clip(err.Error())) }

// closed is the status for an engine that no longer decides. Unavailable sends the client elsewhere.
func closed(err error) error {
	return status.Error(codes.Unavailable, wire.Clip("engine: "+err.Error()))
}
