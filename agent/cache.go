package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/bounds"
	"github.com/headgate-go/headgate/internal/wire"
)

// A cache key that is not looked up gets its own answer, so that the check and the other keys are not affected. Answers
// are bounded, because SDKs refuse those of more than 4 MiB.
const (
	maxCacheKeys   = 1024    // global keys of one call
	maxCacheValues = 3 << 20 // bytes of all values of an answer, and of one that is stored
	maxRefused     = 1 << 16 // bytes of refused keys and their errors
)

var (
	errNoControlPoint = errors.New("cache control_point cannot be empty") // in the words of other agents
	errNoCacheKey     = errors.New("cache key cannot be empty")           // also theirs
	errNegativeTTL    = errors.New("the time to live is negative")
)

// checkResultKey returns what is wrong with the key of a result; nil if nothing is.
func checkResultKey(controlPoint, key string) error {
	if controlPoint == "" {
		return errNoControlPoint
	}
	return cmp.Or(bounds.CheckControlPoint(controlPoint), bounds.CheckCacheKeys(key))
}

// checkGlobalKey returns what is wrong with the i-th global key of a call; nil if nothing is.
func checkGlobalKey(i int, key string) error {
	switch {
	case key == "":
		return errNoCacheKey
	case i >= maxCacheKeys:
		return fmt.Errorf("there are more than %d cache keys", maxCacheKeys)
	default:
		return bounds.CheckCacheKeys(key)
	}
}

// A refusal collects what is answered about keys that are not looked up.
type refusal struct {
	result error
	global map[string]error
	size   int
}

// refuse notes the key if there is room for it in the answer. SDKs read a key that the answer lacks as a miss with an
// error.
func (r *refusal) refuse(key string, err error) {
	if _, ok := r.global[key]; ok {
		return
	}
	if r.size += len(key) + len(err.Error()) + 16; r.size > maxRefused {
		return
	}
	if r.global == nil {
		r.global = make(map[string]error)
	}
	r.global[key] = err
}

// lookupOf returns what the engine is asked of a lookup, and what is refused of it.
func lookupOf(ctx context.Context, controlPoint string, m *checkv1.CacheLookupRequest) (*agentapi.Lookup, refusal) {
	left, c := maxCacheValues, callOf(ctx)
	room := func(size int) bool {
		if size > left || !c.borrow(size) {
			return false
		}
		left -= size
		return true
	}
	asked, refused := &agentapi.Lookup{Room: room}, refusal{}
	if key := m.GetResultCacheKey(); key != "" {
		if refused.result = checkResultKey(controlPoint, key); refused.result == nil {
			asked.Result = key
		}
	}
	asked.Global = onlyOnce(m.GetGlobalCacheKeys(), func(i int, key string) bool {
		err := checkGlobalKey(i, key)
		if err != nil {
			refused.refuse(key, err)
		}
		return err == nil
	})
	return asked, refused
}

// onlyOnce returns the keys that are good, each once, in their order. It makes no list if all keys are good and differ.
func onlyOnce(keys []string, good func(i int, key string) bool) []string {
	const few = 8 // so many are compared in less time than a map takes
	var seen map[string]bool
	if len(keys) > few {
		seen = make(map[string]bool, len(keys))
	}
	n := 0 // of the first keys, all of which are good and differ
	var kept []string
	for i, key := range keys {
		again := seen[key]
		if seen == nil {
			again = slices.Contains(keys[:i], key)
		} else {
			seen[key] = true
		}
		switch one := !again && good(i, key); {
		case one && n == i:
			n++
		case one:
			if kept == nil {
				kept = slices.Clone(keys[:n])
			}
			kept = append(kept, key)
		}
	}
	if kept == nil {
		return slices.Clip(keys[:n])
	}
	return kept
}

// fill adds what was refused to the answer.
func (r *refusal) fill(m *checkv1.CacheLookupResponse) {
	if r.result != nil {
		m.ResultCacheResponse = wire.KeyLookup(agentapi.CacheAnswer{Err: r.result})
	}
	for key, err := range r.global {
		if m.GlobalCacheResponses == nil {
			m.GlobalCacheResponses = make(map[string]*checkv1.KeyLookupResponse, len(r.global))
		}
		m.GlobalCacheResponses[key] = wire.KeyLookup(agentapi.CacheAnswer{Err: err})
	}
}

func (s handler) CacheLookup(ctx context.Context, m *checkv1.CacheLookupRequest) (*checkv1.CacheLookupResponse, error) {
	asked, refused := lookupOf(ctx, m.GetControlPoint(), m)
	response := new(checkv1.CacheLookupResponse)
	var keys []agentapi.CacheKey
	if asked.Result != "" {
		keys = append(keys, agentapi.CacheKey{ControlPoint: m.GetControlPoint(), Key: asked.Result})
	}
	for _, key := range asked.Global {
		keys = append(keys, agentapi.CacheKey{Key: key, Global: true})
	}
	for i, answer := range s.service.engine.Lookup(ctx, keys, asked.Room) {
		if !keys[i].Global {
			response.ResultCacheResponse = wire.KeyLookup(answer)
			continue
		}
		if response.GlobalCacheResponses == nil {
			response.GlobalCacheResponses = make(map[string]*checkv1.KeyLookupResponse, len(asked.Global))
		}
		response.GlobalCacheResponses[keys[i].Key] = wire.KeyLookup(answer)
	}
	refused.fill(response)
	return response, nil
}

func (s handler) CacheUpsert(ctx context.Context, m *checkv1.CacheUpsertRequest) (*checkv1.CacheUpsertResponse, error) {
	store := func(key agentapi.CacheKey, e *checkv1.CacheEntry) error {
		if n := len(e.GetValue()); n > maxCacheValues {
			return fmt.Errorf("cache entry of %d bytes is larger than %d", n, maxCacheValues)
		}
		ttl := e.GetTtl().AsDuration() // also where the signs differ; what is too long for a Duration becomes the longest one
		if ttl < 0 {
			return errNegativeTTL
		}
		return s.service.engine.Store(ctx, key, e.GetValue(), ttl)
	}
	told := func(err error) *checkv1.KeyUpsertResponse {
		operation, text := outcome(err)
		return &checkv1.KeyUpsertResponse{OperationStatus: operation, Error: text}
	}
	response := new(checkv1.CacheUpsertResponse)
	if e := m.GetResultCacheEntry(); e.GetKey() != "" {
		err := checkResultKey(m.GetControlPoint(), e.GetKey())
		if err == nil {
			err = store(agentapi.CacheKey{ControlPoint: m.GetControlPoint(), Key: e.GetKey()}, e)
		}
		response.ResultCacheResponse = told(err)
	}
	var refused refusal
	response.GlobalCacheResponses = make(map[string]*checkv1.KeyUpsertResponse)
	i := 0
	for key, e := range m.GetGlobalCacheEntries() {
		if err := checkGlobalKey(i, key); err != nil {
			refused.refuse(key, err)
			continue
		}
		i++
		response.GlobalCacheResponses[key] = told(store(agentapi.CacheKey{Key: key, Global: true}, e))
	}
	for key, err := range refused.global {
		response.GlobalCacheResponses[key] = told(err)
	}
	return response, nil
}

func (s handler) CacheDelete(ctx context.Context, m *checkv1.CacheDeleteRequest) (*checkv1.CacheDeleteResponse, error) {
	told := func(err error) *checkv1.KeyDeleteResponse {
		operation, text := outcome(err)
		return &checkv1.KeyDeleteResponse{OperationStatus: operation, Error: text}
	}
	response := new(checkv1.CacheDeleteResponse)
	if key := m.GetResultCacheKey(); key != "" {
		err := checkResultKey(m.GetControlPoint(), key)
		if err == nil {
			err = s.service.engine.Delete(ctx, agentapi.CacheKey{ControlPoint: m.GetControlPoint(), Key: key})
		}
		response.ResultCacheResponse = told(err)
	}
	var refused refusal
	response.GlobalCacheResponses = make(map[string]*checkv1.KeyDeleteResponse)
	for i, key := range m.GetGlobalCacheKeys() {
		if err := checkGlobalKey(i, key); err != nil {
			refused.refuse(key, err)
			continue
		}
		response.GlobalCacheResponses[key] = told(s.service.engine.Delete(ctx, agentapi.CacheKey{Key: key, Global: true}))
	}
	for key, err := range refused.global {
		if _, done := response.GetGlobalCacheResponses()[key]; !done {
			response.GlobalCacheResponses[key] = told(err)
		}
	}
	return response, nil
}

// outcome is what became of one cache entry, for the wire.
func outcome(err error) (checkv1.CacheOperationStatus, string) {
	if err != nil {
		return checkv1.CacheOperationStatus_ERROR, wire.Clip(err.Error())
	}
	return checkv1.CacheOperationStatus_SUCCESS, ""
}
