package sharedtest

import (
	"bytes"
	"context"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
)

type cached struct {
	value []byte
	until time.Time
}

// Get does what shared.Caches says.
func (s *Store) Get(ctx context.Context, keys []shared.CacheKey) (values [][]byte, err error) {
	err = s.call(ctx, &s.counted.Get, func(now time.Time) error {
		for _, key := range keys {
			var value []byte
			if v, ok := s.server.values[key]; ok && v.until.After(now) {
				value = append([]byte{}, v.value...)
			}
			values = append(values, value)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return values, nil
}

// Set does what shared.Caches says.
func (s *Store) Set(ctx context.Context, key shared.CacheKey, value []byte, ttl time.Duration) error {
	return s.call(ctx, &s.counted.Set, func(now time.Time) error {
		s.server.values[key] = cached{bytes.Clone(value), now.Add(ttl)}
		return nil
	})
}

// Delete does what shared.Caches says.
func (s *Store) Delete(ctx context.Context, key shared.CacheKey) error {
	return s.call(ctx, &s.counted.Delete, func(time.Time) error {
		delete(s.server.values, key)
		return nil
	})
}

// A ramp is where a load ramp stood when it was last moved.
type ramp struct {
	shared.Position
	since time.Time
}

// Move does what shared.Ramps says.
func (s *Store) Move(ctx context.Context, key shared.Key, from uint64, to *shared.Position) (at shared.Position, err error) {
	err = s.call(ctx, &s.counted.Move, func(now time.Time) error {
		is := s.server.ramps[key]
		if is == nil {
			is = new(ramp)
		}
		if to != nil && is.Version == from {
			moved := &ramp{*to, now}
			moved.Version = is.Version + 1
			s.server.ramps[key], is = moved, moved
		}
		at = is.Position
		if at.Version > 0 {
			at.At = max(at.At+time.Duration(at.Direction)*now.Sub(is.since), 0)
		}
		return nil
	})
	if err != nil {
		return shared.Position{}, err
	}
	return at, nil
}
