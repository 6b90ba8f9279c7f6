package headgate_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// Flows that an agent is being asked about when that is shut down, on the client's side or the engine's, are rejected in
// every form. They neither run nor are retried. A flow that starts later is Unreachable.
func TestClosingRejectsWhatWaits(t *testing.T) {
	work := func(ran *atomic.Int32) func(context.Context) (int, error) {
		return func(context.Context) (int, error) { return int(ran.Add(1)), nil }
	}
	waits := flowctl.Params{CheckTimeout: time.Hour, ResultCacheKey: "key"}
	retrying := func(client headgate.Starter) headgate.Starter {
		return headgate.Retrying(client, headgate.RetryPolicy{Attempts: -1, Budget: -1})
	}
	for _, tt := range []struct {
		name string
		call func(ctx context.Context, client *flowctl.Client, ran *atomic.Int32) error
	}{
		{"Guard", func(ctx context.Context, client *flowctl.Client, ran *atomic.Int32) error {
			_, err := headgate.Guard(client, point, waits, work(ran), nil)(ctx)
			return err
		}},
		{"Do", func(ctx context.Context, client *flowctl.Client, ran *atomic.Int32) error {
			return headgate.Do(ctx, client, point, waits, func(context.Context, *flowctl.Flow) error {
				ran.Add(1)
				return nil
			})
		}},
		{"Cached", func(ctx context.Context, client *flowctl.Client, ran *atomic.Int32) error {
			_, err := headgate.Cached(client, point, waits, work(ran), nil, headgate.CachePolicy[int]{})(ctx)
			return err
		}},
		{"Retrying", func(ctx context.Context, client *flowctl.Client, ran *atomic.Int32) error {
			_, err := headgate.Guard(retrying(client), point, waits, work(ran), nil)(ctx)
			return err
		}},
		{"Cached and Retrying", func(ctx context.Context, client *flowctl.Client, ran *atomic.Int32) error {
			_, err := headgate.Cached(retrying(client), point, waits, work(ran), nil, headgate.CachePolicy[int]{})(ctx)
			return err
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sides.Setup{
				Policies: sides.Policies(policy.ConcurrencyScheduler{Selectors: policy.At(point), Max: 1, MaxInflight: 24 * time.Hour}),
				Answers:  []flowtest.Answer{{}},
			}.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) {
				holder := side.Client.Start(t.Context(), point, waits)
				if side.Script != nil {
					side.Answer(flowtest.Answer{Hang: true})
				}
				began := time.Now()
				var ran atomic.Int32
				errs := make([]error, 3)
				var calls sync.WaitGroup
				for i := range errs {
					calls.Go(func() { errs[i] = tt.call(t.Context(), side.Client, &ran) })
				}
				synctest.Wait() // they are in the queue
				if side.Kind == sides.Embedded {
					_ = side.Engine.Close()
				} else if err := side.Client.Close(t.Context()); err != nil {
					t.Errorf("Close() = %v", err)
				}
				calls.Wait()
				for _, err := range errs {
					rejected, ok := errors.AsType[*flowctl.RejectedError](err)
					if !ok || rejected.Cause() != flowctl.CauseClosed || rejected.Reason != flowctl.ReasonNoTokens || rejected.HTTPStatus != 503 || rejected.RetryAfter() != 0 {
						t.Errorf("a call that waited returned %v want a rejection by closing", err)
					}
				}
				if n, waited := ran.Load(), time.Since(began); n != 0 || waited != 0 {
					t.Errorf("%d calls ran, after %s", n, waited)
				}
				if err := tt.call(t.Context(), side.Client, &ran); err != nil || ran.Load() != 1 {
					t.Errorf("a call after that returned %v want that of one that runs", err)
				}
				_, _ = holder.End(t.Context())
			})
		})
	}
}

// A call that waits for its retry returns at once, rejected, when its client is closed, or its engine.
func TestClosingEndsWaitsForRetries(t *testing.T) {
	for _, on := range []flowctl.UnreachablePolicy{flowctl.FailOpen, flowctl.FailClosed} {
		for _, closesEngine := range []bool{false, true} {
			kinds := sides.All
			if closesEngine {
				kinds = []sides.Kind{sides.Embedded} // of another process's nobody hears
			}
			sides.Setup{
				Answers: []flowtest.Answer{{Reason: flowctl.ReasonRateLimited, RetryAfter: time.Hour}},
			}.InBubbles(t, kinds, func(t *testing.T, side *sides.Side) {
				starts := headgate.Retrying(side.Client, headgate.RetryPolicy{})
				flows := make(chan *flowctl.Flow, 1)
				began := time.Now()
				go func() { flows <- starts.Start(t.Context(), point, flowctl.Params{OnUnreachable: on}) }()
				synctest.Wait()
				if closesEngine {
					_ = side.Engine.Close()
				} else {
					_ = side.Client.Close(t.Context())
				}
				flow := <-flows
				if waited := time.Since(began); waited != 0 || flow.Decision() != flowctl.Rejected || flow.ShouldRun() {
					t.Errorf("the flow is %s after %s want rejected at once", flow.Decision(), waited)
				}
				if got := side.Asked(); got != 1 {
					t.Errorf("%d checks want one", got)
				}
			})
		}
	}
}
