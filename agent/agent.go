// Package agent serves an engine to other processes: it speaks the Aperture flow-control protocol over gRPC, so that
// any number of clients, of Headgate and of other SDKs, share one set of limits.
//
//	server := grpc.NewServer(agent.ServerOptions()...)
//	agent.Register(server, limits)
//	err := server.Serve(listener)
//
// It speaks CheckHTTP too, for clients that ask about HTTP requests and leave it to the agent to make labels of them.
// An engine classifies nothing: the labels are those of labels.FromRequest with all headers, and the members of the baggage
// header. A member does not replace a label that the request has, because a peer can send baggage through a proxy that sets
// the headers by which policies limit. Aperture's agent lets baggage replace labels of the request.
//
// An SDK runs the flow whose check is an error. So a check is refused only if it cannot be one: without a control point, or
// beyond the size of a message. The engine sees all labels that policies name, and whole. Of the others it sees as many as
// the answer reports: of more than 64 labels those that policies name, and headers last, and of those beyond the 1024th
// none that no policy names; of a value its first 4096 bytes. Cache keys that are empty, longer than 255 bytes or
// beyond the 1024th look up nothing, and the answer tells so by key; all cached values of an answer have 3 MiB at the
// most. Of more decisions than an answer has room for, those that hold no slot are left out first, and a flow whose
// slots alone do not fit is rejected: see [Service.Warnings]. A check's deadline, less a margin for the answer to
// arrive, is the longest that it waits in queues; one that comes with less than 10 ms left is rejected by the limiters
// and schedulers that it meets, because an answer that its client does not hear would cost it tokens and slots all the
// same. Answers of up to 1 KiB are as compressed as the questions: gzip, or not.
package agent

import (
	"context"
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
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/bounds"
	"github.com/headgate-go/headgate/internal/telemetry"
	"github.com/headgate-go/headgate/internal/wire"
)

const margin = 10 * time.Millisecond // what an answer needs to arrive

// answerTime is what an answer costs agent and client where hundreds of checks wait that have one deadline. If they were
// all answered in the last moment, most answers would be too late. So a check ends its wait the sooner the more checks are
// under way when it comes: by a twentieth of its time at the least, because more may come, and by a quarter at the most.
// The first few of a burst end theirs by a twentieth too.
const answerTime = 500 * time.Microsecond

// A Service offers an engine over gRPC. Make one with [Register]. It is safe for concurrent use, and has no goroutine of
// its own.
type Service struct {
	engine agentapi.Local
	spans  atomic.Uint64
	issued issued
	asking crowd
}

// Register offers the engine's services on s, a *grpc.Server or whatever else registers services, before it serves. The
// engine remains the caller's to close. Closing it rejects the checks that wait, which lets a graceful stop of s end; a
// check that comes later is answered with the status Unavailable. So begin the graceful stop first.
func Register(s grpc.ServiceRegistrar, e *engine.Engine) *Service {
	svc := &Service{engine: e.Agent()}
	services := registrar{s, svc.engine.NamedLabels}
	services.RegisterService(&checkv1.FlowControlService_ServiceDesc, handler{service: svc})
	services.RegisterService(&checkhttpv1.FlowControlServiceHTTP_ServiceDesc, handler{service: svc})
	telemetry.RegisterCounter(services, func(spans int) { svc.spans.Add(uint64(spans)) }, svc.read)
	return svc
}

// A registrar registers services that are bounded.
type registrar struct {
	grpc.ServiceRegistrar
	named func() map[string]bool
}

func (r registrar) RegisterService(service *grpc.ServiceDesc, impl any) {
	r.ServiceRegistrar.RegisterService(bounded(*service, r.named), impl)
}

// Spans is how many records of flows clients have sent so far. They are accepted from every SDK, and looked at where a
// policy wants to know how long flows take, and none is kept.
func (s *Service) Spans() uint64 { return s.spans.Load() }

// handler is what gRPC calls: the service's side of the protocol.
type handler struct {
	checkv1.UnimplementedFlowControlServiceServer
	checkhttpv1.UnimplementedFlowControlServiceHTTPServer
	service *Service
}

func (s handler) Check(ctx context.Context, m *checkv1.CheckRequest) (*checkv1.CheckResponse, error) {
	own := &agentapi.Shared{Options: agentapi.Options{RampMode: m.GetRampMode(), DryRun: m.GetDryRun()}}
	req := agentapi.Request{
		ControlPoint: m.GetControlPoint(),
		Labels:       agentapi.Labels{Params: m.GetLabels(), Shared: own},
	}
	var refused refusal
	if lookup := m.GetCacheLookupRequest(); lookup != nil { // also one without keys, as other SDKs send: it gets an answer
		// The control point is the check's; one in the lookup would read another's results.
		own.Lookup, refused = lookupOf(ctx, m.GetControlPoint(), lookup)
	}
	response, err := s.decide(ctx, &req, wire.MaxDecisions)
	if err != nil {
		return nil, err
	}
	response.ExpectEnd = m.GetExpectEnd()
	if found := response.GetCacheLookupResponse(); found != nil {
		refused.fill(found)
	}
	return response, nil
}

// decide asks the engine about what a client wants to know. The request shares nothing with others. The answer has so many
// bytes of decisions at the most.
func (s handler) decide(ctx context.Context, req *agentapi.Request, room int) (*checkv1.CheckResponse, error) {
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
	begin := time.Now()
	var v agentapi.Verdict
	if err := s.service.engine.Check(ctx, req, &v); err != nil && ctx.Err() == nil {
		return nil, closed(err)
	}
	if ctx.Err() != nil {
		// The client never hears of it.
		s.service.engine.Revert(ctx, req, &v)
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	named := s.service.engine.NamedLabels()
	response, ok := wire.Answer(req, &v, named, room)
	if !ok {
		// A slot that the answer does not name would never come back, and an answer with all of them is an error to
		// clients, which lets the flow run.
		s.service.engine.Revert(ctx, req, &v)
		if !v.Rejected() { // as one in dry run may be
			v.Reject(agentapi.Rejection{Reason: agentapi.ReasonNoTokens, Status: http.StatusServiceUnavailable})
		}
		response, _ = wire.Answer(req, &v, named, room)
	}
	response.End = timestamppb.New(response.GetStart().AsTime().Add(time.Since(begin)))
	if s.service.engine.Measures(req.ControlPoint) {
		s.service.issued.add(response.GetStart().AsTime())
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

// FlowEnd gives back slots, the first of those that the client names.
func (s handler) FlowEnd(ctx context.Context, m *checkv1.FlowEndRequest) (*checkv1.FlowEndResponse, error) {
	refs := m.GetInflightRequests()
	refs = refs[:min(len(refs), maxSlots)]
	response := &checkv1.FlowEndResponse{TokenReturnStatuses: make([]*checkv1.TokenReturnStatus, 0, len(refs))}
	for _, ref := range refs {
		known, returned := s.service.end(ctx, ref)
		one := &checkv1.TokenReturnStatus{InflightRequestRef: ref, Returned: returned}
		if !known {
			one.Error = "flow ender not found for limiter id"
		}
		response.TokenReturnStatuses = append(response.TokenReturnStatuses, one)
	}
	return response, nil
}

// end gives back one slot. It reports whether the engine knows the limiter, and whether the slot was still taken.
func (s *Service) end(ctx context.Context, ref *checkv1.InflightRequestRef) (known, returned bool) {
	return s.engine.EndSlot(ctx,
		ref.GetPolicyName(), ref.GetPolicyHash(), ref.GetComponentId(), ref.GetLabel(), wire.ReadSlotID(ref.GetRequestId()))
}

func invalid(err error) error { return status.Error(codes.InvalidArgument, wire.Clip(err.Error())) }

// closed is the status for an engine that no longer decides: the client is to go elsewhere.
func closed(err error) error {
	return status.Error(codes.Unavailable, wire.Clip("engine: "+err.Error()))
}
