// Package telemetry reports flows to agents. It has the record of a flow, as a span of OpenTelemetry's, and the service
// that takes spans. Clients write records; agents and the test kit read them.
//
// The service is written by hand because the generated package links an HTTP gateway. On the wire a request to it is a
// TracesData.
package telemetry

import (
	"context"
	"errors"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/headgate-go/headgate/internal/protofield"
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

// maxFields is how many fields an export may have down to its spans, whose own do not count.
const maxFields = 1 << 16

var errFields = status.Error(codes.ResourceExhausted, "the export has too many fields")

// RegisterCounter registers the service on s for an agent that only counts the spans that clients export, and may read
// the bytes of each. It does not decode spans, because each would cost some thirty objects. A nil read is not called.
func RegisterCounter(s grpc.ServiceRegistrar, add func(n int), read func(ctx context.Context, span []byte)) {
	// A message without fields of its own keeps all that comes.
	Register(s, func(ctx context.Context, data *emptypb.Empty) error {
		left := maxFields
		n, err := each(data.ProtoReflect().GetUnknown(), func([]byte) {}, &left, resourceSpans, scopeSpans, spans)
		if errors.Is(err, errFields) {
			return err
		}
		if err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
		add(n)
		if read != nil {
			left, spansLeft := maxFields, maxRead
			_, _ = each(data.ProtoReflect().GetUnknown(), func(span []byte) {
				if spansLeft--; spansLeft >= 0 {
					read(ctx, span)
				}
			}, &left, resourceSpans, scopeSpans, spans)
		}
		return nil
	})
}

// each calls visit with each field at the end of the path, and counts them. It looks at no more fields than are left.
func each(message []byte, visit func([]byte), left *int, path ...protowire.Number) (n int, err error) {
	if *left -= protofield.Count(message, *left); *left < 0 {
		return 0, errFields
	}
	ok := protofield.Walk(message, func(field protowire.Number, data []byte, _ uint64) {
		switch {
		case err != nil || field != path[0] || data == nil:
		case len(path) == 1:
			visit(data)
			n++
		default:
			var more int
			more, err = each(data, visit, left, path[1:]...)
			n += more
		}
	})
	if err == nil && !ok {
		err = protofield.ErrMalformed
	}
	if err != nil {
		return 0, err
	}
	return n, nil
}
