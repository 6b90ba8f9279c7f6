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
	maxHeaders       = 24 << 10 // bytes of a call's header list: 16 KiB of the application's, and what clients add
	maxMethod        = 256      // bytes of a method's name
	maxStreams       = 10_240   // calls at once: more than flows wait in a queue of the default length
	pingsApart       = 5 * time.Second
	idleFor          = 30 * time.Minute
	handshakeTimeout = 10 * time.Second
)

// keyHeader is the metadata that carries the API key.
const keyHeader = "x-api-key"

// An Option changes what [ServerOptions] returns.
type Option func(*options)

type options struct {
	keys func(key string) (name string, ok bool)
}

// WithKeys has the server refuse calls without a valid API key, which clients send as the metadata x-api-key. A call with
// several keys needs one that is valid: some clients send their key besides what they pass on. It holds
// for all services of the server. The methods Check and Watch of gRPC's standard health service are the exception, because
// balancers ask them without a key. A refused call ends with the status Unauthenticated before its message is read, and
// no interceptor and no handler runs.
//
// Of the health service's calls without a key, 32 Checks and 256 Watches can be under way at a time. A Check has 1 s, and
// so has the message of a Watch, which is refused if it is compressed or longer than 1 KiB.
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
//   - A call's metadata may have 24 KiB, each entry with 32 bytes more than it has. The name of its method may have 256
//     bytes of printable ASCII. The health service looks at names of services up to 1 KiB.
//   - Of the messages that take more than 50 ms to arrive there are 64 at a time. Beyond that the connection that sends the
//     most of them loses the one that takes the longest. Compressed messages are 64 at a time, and others wait.
//   - Requests that are being decided about have 128 MiB at the most, with their metadata. Those of up to 4 KiB do not
//     count. A check beyond that is decided about at once: it does not wait.
//   - Answers that clients do not read have 64 MiB at the most, and 16 MiB for one connection. Beyond that checks are
//     answered without labels and cached values, and other calls end with ResourceExhausted. Answers of more than 1 KiB
//     are not compressed.
//
// The options include a codec and a tap handle. A server can have only one tap handle: gRPC panics if it is given another.
func ServerOptions(opts ...Option) []grpc.ServerOption {
	var o options
	for _, opt := range opts {
		opt(&o)
	}
	g := newGate()
	visitors := newVisitors()
	return []grpc.ServerOption{
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: pingsApart, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idleFor}),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.WaitForHandlers(true),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.InTapHandle(func(ctx context.Context, info *tap.Info) (context.Context, error) {
			if !isPlain(info.FullMethodName) {
				return refuse(ctx, errMethod)
			}
			err := o.refusal(info)
			if err == nil {
				return g.call(ctx, info.Header), nil
			}
			if visits := visitors.of(info.FullMethodName); visits != nil {
				c, err := visits.begin(ctx)
				if err != nil {
					return refuse(ctx, err)
				}
				return c, nil
			}
			return refuse(ctx, err)
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
			if v := visitOf(stream.Context()); v != nil {
				stream = visitingStream{stream, v}
			}
			return handle(server, stream)
		}),
	}
}

// refusal tells why the call is refused; nil when it is not.
func (o *options) refusal(info *tap.Info) error {
	if o.keys == nil {
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

// isPlain reports whether a method can have the name. gRPC repeats the names of methods that it does not know, in a
// longer form, and again and again.
func isPlain(method string) bool {
	return len(method) <= maxMethod && strings.IndexFunc(method, func(r rune) bool { return r < '!' || r > '~' }) < 0
}

// refusalTime is how long a call that is refused has to arrive. Most take a moment.
const refusalTime = time.Second

// refuse ends a call in the tap handle. GRPC keeps the timer of such a call until its deadline, which can be years away. So
// the timer is stopped first.
func refuse(ctx context.Context, err error) (context.Context, error) {
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) > refusalTime && !stopTimer(ctx) {
		return refused(ctx, err), nil
	}
	return ctx, err
}

// stopTimer stops the timer of the context that gRPC made for the call, and reports whether it did. Nobody else can: gRPC
// drops the function that would cancel the context, and package context has no other way. So the timer is looked up
// by reflection, and is not found if a future release of Go keeps it elsewhere.
func stopTimer(ctx context.Context) bool {
	for v := reflect.ValueOf(ctx); v.Kind() == reflect.Pointer && v.Elem().Kind() == reflect.Struct; {
		s := v.Elem()
		if !s.FieldByName("key").IsValid() { // no context with a value
			timer := s.FieldByName("timer")
			return timer.IsValid() && timer.Type() == reflect.TypeFor[*time.Timer]() && !timer.IsNil() &&
				reflect.NewAt(reflect.TypeFor[time.Timer](), timer.UnsafePointer()).Interface().(*time.Timer).Stop() //nolint:forcetypeassert // it is what NewAt was told
		}
		parent := s.FieldByName("Context")
		if parent.Kind() != reflect.Interface {
			return false
		}
		v = parent.Elem()
	}
	return false
}

type refusalKey struct{}

// refused makes the context of a call whose timer cannot be stopped. The call begins, and ends where it would be handled,
// or at the latest after refusalTime.
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
	errMethod   = status.Error(codes.Unimplemented, "no method has such a name")
)

// connectionOf identifies the connection that a call came by.
func connectionOf(ctx context.Context) any {
	// A listener of the application's own can have addresses that are no keys of maps.
	if p, ok := peer.FromContext(ctx); ok && reflect.ValueOf(p.Addr).Comparable() {
		return p.Addr
	}
	return nil
}
