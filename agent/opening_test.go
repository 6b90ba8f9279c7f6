package agent_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// Of calls whose message does not come, or whose stream does not end after it, no more than 64 last, whatever
// they call. The others give everything back.
func TestCallsThatDoNotArriveEnd(t *testing.T) {
	const (
		arrival  = 50 * time.Millisecond
		patience = time.Second
		lasting  = 64
	)
	const check = "/aperture.flowcontrol.check.v1.FlowControlService/Check"
	for _, tt := range []struct {
		name, method string
		send         bool
		opts         []grpc.CallOption
		after        time.Duration
	}{
		{"no message", check, false, nil, 2 * arrival},
		{"no message, compressed", check, false, []grpc.CallOption{grpc.UseCompressor(gzip.Name)}, 6 * arrival},
		{"no end", check, true, nil, 2 * arrival},
		{"no end, compressed", check, true, []grpc.CallOption{grpc.UseCompressor(gzip.Name)}, 2 * arrival},
		{"no message for another service", healthv1.Health_Check_FullMethodName, false, nil, 2 * patience},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{policy.RateLimiter{Selectors: policy.At("other"), Interval: time.Hour}}}})
				if err != nil {
					t.Fatal(err)
				}
				defer e.Close()
				server := grpc.NewServer(agent.ServerOptions()...)
				agent.Register(server, e)
				healthv1.RegisterHealthServer(server, health.NewServer())
				conn, err := grpc.NewClient("passthrough:///localhost", grpc.WithTransportCredentials(insecure.NewCredentials()), sides.Serve(t, server))
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				const calls = 4 * lasting
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				ended := make(chan error, calls)
				for range calls {
					stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, tt.method, tt.opts...)
					if err != nil {
						t.Fatal(err)
					}
					if tt.send {
						if err := stream.SendMsg(&checkv1.CheckRequest{ControlPoint: "point"}); err != nil {
							t.Fatal(err)
						}
					}
					go func() { ended <- stream.RecvMsg(new(checkv1.CheckResponse)) }()
				}
				<-time.After(tt.after)
				synctest.Wait()
				if want := calls - lasting; len(ended) != want {
					t.Errorf("%d calls have ended want %d", len(ended), want)
				}
				for range len(ended) {
					if err := <-ended; status.Code(err) != codes.Unavailable && status.Code(err) != codes.Canceled {
						t.Errorf("a call ended by %v want Unavailable or Canceled", err)
					}
				}
				m, err := checkv1.NewFlowControlServiceClient(conn).Check(ctx, &checkv1.CheckRequest{ControlPoint: "point"})
				if err != nil || m.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_ACCEPTED {
					t.Errorf("a check beside them: %v, %v", m.GetDecisionType(), err)
				}
			})
		})
	}
}
