// Package telemetry reports flows to agents. It has the record of a flow, as a span of OpenTelemetry's, and the service
// that takes spans. Clients write records; agents and the test kit read them.
//
// The service is written by hand because the generated package links an HTTP gateway. On the wire a request to it is a
// TracesData.
package telemetry

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/emptypb"
)

// Export is the full name of the service's one method.
const Export = "/" + service + "/" + method

const (
	service = "opentelemetry.proto.collector.trace.v1.TraceService"
	method  = "Export"
)

// Register registers the service on s. Requests are read as an M, a message, so that no client links those of
// opentelemetry.proto.trace.v1. The error of export is the call's status.
func Register[M any](s grpc.ServiceRegistrar, export func(ctx context.Context, m *M) error) {
	handle := func(ctx context.Context, req any) (any, error) {
		m, _ := req.(*M)
		return new(emptypb.Empty), export(ctx, m)
	}
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: service,
		HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{
			MethodName: method,
			Handler: func(_ any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
				m := new(M)
				if err := decode(m); err != nil {
					return nil, err
				}
				if intercept == nil {
					return handle(ctx, m)
				}
				return intercept(ctx, m, &grpc.UnaryServerInfo{FullMethod: Export}, handle)
			},
		}},
	}, nil)
}

// maxRead is how many spans of an export are read. The span of a flow has some 300 bytes, and an export 4 MiB.
const maxRead = 1 << 14

// RegisterCounter registers the service on s for an agent that only counts the spans that clients export, and may read
// the bytes of each. It does not decode spans, because each would cost some thirty objects. A nil read is not called.
func RegisterCounter(s grpc.ServiceRegistrar, add func(n int), read func(ctx context.Context, span []byte)) {
	// A message without fields of its own keeps all that comes.
	Register(s, func(ctx context.Context, data *emptypb.Empty) error {
		n, err := each(data.ProtoReflect().GetUnknown(), func([]byte) {}, resourceSpans, scopeSpans, spans)
		if err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
		add(n)
		if read != nil {
			left := maxRead
			_, _ = each(data.ProtoReflect().GetUnknown(), func(span []byte) {
				if left--; left >= 0 {
					read(ctx, span)
				}
			}, resourceSpans, scopeSpans, spans)
		}
		return nil
	})
}

// each calls visit with each field at the end of the path, and counts them.
func each(message []byte, visit func([]byte), path ...protowire.Number) (n int, err error) {
	for len(message) > 0 {
		// A message can have millions of empty spans.
		if len(path) == 1 && len(message) > 1 && path[0] < 16 && message[0] == byte(path[0]<<3)|byte(protowire.BytesType) && message[1] == 0 {
			visit(message[2:2:2])
			n++
			message = message[2:]
			continue
		}
		number, kind, size := protowire.ConsumeTag(message)
		if size < 0 {
			return 0, protowire.ParseError(size)
		}
		message = message[size:]
		if size = protowire.ConsumeFieldValue(number, kind, message); size < 0 {
			return 0, protowire.ParseError(size)
		}
		if number == path[0] && kind == protowire.BytesType {
			inner, _ := protowire.ConsumeBytes(message)
			if len(path) == 1 {
				visit(inner)
				n++
			} else {
				more, err := each(inner, visit, path[1:]...)
				if err != nil {
					return 0, err
				}
				n += more
			}
		}
		message = message[size:]
	}
	return n, nil
}
