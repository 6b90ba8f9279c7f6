package agent_test

import (
	"context"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/agent"
	"github.com/headgate-go/headgate/internal/testing/sides"
)

// healthy is a connection to a health service behind keys.
func healthy(t *testing.T) *grpc.ClientConn {
	t.Helper()
	server := grpc.NewServer(agent.ServerOptions(agent.WithKeys(func(key string) (string, bool) { return "shop", key == "sesame" }))...)
	healthv1.RegisterHealthServer(server, health.NewServer())
	conn, err := grpc.NewClient("passthrough:///localhost", grpc.WithTransportCredentials(insecure.NewCredentials()), sides.Serve(t, server))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func TestHealthWithoutKey(t *testing.T) {
	conn := healthy(t)
	client := healthv1.NewHealthClient(conn)
	withKey := metadata.AppendToOutgoingContext(t.Context(), "x-api-key", "sesame")
	long := strings.Repeat("a", 1<<20)
	for _, tt := range []struct {
		name         string
		ctx          context.Context
		service      string
		opts         []grpc.CallOption
		check, watch codes.Code
	}{
		{"the server", t.Context(), "", nil, codes.OK, codes.OK},
		{"a service that there is not", t.Context(), "a", nil, codes.NotFound, codes.OK},
		{"a long name", t.Context(), long, nil, codes.NotFound, codes.InvalidArgument},
		{"a long name, compressed", t.Context(), long, []grpc.CallOption{grpc.UseCompressor(gzip.Name)}, codes.NotFound, codes.InvalidArgument},
		{"compressed, with a key", withKey, "a", []grpc.CallOption{grpc.UseCompressor(gzip.Name)}, codes.NotFound, codes.OK},
		{"a long name, with a key", withKey, long, nil, codes.NotFound, codes.OK},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(tt.ctx)
			defer cancel()
			request := &healthv1.HealthCheckRequest{Service: tt.service}
			if _, err := client.Check(ctx, request, tt.opts...); status.Code(err) != tt.check {
				t.Errorf("Check() = %v want %v", err, tt.check)
			}
			stream, err := client.Watch(ctx, request, tt.opts...)
			if err == nil {
				_, err = stream.Recv()
			}
			if status.Code(err) != tt.watch {
				t.Errorf("Watch() = %v want %v", err, tt.watch)
			}
		})
	}
}

// Of the watches without a key there are no more than 256, and their ends make room. Those with one are not bounded by that.
func TestWatchesWithoutKey(t *testing.T) {
	client := healthv1.NewHealthClient(healthy(t))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	watch := func(ctx context.Context) error {
		stream, err := client.Watch(ctx, new(healthv1.HealthCheckRequest))
		if err == nil {
			_, err = stream.Recv()
		}
		return err
	}
	const most = 256
	for i := range most {
		if err := watch(ctx); err != nil {
			t.Fatalf("watch %d: %v", i, err)
		}
	}
	if err := watch(ctx); status.Code(err) != codes.Unavailable {
		t.Errorf("one more watch: %v want Unavailable", err)
	}
	if err := watch(metadata.AppendToOutgoingContext(ctx, "x-api-key", "sesame")); err != nil {
		t.Errorf("one more watch, with a key: %v", err)
	}
	cancel()
	for watch(t.Context()) != nil { // until the server knows of the ends
		if t.Context().Err() != nil {
			t.Fatal("ends make no room")
		}
	}
}

// Calls without a key whose message does not arrive end by themselves, also those beyond the bound.
func TestUnfinishedHealthWithoutKey(t *testing.T) {
	conn := healthy(t)
	for _, method := range []string{healthv1.Health_Check_FullMethodName, healthv1.Health_Watch_FullMethodName} {
		t.Run(method, func(t *testing.T) {
			var streams []grpc.ClientStream
			for range 300 {
				stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
				if err != nil {
					t.Fatal(err)
				}
				streams = append(streams, stream)
			}
			for i, stream := range streams {
				if err := stream.RecvMsg(new(healthv1.HealthCheckResponse)); err == nil {
					t.Errorf("call %d is answered", i)
				}
			}
		})
	}
}
