// Package agent serves an engine to other processes: it speaks the Aperture flow-control protocol over gRPC, so that
// any number of clients, of Headgate and of other SDKs, share one set of limits.
//
//	server := grpc.NewServer(agent.ServerOptions()...)
//	agent.Register(server, limits)
//	err := server.Serve(listener)
//
// It speaks CheckHTTP too, for clients that ask about HTTP requests and leave it to the agent to make labels of them.
// An engine classifies nothing: the labels are those of labels.FromRequest with all headers, and what the baggage header
// says overrides them.
//
// Requests are bounded like flows are in a client: what a client of this module would call invalid is InvalidArgument
// here, with what is wrong. A check's deadline, less a margin for the answer to arrive, is the longest that it waits in
// queues; one that comes with less than 10 ms left is rejected by the limiters and schedulers that it meets, because an
// answer that its client does not hear would cost it tokens and slots all the same. Answers are as compressed as the
// questions: gzip, or not.
package agent

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	_ "google.golang.org/grpc/encoding/gzip" // for clients that compress, as other SDKs can be told to
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/internal/collector"
	"github.com/headgate-go/headgate/internal/seam"
	"github.com/headgate-go/headgate/internal/wire"
	"github.com/headgate-go/headgate/labels"
)

// The bounds of a request.
const (
	margin   = 10 * time.Millisecond // what an answer needs to arrive
	maxSlots = 256
)

// A Server offers an engine over gRPC. Make one with [Register]. It is safe for concurrent use, and has no goroutine of
// its own.
type Server struct {
	engine *engine.Engine
	spans  atomic.Uint64
}

// Register offers the engine's services on s, a *grpc.Server or whatever else registers services, before it serves. The
// engine remains the caller's to close, after s has stopped.
func Register(s grpc.ServiceRegistrar, e *engine.Engine) *Server {
	srv := &Server{engine: e}
	checkv1.RegisterFlowControlServiceServer(s, service{server: srv})
	checkhttpv1.RegisterFlowControlServiceHTTPServer(s, service{server: srv})
	collector.RegisterCounter(s, func(spans int) { srv.spans.Add(uint64(spans)) }, srv.read)
	return srv
}

// ServerOptions are what a gRPC server for agents should be made with: clients may send pings every 5 s, where gRPC's
// own default of 5 minutes ends the connections of those SDKs that ping more often, and every check that waits on them.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.WaitForHandlers(true),
	}
}

// Warnings lists what the engine's policies say and a server has no use for: a selector that names a service picks no
// flow of a client's, because the protocol has no place for the client's service.
func (s *Server) Warnings() []string { return s.engine.ServiceWarnings() }

// Spans is how many records of flows clients have sent so far. They are accepted from every SDK, and looked at where a
// policy wants to know how long flows take, and none is kept.
func (s *Server) Spans() uint64 { return s.spans.Load() }

// service is the server's side of the protocol.
type service struct {
	checkv1.UnimplementedFlowControlServiceServer
	checkhttpv1.UnimplementedFlowControlServiceHTTPServer
	server *Server
}

func (s service) Check(ctx context.Context, m *checkv1.CheckRequest) (*checkv1.CheckResponse, error) {
	base := &seam.Base{RampMode: m.GetRampMode()}
	req := seam.Request{
		ControlPoint: m.GetControlPoint(),
		Labels:       seam.Labels{Params: m.GetLabels(), Base: base},
	}
	if err := labels.Check(req.Labels.Params); err != nil {
		return nil, invalid(err)
	}
	if lookup := m.GetCacheLookupRequest(); lookup != nil { // also one without keys, as other SDKs send: it gets an answer
		// The control point is the check's; one in the lookup would read another's results.
		base.Looks, base.Lookup = true, seam.Lookup{Result: lookup.GetResultCacheKey(), Global: lookup.GetGlobalCacheKeys()}
		if err := seam.CheckCacheKeys(base.Lookup.Result, base.Lookup.Global...); err != nil {
			return nil, invalid(err)
		}
	}
	response, err := s.decide(ctx, &req)
	if err != nil {
		return nil, err
	}
	response.ExpectEnd = m.GetExpectEnd()
	return response, nil
}

// decide asks the engine about what a client wants to know. The request has a base of its own.
func (s service) decide(ctx context.Context, req *seam.Request) (*checkv1.CheckResponse, error) {
	if err := seam.CheckControlPoint(req.ControlPoint); err != nil {
		return nil, invalid(err)
	}
	if deadline, ok := ctx.Deadline(); ok {
		req.Labels.Base.Late = time.Until(deadline) < margin
	}
	begin := time.Now()
	var v seam.Verdict
	if err := s.server.engine.Check(ctx, req, &v); err != nil && ctx.Err() == nil {
		return nil, closed(err)
	}
	if ctx.Err() != nil {
		// The client never hears of it.
		s.server.engine.Revert(&v)
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	response := wire.Response(req, &v)
	response.End = timestamppb.New(response.GetStart().AsTime().Add(time.Since(begin)))
	return response, nil
}

func (s service) FlowEnd(_ context.Context, m *checkv1.FlowEndRequest) (*checkv1.FlowEndResponse, error) {
	if n := len(m.GetInflightRequests()); n > maxSlots {
		return nil, invalid(fmt.Errorf("%d in-flight requests are more than %d", n, maxSlots))
	}
	response := new(checkv1.FlowEndResponse)
	for _, ref := range m.GetInflightRequests() {
		known, returned := s.server.engine.EndSlot(
			ref.GetPolicyName(), ref.GetPolicyHash(), ref.GetComponentId(), ref.GetLabel(), wire.ReadSlotID(ref.GetRequestId()))
		one := &checkv1.TokenReturnStatus{InflightRequestRef: ref, Returned: returned}
		if !known {
			one.Error = "flow ender not found for limiter id"
		}
		response.TokenReturnStatuses = append(response.TokenReturnStatuses, one)
	}
	return response, nil
}

func (s service) CacheLookup(_ context.Context, m *checkv1.CacheLookupRequest) (*checkv1.CacheLookupResponse, error) {
	if err := seam.CheckCacheKeys(m.GetResultCacheKey(), m.GetGlobalCacheKeys()...); err != nil {
		return nil, invalid(err)
	}
	response := new(checkv1.CacheLookupResponse)
	if key := m.GetResultCacheKey(); key != "" {
		if err := seam.CheckControlPoint(m.GetControlPoint()); err != nil {
			return nil, invalid(err)
		}
		response.ResultCacheResponse = wire.KeyLookup(s.server.engine.Lookup(seam.CacheKey{ControlPoint: m.GetControlPoint(), Key: key}))
	}
	for _, key := range m.GetGlobalCacheKeys() {
		if response.GlobalCacheResponses == nil {
			response.GlobalCacheResponses = make(map[string]*checkv1.KeyLookupResponse, len(m.GetGlobalCacheKeys()))
		}
		response.GlobalCacheResponses[key] = wire.KeyLookup(s.server.engine.Lookup(seam.CacheKey{Key: key, Global: true}))
	}
	return response, nil
}

func (s service) CacheUpsert(ctx context.Context, m *checkv1.CacheUpsertRequest) (*checkv1.CacheUpsertResponse, error) {
	store := func(key seam.CacheKey, e *checkv1.CacheEntry) *checkv1.KeyUpsertResponse {
		// A time to live that is none is the default, as one that is not there.
		err := s.server.engine.Store(ctx, key, e.GetValue(), max(e.GetTtl().AsDuration(), 0))
		operation, text := outcome(err)
		return &checkv1.KeyUpsertResponse{OperationStatus: operation, Error: text}
	}
	if err := seam.CheckCacheKeys(m.GetResultCacheEntry().GetKey(), slices.Collect(maps.Keys(m.GetGlobalCacheEntries()))...); err != nil {
		return nil, invalid(err)
	}
	response := new(checkv1.CacheUpsertResponse)
	if e := m.GetResultCacheEntry(); e.GetKey() != "" {
		if err := seam.CheckControlPoint(m.GetControlPoint()); err != nil {
			return nil, invalid(err)
		}
		response.ResultCacheResponse = store(seam.CacheKey{ControlPoint: m.GetControlPoint(), Key: e.GetKey()}, e)
	}
	for key, e := range m.GetGlobalCacheEntries() {
		if response.GlobalCacheResponses == nil {
			response.GlobalCacheResponses = make(map[string]*checkv1.KeyUpsertResponse, len(m.GetGlobalCacheEntries()))
		}
		response.GlobalCacheResponses[key] = store(seam.CacheKey{Key: key, Global: true}, e)
	}
	return response, nil
}

func (s service) CacheDelete(ctx context.Context, m *checkv1.CacheDeleteRequest) (*checkv1.CacheDeleteResponse, error) {
	remove := func(key seam.CacheKey) *checkv1.KeyDeleteResponse {
		operation, text := outcome(s.server.engine.Delete(ctx, key))
		return &checkv1.KeyDeleteResponse{OperationStatus: operation, Error: text}
	}
	if err := seam.CheckCacheKeys(m.GetResultCacheKey(), m.GetGlobalCacheKeys()...); err != nil {
		return nil, invalid(err)
	}
	response := new(checkv1.CacheDeleteResponse)
	if key := m.GetResultCacheKey(); key != "" {
		if err := seam.CheckControlPoint(m.GetControlPoint()); err != nil {
			return nil, invalid(err)
		}
		response.ResultCacheResponse = remove(seam.CacheKey{ControlPoint: m.GetControlPoint(), Key: key})
	}
	for _, key := range m.GetGlobalCacheKeys() {
		if response.GlobalCacheResponses == nil {
			response.GlobalCacheResponses = make(map[string]*checkv1.KeyDeleteResponse, len(m.GetGlobalCacheKeys()))
		}
		response.GlobalCacheResponses[key] = remove(seam.CacheKey{Key: key, Global: true})
	}
	return response, nil
}

// outcome is what became of one cache entry, for the wire.
func outcome(err error) (checkv1.CacheOperationStatus, string) {
	if err != nil {
		return checkv1.CacheOperationStatus_ERROR, err.Error()
	}
	return checkv1.CacheOperationStatus_SUCCESS, ""
}

func invalid(err error) error { return status.Error(codes.InvalidArgument, err.Error()) }

// closed is the status for an engine that no longer decides: the client is to go elsewhere.
func closed(err error) error { return status.Error(codes.Unavailable, "engine: "+err.Error()) }
