package agent

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/internal/wire"
)

// The bounds of sessions' messages that have begun to arrive and are not handled. A client sends settlements when those before them
// are answered, and returns likewise. So a stream of an honest client has two large messages at the most, and few heartbeats.
const (
	maxUnhandled      = 64                                                    // messages of a stream
	maxUnhandledSize  = 2*wire.MaxSessionMessage + maxUnhandled*unhandledSize // bytes of a stream
	unhandledSize     = 128                                                   // bytes that a message takes besides its own
	maxUnhandledAll   = 64 << 20                                              // bytes, over all sessions
	maxUnhandledByOne = maxUnhandledAll / 2                                   // of one owner
	ownUnhandled      = 1 << 20                                               // of one owner, even if others leave no room
	maxHandled        = 128                                                   // messages that are handled at a time; some wait for a store
	maxHandledByOne   = maxHandled / 2                                        // of one owner
	unitsByOne        = 25_000                                                // that are handled of one owner each second, for each processor: a message's elements
	messageUnits      = 4                                                     // of a message, besides its elements
	messageArrival    = 10 * time.Second                                      // how long a message may take to arrive
	maxFloods         = 32                                                    // streams of a connection that end within lateFor because they send too fast; then it ends
)

// An owner has sessions: an API key, a certificate, or all clients without either.
type owner struct {
	name     string
	sessions int           // guarded by sessions.mu
	spares   int           // streams besides the first of each session; guarded by sessions.mu
	turns    chan struct{} // has an element for each of its messages that is handled

	unhandled atomic.Int64 // bytes
	pace      pace         // of units
}

// A line is one stream of a session. A goroutine reads its messages as they come, so that they do not stay in gRPC's buffers, where
// nothing counts them.
type line struct {
	session  *session
	all      *sessions
	cancel   context.CancelFunc // ends the call; nil on a server without ServerOptions
	messages chan []byte        // closed by the reader when no more come
	readErr  error              // why; set before messages is closed
	failed   chan struct{}      // closed after failure is set

	mu      sync.Mutex
	failure error // why the agent ends the stream
	count   int   // of messages that are not handled
	size    int   // of these, in bytes
}

var (
	errReplaced  = status.Error(codes.Unavailable, "a newer stream of the session has taken the place of this one")
	errFast      = status.Error(codes.ResourceExhausted, "the client sends more than it waits for")
	errUnhandled = status.Error(codes.ResourceExhausted, "too many messages of sessions wait")
	errOverdue   = status.Error(codes.DeadlineExceeded, "the message does not arrive")
)

// fail ends the stream, also one whose client does not read.
func (l *line) fail(err error) {
	l.mu.Lock()
	first := l.failure == nil
	if first {
		l.failure = err
	}
	l.mu.Unlock()
	if !first {
		return
	}
	close(l.failed)
	if l.cancel != nil {
		l.cancel()
	}
}

// reason returns why the stream ends, if the agent ends it; or else err.
func (l *line) reason(err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failure != nil {
		return l.failure
	}
	return err
}

// read reads the messages until no more come.
func (l *line) read(stream grpc.ServerStream) {
	defer close(l.messages)
	late := time.AfterFunc(messageArrival, func() { l.fail(errOverdue) })
	defer late.Stop()
	late.Stop()
	for {
		data, err := receive(stream, wire.MaxSessionMessage, func(size int) error {
			late.Reset(messageArrival)
			return l.take(size + unhandledSize)
		})
		late.Stop()
		if err != nil {
			l.readErr = err
			if errors.Is(err, errFast) && l.all.floods(connectionOf(stream.Context())) {
				closeConnection(stream.Context())
			}
			if errors.Is(err, errFast) || errors.Is(err, errUnhandled) {
				l.fail(err)
			}
			return
		}
		l.messages <- data // it has room for as many as take lets in
	}
}

// take counts a message of so many bytes, or returns why there is no room for it.
func (l *line) take(size int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.failure != nil:
		return l.failure
	case l.count >= maxUnhandled || l.size+size > maxUnhandledSize:
		return errFast
	case !l.all.take(l.session.owner, int64(size)):
		return errUnhandled
	}
	l.count++
	l.size += size
	return nil
}

// handled gives back the room of a message.
func (l *line) handled(size int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.count > 0 {
		l.count--
		l.size -= size
		l.all.take(l.session.owner, -int64(size))
	}
}

// over gives back the room of all messages, when the stream has ended.
func (l *line) over() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failure == nil {
		l.failure = errReplaced // no message is counted any more
	}
	l.all.take(l.session.owner, -int64(l.size))
	l.count, l.size = 0, 0
}

// take counts bytes of messages that are not handled, and reports whether there was room for them.
func (s *sessions) take(of *owner, size int64) bool {
	own, all := of.unhandled.Add(size), s.unhandled.Add(size)
	if size <= 0 || own <= ownUnhandled || own <= maxUnhandledByOne && all <= maxUnhandledAll {
		return true
	}
	of.unhandled.Add(-size)
	s.unhandled.Add(-size)
	return false
}

// turn waits until a message of the owner with so many elements may be handled. Thousands of messages that are handled at a time would
// make checks wait for a processor. Call the function when the message is handled.
func (s *sessions) turn(ctx context.Context, of *owner, elements int) (done func(), err error) {
	second := unitsByOne * runtime.GOMAXPROCS(0)
	if err := of.pace.wait(ctx, messageUnits+elements, second, second/4); err != nil {
		return nil, status.FromContextError(err).Err()
	}
	select {
	case of.turns <- struct{}{}:
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	select {
	case s.turns <- struct{}{}:
		return func() { <-s.turns; <-of.turns }, nil
	case <-ctx.Done():
		<-of.turns
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

// floods notes that a stream of the connection has ended because it sends too fast. It reports whether the connection should end,
// because all that it sends costs the agent processor time.
func (s *sessions) floods(connection any) bool {
	s.floodsMu.Lock()
	defer s.floodsMu.Unlock()
	if now := time.Now(); s.flooded == nil || now.Sub(s.floodsSince) >= lateFor {
		s.flooded, s.floodsSince = make(map[any]int), now
	}
	s.flooded[connection]++
	return s.flooded[connection] > maxFloods
}
