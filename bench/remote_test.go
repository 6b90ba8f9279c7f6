package bench

import (
	"context"
	"net"
	"testing"
	"time"

	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/headgate-go/headgate"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/flowctl"
)

// agent answers every check with what a real one says of a flow that met one rate limiter.
type agent struct {
	checkv1.UnimplementedFlowControlServiceServer
}

func (agent) Check(_ context.Context, req *checkv1.CheckRequest) (*checkv1.CheckResponse, error) {
	return &checkv1.CheckResponse{
		Start:               timestamppb.Now(),
		End:                 timestamppb.Now(),
		ControlPoint:        req.GetControlPoint(),
		FlowLabelKeys:       []string{"user_id"},
		TelemetryFlowLabels: map[string]string{"user_id": req.GetLabels()["user_id"], "aperture.control_point_type": "feature"},
		LimiterDecisions: []*checkv1.LimiterDecision{{
			PolicyName: "per-user", PolicyHash: "0f48273d17d24fcf46355fb78b785550", ComponentId: "root.0",
			Details: &checkv1.LimiterDecision_RateLimiterInfo_{RateLimiterInfo: &checkv1.LimiterDecision_RateLimiterInfo{
				Label: "user_id:u", TokensInfo: &checkv1.LimiterDecision_TokensInfo{Remaining: 9, Current: 1, Consumed: 1},
			}},
		}},
		ExpectEnd: true,
	}, nil
}

// serve starts the agent on loopback. It takes telemetry as well: the service is one method, see the protocol.
func serve(b *testing.B) (address string) {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	s := grpc.NewServer()
	checkv1.RegisterFlowControlServiceServer(s, agent{})
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: "opentelemetry.proto.collector.trace.v1.TraceService",
		HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{
			MethodName: "Export",
			Handler: func(_ any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
				return new(tracev1.TracesData), decode(new(tracev1.TracesData))
			},
		}},
	}, nil)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	b.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			b.Error(err)
		}
	})
	return l.Addr().String()
}

// BenchmarkRemote is Guard and Do over gRPC with telemetry on, beside the bare call that asks the same.
func BenchmarkRemote(b *testing.B) {
	ctx := b.Context()
	address := serve(b)
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	bare := checkv1.NewFlowControlServiceClient(conn)
	client, err := flowctl.Dial(address, flowctl.WithInsecure())
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = client.Close(ctx) }()
	if err := client.Ready(ctx); err != nil {
		b.Fatal(err)
	}
	guard := headgate.Guard(client, point, userParams, workContext, nil)
	for _, row := range []struct {
		name string
		call func() error
	}{
		{"headgate Guard", func() error { _, err := guard(ctx); return err }},
		{"headgate Do", func() error {
			return headgate.Do(ctx, client, point, userParams, func(context.Context, *flowctl.Flow) error { _, err := work(); return err })
		}},
		{"bare Check", func() error {
			ctx, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
			defer cancel()
			_, err := bare.Check(ctx, &checkv1.CheckRequest{ControlPoint: point, Labels: userParams.Labels, ExpectEnd: true})
			return err
		}},
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
