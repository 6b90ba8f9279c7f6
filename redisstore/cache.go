package redisstore

import (
	"context"
	"strconv"
	"time"

	"github.com/redis/rueidis"

	"github.com/headgate-go/headgate/internal/shared"
)

// Get does what [shared.Caches] says. In a cluster the values may be at different shards, which are asked at the same time.
func (s *Store) Get(ctx context.Context, keys []shared.CacheKey) ([][]byte, error) {
	if len(keys) == 0 {
		return nil, nil
	}
	commands := make([]rueidis.Completed, len(keys))
	sh := s.single.take.shard()
	for i, k := range keys {
		n := s.cacheName(k)
		if s.cluster {
			if sh = s.shardOf(slotOf("{" + n + "}")); sh.gate.Open() {
				return nil, shared.ErrDown
			}
		}
		commands[i] = s.client.B().Get().Key(n).Build()
	}
	results, err := s.plain(ctx, sh, commands...)
	if err != nil {
		return nil, err
	}
	values := make([][]byte, len(keys))
	for i, r := range results {
		value, err := r.AsBytes()
		if err = answerError(err); err != nil {
			return nil, err
		}
		values[i] = value
	}
	return values, nil
}

// Set does what [shared.Caches] says.
func (s *Store) Set(ctx context.Context, key shared.CacheKey, value []byte, ttl time.Duration) error {
	n := s.cacheName(key)
	ms := max(ttl.Milliseconds(), 1)
	return s.one(ctx, n, s.client.B().Arbitrary("SET").Keys(n).Args(rueidis.BinaryString(value), "PX", strconv.FormatInt(ms, 10)).Build())
}

// Delete does what [shared.Caches] says.
func (s *Store) Delete(ctx context.Context, key shared.CacheKey) error {
	n := s.cacheName(key)
	return s.one(ctx, n, s.client.B().Del().Key(n).Build())
}

// one runs a command of one key.
func (s *Store) one(ctx context.Context, key string, command rueidis.Completed) error {
	sh := s.single.take.shard()
	if s.cluster {
		sh = s.shardOf(slotOf("{" + key + "}"))
	}
	results, err := s.plain(ctx, sh, command)
	if err != nil {
		return err
	}
	return answerError(results[0].Error())
}

// plain runs commands within the store's bound. The error is that of a server that has not answered.
func (s *Store) plain(ctx context.Context, sh *shard, commands ...rueidis.Completed) ([]rueidis.RedisResult, error) {
	if sh.gate.Open() {
		return nil, shared.ErrDown
	}
	if s.ctx.Err() != nil {
		return nil, errClosed
	}
	sent := time.Now()
	bounded, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	results := s.client.DoMulti(unbounded{bounded}, commands...)
	for _, r := range results {
		if err := r.NonRedisError(); err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			return nil, s.evidence(sh, err, sent)
		}
	}
	return results, s.evidence(sh, nil, sent)
}

// answerError returns the error of an answer. Nil, the answer that there is no value, is none.
func answerError(err error) error {
	if err == nil || rueidis.IsRedisNil(err) {
		return nil
	}
	if answer, ok := rueidis.IsRedisErr(err); ok {
		return refusal(answer)
	}
	return errReply
}
