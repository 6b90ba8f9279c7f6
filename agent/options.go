package agent

import (
	"context"
	"errors"
	"net"
	"reflect"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
	"google.golang.org/protobuf/proto"

	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
)

// The bounds of a connection.
const (
	maxHeaders       = 24 << 10 // bytes of a call's header list: 16 KiB of the application's, and what clients add
	maxMethod        = 256      // bytes of a method's name
	maxStreams       = 10_240   // calls at once: more than flows wait in a queue of the default length
	pingsApart       = 5 * time.Second
	idleFor          = 30 * time.Minute
	handshakeTimeout = 10 * time.Second

	// GRPC's windows grow to 16 MiB for each stream otherwise, if a client has a fast network. A message that is longer has room as
	// soon as it is read.
	streamWindow     = 64 << 10
	connectionWindow = 1 << 20
)

// keyHeader is the metadata that carries the API key.
const keyHeader = "x-api-key"

// An Option changes what [ServerOptions] returns.
type Option func(*options)

type options struct {
	keys  func(key string) (name string, ok bool)
	creds credentials.TransportCredentials
	paces *pacer
}

// WithCredentials secures the server's connections, as [grpc.Creds] does. Without the option, or with nil, connections are
// in plaintext. If the option is repeated, the last one counts. Handlers and interceptors find the same peer as with
// grpc.Creds. Do not give the server grpc.Creds as well. Before [ServerOptions] it has no effect, and connections are in
// plaintext. After ServerOptions it replaces these credentials. Then what connections send is not paced, and what they do not read is
// not bounded.
//
// What TLS itself costs is bounded with gRPC's own credentials for TLS. They get a wrapped connection. Other credentials get the
// connection as the listener made it.
func WithCredentials(creds credentials.TransportCredentials) Option {
	return func(o *options) { o.creds = creds }
}

// WithKeys makes the server refuse calls without a valid API key, which clients send as the metadata x-api-key. If a
// call has several keys, one valid key is enough, because some clients add their own to metadata that they pass on. The
// option applies to all services of the server. The methods Check and Watch of gRPC's standard health service are the
// exception, because balancers call them without a key. A refused call ends with the status Unauthenticated before its
// message is read, and no interceptor and no handler runs. A server with keys refuses all calls by [grpc.Server.ServeHTTP],
// because keys are not checked there.
//
// At most 32 Checks and 256 Watches of the health service can be under way without a key. A Check may take 1 s. The
// message of a Watch must arrive within 1 s, and is refused if it is compressed or longer than 1 KiB.
//
// The function valid reports whether the key is valid, and names its owner. It is called for the keys of each call, at
// the same time for calls of several connections. The other calls of a connection wait for it, so it must not block.
// Let it compare in constant time, as crypto/subtle does, or look up a hash of the key in a map. Otherwise the time
// reveals how much of a key is right.
func WithKeys(valid func(key string) (name string, ok bool)) Option {
	return func(o *options) { o.keys = valid }
}

// ServerOptions returns the options for a gRPC server that serves agents. They bound what a peer can cost the agent.
// gRPC's own options override them if they come later:
//
//   - Clients may send pings every 5 s. gRPC's own default of 5 minutes would end the connections of SDKs that ping more
//     often, with every check that waits on them.
//   - A connection may have 10,240 calls under way, flows in queues included. It ends after 30 minutes without a call.
//     A handshake may take 10 s. With TLS, as many handshakes compute at a time as half of the processors, and others wait. A
//     client can send 64 KiB in a handshake, its certificates included.
//   - A call's metadata may have 24 KiB, where each entry counts 32 bytes more than its text. A method's name may have 256
//     bytes of printable ASCII. The health service looks at names of services up to 1 KiB.
//   - Calls whose messages have not arrived take at most 128 MiB, with 8 KiB and their metadata for each. Beyond that, the
//     connection with the most of them loses a call.
//   - At most 64 messages may take more than 50 ms to arrive at a time. Beyond that, the connection with the most of them
//     loses its oldest one. A call whose messages are compressed otherwise than by gzip ends with Unimplemented. The
//     exception are other services' calls that are not streams: gRPC decompresses their messages first, if it can, to at
//     most 4 MiB each.
//   - At most half of the processors read requests of 64 KiB and more. The other requests wait, and take at most 64 MiB. The
//     next one is of the connection whose requests have lately taken the least time. The size of a request is that without
//     compression. It may be 4 MiB. A compressed message for another service may have 64 KiB without compression.
//   - Requests that are being decided take at most 128 MiB, with their metadata and 16 KiB for each call. Those that are not
//     checks have 32 MiB more. Checks that keep up to 2 KiB do not count, nor other requests of up to 4 KiB. A label counts
//     for 96 bytes besides its text, and a cache key or a header of CheckHTTP for 192. A check beyond that is decided at once,
//     and does not wait.
//   - Calls whose answers have not left take at most 128 MiB, with 4 KiB and four times their metadata for each. Beyond that,
//     connections end: those with many such bytes that have not read for long. Beyond 16 MiB of one connection, checks are
//     answered without labels and cached values, and other calls with answers of more than 1 KiB end with
//     ResourceExhausted. If such a connection does not read at all, it is not read either. Flows that wait in queues do not
//     count. A Watch of the health service counts as long as it lasts. Answers of more than 1 KiB are not compressed.
//   - There can be 8192 sessions of clients, of which one API key, or one certificate, can have 2048. So can all clients
//     without either. A connection can have 128 streams of sessions. A message of a session may have 16 KiB. 1000 of a stream
//     are handled a second, and the others wait. A stream with more than 64 messages that wait, or two large ones, ends. What
//     waits or arrives takes at most 64 MiB. What is remembered of flows that can be settled takes at most 16 MiB for one
//     session, and 128 MiB, with 16 KiB more for each session.
//   - A connection is read more slowly if it sends frames that no call needs. A call that is let in needs up to 15 small frames
//     and 4 MiB of data, and a message of a stream needs 4 small frames. A connection can send 5000 other frames a second. All
//     connections can send 40,000 a second for each processor, in equal shares, and each can send 100 even then. A call that
//     is refused counts as 17 frames or more. One that gRPC refuses by itself, because its header is malformed or too long,
//     counts as 1000. An answer with a header of more than 256 bytes counts as one more for each 16, unless a handler makes it.
//     A frame other than DATA counts as one more for each 64 bytes. A record of TLS that brings no data counts as 16. A
//     connection that sends more for 3 s ends. Connections whose addresses are equal count as one.
//   - A client can send 64 KiB of a stream, and 1 MiB of a connection, before the agent reads it.
//   - Other services of the server can have 64 streams at a time, and 16 of one connection. Watch of the health service
//     is not among them. What such streams send counts as answers do.
//
// The options include a codec, a decompressor, credentials and a tap handle. Give credentials by [WithCredentials], because they replace
// those of earlier options. A server can have only one tap handle: gRPC panics if it is given another. Most of these bounds do not
// hold for [grpc.Server.ServeHTTP], which calls no tap handle.
func ServerOptions(opts ...Option) []grpc.ServerOption {
	o := options{paces: new(pacer)}
	for _, opt := range opts {
		opt(&o)
	}
	g := newGate()
	lines := newLineGate()
	visitors := newVisitors()
	others := newKinds()
	return []grpc.ServerOption{
		grpc.Creds(newPacedCredentials(o.creds, o.paces)),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: pingsApart, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idleFor}),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.StaticStreamWindowSize(streamWindow),
		grpc.StaticConnWindowSize(connectionWindow),
		grpc.WaitForHandlers(true),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.RPCDecompressor(keepGzip{}), //nolint:staticcheck // a compressor is the whole program's, and gRPC keeps this one throughout 1.x
		grpc.InTapHandle(func(ctx context.Context, info *tap.Info) (context.Context, error) {
			connection := connectionOf(ctx)
			a := o.paces.allowance(connection)
			a.see()
			if !isPlain(info.FullMethodName) {
				return refuse(ctx, errMethod)
			}
			owner, err := o.owner(info)
			if err == nil {
				of := g
				if info.FullMethodName == sessionv1.SessionService_Session_FullMethodName {
					of = lines
				}
				c, err := of.call(ctx, connection, info.Header)
				if err != nil {
					if errors.Is(err, errFlood) {
						closeConnection(ctx)
					}
					return refuse(ctx, err)
				}
				c.owner, c.hasKey, c.allowance = owner, o.keys != nil, a
				a.admit(c.metadata)
				return c, nil
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
			if o.bypassed(ctx) {
				return nil, errServeHTTP
			}
			c := callOf(ctx)
			other := c.find(ctx) // of another service
			if c.ready() {
				c.over()
				return nil, errEvicted
			}
			response, err := handle(ctx, request)
			if !other {
				return response, err
			}
			if m, ok := response.(proto.Message); ok && err == nil {
				return c.answer(ctx, m)
			}
			c.over()
			return response, err
		}),
		grpc.ChainStreamInterceptor(func(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			if err := refusalOf(stream.Context()); err != nil {
				return err
			}
			if o.bypassed(stream.Context()) {
				return errServeHTTP
			}
			c := callOf(stream.Context())
			c.find(stream.Context())
			defer c.over()
			if c.ready() {
				return errEvicted
			}
			if c != nil && compresses(stream.Context()) {
				return errEncoding
			}
			if v := visitOf(stream.Context()); v != nil {
				stream = visitingStream{stream, v}
			}
			if c != nil {
				return others.serve(c, server, stream, info.FullMethod, handle)
			}
			return handle(server, stream)
		}),
	}
}

// owner returns who owns the call's API key; empty if no key is needed. The error says why the call is refused.
func (o *options) owner(info *tap.Info) (string, error) {
	if o.keys == nil {
		return "", nil
	}
	sent := info.Header.Get(keyHeader)
	if len(sent) == 0 {
		return "", errNoKey
	}
	for _, key := range sent {
		if name, ok := o.keys(key); ok {
			return name, nil
		}
	}
	return "", errWrongKey
}

// bypassed reports whether the call needs a key, and none was asked for: ServeHTTP of gRPC's server calls no tap handle.
func (o *options) bypassed(ctx context.Context) bool {
	return o.keys != nil && callOf(ctx) == nil && visitOf(ctx) == nil
}

// isPlain reports whether a method can have the name. gRPC repeats the name of an unknown method several times, in a
// longer form.
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

// stopTimer stops the timer of the context that gRPC made for the call, and reports whether it did. There is no other
// way, because gRPC drops the function that would cancel the context. So the timer is looked up by reflection. If a
// future release of Go keeps it elsewhere, it is not found.
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

// closeConnection closes the connection that the call came by, and reports whether it did. A server cannot close a
// connection of its own accord otherwise, so the connection is looked up by reflection in the context that gRPC made. If
// a future release of gRPC keeps it elsewhere, it is not found.
func closeConnection(ctx context.Context) bool {
	for v := reflect.ValueOf(ctx); v.Kind() == reflect.Pointer && v.Elem().Kind() == reflect.Struct; {
		s := v.Elem()
		key, value := s.FieldByName("key"), s.FieldByName("val")
		if key.Kind() == reflect.Interface && value.Kind() == reflect.Interface && value.Type() == reflect.TypeFor[any]() && !key.IsNil() {
			if of := key.Elem().Type(); of.Name() == "connectionKey" && of.PkgPath() == "google.golang.org/grpc/internal/transport" {
				kept, _ := reflect.TypeAssert[*any](reflect.NewAt(reflect.TypeFor[any](), value.Addr().UnsafePointer()))
				conn, ok := (*kept).(net.Conn)
				return ok && conn.Close() == nil
			}
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

// refusalOf returns why the call is refused; nil if it is not.
func refusalOf(ctx context.Context) error {
	err, _ := ctx.Value(refusalKey{}).(error)
	return err
}

// gRPC turns errors of a tap handle into PermissionDenied if they have no status.
var (
	errNoKey    = status.Error(codes.Unauthenticated, "an API key is needed, as metadata "+keyHeader)
	errWrongKey = status.Error(codes.Unauthenticated, "wrong API key")

	errServeHTTP = status.Error(codes.Unauthenticated, "the server checks API keys only if it accepts connections by Serve, not by ServeHTTP")
	errMethod    = status.Error(codes.Unimplemented, "no method has such a name")
)

// connectionOf identifies the connection that a call came by.
func connectionOf(ctx context.Context) any {
	if p, ok := peer.FromContext(ctx); ok {
		return connectionAt(p.Addr)
	}
	return nil
}

// connectionAt identifies the connection whose peer has the address.
func connectionAt(address net.Addr) any {
	// The application's own listener can have addresses that cannot be keys of maps.
	if reflect.ValueOf(address).Comparable() {
		return address
	}
	return nil
}
