package redisstore

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// A link knows whether the connection to the one server is there. It makes connections for the client.
//
// The client makes a connection, and greets the server, in the goroutine of the call that needs it. Other calls wait for that. It may
// take longer than the store's bound. So no caller may be the one that needs it, or wait for it.
type link struct {
	up     atomic.Bool // the server has answered a call since a connection was last made
	dialed atomic.Pointer[time.Time]

	mu    sync.Mutex
	bound context.Context //nolint:containedctx // Open's, until it returns: the client has no context for the connections that it begins with
	stops []func() bool
}

// ownKey is the key of contexts of calls that their callers send.
type ownKey struct{}

// errUnconnected is the error of a call that its caller has sent, if there was no connection. The call has not left.
var errUnconnected = errors.New("there is no connection to the store")

// dial makes a connection that ends when its server sends what no server may send. See [wire].
func (l *link) dial(ctx context.Context, address string, dialer *net.Dialer, config *tls.Config) (net.Conn, error) {
	now := time.Now()
	l.dialed.Store(&now)
	l.up.Store(false)
	if ctx.Value(ownKey{}) != nil {
		return nil, errUnconnected
	}
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
	return &wire{Conn: conn}, nil
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

// answered notes that a call that was sent then has been answered.
func (l *link) answered(sent time.Time) {
	if l.up.Load() {
		return
	}
	if dialed := l.dialed.Load(); dialed == nil || sent.After(*dialed) {
		l.up.Store(true)
	}
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
