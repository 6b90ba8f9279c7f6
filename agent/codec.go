package agent

import (
	"context"
	"runtime"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
)

// A loan is room for the values of an answer until the client has taken them. A client can ask and not read: gRPC keeps
// the encoded answer then, for as long as the connection lasts. So the answer's buffer gives the loan back when gRPC
// frees it, or with the garbage where gRPC only forgets it, as it does when a connection breaks.
type loan struct{ *debt }

// A debt is apart from its loan, so that it outlives it.
type debt struct {
	gate       *gate
	connection any
	size       int
	paid       atomic.Bool
}

func (d *debt) pay() {
	if d.paid.Swap(true) {
		return
	}
	g := d.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	g.unsent -= d.size
	if g.by[d.connection] -= d.size; g.by[d.connection] <= 0 {
		delete(g.by, d.connection)
	}
}

// borrow takes room for a value in the call's answer, and reports whether there was any. Values that are not large
// together need none: else clients that do not read would keep others from small values.
func (c *call) borrow(ctx context.Context, size int) bool {
	if c == nil {
		return true
	}
	borrowed := 0
	if c.loan != nil {
		borrowed = c.loan.size
	}
	if c.values+size < large {
		c.values += size
		return true
	}
	more := c.values + size - borrowed
	g := c.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.unsent+more > maxUnsent || g.by[c.connection]+more > maxUnsentByOne {
		return false
	}
	g.unsent += more
	g.by[c.connection] += more
	c.values += size
	if c.loan == nil {
		c.loan = &loan{&debt{gate: g, connection: c.connection}}
		runtime.AddCleanup(c.loan, (*debt).pay, c.loan.debt)
		// A compressed copy would outlive the buffer that we know of.
		_ = grpc.SetSendCompressor(ctx, encoding.Identity)
	}
	c.loan.size += more
	return true
}

// Get and Put make a loan the pool of one buffer.
func (l *loan) Get(size int) *[]byte { return mem.DefaultBufferPool().Get(size) }

func (l *loan) Put(buf *[]byte) {
	l.pay()
	mem.DefaultBufferPool().Put(buf)
}

// A lent message has a loan.
type lent struct {
	proto.Message
	loan *loan
}

// codec is gRPC's own for protobuf, except that it knows of loans, and of health requests.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2("proto")} }

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

// Unmarshal does not decode long health requests: the health service keeps the names that it is asked to watch.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	m, ok := v.(*healthv1.HealthCheckRequest)
	if !ok || data.Len() <= maxServiceOf {
		return c.CodecV2.Unmarshal(data, v)
	}
	m.Service = longName
	return nil
}

// longName stands for all names of services that are too long. No service has it.
const longName = "\x00"
