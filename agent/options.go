package agent

import (
	"context"
	"reflect"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
)

// The bounds of a connection.
const (
	maxHeaders       = 64 << 10 // bytes of a call's header list
	maxStreams       = 10_240   // calls at once: more than flows wait in a queue of the default length
	pingsApart       = 5 * time.Second
	idleFor          = 30 * time.Minute
	handshakeTimeout = 10 * time.Second
)

// keyHeader is the metadata that carries the API key.
const keyHeader = "x-api-key"

// healthService is what balancers ask, which have no key.
const healthService = "/grpc.health.v1.Health/"

// An Option changes what [ServerOptions] returns.
type Option func(*options)

type options struct {
	keys func(key string) (name string, ok bool)
}

// WithKeys has the server refuse calls without a valid API key, which clients send as the metadata x-api-key. A call with
// several keys needs one that is valid: some clients send their key besides what they pass on. It holds for all services of the server except gRPC's standard health service, because balancers ask that one without a key. A
// refused call ends with the status Unauthenticated before its message is read. If it has a deadline and is for a service
// that is not the agent's, its message may be read, for 50 ms at the most: gRPC would keep a timer for it otherwise.
//
// The function valid reports whether the key is valid, and names its owner. It is called for each key of each call, at the same time
// for calls of several connections, and the other calls of a connection wait for it: so it must not block. Let it compare
// in constant time, as crypto/subtle does, or look up a hash of the key in a map: otherwise the time tells how much of a
// key is right.
func WithKeys(valid func(key string) (name string, ok bool)) Option {
	return func(o *options) { o.keys = valid }
}

// ServerOptions are what a gRPC server for agents should be made with. They bound what a peer can cost the agent; gRPC's
// own options after these override them:
//
//   - Clients may send pings every 5 s. gRPC's own default of 5 minutes ends the connections of those SDKs that ping more
//     often, and every check that waits on them.
//   - A connection may have 10,240 calls under way, which includes flows that wait in queues. One without a call for
//     30 minutes ends; a handshake has 10 s.
//   - A call's metadata may have 64 KiB.
//   - The messages that arrive at a time have 256 MiB at the most. Beyond that calls wait until they are read, and the
//     connection that sends the most of them without an end loses the one that takes the longest.
//   - Cached values that a client does not read have 64 MiB at the most, and 16 MiB for one connection.
//
// The options include a codec and a tap handle. A server can have only one tap handle: gRPC panics if it is given another.
func ServerOptions(opts ...Option) []grpc.ServerOption {
	var o options
	for _, opt := range opts {
		opt(&o)
	}
	g := newGate()
	return []grpc.ServerOption{
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: pingsApart, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idleFor}),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.WaitForHandlers(true),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.InTapHandle(func(ctx context.Context, info *tap.Info) (context.Context, error) {
			err := o.refusal(info)
			if err == nil {
				return g.call(ctx), nil
			}
			if _, ok := ctx.Deadline(); ok {
				return refused(ctx, err), nil
			}
			return ctx, err
		}),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			if err := refusalOf(ctx); err != nil {
				return nil, err
			}
			return handle(ctx, request)
		}),
		grpc.ChainStreamInterceptor(func(server any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			if err := refusalOf(stream.Context()); err != nil {
				return err
			}
			return handle(server, stream)
		}),
	}
}

// refusal tells why the call is refused; nil when it is not.
func (o *options) refusal(info *tap.Info) error {
	if o.keys == nil || strings.HasPrefix(info.FullMethodName, healthService) {
		return nil
	}
	sent := info.Header.Get(keyHeader)
	if len(sent) == 0 {
		return errNoKey
	}
	for _, key := range sent {
		if _, ok := o.keys(key); ok {
			return nil
		}
	}
	return errWrongKey
}

// refusalTime is how long a call that is refused has to arrive. Most take a moment.
const refusalTime = time.Second

type refusalKey struct{}

// refused makes the context of a call that has a deadline and is refused. If the tap handle refused it, gRPC would keep
// its timer until the deadline, which can be years away. So the call begins, and ends where it would be handled, or at
// the latest after refusalTime.
func refused(ctx context.Context, err error) context.Context {
	ctx, cancel := context.WithTimeout(context.WithValue(ctx, refusalKey{}, err), refusalTime)
	context.AfterFunc(ctx, cancel)
	return ctx
}

// refusalOf tells why the call is refused; nil when it is not.
func refusalOf(ctx context.Context) error {
	err, _ := ctx.Value(refusalKey{}).(error)
	return err
}

// Without a status of their own gRPC makes PermissionDenied of a tap handle's errors.
var (
	errNoKey    = status.Error(codes.Unauthenticated, "an API key is needed, as metadata "+keyHeader)
	errWrongKey = status.Error(codes.Unauthenticated, "wrong API key")
)

// connectionOf identifies the connection that a call came by.
func connectionOf(ctx context.Context) any {
	// A listener of the application's own can have addresses that are no keys of maps.
	if p, ok := peer.FromContext(ctx); ok && reflect.ValueOf(p.Addr).Comparable() {
		return p.Addr
	}
	return nil
}
