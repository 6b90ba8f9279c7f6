package agent

import (
	"context"
	"errors"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/wire"
)

// borrow takes room for a value in the call's answer, and reports whether there was room.
func (c *call) borrow(size int) bool { return c == nil || c.outbox.lend(c.stream, size) }

var errUnread = status.Error(codes.ResourceExhausted, "too many answers are unread")

// answer counts the answer. If there is no room, the answer loses what its client can do without. A check is always
// answered, because its client would run the flow on an error. The rest of such an answer is small.
func (c *call) answer(ctx context.Context, m proto.Message) (any, error) {
	if c == nil {
		return m, nil
	}
	size := proto.Size(m)
	if size <= smallAnswer {
		c.outbox.answer(c.stream, c.metadata, size, true)
		return m, nil
	}
	if !c.outbox.answer(c.stream, c.metadata, size, false) {
		check := shrink(m)
		size = proto.Size(m)
		if !c.outbox.answer(c.stream, c.metadata, size, check) {
			c.over()
			return nil, errUnread
		}
	}
	_ = grpc.SetSendCompressor(ctx, encoding.Identity) // a compressor takes much time and memory
	return sized(m, size), nil
}

// over counts a call whose handler has ended without an answer.
func (c *call) over() {
	if c != nil {
		c.outbox.answer(c.stream, c.metadata, 0, true)
	}
}

// shrink removes what can be spared from the answer: labels, and cached values. It reports whether a check is answered.
func shrink(m proto.Message) (check bool) {
	switch m := m.(type) {
	case *checkhttpv1.CheckHTTPResponse:
		m.DynamicMetadata = nil // a copy of the other
		if m.GetOkResponse() != nil {
			m.GetOkResponse().Headers = nil
		}
		return shrink(m.GetCheckResponse())
	case *checkv1.CheckResponse:
		m.TelemetryFlowLabels = nil
		if m.GetCacheLookupResponse() != nil {
			m.CacheLookupResponse = new(checkv1.CacheLookupResponse) // SDKs take what it lacks for a miss
		}
		return true
	case *checkv1.CacheLookupResponse:
		m.ResultCacheResponse = without(m.GetResultCacheResponse())
		for key, found := range m.GetGlobalCacheResponses() {
			m.GlobalCacheResponses[key] = without(found)
		}
	}
	return false
}

// without is the answer for a key whose value is left out.
func without(found *checkv1.KeyLookupResponse) *checkv1.KeyLookupResponse {
	if len(found.GetValue()) == 0 {
		return found
	}
	return wire.KeyLookup(agentapi.CacheAnswer{Err: errUnreadValue})
}

var errUnreadValue = errors.New("there is no room for the cached value: too many answers are unread")

// maxPooled is the largest answer whose buffer comes from gRPC's pool. The next larger buffers there have 1 MiB.
const maxPooled = 32 << 10

// kept is how many bytes the buffer of an answer has.
func kept(size int) int {
	if size <= smallAnswer { // it has no room to spare
		return size
	}
	for _, of := range []int{4 << 10, 16 << 10, maxPooled} { // gRPC's own sizes
		if size <= of {
			return of
		}
	}
	return size
}

// An unpooled message has a buffer of its own size.
type unpooled struct{ proto.Message }

// sized returns the message, unpooled if it is too large for gRPC's pool.
func sized(m proto.Message, size int) any {
	if size > maxPooled {
		return unpooled{m}
	}
	return m
}

// codec is gRPC's own for protobuf, except that it knows of large answers, of health requests, and of compressed messages.
type codec struct {
	encoding.CodecV2
	decompressions *sync.Pool
}

func newCodec() codec { return codec{encoding.GetCodecV2("proto"), new(sync.Pool)} }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(unpooled)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	data, err := proto.Marshal(m.Message)
	if err != nil {
		return nil, err
	}
	return mem.BufferSlice{mem.SliceBuffer(data)}, nil
}

// Unmarshal does not decode long health requests: the health service keeps the names that it is asked to watch. It also decompresses
// messages of services other than the agent's.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	m, ok := v.(*healthv1.HealthCheckRequest)
	if _, own := v.(message); !own && isGzip(data) {
		d := takeDecompression(c.decompressions)
		defer c.decompressions.Put(d)
		err := d.decompress(data.Reader(), maxForeignMessage)
		if ok && errors.Is(err, errLarge) {
			m.Service = longName
			return nil
		}
		if err != nil {
			return err
		}
		data = mem.BufferSlice{mem.SliceBuffer(d.plain.Bytes())}
	}
	if !ok || data.Len() <= maxServiceOf {
		return c.CodecV2.Unmarshal(data, v)
	}
	m.Service = longName
	return nil
}

// longName stands for all names of services that are too long. No service has it.
const longName = "\x00"
