package agent_test

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
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
	"github.com/headgate-go/headgate/internal/testing/sides"
)

// Every method of the server but those by which balancers ask for its health wants a valid key, whatever else is sent.
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
	l := bufconn.Listen(1 << 16)
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
		flow + "NoSuchMethod":                                       nil,
		"/grpc.health.v1.Health/List":                               nil,
		"/grpc.health.v1.Health/../mine.Service/Method":             nil,
		"/grpc.health.v1.Health.Other/Check":                        nil,
		"/grpc.health.v1.Healthy/Check":                             nil,
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
				if refused := status.Code(err) == codes.Unauthenticated; refused == tt.ok {
					t.Errorf("Invoke() with a deadline = %v want a call that is let through: %v", err, tt.ok)
				}
			})
		}
		if _, err := healthv1.NewHealthClient(conn).Check(ctx, new(healthv1.HealthCheckRequest)); err != nil {
			t.Errorf("%s: the health service answers %v", tt.name, err)
		}
	}
}

// A call without a key reaches no interceptor and no handler of the application, whatever its deadline is.
func TestRefusedCallsReachNothing(t *testing.T) {
	for _, first := range []bool{true, false} {
		t.Run(fmt.Sprintf("the application's options first: %v", first), func(t *testing.T) {
			var reached atomic.Int64
			own := []grpc.ServerOption{
				grpc.UnaryInterceptor(func(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
					reached.Add(1)
					return handle(ctx, request)
				}),
				grpc.StreamInterceptor(func(server any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
					reached.Add(1)
					return handle(server, stream)
				}),
			}
			opts := agent.ServerOptions(agent.WithKeys(func(key string) (string, bool) { return "shop", key == "sesame" }))
			if first {
				opts = append(own, opts...)
			} else {
				opts = append(opts, own...)
			}
			server := grpc.NewServer(opts...)
			server.RegisterService(&grpc.ServiceDesc{
				ServiceName: "mine.Service", HandlerType: (*any)(nil),
				Methods: []grpc.MethodDesc{{MethodName: "Unary", Handler: func(_ any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
					reached.Add(1) // without interceptors
					m := new(healthv1.HealthCheckRequest)
					return m, decode(m)
				}}},
				Streams: []grpc.StreamDesc{{StreamName: "Stream", ServerStreams: true, ClientStreams: true, Handler: func(any, grpc.ServerStream) error {
					reached.Add(1)
					return nil
				}}},
			}, nil)
			conn, err := grpc.NewClient("passthrough:///localhost", grpc.WithTransportCredentials(insecure.NewCredentials()), sides.Serve(t, server))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			for _, method := range []string{"/mine.Service/Unary", "/mine.Service/Stream"} {
				for _, timeout := range []time.Duration{0, 900 * time.Millisecond, time.Hour, 99_999_999 * time.Second} {
					ctx, cancel := t.Context(), context.CancelFunc(func() {})
					if timeout > 0 {
						ctx, cancel = context.WithTimeout(ctx, timeout)
					}
					err := conn.Invoke(ctx, method, new(healthv1.HealthCheckRequest), new(healthv1.HealthCheckRequest))
					cancel()
					if status.Code(err) != codes.Unauthenticated || reached.Load() > 0 {
						t.Errorf("%s with a timeout of %v: %v, %d interceptors and handlers are reached want Unauthenticated, 0", method, timeout, err, reached.Load())
					}
				}
			}
			_ = conn.Invoke(metadata.AppendToOutgoingContext(t.Context(), "x-api-key", "sesame"), "/mine.Service/Unary", new(healthv1.HealthCheckRequest), new(healthv1.HealthCheckRequest))
			if reached.Load() == 0 {
				t.Error("a call with a key reaches nothing")
			}
		})
	}
}

// Names of methods that gRPC would repeat at length are not repeated, with or without keys.
func TestNamesOfMethods(t *testing.T) {
	for _, opts := range [][]agent.Option{nil, {agent.WithKeys(func(string) (string, bool) { return "", true })}} {
		server := grpc.NewServer(agent.ServerOptions(opts...)...)
		conn, err := grpc.NewClient("passthrough:///localhost", grpc.WithTransportCredentials(insecure.NewCredentials()), sides.Serve(t, server))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		for _, method := range []string{"/" + strings.Repeat("a", 300) + "/b", "/a/" + strings.Repeat("\xff", 20), "/a/\x80", "/a b/c"} {
			for _, ctx := range []context.Context{t.Context(), metadata.AppendToOutgoingContext(ctx, "x-api-key", "k")} {
				err := conn.Invoke(ctx, method, new(healthv1.HealthCheckRequest), new(healthv1.HealthCheckRequest))
				if status.Code(err) != codes.Unimplemented && status.Code(err) != codes.Unauthenticated || strings.Contains(err.Error(), method[3:]) {
					t.Errorf("%.20q: %v", method, err)
				}
			}
		}
	}
}
