package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"time"

	"github.com/go-redis/redis_rate/v10"
	"github.com/redis/go-redis/v9"
	"github.com/redis/rueidis"
	"github.com/throttled/throttled/v2"
	"github.com/throttled/throttled/v2/store/goredisstore.v9"

	"github.com/headgate-go/headgate/internal/testing/benchtable"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// users is how many keys each row has, unless it says otherwise.
const users = 10_000

// anyUser returns one of the users' names.
func anyUser() string { return "user-" + strconv.Itoa(rand.IntN(users)) }

// bucket is the least that a script of a token bucket does: it reads the time and the state, and writes the state with a time to live.
const bucket = `
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local capacity, rate, cost = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local tokens, at = capacity, now
local state = redis.call('GET', KEYS[1])
if state then
  local sep = string.find(state, ' ', 1, true)
  at = tonumber(string.sub(state, sep + 1))
  tokens = math.min(capacity, tonumber(string.sub(state, 1, sep - 1)) + rate * math.max(0, now - at))
end
if tokens < cost then
  return {'0', tostring(tokens)}
end
tokens = tokens - cost
redis.call('SET', KEYS[1], string.format('%.17g %.17g', tokens, now), 'PX', math.ceil((capacity - tokens) / rate * 1000) + 1000)
return {'1', string.format('%.17g', tokens)}
`

// The limits of all rows let every call through.
const (
	capacity = 1e9
	fill     = 1e9 // a second
)

// peers are the rows of other libraries.
type peers struct {
	ctx       context.Context //nolint:containedctx // the run's
	rueidis   rueidis.Client
	pooled    rueidis.Client // each call has a connection of a pool for itself
	goredis   *redis.Client
	rate      *redis_rate.Limiter
	throttled *throttled.GCRARateLimiterCtx
}

func openPeers(ctx context.Context, server *redistest.Server) (_ *peers, err error) {
	p := &peers{ctx: ctx}
	p.rueidis, err = rueidis.NewClient(rueidis.ClientOption{
		InitAddress: []string{server.Addr()}, DisableCache: true, AlwaysPipelining: true, DisableRetry: true,
	})
	if err != nil {
		return nil, err
	}
	p.pooled, err = rueidis.NewClient(rueidis.ClientOption{
		InitAddress: []string{server.Addr()}, DisableCache: true, DisableAutoPipelining: true, DisableRetry: true,
	})
	if err != nil {
		return nil, err
	}
	p.goredis = redis.NewClient(&redis.Options{Addr: server.Addr(), PoolSize: inFlight}) // a connection for each call in flight, as its users have
	p.rate = redis_rate.NewLimiter(p.goredis)
	store, err := goredisstore.NewCtx(p.goredis, "throttled:")
	if err != nil {
		return nil, err
	}
	p.throttled, err = throttled.NewGCRARateLimiterCtx(store, throttled.RateQuota{MaxRate: throttled.PerDuration(1e6, time.Second), MaxBurst: 1e6})
	return p, err
}

func (p *peers) close() {
	p.rueidis.Close()
	p.pooled.Close()
	_ = p.goredis.Close() // it has no calls
}

const (
	bareRueidis = "bare EVALSHA of a bucket, rueidis"
	barePooled  = "bare EVALSHA of a bucket, rueidis, a connection for each call"
	bareGoRedis = "bare EVALSHA of a bucket, go-redis"
	redisRate   = "redis_rate"
	redisHot    = "redis_rate, one hot key"
	throttling  = "throttled"
)

// errRejected is the error of a call that a limiter did not let through.
var errRejected = errors.New("rejected")

func (p *peers) rows() []*benchtable.Row {
	limit := redis_rate.Limit{Rate: fill, Burst: capacity, Period: time.Second}
	allow := func(key func() string) func() func() error {
		return each(func() error {
			result, err := p.rate.Allow(p.ctx, key(), limit)
			if err == nil && result.Allowed == 0 {
				err = errRejected
			}
			return err
		})
	}
	script := rueidis.NewLuaScript(bucket)
	bare := func(client rueidis.Client, prefix string) func() func() error {
		return each(func() error {
			return granted(script.Exec(p.ctx, client, []string{prefix + anyUser()}, []string{"1e9", "1e9", "1"}).AsStrSlice())
		})
	}
	other := redis.NewScript(bucket)
	return []*benchtable.Row{
		{Name: bareRueidis, ByTurns: true, InFlight: inFlight, Call: bare(p.rueidis, "bare:")},
		{Name: barePooled, ByTurns: true, InFlight: inFlight, Call: bare(p.pooled, "bare3:")},
		{Name: bareGoRedis, ByTurns: true, InFlight: inFlight, Call: each(func() error {
			return granted(other.Run(p.ctx, p.goredis, []string{"bare2:" + anyUser()}, "1e9", "1e9", "1").StringSlice())
		})},
		{Name: redisRate, ByTurns: true, InFlight: inFlight, Call: allow(anyUser)},
		{Name: redisHot, ByTurns: true, InFlight: inFlight, Call: allow(func() string { return "hot" })},
		{Name: throttling, ByTurns: true, InFlight: inFlight, Call: each(func() error {
			limited, _, err := p.throttled.RateLimitCtx(p.ctx, anyUser(), 1)
			if err == nil && limited {
				err = errRejected
			}
			return err
		})},
	}
}

// each makes the same call for all goroutines.
func each(call func() error) func() func() error {
	return func() func() error { return call }
}

// granted checks the answer of a bare script.
func granted(answer []string, err error) error {
	if err != nil {
		return err
	}
	if len(answer) != 2 || answer[0] != "1" {
		return fmt.Errorf("%w: %q", errRejected, answer)
	}
	return nil
}
