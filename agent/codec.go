package agent

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"

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

// A loan is room for an answer until the client has read it. If a client does not read, gRPC keeps the encoded answer
// for as long as the connection lasts. The answer's buffer gives the loan back when gRPC frees it. If gRPC only drops
// the buffer, as when a connection breaks, the garbage collector gives the loan back.
type loan struct{ *debt }

// A debt is apart from its loan because it outlives it.
type debt struct {
	unsent     *unsent
	connection any
	size       int
	paid       atomic.Bool
}

func (d *debt) pay() {
	if d.paid.Swap(true) {
		return
	}
	u := d.unsent
	u.mu.Lock()
	defer u.mu.Unlock()
	u.size -= d.size
	if u.by[d.connection] -= d.size; u.by[d.connection] <= 0 {
		delete(u.by, d.connection)
	}
}

// borrow takes room for a value in the call's answer, and reports whether there was room. Small values need none yet,
// because they count with the answer.
func (c *call) borrow(ctx context.Context, size int) bool {
	if c == nil {
		return true
	}
	if c.values+size >= smallValues && !c.lend(ctx, c.values+size, false) {
		return false
	}
	c.values += size
	return true
}

// lend takes room for the call's answer, in addition to what the call has, and reports whether there was room. If must
// is set, it always takes room. A connection with few unread bytes always finds room, so that connections that do not
// read cannot keep it from answers.
func (c *call) lend(ctx context.Context, size int, must bool) bool {
	more := size
	if c.loan != nil {
		more -= c.loan.size
	}
	if !c.gate.unsent.lend(c.connection, more, must) {
		return false
	}
	if c.loan == nil { // without the mutex, because streams send much
		c.loan = &loan{&debt{unsent: c.gate.unsent, connection: c.connection}}
		runtime.AddCleanup(c.loan, (*debt).pay, c.loan.debt)
		// A compressed copy would outlive the buffer that we know of.
		_ = grpc.SetSendCompressor(ctx, encoding.Identity)
	}
	c.loan.size = size
	return true
}

// lend takes room for so many more bytes of answers, if there is room or it must.
func (u *unsent) lend(connection any, more int, must bool) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	by := u.by[connection] + more
	if more > 0 && !must && (by > maxUnsentByOne || u.size+more > maxUnsent && by > ownUnsent) {
		return false
	}
	u.size += more
	u.by[connection] = by
	return true
}

var errUnread = status.Error(codes.ResourceExhausted, "too many answers are unread")

// answer counts the answer. If there is no room, the answer loses what its client can do without. A check is always
// answered, because its client would run the flow on an error. The rest of such an answer is small.
func (c *call) answer(ctx context.Context, m proto.Message) (any, error) {
	if c == nil {
		return m, nil
	}
	size := proto.Size(m)
	if size <= smallAnswer && c.loan == nil {
		return m, nil
	}
	if !c.lend(ctx, kept(size), false) {
		check := shrink(m)
		if !c.lend(ctx, kept(proto.Size(m)), check) {
			if c.loan != nil {
				c.loan.pay()
			}
			return nil, errUnread
		}
	}
	return lent{m, c.loan}, nil
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
	for _, of := range []int{4 << 10, 16 << 10, maxPooled} { // gRPC's own sizes
		if size <= of {
			return of
		}
	}
	return size
}

// Get and Put make a loan the pool of one buffer.
func (l *loan) Get(size int) *[]byte {
	if size > maxPooled {
		buf := make([]byte, size)
		return &buf
	}
	return mem.DefaultBufferPool().Get(max(size, smallAnswer+1)) // gRPC does not give smaller ones back
}

func (l *loan) Put(buf *[]byte) {
	l.pay()
	if cap(*buf) <= maxPooled {
		mem.DefaultBufferPool().Put(buf)
	}
}

// A lent message has a loan.
type lent struct {
	proto.Message
	loan *loan
}

// codec is gRPC's own for protobuf, except that it knows of loans, of health requests, and of compressed messages.
type codec struct {
	encoding.CodecV2
	decompressions *sync.Pool
}

func newCodec() codec { return codec{encoding.GetCodecV2("proto"), new(sync.Pool)} }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(lent)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	size := proto.Size(m.Message)
	buf := m.loan.Get(size)
	data, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend((*buf)[:0], m.Message)
	if err != nil {
		m.loan.Put(buf)
		return nil, err
	}
	*buf = data
	return mem.BufferSlice{mem.NewBuffer(buf, m.loan)}, nil
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
