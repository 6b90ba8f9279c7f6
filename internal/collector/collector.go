// Package collector is the server side of OTLP's trace service, for agents that flows report to. It is written by hand
// because the generated package links an HTTP gateway; on the wire a request to it is a TracesData.
package collector

import (
	"context"

	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// Export is the full name of the service's one method.
const Export = "/" + service + "/" + method

const (
	service = "opentelemetry.proto.collector.trace.v1.TraceService"
	method  = "Export"
)

// A Handler gets what clients export. Its error is the call's status.
type Handler func(ctx context.Context, data *tracev1.TracesData) error

// Register offers the service on s.
func Register(s grpc.ServiceRegistrar, export Handler) {
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: service,
		HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{
			MethodName: method,
			Handler: func(_ any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
				data := new(tracev1.TracesData)
				if err := decode(data); err != nil {
					return nil, err
				}
				handle := func(ctx context.Context, req any) (any, error) {
					data, _ := req.(*tracev1.TracesData)
					return new(emptypb.Empty), export(ctx, data)
				}
				if intercept == nil {
					return handle(ctx, data)
				}
				return intercept(ctx, data, &grpc.UnaryServerInfo{FullMethod: Export}, handle)
			},
		}},
	}, nil)
}
