package agent_test

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/internal/telemetry"
)

// Every service of the server but the health service wants a valid key, whatever else is sent.
func TestKeys(t *testing.T) {
	e, err := engine.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	server := grpc.NewServer(agent.ServerOptions(agent.WithKeys(func(key string) (string, bool) { return "shop", key == "sesame" }))...)
	agent.Register(server, e)
	healthv1.RegisterHealthServer(server, health.NewServer())
	reflection.Register(server)
	l := bufconn.Listen(1 << 20)
	go func() { _ = server.Serve(l) }()
	defer server.Stop()
	conn, err := grpc.NewClient("passthrough:///localhost", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()

	const flow = "/aperture.flowcontrol.check.v1.FlowControlService/"
	point, _ := (raw{}).Marshal([]byte("\x0a\x05point"))
	calls := map[string][]byte{
		flow + "Check": point, flow + "FlowEnd": nil, flow + "CacheLookup": nil, flow + "CacheUpsert": nil, flow + "CacheDelete": nil,
		checkhttpv1.FlowControlServiceHTTP_CheckHTTP_FullMethodName: []byte("\x22\x05point"),
		telemetry.Export: nil,
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": nil,
		"/no.such.Service/Method":                                   nil,
	}
	for _, tt := range []struct {
		name string
		keys []string
		ok   bool
	}{
		{"no key", nil, false},
		{"wrong key", []string{"x-api-key", "open"}, false},
		{"empty key", []string{"x-api-key", ""}, false},
		{"key", []string{"x-api-key", "sesame"}, true},
		{"a wrong key after the key", []string{"x-api-key", "sesame", "x-api-key", "open"}, true},
		{"wrong keys before the key", []string{"x-api-key", "", "x-api-key", "open", "x-api-key", "sesame"}, true},
		{"two wrong keys", []string{"x-api-key", "open", "x-api-key", "opens"}, false},
	} {
		ctx := metadata.AppendToOutgoingContext(t.Context(), tt.keys...)
		withDeadline, cancel := context.WithTimeout(ctx, time.Hour)
		defer cancel()
		for method, request := range calls {
			t.Run(fmt.Sprintf("%s%s", tt.name, method), func(t *testing.T) {
				err := conn.Invoke(ctx, method, request, new(checkv1.CheckResponse), grpc.ForceCodec(raw{}))
				if refused := status.Code(err) == codes.Unauthenticated; refused == tt.ok {
					t.Errorf("Invoke() = %v want a call that is let through: %v", err, tt.ok)
				}
				err = conn.Invoke(withDeadline, method, request, new(checkv1.CheckResponse), grpc.ForceCodec(raw{}))
				if code := status.Code(err); (code == codes.Unauthenticated) == tt.ok && code != codes.Unimplemented {
					t.Errorf("Invoke() with a deadline = %v want a call that is let through: %v", err, tt.ok)
				}
			})
		}
		if _, err := healthv1.NewHealthClient(conn).Check(ctx, new(healthv1.HealthCheckRequest)); err != nil {
			t.Errorf("%s: the health service answers %v", tt.name, err)
		}
	}
}
