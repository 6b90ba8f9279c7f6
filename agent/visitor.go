package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// The bounds of calls without a key to the health service.
const (
	maxChecks    = 32          // under way, over all connections; gRPC reads a message of each, of 4 MiB at the most
	maxWatches   = 256         // the same
	visitTime    = time.Second // that a Check, or the message of a Watch, takes at the most
	maxServiceOf = 1 << 10     // bytes of a health request, of any caller
)

// visitors are the calls without a key that are let in: those to the health service.
type visitors struct{ checks, watches *visits }

func newVisitors() visitors {
	return visitors{&visits{most: maxChecks}, &visits{most: maxWatches, stay: true}}
}

// of returns those to the method; nil for a method that needs a key.
func (v visitors) of(method string) *visits {
	switch method {
	case healthv1.Health_Check_FullMethodName:
		return v.checks
	case healthv1.Health_Watch_FullMethodName:
		return v.watches
	default:
		return nil
	}
}

// visits are calls to one method.
type visits struct {
	most int
	stay bool // calls whose message has arrived may last

	mu  sync.Mutex
	all []*visit // in the order in which they began
}

type visitKey struct{}

// A visit is one call.
type visit struct {
	cancel     context.CancelFunc
	connection any
	begin      time.Time
	late       *time.Timer // cancels the visit
	ended      bool
}

// visitOf returns the visit that ctx belongs to; nil for none.
func visitOf(ctx context.Context) *visit {
	v, _ := ctx.Value(visitKey{}).(*visit)
	return v
}

// begin lets a call in and returns its context, or returns why not.
func (s *visits) begin(ctx context.Context) (context.Context, error) {
	v := &visit{connection: connectionOf(ctx), begin: time.Now()}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.all) >= s.most {
		// A call that has ended counts until gRPC is done with it, because it may have its message in memory.
		if other := s.other(v); other != nil {
			other.ended = true
			other.cancel()
		}
		return nil, errCrowded
	}
	context.AfterFunc(ctx, func() { s.end(v) })
	ctx, v.cancel = context.WithCancel(context.WithValue(ctx, visitKey{}, v))
	v.late = time.AfterFunc(visitTime, v.cancel)
	s.all = append(s.all, v)
	return ctx, nil
}

// other returns the call that should make room for v; nil for none. It is the oldest call of the connection with the
// most calls, among those that have had time to arrive. If calls may last, a connection keeps its only call.
func (s *visits) other(v *visit) *visit {
	count := make(map[any]int)
	for _, one := range s.all {
		count[one.connection]++
	}
	var other *visit
	for _, one := range s.all {
		if one.ended || v.begin.Sub(one.begin) < arrival || s.stay && count[one.connection] == 1 {
			continue
		}
		if other == nil || count[one.connection] > count[other.connection] {
			other = one
		}
	}
	return other
}

// end ends the visit.
func (s *visits) end(v *visit) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v.late.Stop()
	for i, one := range s.all {
		if one == v {
			s.all = append(s.all[:i], s.all[i+1:]...)
			return
		}
	}
}

var (
	errCrowded    = status.Error(codes.Unavailable, "too many calls without an API key are under way")
	errTooLong    = status.Error(codes.InvalidArgument, "the message of a call without an API key is compressed, or too long")
	errNoMessage  = status.Error(codes.InvalidArgument, "there is no message")
	errUnreadable = status.Error(codes.Unauthenticated, "this server wants an API key")
)

// A visitingStream is the stream of a visit. It reads the message by itself, because gRPC would read 4 MiB, and
// decompress it to as much. The visit may last once its message has arrived.
type visitingStream struct {
	grpc.ServerStream
	visit *visit
}

func (s visitingStream) RecvMsg(into any) error {
	m, isMessage := into.(proto.Message)
	if !isMessage {
		return errUnreadable
	}
	data, err := receive(s, maxServiceOf, nil)
	switch {
	case errors.Is(err, errNoTransport):
		return errUnreadable
	case errors.Is(err, errMessage):
		return errTooLong
	case err != nil:
		return visitError(s.Context())
	}
	s.visit.late.Stop()
	return proto.Unmarshal(data, m)
}

var errNoTransport = status.Error(codes.Unimplemented, "the server's transport is not gRPC's own")

// receivePiece is how many bytes of a message are read at a time. Up to then gRPC keeps each frame by itself, also one of a byte.
const receivePiece = 512

// receive reads a message of at most so many bytes, which is not compressed. The function begins, if not nil, gets its size before it
// is read, and may refuse it.
func receive(stream grpc.ServerStream, most uint32, begins func(size int) error) ([]byte, error) {
	// GRPC's own type, which has no name here.
	transport, ok := grpc.ServerTransportStreamFromContext(stream.Context()).(interface {
		ReadMessageHeader(header []byte) error
		Read(n int) (mem.BufferSlice, error)
	})
	if !ok {
		return nil, errNoTransport
	}
	var header [5]byte
	if err := transport.ReadMessageHeader(header[:]); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(header[1:])
	if header[0] != 0 || size > most {
		return nil, errMessage
	}
	if begins != nil {
		if err := begins(int(size)); err != nil {
			return nil, err
		}
	}
	data := make([]byte, size)
	for rest := data; len(rest) > 0; {
		piece, err := transport.Read(min(len(rest), receivePiece))
		if err != nil {
			return nil, err
		}
		rest = rest[piece.CopyTo(rest):]
		piece.Free()
	}
	return data, nil
}

// visitError is the error of a call whose message has not arrived.
func visitError(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return status.FromContextError(err).Err()
	}
	return errNoMessage
}
