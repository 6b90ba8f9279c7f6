package replay

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/wire"
)

// Stub makes the protocol's calls by flows of a client of the toolkit. What a client does not report is as an agent has
// it if nothing went wrong: the statuses of slots and of cache entries.
func Stub(client *flowctl.Client) checkv1.FlowControlServiceClient {
	return &stub{client: client, flows: make(map[string]*flowctl.Flow)}
}

type stub struct {
	client *flowctl.Client

	mu    sync.Mutex
	flows map[string]*flowctl.Flow // by the slot that they hold; no recorded flow holds several
}

// start starts a flow whose check timeout is ctx's deadline. With the deadline of a caller it would be Canceled.
func (s *stub) start(ctx context.Context, controlPoint string, params flowctl.Params) *flowctl.Flow {
	if deadline, ok := ctx.Deadline(); ok {
		params.CheckTimeout = time.Until(deadline)
	}
	return s.client.Start(context.WithoutCancel(ctx), controlPoint, params)
}

func (s *stub) Check(ctx context.Context, req *checkv1.CheckRequest, _ ...grpc.CallOption) (*checkv1.CheckResponse, error) {
	lookup := req.GetCacheLookupRequest()
	flow := s.start(ctx, req.GetControlPoint(), flowctl.Params{
		Labels:          req.GetLabels(),
		RampMode:        req.GetRampMode(),
		ResultCacheKey:  lookup.GetResultCacheKey(),
		GlobalCacheKeys: lookup.GetGlobalCacheKeys(),
	})
	if !flow.ShouldRun() { // then it ends at once, as in a guard
		got, err := flow.End(ctx)
		if err != nil {
			return nil, err
		}
		if got != (flowctl.EndResponse{}) {
			return nil, fmt.Errorf("a flow that does not run held slots: %+v", got)
		}
	}
	m := flow.CheckResponse()
	switch {
	case errors.Is(flow.Err(), flowctl.ErrInvalid):
		return nil, status.Error(codes.InvalidArgument, flow.Err().Error())
	case m == nil:
		return nil, flow.Err()
	}
	if lookup != nil && lookup.GetResultCacheKey() == "" && len(lookup.GetGlobalCacheKeys()) == 0 {
		m.CacheLookupResponse = new(checkv1.CacheLookupResponse) // a client asks for nothing then
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, ref := range wire.Held(m) {
		s.flows[ref.GetRequestId()] = flow
	}
	return m, nil
}

func (s *stub) FlowEnd(ctx context.Context, req *checkv1.FlowEndRequest, _ ...grpc.CallOption) (*checkv1.FlowEndResponse, error) {
	m := new(checkv1.FlowEndResponse)
	for _, ref := range req.GetInflightRequests() {
		s.mu.Lock()
		flow, ok := s.flows[ref.GetRequestId()]
		s.mu.Unlock()
		var got flowctl.EndResponse
		if ok {
			var err error
			switch got, err = flow.End(ctx); {
			case errors.Is(err, flowctl.ErrEnded):
			case err != nil:
				return nil, err
			case got.Held != 1:
				return nil, fmt.Errorf("a flow with one slot held %d", got.Held)
			}
		}
		m.TokenReturnStatuses = append(m.TokenReturnStatuses, &checkv1.TokenReturnStatus{InflightRequestRef: ref, Returned: got.Returned == 1})
	}
	return m, nil
}

func (s *stub) CacheUpsert(ctx context.Context, req *checkv1.CacheUpsertRequest, _ ...grpc.CallOption) (*checkv1.CacheUpsertResponse, error) {
	entry := req.GetResultCacheEntry()
	flow := s.start(ctx, req.GetControlPoint(), flowctl.Params{ResultCacheKey: entry.GetKey()})
	m := new(checkv1.CacheUpsertResponse)
	var errs []error
	if entry.GetKey() != "" {
		errs = append(errs, flow.SetResultCache(ctx, entry.GetValue(), entry.GetTtl().AsDuration()))
		m.ResultCacheResponse = new(checkv1.KeyUpsertResponse)
	}
	for key, entry := range req.GetGlobalCacheEntries() {
		if m.GlobalCacheResponses == nil {
			m.GlobalCacheResponses = make(map[string]*checkv1.KeyUpsertResponse)
		}
		errs = append(errs, flow.SetGlobalCache(ctx, key, entry.GetValue(), entry.GetTtl().AsDuration()))
		m.GlobalCacheResponses[key] = new(checkv1.KeyUpsertResponse)
	}
	_, err := flow.End(ctx)
	return m, errors.Join(append(errs, err)...)
}

func (s *stub) CacheLookup(ctx context.Context, req *checkv1.CacheLookupRequest, _ ...grpc.CallOption) (*checkv1.CacheLookupResponse, error) {
	flow := s.start(ctx, req.GetControlPoint(), flowctl.Params{
		ResultCacheKey: req.GetResultCacheKey(), GlobalCacheKeys: req.GetGlobalCacheKeys(),
	})
	_, err := flow.End(ctx)
	return flow.CheckResponse().GetCacheLookupResponse(), errors.Join(flow.Err(), err)
}

func (s *stub) CacheDelete(ctx context.Context, req *checkv1.CacheDeleteRequest, _ ...grpc.CallOption) (*checkv1.CacheDeleteResponse, error) {
	flow := s.start(ctx, req.GetControlPoint(), flowctl.Params{ResultCacheKey: req.GetResultCacheKey()})
	m := new(checkv1.CacheDeleteResponse)
	var errs []error
	if req.GetResultCacheKey() != "" {
		errs = append(errs, flow.DeleteResultCache(ctx))
		m.ResultCacheResponse = new(checkv1.KeyDeleteResponse)
	}
	for _, key := range req.GetGlobalCacheKeys() {
		if m.GlobalCacheResponses == nil {
			m.GlobalCacheResponses = make(map[string]*checkv1.KeyDeleteResponse)
		}
		errs = append(errs, flow.DeleteGlobalCache(ctx, key))
		m.GlobalCacheResponses[key] = new(checkv1.KeyDeleteResponse)
	}
	_, err := flow.End(ctx)
	return m, errors.Join(append(errs, err)...)
}
