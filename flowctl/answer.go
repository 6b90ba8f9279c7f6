package flowctl

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/internal/wire"
)

// The bounds of what an agent may answer. They hold before anything is decoded.
const (
	maxAnswer       = wire.MaxAnswer   // bytes, without what the answer repeats of the question
	maxCachedAnswer = 16 << 20         // bytes, if the question asks for cached values
	maxElements     = wire.MaxElements // an empty one has 2 bytes on the wire and 100 in memory
	maxUnknown      = 1024             // fields that this version does not know: they are kept, and reported with the flow
	maxNesting      = 64

	// Elements of other agents have 5 bytes and more. Those of an answer that is full of shorter ones would cost a hundred times as much as
	// they do on the network.
	fewElements    = 512 // that any answer may have
	bytesByElement = 4   // of the others

	// A smaller answer cannot have too much in it. A larger one takes long to decode, so its check must have time left.
	smallAnswer = 2 * fewElements

	// The bytes of large answers that may be decoded at a time. An answer beyond them fails instead of waiting: it would
	// wait in memory, and past the deadline of its check.
	maxDecoding = 48 << 20
	largeAnswer = 1 << 20
)

var (
	errElements      = fmt.Errorf("the answer has more than %d elements", maxElements)
	errEmptyElements = fmt.Errorf("the answer has more than %d elements, most of which are empty", fewElements)
	errUnknown       = fmt.Errorf("the answer has more than %d unknown fields", maxUnknown)
	errNesting       = fmt.Errorf("the answer is nested more than %d deep", maxNesting)
	errDecoding      = errors.New("too many large answers came at the same time")
	errLate          = errors.New("the answer came too late to be decoded")
)

// boundedCodec is gRPC's codec for Protocol Buffers. It checks the bounds of an answer before it decodes it.
type boundedCodec struct {
	encoding.CodecV2
}

func (c boundedCodec) Unmarshal(data mem.BufferSlice, v any) error {
	if err := checkBounds(data, v, 0); err != nil {
		return err
	}
	return c.CodecV2.Unmarshal(data, v)
}

// decode decodes the answer to a check, which may be large. repeated is how many of its elements repeat the question. An
// answer that is not small is an error if ctx has ended: its check would end even later, and so would those that wait for a processor.
func (r *remote) decode(ctx context.Context, data mem.BufferSlice, v any, repeated int) error {
	size := int64(data.Len())
	if size >= smallAnswer && ctx.Err() != nil {
		return errLate
	}
	if size >= largeAnswer {
		defer r.decoding.Add(-size)
		if r.decoding.Add(size) > maxDecoding {
			return errDecoding
		}
	}
	if err := checkBounds(data, v, repeated); err != nil {
		return err
	}
	return r.codec.CodecV2.Unmarshal(data, v)
}

// checkBounds returns an error if an answer has more in it than any agent has reason to send. Small answers cannot have
// that, and are not looked at. repeated is how many elements repeat the question.
func checkBounds(data mem.BufferSlice, v any, repeated int) error {
	m, ok := v.(proto.Message)
	if !ok || data.Len() < smallAnswer {
		return nil
	}
	buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buf.Free()
	n := counted{elements: -repeated, most: min(maxElements, fewElements+data.Len()/bytesByElement)}
	return n.add(m.ProtoReflect().Descriptor(), buf.ReadOnlyData(), maxNesting)
}

// counted counts elements and unknown fields. Of the elements, those of packed lists are apart: they are numbers, which cost little.
type counted struct {
	elements, packed, unknown int
	most                      int // elements that are not packed
}

// add counts those of an encoded message. What is malformed is left to the decoder.
func (n *counted) add(desc protoreflect.MessageDescriptor, data []byte, depth int) error {
	if depth == 0 {
		return errNesting
	}
	fields := desc.Fields()
	for len(data) > 0 {
		number, kind, size := protowire.ConsumeTag(data)
		if size < 0 {
			return nil
		}
		data = data[size:]
		if size = protowire.ConsumeFieldValue(number, kind, data); size < 0 {
			return nil
		}
		field := data[:size]
		data = data[size:]
		known := fields.ByNumber(number)
		if known == nil {
			if n.unknown++; n.unknown > maxUnknown {
				return errUnknown
			}
			continue
		}
		if known.Message() != nil || known.IsList() {
			n.elements++
		}
		if kind == protowire.BytesType {
			inner, _ := protowire.ConsumeBytes(field)
			switch {
			case known.Message() != nil:
				if err := n.add(known.Message(), inner, depth-1); err != nil {
					return err
				}
			case known.IsList() && known.Kind() != protoreflect.StringKind && known.Kind() != protoreflect.BytesKind:
				n.packed += len(inner)
			}
		}
		switch {
		case n.elements+n.packed > maxElements:
			return errElements
		case n.elements > n.most:
			return errEmptyElements
		}
	}
	return nil
}

// clipError bounds the text of an error that came with an answer, or about a connection. A clipped error keeps its
// code, and nothing else that the peer chose.
func clipError(err error) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	if s, ok := status.FromError(err); ok {
		if s.Code() == codes.Internal && strings.HasSuffix(s.Message(), refusedFormat) {
			return status.Error(codes.Internal, "the answer is compressed, and the client had not asked for that")
		}
		if len(text) <= wire.MaxText && proto.Size(s.Proto()) <= 2*wire.MaxText {
			return err
		}
		return status.Error(s.Code(), wire.Clip(s.Message()))
	}
	if len(text) <= wire.MaxText {
		return err
	}
	return errors.New(wire.Clip(text))
}

// clipDenied bounds the answer to a denied request.
func clipDenied(m *checkhttpv1.CheckHTTPResponse) {
	denied := m.GetDeniedResponse()
	if denied == nil {
		return
	}
	denied.Body = wire.Clip(denied.GetBody())
	for name, value := range denied.GetHeaders() {
		if len(name) > wire.MaxText {
			delete(denied.GetHeaders(), name)
		} else {
			denied.Headers[name] = wire.Clip(value)
		}
	}
}
