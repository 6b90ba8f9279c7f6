package flowctl

import (
	"context"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/wire"
)

// Store puts a value into the agent's cache.
func (r *remote) Store(ctx context.Context, key agentapi.CacheKey, value []byte, ttl time.Duration) error {
	entry := &checkv1.CacheEntry{Key: key.Key, Value: value}
	if ttl > 0 {
		entry.Ttl = durationpb.New(ttl)
	}
	req := &checkv1.CacheUpsertRequest{ControlPoint: key.ControlPoint}
	if key.Global {
		req.GlobalCacheEntries = map[string]*checkv1.CacheEntry{key.Key: entry}
	} else {
		req.ResultCacheEntry = entry
	}
	m := new(checkv1.CacheUpsertResponse)
	if err := r.callCache(ctx, checkv1.FlowControlService_CacheUpsert_FullMethodName, req, m); err != nil {
		return err
	}
	if key.Global {
		return cacheStatus(m.GetGlobalCacheResponses()[key.Key])
	}
	return cacheStatus(m.GetResultCacheResponse())
}

// Delete removes a value from the agent's cache.
func (r *remote) Delete(ctx context.Context, key agentapi.CacheKey) error {
	req := &checkv1.CacheDeleteRequest{ControlPoint: key.ControlPoint}
	if key.Global {
		req.GlobalCacheKeys = []string{key.Key}
	} else {
		req.ResultCacheKey = key.Key
	}
	m := new(checkv1.CacheDeleteResponse)
	if err := r.callCache(ctx, checkv1.FlowControlService_CacheDelete_FullMethodName, req, m); err != nil {
		return err
	}
	if key.Global {
		return cacheStatus(m.GetGlobalCacheResponses()[key.Key])
	}
	return cacheStatus(m.GetResultCacheResponse())
}

// callCache makes a call about the cache.
func (r *remote) callCache(ctx context.Context, method string, req, m proto.Message) error {
	if r.spares() {
		return errBreakerOpen
	}
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	if err := r.invoke(ctx, method, req, m); err != nil {
		return err
	}
	r.answered()
	return nil
}

const errCacheSilence = ownError("the agent does not say what became of the entry")

// cacheStatus returns the error that the agent reports for one entry. Silence is an error too, although success is the
// zero value on the wire.
func cacheStatus[M interface {
	comparable
	GetOperationStatus() checkv1.CacheOperationStatus
	GetError() string
}](said M) error {
	var nothing M
	switch {
	case said == nothing:
		return errCacheSilence
	case said.GetOperationStatus() != checkv1.CacheOperationStatus_SUCCESS || said.GetError() != "":
		return wire.CacheError(said.GetError())
	default:
		return nil
	}
}
