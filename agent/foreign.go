package agent

import (
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
)

// The bounds of the streams of other services of the server, such as reflection, and of sessions by connection.
const (
	maxForeign      = 64             // at a time, over all connections
	maxForeignByOne = maxForeign / 4 // of one connection
	maxLinesByOne   = 128            // streams of sessions of one connection: a client has one, and a proxy has many clients
)

// streams are those of one kind that are under way.
type streams struct {
	most, byOne int   // over all connections, and of one
	full        error // what ends one more

	mu  sync.Mutex
	all int
	by  map[any]int
}

var (
	errForeign = status.Error(codes.ResourceExhausted, "too many streams of services other than the agent's are under way")
	errLines   = status.Error(codes.ResourceExhausted, "the connection has too many streams of sessions")
)

// kinds are a server's streams by what they are for. A Watch of the health service is of neither kind: only its bytes are bounded, by the
// outbox.
type kinds struct{ foreign, lines streams }

func newKinds() *kinds {
	return &kinds{
		foreign: streams{most: maxForeign, byOne: maxForeignByOne, full: errForeign},
		lines:   streams{most: maxSessions + maxSpares, byOne: maxLinesByOne, full: errLines},
	}
}

// serve handles a stream of the call, if there is room for it. What the stream sends counts as the agent's own answers do.
func (k *kinds) serve(c *call, server any, stream grpc.ServerStream, method string, handle grpc.StreamHandler) error {
	_ = grpc.SetSendCompressor(stream.Context(), encoding.Identity) // the outbox counts what is sent
	stream = countedStream{stream, c}
	of := &k.foreign
	switch method {
	case healthv1.Health_Watch_FullMethodName:
		c.outbox.lasts(c.stream, c.size()) // nothing else bounds how many there are
		return handle(server, stream)
	case sessionv1.SessionService_Session_FullMethodName:
		of = &k.lines
	}
	if !of.enter(c.connection) {
		return of.full
	}
	defer of.leave(c.connection)
	return handle(server, stream)
}

func (s *streams) enter(connection any) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all >= s.most || s.by[connection] >= s.byOne {
		return false
	}
	if s.by == nil {
		s.by = make(map[any]int)
	}
	s.all++
	s.by[connection]++
	return true
}

func (s *streams) leave(connection any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all--
	if s.by[connection]--; s.by[connection] == 0 {
		delete(s.by, connection)
	}
}

// A countedStream counts each message that it sends, until the client has read it, also small ones: one stream can send many.
type countedStream struct {
	grpc.ServerStream
	call *call
}

func (s countedStream) SendMsg(m any) error {
	message, ok := m.(proto.Message)
	if !ok {
		return s.ServerStream.SendMsg(m)
	}
	size := proto.Size(message)
	if !s.call.outbox.send(s.call.stream, size) {
		return errUnread
	}
	return s.ServerStream.SendMsg(sized(message, size))
}

func (s countedStream) RecvMsg(into any) error {
	err := s.ServerStream.RecvMsg(into)
	if err == nil {
		s.call.allowance.earn(messageEarns, callEarnsData)
	}
	return err
}
