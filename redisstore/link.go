package redisstore

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync/atomic"
)

// A link knows whether the connection to the one server is there. It makes connections for the client.
//
// The client makes a connection, and greets the server, in the goroutine of the call that needs it. Other calls wait for that. It may
// take longer than the store's bound. So no caller may be the one that needs it, or wait for it.
type link struct{ up atomic.Bool } // a server has answered since a connection was last made

// ownKey is the key of contexts of calls that their callers send.
type ownKey struct{}

// errUnconnected is the error of a call that its caller has sent, if there was no connection. The call has not left.
var errUnconnected = errors.New("there is no connection to the store")

// dial makes a connection that ends when its server sends what no server may send. See [wire].
func (l *link) dial(ctx context.Context, address string, dialer *net.Dialer, config *tls.Config) (net.Conn, error) {
	l.up.Store(false)
	if ctx.Value(ownKey{}) != nil {
		return nil, errUnconnected
	}
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
	return &wire{Conn: conn}, nil
}
