package redisstore

import (
	"cmp"
	"context"
	"slices"
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
	commands, shards := make([]rueidis.Completed, len(keys)), make([]*shard, len(keys))
	for i, k := range keys {
		n := s.cacheName(k)
		commands[i], shards[i] = s.client.B().Get().Key(n).Build(), s.shardOfKey(n)
	}
	results, err := s.plain(ctx, shards, ofText, commands...)
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

// maxCached is how many bytes a value has at most, which is more than an agent takes. Values come by the connection on which flows are
// decided about. The answers behind a larger one would take longer than calls wait, and the client would give the connection up.
const maxCached = 4 << 20

// Set does what [shared.Caches] says. It fails for a value of more than 4 MiB.
func (s *Store) Set(ctx context.Context, key shared.CacheKey, value []byte, ttl time.Duration) error {
	if len(value) > maxCached {
		return errValue
	}
	n := s.cacheName(key)
	ms := max(ttl.Milliseconds(), 1)
	return s.one(ctx, n, ofText, s.client.B().Arbitrary("SET").Keys(n).Args(rueidis.BinaryString(value), "PX", strconv.FormatInt(ms, 10)).Build())
}

// Delete does what [shared.Caches] says.
func (s *Store) Delete(ctx context.Context, key shared.CacheKey) error {
	n := s.cacheName(key)
	return s.one(ctx, n, ofNumber, s.client.B().Del().Key(n).Build())
}

// shardOfKey returns the shard that has a key without a tag.
func (s *Store) shardOfKey(key string) *shard { return s.shardOf(slotOf("{" + key + "}")) }

// one runs a command of one key.
func (s *Store) one(ctx context.Context, key string, of answerKind, command rueidis.Completed) error {
	results, err := s.plain(ctx, []*shard{s.shardOfKey(key)}, of, command)
	if err != nil {
		return err
	}
	return answerError(results[0].Error())
}

// An answerKind is what commands are answered with, unless they are refused.
type answerKind uint8

const (
	ofText answerKind = iota // or with nil
	ofNumber
)

// unfit returns why a result is no answer of the kind. It is nil for a refusal.
func (of answerKind) unfit(r rueidis.RedisResult) error {
	var err error
	if of == ofNumber {
		_, err = r.ToInt64()
	} else {
		_, err = r.ToString()
	}
	if _, refused := rueidis.IsRedisErr(err); refused || rueidis.IsRedisNil(err) {
		return nil
	}
	return err
}

// plain runs commands of these shards together, within the store's bound. The error is that of a server that has not answered, or not
// with what the commands are answered with.
func (s *Store) plain(ctx context.Context, shards []*shard, of answerKind, commands ...rueidis.Completed) ([]rueidis.RedisResult, error) {
	if slices.ContainsFunc(shards, func(sh *shard) bool { return sh.gate.Open() }) {
		return nil, shared.ErrDown
	}
	if s.ctx.Err() != nil {
		return nil, errClosed
	}
	sent := time.Now()
	bounded, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	results := s.client.DoMulti(unbounded{bounded}, commands...)
	became := make(map[*shard]error, 1) // of what was asked of each
	for i, r := range results {
		became[shards[i]] = cmp.Or(became[shards[i]], of.unfit(r))
	}
	var err error
	for sh, failed := range became {
		if failed != nil && ctx.Err() != nil {
			return nil, ctx.Err()
		}
		err = cmp.Or(err, s.evidence(sh, failed, sent))
	}
	return results, err
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
