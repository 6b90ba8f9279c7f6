package agent

import (
	"context"
	"slices"
	"strings"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/runtime/protoiface"
)

// lenient is the service, except that text in its requests need not be UTF-8. Some SDKs send text as they have it, a lone
// half of a surrogate pair for example. Go's decoder refuses that, and an SDK takes the error for leave to run the flow.
func lenient(service grpc.ServiceDesc) *grpc.ServiceDesc {
	service.Methods = slices.Clone(service.Methods)
	for i := range service.Methods {
		handle := service.Methods[i].Handler
		service.Methods[i].Handler = func(server any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
			return handle(server, ctx, func(into any) error {
				if m, ok := into.(proto.Message); ok {
					return decode(lenientMessage{m})
				}
				return decode(into)
			}, intercept)
		}
	}
	return &service
}

// A lenientMessage decodes into its message.
type lenientMessage struct{ proto.Message }

func (m lenientMessage) ProtoReflect() protoreflect.Message {
	return lenientReflection{m.Message.ProtoReflect()}
}

type lenientReflection struct{ protoreflect.Message }

func (r lenientReflection) Interface() protoreflect.ProtoMessage {
	return lenientMessage{r.Message.Interface()}
}

func (r lenientReflection) ProtoMethods() *protoiface.Methods {
	return &protoiface.Methods{Unmarshal: func(in protoiface.UnmarshalInput) (protoiface.UnmarshalOutput, error) {
		m := r.Message.Interface()
		err := proto.Unmarshal(in.Buf, m)
		if err != nil {
			if repaired, ok := repairText(in.Buf, m.ProtoReflect().Descriptor()); ok {
				err = proto.Unmarshal(repaired, m)
			}
		}
		return protoiface.UnmarshalOutput{Flags: protoiface.UnmarshalInitialized}, err
	}}
}

// repairText is the message with its text made UTF-8, as far as the descriptor knows the fields. It is not ok where the
// bytes are no message at all.
func repairText(message []byte, d protoreflect.MessageDescriptor) (repaired []byte, ok bool) {
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return nil, false
		}
		size := protowire.ConsumeFieldValue(number, kind, message[n:])
		if size < 0 {
			return nil, false
		}
		field := d.Fields().ByNumber(number)
		if kind != protowire.BytesType || field == nil || field.Kind() != protoreflect.StringKind && field.Kind() != protoreflect.MessageKind {
			repaired = append(repaired, message[:n+size]...)
		} else {
			data, _ := protowire.ConsumeBytes(message[n:])
			switch {
			case field.Kind() == protoreflect.MessageKind:
				if data, ok = repairText(data, field.Message()); !ok {
					return nil, false
				}
			case !utf8.Valid(data):
				data = []byte(strings.ToValidUTF8(string(data), "\uFFFD"))
			}
			repaired = protowire.AppendBytes(append(repaired, message[:n]...), data)
		}
		message = message[n+size:]
	}
	return repaired, true
}
