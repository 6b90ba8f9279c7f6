package engine

import (
	"context"
	"time"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/shared"
)

// A sharedCache is a cache in the store. The store bounds it. A lookup that the store does not answer is a miss.
type sharedCache struct {
	engine *Engine
	cacheCounts
}

// lookupShared finds values in both caches of the store, by one call. Room is that of agentapi.Lookup.
func (e *Engine) lookupShared(ctx context.Context, keys []agentapi.CacheKey, room func(size int) bool) []agentapi.CacheAnswer {
	answers := make([]agentapi.CacheAnswer, len(keys))
	asked := make([]shared.CacheKey, len(keys))
	for i, key := range keys {
		_, k := e.cache(key)
		asked[i] = shared.CacheKey{ControlPoint: k.controlPoint, Key: k.key}
	}
	values, err := e.store.Get(ctx, asked)
	e.answered(ctx, err)
	for i, key := range keys {
		c, _ := e.cache(key)
		counts := &c.(*sharedCache).cacheCounts //nolint:forcetypeassert // both caches are
		switch a := &answers[i]; {
		case err != nil || values[i] == nil:
			counts.misses.Add(1)
		case room != nil && !room(len(values[i])):
			counts.misses.Add(1)
			a.Err = errNoRoom
		default:
			counts.hits.Add(1)
			a.Value, a.Hit = values[i], true
		}
	}
	return answers
}

func (c *sharedCache) store(ctx context.Context, k cacheKey, value []byte, ttl time.Duration) error {
	if k.key == "" {
		c.refused.Add(1)
		return errNoCacheKey
	}
	if ttl <= 0 || ttl > maxTTL {
		ttl = maxTTL
	}
	err := c.engine.store.Set(ctx, shared.CacheKey{ControlPoint: k.controlPoint, Key: k.key}, value, ttl)
	if c.engine.answered(ctx, err); err != nil {
		c.refused.Add(1)
		return err
	}
	c.stores.Add(1)
	return nil
}

func (c *sharedCache) remove(ctx context.Context, k cacheKey) error {
	if k.key == "" {
		return errNoCacheKey
	}
	err := c.engine.store.Delete(ctx, shared.CacheKey{ControlPoint: k.controlPoint, Key: k.key})
	if c.engine.answered(ctx, err); err != nil {
		return err
	}
	c.deletes.Add(1)
	return nil
}

func (c *sharedCache) close() {}
