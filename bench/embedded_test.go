package bench

import (
	"context"
	"testing"
	"time"

	"github.com/failsafe-go/failsafe-go"
	"github.com/failsafe-go/failsafe-go/ratelimiter"
	"github.com/sony/gobreaker/v2"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

const point = "checkout"

var userParams = flowctl.Params{Labels: map[string]string{"user_id": "u"}}

func work() (int, error) { return 42, nil }

func workContext(context.Context) (int, error) { return work() }

// keyed is a client of an engine with one rate limiter, keyed by a label, that never runs out.
func keyed(b *testing.B) *flowctl.Client {
	b.Helper()
	e, err := engine.New([]policy.Policy{{Name: "per-user", Components: []policy.Component{policy.RateLimiter{
		Selectors: policy.At(point), Capacity: 1e12, Fill: 1e12, Interval: time.Second, LimitBy: "user_id",
	}}}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = e.Close() })
	client, err := flowctl.New(e)
	if err != nil {
		b.Fatal(err)
	}
	return client
}

// BenchmarkAccepted is a call that is let through: by a rate limiter for each user here and a single one of failsafe-go,
// and by gobreaker's breaker, which limits nothing and sets the pace.
func BenchmarkAccepted(b *testing.B) {
	ctx := b.Context()
	client := keyed(b)
	guard := headgate.Guard(client, point, userParams, workContext, nil)
	limited := failsafe.With[int](ratelimiter.NewBurstyBuilder[int](1<<40, time.Second).Build())
	breaker := gobreaker.NewCircuitBreaker[int](gobreaker.Settings{})
	for _, row := range []struct {
		name string
		call func() error
	}{
		{"headgate Guard", func() error { _, err := guard(ctx); return err }},
		{"headgate Do", func() error {
			return headgate.Do(ctx, client, point, userParams, func(context.Context, *flowctl.Flow) error { _, err := work(); return err })
		}},
		{"failsafe-go", func() error { _, err := limited.Get(work); return err }},
		{"gobreaker", func() error { _, err := breaker.Execute(work); return err }},
	} {
		b.Run(row.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := row.call(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
