package agent_test

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/reflection"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// A server decompresses checks up to 4 MiB, and messages of other services up to 64 KiB.
func TestCompressedMessages(t *testing.T) {
	e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{policy.RateLimiter{Selectors: policy.At("point"), LimitBy: "user_id", Capacity: 1, Fill: 1, Interval: time.Hour}}}})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	server := grpc.NewServer(agent.ServerOptions()...)
	agent.Register(server, e)
	reflection.Register(server)
	conn, err := grpc.NewClient("passthrough:///localhost", grpc.WithTransportCredentials(insecure.NewCredentials()), sides.Serve(t, server))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	check := func(size int) error {
		m := &checkv1.CheckRequest{ControlPoint: "point", Labels: map[string]string{"user_id": strings.Repeat("u", size)}}
		first, err := checkv1.NewFlowControlServiceClient(conn).Check(t.Context(), m, grpc.UseCompressor(gzip.Name), grpc.MaxCallSendMsgSize(8<<20))
		if err != nil {
			return err
		}
		if len(first.GetLimiterDecisions()) != 1 {
			t.Errorf("a check of %d bytes has the decisions %v want one", size, first.GetLimiterDecisions())
		}
		return nil
	}
	reflects := func(size int) error {
		stream, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context(), grpc.UseCompressor(gzip.Name))
		if err != nil {
			return err
		}
		if err := stream.Send(&reflectionv1.ServerReflectionRequest{Host: strings.Repeat("x", size), MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}}); err != nil {
			return err
		}
		_, err = stream.Recv()
		return err
	}
	for _, tt := range []struct {
		name string
		call func(size int) error
		size int
		want codes.Code
	}{
		{"a small check", check, 100, codes.OK},
		{"a check of 60 KiB", check, 60 << 10, codes.OK},
		{"a check of 100 KiB", check, 100 << 10, codes.OK},
		{"a check of 3 MiB", check, 3 << 20, codes.OK},
		{"a check of 5 MiB", check, 5 << 20, codes.ResourceExhausted},
		{"a small question of another service", reflects, 100, codes.OK},
		{"a question of 60 KiB", reflects, 60 << 10, codes.OK},
		{"a question of 70 KiB", reflects, 70 << 10, codes.Internal},
		{"a question of 3 MiB", reflects, 3 << 20, codes.Internal},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.call(tt.size); status.Code(err) != tt.want {
				t.Errorf("%v want %v", err, tt.want)
			}
		})
	}
}
