package agent_test

import (
	"context"
	"crypto/x509"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/engine"
)

// A server that is served by ServeHTTP reads compressed messages, although gRPC calls no tap handle there. As nothing asks for keys, it
// refuses all calls if they need one.
func TestServeHTTP(t *testing.T) {
	keyed := agent.WithKeys(func(key string) (string, bool) { return "shop", key == "sesame" })
	check := func(size int) func(ctx context.Context, conn *grpc.ClientConn, opts ...grpc.CallOption) error {
		return func(ctx context.Context, conn *grpc.ClientConn, opts ...grpc.CallOption) error {
			m := &checkv1.CheckRequest{ControlPoint: "point", Labels: map[string]string{"user_id": strings.Repeat("u", size)}}
			_, err := checkv1.NewFlowControlServiceClient(conn).Check(ctx, m, opts...)
			return err
		}
	}
	reflects := func(ctx context.Context, conn *grpc.ClientConn, opts ...grpc.CallOption) error {
		stream, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(ctx, opts...)
		if err != nil {
			return err
		}
		// If it fails, Recv has the status.
		_ = stream.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}})
		_, err = stream.Recv()
		return err
	}
	zipped := []grpc.CallOption{grpc.UseCompressor(gzip.Name)}
	for _, tt := range []struct {
		name string
		keys []agent.Option
		call func(ctx context.Context, conn *grpc.ClientConn, opts ...grpc.CallOption) error
		opts []grpc.CallOption
		want codes.Code
	}{
		{"a check", nil, check(100), nil, codes.OK},
		{"a compressed check", nil, check(100), zipped, codes.OK},
		{"a compressed check of 3 MiB", nil, check(3 << 20), zipped, codes.OK},
		{"a compressed check of 5 MiB", nil, check(5 << 20), zipped, codes.ResourceExhausted},
		{"a compressed message of another service", nil, reflects, zipped, codes.OK},
		{"a check, with keys", []agent.Option{keyed}, check(100), nil, codes.Unauthenticated},
		{"a stream, with keys", []agent.Option{keyed}, reflects, nil, codes.Unauthenticated},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e, err := engine.New(nil)
			if err != nil {
				t.Fatal(err)
			}
			defer e.Close()
			server := grpc.NewServer(agent.ServerOptions(tt.keys...)...)
			agent.Register(server, e)
			reflection.Register(server)
			site := httptest.NewUnstartedServer(http.HandlerFunc(server.ServeHTTP))
			site.EnableHTTP2 = true
			site.StartTLS()
			defer site.Close()
			roots := x509.NewCertPool()
			roots.AddCert(site.Certificate())
			conn, err := grpc.NewClient(site.Listener.Addr().String(), grpc.WithTransportCredentials(credentials.NewClientTLSFromCert(roots, "example.com")))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			ctx := metadata.AppendToOutgoingContext(t.Context(), "x-api-key", "sesame")
			if err := tt.call(ctx, conn, tt.opts...); status.Code(err) != tt.want {
				t.Errorf("%v want %v", err, tt.want)
			}
		})
	}
}
