package redisstore

import (
	"context"
	"crypto/tls"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/rueidis"
)

// A link makes the connections of a store, and knows when one has ended.
type link struct {
	ended atomic.Uint64 // how many have, or more

	mu    sync.Mutex
	bound context.Context //nolint:containedctx // Open's, until it returns: the client has no context for the connections that it begins with
	stops []func() bool
}

// dial makes a connection that ends when its server sends what no server may send. See [wire].
func (l *link) dial(ctx context.Context, address string, dialer *net.Dialer, config *tls.Config) (net.Conn, error) {
	ctx, cancel := l.within(ctx)
	defer cancel()
	var conn net.Conn
	var err error
	if config != nil {
		secure := tls.Dialer{NetDialer: dialer, Config: config}
		conn, err = secure.DialContext(ctx, "tcp", address)
	} else {
		conn, err = dialer.DialContext(ctx, "tcp", address)
	}
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.bound != nil {
		l.stops = append(l.stops, context.AfterFunc(l.bound, func() { _ = conn.Close() }))
	}
	return &wire{Conn: conn, link: l}, nil
}

// within returns a context that also ends when that of Open does, while there is one.
func (l *link) within(ctx context.Context) (context.Context, context.CancelFunc) {
	l.mu.Lock()
	defer l.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	if l.bound != nil {
		l.stops = append(l.stops, context.AfterFunc(l.bound, cancel))
	}
	return ctx, cancel
}

// opened has connections last on after the context of Open has ended.
func (l *link) opened() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, stop := range l.stops {
		stop()
	}
	l.bound, l.stops = nil, nil
}

// A lone is a connection to the one server of a store, for one call at a time. Its caller writes the call and reads the answer. On the
// store's other connection, two goroutines of the client do that, and a call by itself takes almost twice as long: both have to wake up.
//
// The client makes a connection in the goroutine of the call that needs it, which may take longer than the store's bound. So calls use this
// one only while it is known to be there. Nothing reads from it between two calls. When a server restarts, all connections end, so this
// one counts as ended when any other one has.
type lone struct {
	client rueidis.Client
	link   *link

	mu    sync.Mutex // held by the one that uses the connection
	known bool       // the connection was there when so many had ended
	ended uint64
}

// loneBufferSize is the size of the buffers of a connection for one call at a time.
const loneBufferSize = 4 << 10

// newLone connects to the server.
func newLone(o rueidis.ClientOption, l *link) (*lone, error) {
	o.AlwaysPipelining = false
	o.Dialer.KeepAlive = -1 // a ping of the client's beside a call would have goroutines send from then on: see check
	o.RingScaleEachConn = 1 // for one call
	o.ReadBufferEachConn, o.WriteBufferEachConn = loneBufferSize, loneBufferSize
	client, err := rueidis.NewClient(o)
	if err != nil {
		if client != nil {
			client.Close()
		}
		return nil, err
	}
	return &lone{client: client, link: l}, nil
}

// take takes the connection for a call, until free is called. It reports false if the connection is in use, or not known to be there.
func (l *lone) take() bool {
	if !l.mu.TryLock() {
		return false
	}
	if !l.known || l.ended != l.link.ended.Load() {
		l.mu.Unlock()
		return false
	}
	return true
}

func (l *lone) free() { l.mu.Unlock() }

// check finds out, by a deadline, whether the connection is there. It makes another one if this one has failed. It also keeps the server
// from ending the connection because nobody uses it.
func (l *lone) check(ctx context.Context, deadline time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	ended := l.link.ended.Load()
	err := l.client.Do(until{ctx, deadline}, l.client.B().Ping().Build()).NonRedisError() // a refusal is an answer
	l.known, l.ended = err == nil, ended
}

// until is a context with a deadline that has no timer. The client sets the deadline of the connection by it, if no goroutine of its own
// sends. A deadline that passes ends the connection.
type until struct {
	context.Context //nolint:containedctx // it is what the deadline is added to

	deadline time.Time
}

func (u until) Deadline() (deadline time.Time, ok bool) { return u.deadline, true }
