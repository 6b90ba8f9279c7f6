package agent

import (
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
)

// The bounds of the streams of other services of the server, such as reflection.
const (
	maxForeign      = 64             // at a time, over all connections
	maxForeignByOne = maxForeign / 4 // of one connection
)

// foreign are the streams of other services. A Watch of the health service does not count: it says little and lasts.
// Sessions are the agent's own, and have bounds of their own.
type foreign struct {
	mu  sync.Mutex
	all int
	by  map[any]int
}

var errForeign = status.Error(codes.ResourceExhausted, "too many streams of services other than the agent's are under way")

// serve handles a stream of the call, if there is room for it. What the stream sends counts as the agent's own answers do.
func (f *foreign) serve(c *call, server any, stream grpc.ServerStream, method string, handle grpc.StreamHandler) error {
	stream = countedStream{stream, c}
	if method == healthv1.Health_Watch_FullMethodName || method == sessionv1.SessionService_Session_FullMethodName {
		return handle(server, stream)
	}
	if !f.enter(c.connection) {
		return errForeign
	}
	defer f.leave(c.connection)
	return handle(server, stream)
}

func (f *foreign) enter(connection any) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.all >= maxForeign || f.by[connection] >= maxForeignByOne {
		return false
	}
	if f.by == nil {
		f.by = make(map[any]int)
	}
	f.all++
	f.by[connection]++
	return true
}

func (f *foreign) leave(connection any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.all--
	if f.by[connection]--; f.by[connection] == 0 {
		delete(f.by, connection)
	}
}

// A countedStream counts each message that it sends, until the client has read it. Small ones count too, because one
// stream sends many.
type countedStream struct {
	grpc.ServerStream
	call *call
}

func (s countedStream) SendMsg(m any) error {
	message, ok := m.(proto.Message)
	if !ok {
		return s.ServerStream.SendMsg(m)
	}
	one := &call{gate: s.call.gate, connection: s.call.connection}
	if !one.lend(s.Context(), kept(max(proto.Size(message), smallAnswer+1)), false) {
		return errUnread
	}
	return s.ServerStream.SendMsg(lent{message, one.loan})
}
