package main

import (
	"context"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/grpcguard"
)

// newGRPCServer makes a server with the services. The interceptors do not guard the health service.
func newGRPCServer(client headgate.Starter) *grpc.Server {
	byTenant := grpcguard.WithParams(func(ctx context.Context, _ grpcguard.Call) flowctl.Params {
		key := strings.Join(metadata.ValueFromIncomingContext(ctx, "x-api-key"), ",")
		return flowctl.Params{Labels: map[string]string{"tenant": tenantOf(key)}}
	})
	server := grpc.NewServer(
		grpc.WaitForHandlers(true), // when it is stopped, for their flows' sake
		grpc.ChainUnaryInterceptor(grpcguard.UnaryServerInterceptor(client, "words", byTenant)),
		grpc.ChainStreamInterceptor(grpcguard.StreamServerInterceptor(client, "words", byTenant)))
	server.RegisterService(&words, nil)
	healthgrpc.RegisterHealthServer(server, health.NewServer())
	return server
}

// countMethod takes a google.protobuf.StringValue, and returns the number of words in it as an Int64Value.
const countMethod = "/headgate.examples.Words/Count"

// words is written by hand, because its messages are in protobuf's library. Generated code looks the same, and also
// works on a server without interceptors.
var words = grpc.ServiceDesc{
	ServiceName: "headgate.examples.Words",
	Methods: []grpc.MethodDesc{{
		MethodName: "Count",
		Handler: func(srv any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
			text := new(wrapperspb.StringValue)
			if err := decode(text); err != nil {
				return nil, err
			}
			return intercept(ctx, text, &grpc.UnaryServerInfo{Server: srv, FullMethod: countMethod}, count)
		},
	}},
}

func count(_ context.Context, req any) (any, error) {
	return wrapperspb.Int64(int64(len(strings.Fields(req.(*wrapperspb.StringValue).GetValue())))), nil
}
