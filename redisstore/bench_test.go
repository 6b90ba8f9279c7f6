package redisstore_test

import (
	"context"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
)

// bare is a script of one key as it might be written by hand: a counter with a time to live.
const bare = `local n = redis.call('INCR', KEYS[1]) if n == 1 then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end return n`

// BenchmarkTake compares calls of the store with a bare EVALSHA each, by the same client.
func BenchmarkTake(b *testing.B) {
	client := newClient(b, startServer(b))
	s := newStore(b, client)
	rule := &shared.Rule{Kind: shared.Bucket, Capacity: 1e6, Fill: 1e6, Interval: time.Second}
	sha := do(b, client, "SCRIPT", "LOAD", bare)
	users := make([]string, 10_000)
	for i := range users {
		users[i] = "user-" + strconv.Itoa(i)
	}
	evalsha := func(ctx context.Context, user string) error {
		return client.Do(ctx, client.B().Evalsha().Sha1(sha).Numkeys(1).Key("bare:"+user).Arg("60000").Build()).Error()
	}
	take := func(components ...string) func(context.Context, string) error {
		return func(ctx context.Context, user string) error {
			asks := make([]shared.Ask, len(components))
			for i, c := range components {
				asks[i] = shared.Ask{Key: keyOf(c, user), Rule: rule, Tokens: 1}
			}
			return s.Take(ctx, asks, make([]shared.Answer, len(asks)))
		}
	}
	for _, bb := range []struct {
		name string
		keys int
		call func(context.Context, string) error
	}{
		{"evalsha/hot", 1, evalsha},
		{"take/hot", 1, take("a")},
		{"evalsha/10000", 10_000, evalsha},
		{"take/10000", 10_000, take("a")},
		{"take3/10000", 10_000, take("a", "b", "c")},
	} {
		b.Run(bb.name+"/serial", func(b *testing.B) {
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if err := bb.call(b.Context(), users[i%bb.keys]); err != nil {
					b.Fatal(err)
				}
				i++
			}
		})
		b.Run(bb.name+"/64", func(b *testing.B) {
			b.ReportAllocs()
			b.SetParallelism(32) // of two cores
			var n atomic.Int64
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := bb.call(b.Context(), users[int(n.Add(1))%bb.keys]); err != nil {
						b.Error(err)
					}
				}
			})
		})
	}
}
