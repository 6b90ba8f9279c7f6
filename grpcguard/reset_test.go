package grpcguard_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// Calls that are reset while the agent's answers are on their way leave no slot taken.
func TestResetCalls(t *testing.T) {
	const slots = 20
	calls := race.Pick(slots+10, 200)
	components := map[string]policy.Component{
		"limiter":   policy.ConcurrencyLimiter{Selectors: policy.At(point), Max: slots, MaxInflight: time.Hour},
		"scheduler": policy.ConcurrencyScheduler{Selectors: policy.At(point), Max: slots, MaxInflight: time.Hour},
	}
	for name, component := range components {
		for _, m := range testMethods {
			t.Run(name+"/"+m.name, func(t *testing.T) {
				setup := sides.Setup{Policies: sides.Policies(component), Travel: 5 * time.Millisecond}
				setup.InBubbles(t, []sides.Kind{sides.Embedded, sides.Served}, func(t *testing.T, agent *sides.Side) {
					if err := agent.Client.Ready(t.Context()); err != nil {
						t.Fatal(err)
					}
					s := &side{agent, &starter{Client: agent.Client}}
					svc := &service{do: func(ctx context.Context) error { // with an embedded engine calls get here
						<-ctx.Done()
						return ctx.Err()
					}}
					conn, _ := serve(t, memory, svc.register, guarded(s))
					for range calls {
						ctx, reset := context.WithCancel(t.Context())
						done := make(chan error)
						go func() { done <- m.call(ctx, testgrpc.NewTestServiceClient(conn)) }()
						synctest.Wait() // until the agent has decided
						reset()
						if err := <-done; err == nil {
							t.Error("a call was not reset")
						}
					}
					for waited := time.Duration(0); s.held() > 0; waited += time.Millisecond {
						if waited > time.Second {
							t.Fatalf("%d slots are held", s.held())
						}
						<-time.After(time.Millisecond)
					}
					for i := range slots {
						flow := agent.Client.Start(t.Context(), point, flowctl.Params{})
						defer func() { _, _ = flow.End(t.Context()) }()
						if flow.Decision() != flowctl.Accepted {
							t.Errorf("flow %d: %v, %v want it accepted", i, flow, flow.Err())
						}
					}
				})
			})
		}
	}
}
