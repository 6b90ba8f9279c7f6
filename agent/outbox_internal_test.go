package agent

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	grpcreflection "google.golang.org/grpc/reflection"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/frames"
	"github.com/headgate-go/headgate/internal/wire"
	"github.com/headgate-go/headgate/policy"
)

// newCall is a call on the first stream of a connection of its own.
func newCall() *call {
	o := &outbox{all: new(outboxes)}
	o.all.add(o)
	o.arrives(frames.Frame{Kind: frames.Headers, Stream: 1})
	return &call{outbox: o, stream: 1}
}

// arrives and leaves are one frame.
func (o *outbox) arrives(f frames.Frame) {
	o.mu.Lock()
	defer o.unlock()
	o.arrive(f)
}

func (o *outbox) leaves(f frames.Frame) {
	o.mu.Lock()
	defer o.unlock()
	o.leave(f)
}

// A call counts until its answer has left, but not while a handler has it.
func TestOutbox(t *testing.T) {
	header := frames.Frame{Kind: frames.Headers, Stream: 1, Length: 10}
	data := func(n int) frames.Frame { return frames.Frame{Kind: frames.Data, Stream: 1, Length: n} }
	end := frames.Frame{Kind: frames.Headers, Flags: frames.EndStream, Stream: 1}
	reset := frames.Frame{Kind: frames.RSTStream, Stream: 1}
	begun := unsentCall + 10*unsentHeader
	for _, tt := range []struct {
		name string
		do   func(o *outbox)
		want int
	}{
		{"a call that begins", func(*outbox) {}, begun},
		{"with more headers", func(o *outbox) { o.arrives(frames.Frame{Kind: frames.Continuation, Stream: 1, Length: 5}) }, begun + 5*unsentHeader},
		{"with more headers than calls may have", func(o *outbox) { o.arrives(frames.Frame{Kind: frames.Continuation, Stream: 1, Length: 1 << 14}) }, unsentCall + 4*maxHeaders},
		{"that is handled", func(o *outbox) { o.handle(1) }, 0},
		{"that is answered", func(o *outbox) { o.handle(1); o.answer(1, 100, 50, true) }, unsentCall + 150},
		{"whose answer has left in part", func(o *outbox) { o.answer(1, 100, 50, true); o.leaves(data(11)) }, unsentCall + 100 + 40},
		{"whose answer has left", func(o *outbox) { o.answer(1, 100, 50, true); o.leaves(data(55)) }, unsentCall + 100},
		{"that has ended", func(o *outbox) { o.answer(1, 100, 50, true); o.leaves(end) }, 0},
		{"that the agent has reset", func(o *outbox) { o.leaves(reset) }, 0},
		{"that the client has reset", func(o *outbox) { o.arrives(reset) }, 0},
		{"that the client has reset while a write does not return", func(o *outbox) { o.write(); o.arrives(reset) }, begun},
		{"that the client resets again and again meanwhile", func(o *outbox) {
			o.write()
			for range 10 {
				o.arrives(reset)
				o.answer(1, 0, 50, true)
			}
			if len(o.resets) != 1 {
				t.Errorf("%d resets are kept", len(o.resets))
			}
		}, unsentCall + 50},
		{"that the client has reset, once it has returned", func(o *outbox) { o.write(); o.arrives(reset); o.wrote(nil) }, 0},
		{"that has ended before its handler", func(o *outbox) { o.handle(1); o.leaves(end); o.answer(1, 100, 50, true) }, 0},
		{"whose answer takes room before it is known", func(o *outbox) { o.handle(1); o.lend(1, 1000) }, 1000},
		{"that did", func(o *outbox) { o.handle(1); o.lend(1, 1000); o.answer(1, 0, 50, true) }, unsentCall + 50},
		{"that did, and failed", func(o *outbox) { o.handle(1); o.lend(1, 1000); o.answer(1, 0, 0, true) }, unsentCall},
		{"a stream that sends", func(o *outbox) { o.handle(1); o.send(1, 95); o.send(1, 95) }, 2 * (unsentMessage + 95)},
		{"some of which has left", func(o *outbox) { o.handle(1); o.send(1, 95); o.send(1, 95); o.leaves(data(100)) }, unsentMessage + 95},
		{"and has ended", func(o *outbox) { o.handle(1); o.send(1, 95); o.answer(1, 10, 0, true) }, unsentMessage + 95 + unsentCall + 10},
		{"two calls", func(o *outbox) { o.arrives(frames.Frame{Kind: frames.Headers, Stream: 3}) }, begun + unsentCall},
		{"trailers of the client", func(o *outbox) { o.arrives(header) }, begun},
		{"a connection that has ended", func(o *outbox) { o.all.remove(o); o.arrives(frames.Frame{Kind: frames.Headers, Stream: 3}) }, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := &outbox{all: new(outboxes)}
			o.all.add(o)
			o.arrives(header)
			tt.do(o)
			if o.size != tt.want || o.all.size.Load() != int64(tt.want) {
				t.Errorf("%d bytes are unsent, %d of all want %d", o.size, o.all.size.Load(), tt.want)
			}
		})
	}
}

// Where all connections together have more to send than they may, those end that have most bytes for the longest time.
func TestTheWorstConnectionsEnd(t *testing.T) {
	const mib, room = 1 << 20, 20 // of the connections that are looked at
	type connection struct {
		name   string
		unread int           // answers of 1 MiB
		begins time.Duration // before the last connection does
		reads  time.Duration // when it reads all, and has as many again; 0 for never
	}
	for _, tt := range []struct {
		name        string
		connections []connection
		want        []string
	}{
		{"the most", []connection{{name: "a", unread: 9, begins: time.Second}, {name: "b", unread: 10, begins: time.Second}, {name: "c", unread: 2}}, []string{"b"}},
		{"until 15/16 are left", []connection{
			{name: "a", unread: 7, begins: time.Second}, {name: "b", unread: 6, begins: time.Second}, {name: "c", unread: 5, begins: time.Second}, {name: "d", unread: 3},
		}, []string{"a", "b"}},
		{"few bytes for long do not outweigh many", []connection{{name: "a", unread: 1, begins: time.Hour}, {name: "b", unread: 18, begins: time.Second}, {name: "c", unread: 2}}, []string{"b"}},
		{"many that leave do not outweigh few", []connection{
			{name: "a", unread: 10, begins: 2 * time.Second, reads: 100 * time.Millisecond}, {name: "b", unread: 9, begins: time.Second}, {name: "c", unread: 2},
		}, []string{"b"}},
		{"time since the last read counts", []connection{
			{name: "a", unread: 10, begins: 2 * time.Second, reads: time.Second}, {name: "b", unread: 9, begins: time.Second / 2}, {name: "c", unread: 2},
		}, []string{"a"}},
		{"time before there is a lack of room counts", []connection{{name: "a", unread: 9, begins: time.Second}, {name: "b", unread: 12}}, []string{"a"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				all := new(outboxes)
				all.size.Store(maxUnsent - room*mib) // of connections that are not looked at
				ends := make(chan string, len(tt.connections))
				type event struct {
					before time.Duration
					do     func()
				}
				var events []event
				for _, c := range tt.connections {
					o := &outbox{all: all, end: func() { ends <- c.name }}
					all.add(o)
					next := uint32(1)
					answer := func() {
						o.arrives(frames.Frame{Kind: frames.Headers, Stream: next})
						o.answer(next, mib-unsentCall, 0, true)
						next += 2
					}
					events = append(events, event{c.begins, func() {
						for range c.unread {
							answer()
						}
					}})
					if c.reads > 0 {
						events = append(events, event{c.reads, func() {
							for i := range c.unread {
								o.leaves(frames.Frame{Kind: frames.Headers, Flags: frames.EndStream, Stream: uint32(2*i + 1)})
								answer()
							}
						}})
					}
				}
				slices.SortStableFunc(events, func(a, b event) int { return int(b.before - a.before) })
				for i, e := range events {
					if i > 0 {
						<-time.After(events[i-1].before - e.before)
					}
					e.do()
				}
				synctest.Wait()
				close(ends)
				var ended []string
				for name := range ends {
					ended = append(ended, name)
				}
				if slices.Sort(ended); !slices.Equal(ended, tt.want) {
					t.Errorf("connections %v ended want %v", ended, tt.want)
				}
			})
		})
	}
}

// An answer counts with the buffer that it has. Where there is no room, checks are answered without labels and values,
// lookups without values, and other calls end with ResourceExhausted.
func TestAnswersCount(t *testing.T) {
	text := func(size int) string { return strings.Repeat("v", size) }
	labels := func(size int) proto.Message {
		return &checkv1.CheckResponse{ControlPoint: "point", TelemetryFlowLabels: map[string]string{"k": text(size)}}
	}
	value := func(size int) *checkv1.CacheLookupResponse {
		found := &checkv1.KeyLookupResponse{Value: []byte(text(size))}
		return &checkv1.CacheLookupResponse{ResultCacheResponse: found, GlobalCacheResponses: map[string]*checkv1.KeyLookupResponse{"k": found}}
	}
	missed := wire.KeyLookup(agentapi.CacheAnswer{Err: errUnreadValue})
	point := &checkv1.CheckResponse{ControlPoint: "point"}
	for _, tt := range []struct {
		name   string
		answer proto.Message
		counts int
		full   proto.Message // what is answered where there is no room; nil for an error
	}{
		{"small", labels(900), proto.Size(labels(900)), labels(900)},
		{"labels of 1 KiB", labels(1 << 10), 4 << 10, point},
		{"labels of 5 KiB", labels(5 << 10), 16 << 10, point},
		{"labels of 32,768 bytes", labels(2*(32<<10) - proto.Size(labels(32<<10))), 32 << 10, point},
		{"labels of 56 KiB", labels(56 << 10), proto.Size(labels(56 << 10)), point},
		{"CheckHTTP", &checkhttpv1.CheckHTTPResponse{CheckResponse: labels(1 << 10).(*checkv1.CheckResponse)}, 4 << 10, &checkhttpv1.CheckHTTPResponse{CheckResponse: point}},
		{"a check with values", &checkv1.CheckResponse{ControlPoint: "point", CacheLookupResponse: value(1 << 10)}, 4 << 10, &checkv1.CheckResponse{ControlPoint: "point", CacheLookupResponse: new(checkv1.CacheLookupResponse)}},
		{"values", value(20 << 10), proto.Size(value(20 << 10)), &checkv1.CacheLookupResponse{ResultCacheResponse: missed, GlobalCacheResponses: map[string]*checkv1.KeyLookupResponse{"k": missed}}},
		{"slots", &checkv1.FlowEndResponse{TokenReturnStatuses: []*checkv1.TokenReturnStatus{{Error: text(1 << 10)}}}, 4 << 10, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newCall()
			got, err := c.answer(t.Context(), proto.Clone(tt.answer))
			if err != nil || c.outbox.size != unsentCall+tt.counts {
				t.Fatalf("%d bytes are unsent, %v want %d", c.outbox.size, err, unsentCall+tt.counts)
			}
			sent, err := newCodec().Marshal(got)
			if err != nil || sent.Len() != proto.Size(tt.answer) {
				t.Fatalf("%d bytes are sent, %v want %d", sent.Len(), err, proto.Size(tt.answer))
			}
			if data := sent[0].ReadOnlyData(); tt.counts > maxPooled && cap(data) > tt.counts+tt.counts/8 {
				t.Errorf("the buffer has %d bytes want about %d", cap(data), tt.counts)
			}

			c = newCall()
			most := maxUnsentByOne - unsentCall
			if _, ok := tt.answer.(*checkv1.CacheLookupResponse); ok {
				most -= 4 << 10 // a lookup without values finds the room that its values do not
			}
			c.outbox.arrives(frames.Frame{Kind: frames.Headers, Stream: 3})
			c.outbox.handle(1)
			c.outbox.handle(3)
			if !c.outbox.lend(3, most) {
				t.Fatal("there is no room")
			}
			got, err = c.answer(t.Context(), proto.Clone(tt.answer))
			if tt.full == nil {
				if status.Code(err) != codes.ResourceExhausted {
					t.Errorf("answer() = %v want ResourceExhausted", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.full, got, protocmp.Transform()); diff != "" {
				t.Errorf("without room (-want +got):\n%s", diff)
			}
		})
	}
}

// A fullServer is an agent with the services that other programs add, in memory.
type fullServer struct {
	paces    *pacer
	listener *bufconn.Listener
}

func newFullServer(t *testing.T, buffer int, registers ...func(server *grpc.Server)) *fullServer {
	t.Helper()
	e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{
		policy.ConcurrencyScheduler{Selectors: policy.At("queue"), Max: 1, MaxInflight: time.Hour},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	s := &fullServer{paces: new(pacer), listener: bufconn.Listen(buffer)}
	server := grpc.NewServer(ServerOptions(func(o *options) { o.paces = s.paces })...)
	Register(server, e)
	healthv1.RegisterHealthServer(server, health.NewServer())
	grpcreflection.Register(server)
	for _, register := range registers {
		register(server)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(s.listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
		e.Close()
	})
	return s
}

// A rawClient sends frames.
type rawClient struct {
	t      *testing.T
	conn   net.Conn
	framer *http2.Framer
	block  bytes.Buffer
	hpack  *hpack.Encoder
	next   uint32
}

func (s *fullServer) connect(t *testing.T, settings ...http2.Setting) *rawClient {
	t.Helper()
	conn, err := s.listener.DialContext(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := &rawClient{t: t, conn: conn, framer: http2.NewFramer(conn, conn), next: 1}
	c.hpack = hpack.NewEncoder(&c.block)
	if _, err := conn.Write([]byte(http2.ClientPreface)); err != nil {
		t.Fatal(err)
	}
	if err := c.framer.WriteSettings(settings...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return c
}

func (c *rawClient) call(method string, message []byte, pairs ...string) (stream uint32, err error) {
	c.t.Helper()
	c.block.Reset()
	for all := append([]string{":method", "POST", ":scheme", "http", ":path", method, ":authority", "x", "te", "trailers"}, pairs...); len(all) > 0; all = all[2:] {
		_ = c.hpack.WriteField(hpack.HeaderField{Name: all[0], Value: all[1]})
	}
	stream = c.next
	c.next += 2
	if err := c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: c.block.Bytes(), EndHeaders: true}); err != nil {
		return 0, err
	}
	lasts := method == reflectionv1.ServerReflection_ServerReflectionInfo_FullMethodName || method == sessionv1.SessionService_Session_FullMethodName
	return stream, c.framer.WriteData(stream, !lasts, append([]byte{0, 0, 0, 0, byte(len(message))}, message...))
}

// unsent is what all connections have to send.
func (s *fullServer) unsent() int { return int(s.paces.outboxes.size.Load()) }

// What a client does not read counts until it reads or resets it. So it is for all that it can ask.
func TestAnswersThatAreNotReadCount(t *testing.T) {
	const calls = 30
	encode := func(m proto.Message) []byte {
		data, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	usual := []string{"content-type", "application/grpc"}
	for _, tt := range []struct {
		name    string
		method  string
		message proto.Message
		pairs   []string
		data    bool // the answer has a message, which waits for its stream's window
		base    int  // bytes of a call
	}{
		{"Check", checkv1.FlowControlService_Check_FullMethodName, &checkv1.CheckRequest{ControlPoint: "point"}, usual, true, unsentCall},
		{"CheckHTTP", checkhttpv1.FlowControlServiceHTTP_CheckHTTP_FullMethodName, &checkhttpv1.CheckHTTPRequest{ControlPoint: "point"}, usual, true, unsentCall},
		{"FlowEnd", checkv1.FlowControlService_FlowEnd_FullMethodName, &checkv1.FlowEndRequest{ControlPoint: "point", InflightRequests: []*checkv1.InflightRequestRef{{}}}, usual, true, unsentCall},
		{"CacheLookup", checkv1.FlowControlService_CacheLookup_FullMethodName, &checkv1.CacheLookupRequest{GlobalCacheKeys: []string{"k"}}, usual, true, unsentCall},
		{"a check that fails", checkv1.FlowControlService_Check_FullMethodName, new(checkv1.CheckRequest), usual, false, unsentCall},
		{"health", healthv1.Health_Check_FullMethodName, new(healthv1.HealthCheckRequest), usual, true, unsentCall},
		{"Watch of health", healthv1.Health_Watch_FullMethodName, new(healthv1.HealthCheckRequest), usual, true, callSize},
		{"reflection", reflectionv1.ServerReflection_ServerReflectionInfo_FullMethodName, &reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{ListServices: "*"}}, usual, true, unsentMessage},
		{"sessions", sessionv1.SessionService_Session_FullMethodName, &sessionv1.SessionRequest{Heartbeat: &sessionv1.Heartbeat{Number: 1}}, append(slices.Clone(usual), wire.SessionHeader, fmt.Sprintf("%032x", 1)), true, unsentMessage},
		{"an unknown method", "/a/b", new(checkv1.CheckRequest), usual, false, unsentCall},
		{"no method", "a", new(checkv1.CheckRequest), usual, false, unsentCall},
		{"an unknown encoding", checkv1.FlowControlService_Check_FullMethodName, new(checkv1.CheckRequest), append(slices.Clone(usual), "grpc-encoding", "none"), false, unsentCall},
		{"no call of gRPC", checkv1.FlowControlService_Check_FullMethodName, new(checkv1.CheckRequest), []string{"content-type", "text/plain"}, false, unsentCall},
	} {
		calls := calls
		switch tt.name {
		case "reflection":
			calls = maxForeignByOne
		case "sessions":
			calls = 4 // of a session
		}
		begin := func(t *testing.T, c *rawClient) (streams []uint32) {
			t.Helper()
			for range calls {
				stream, err := c.call(tt.method, encode(tt.message), tt.pairs...)
				if err != nil {
					t.Fatal(err)
				}
				streams = append(streams, stream)
			}
			synctest.Wait()
			return streams
		}
		if tt.data {
			t.Run(tt.name+", with windows that are closed", func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := newFullServer(t, 1<<16)
					c := s.connect(t, http2.Setting{ID: http2.SettingInitialWindowSize})
					go func() { _, _ = io.Copy(io.Discard, c.conn) }()
					streams := begin(t, c)
					if n := s.unsent(); n < calls*tt.base || n > calls*2*max(tt.base, unsentCall) {
						t.Errorf("%d bytes are unsent of %d calls want %d or a little more for each", n, calls, tt.base)
					}
					for _, stream := range streams[:len(streams)/2] {
						_ = c.framer.WriteRSTStream(stream, http2.ErrCodeCancel)
					}
					if err := c.framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 16}); err != nil {
						t.Fatal(err)
					}
					synctest.Wait()
					want := 0
					if tt.method == healthv1.Health_Watch_FullMethodName { // these last
						want = calls / 2 * 2 * callSize
					}
					if n := s.unsent(); n > want {
						t.Errorf("%d bytes are unsent after the client has read want at most %d", n, want)
					}
				})
			})
		}
		t.Run(tt.name+", with a connection that is not read", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newFullServer(t, 64)
				c := s.connect(t)
				// Until the first frames have left, nothing arrives.
				read := make(chan struct{})
				go func() {
					_, _ = io.CopyN(io.Discard, c.conn, 40)
					<-read
					_, _ = io.Copy(io.Discard, c.conn)
				}()
				begin(t, c)
				// What is in buffers has left.
				if n := s.unsent(); n < (calls-2)*tt.base {
					t.Errorf("%d bytes are unsent of %d calls want %d or a little more for each", n, calls, tt.base)
				}
				close(read)
				synctest.Wait()
				if n := s.unsent(); n > 0 && tt.method != healthv1.Health_Watch_FullMethodName {
					t.Errorf("%d bytes are unsent after the client has read", n)
				}
			})
		})
	}
}

// Flows that wait in queues count nothing.
func TestFlowsThatWaitAreNotUnsent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newFullServer(t, 1<<16)
		c := s.connect(t)
		go func() { _, _ = io.Copy(io.Discard, c.conn) }()
		message, err := proto.Marshal(&checkv1.CheckRequest{ControlPoint: "queue"})
		if err != nil {
			t.Fatal(err)
		}
		for range 20 {
			if _, err := c.call(checkv1.FlowControlService_Check_FullMethodName, message, "content-type", "application/grpc"); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if n := s.unsent(); n != 0 {
			t.Errorf("%d bytes are unsent", n)
		}
	})
}

// A client that reads slowly gets all answers, while connections that read nothing end.
func TestSlowClientsAreAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls, others := 60, 4
		s := newFullServer(t, 4<<10)
		s.paces.outboxes.size.Store(enoughUnsent - int64(calls)*2*unsentCall) // as if others had the rest
		conn, err := grpc.NewClient("passthrough:///localhost", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				conn, err := s.listener.DialContext(ctx)
				return slowConn{conn}, err
			}))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		client := checkv1.NewFlowControlServiceClient(conn)
		failed := make(chan error, calls)
		for range calls {
			go func() {
				_, err := client.Check(t.Context(), &checkv1.CheckRequest{ControlPoint: "point"})
				failed <- err
			}()
		}
		metadata := strings.Repeat("x", 4<<10) // it counts fourfold
		message := []byte{0x0a, 5, 'p', 'o', 'i', 'n', 't'}
		check := func(c *rawClient) error {
			_, err := c.call(checkv1.FlowControlService_Check_FullMethodName, message, "content-type", "application/grpc", "x", metadata)
			return err
		}
		var open []*rawClient
		for range others {
			c := s.connect(t)
			open = append(open, c)
			for range 4 * calls {
				if check(c) != nil {
					break
				}
			}
			<-time.After(time.Second)
		}
		if !slices.ContainsFunc(open, func(c *rawClient) bool { return check(c) != nil }) {
			t.Error("no connection has ended")
		}
		for range calls {
			if err := <-failed; err != nil {
				t.Fatalf("a client that reads slowly: %v", err)
			}
		}
	})
}

// A slowConn is read slowly: 4 KiB a second.
type slowConn struct{ net.Conn }

func (c slowConn) Read(p []byte) (int, error) {
	<-time.After(100 * time.Millisecond)
	return c.Conn.Read(p[:min(len(p), 400)])
}

// A connection whose client reads nothing is not read either, once much waits for it.
func TestConnectionsThatAreFullAreNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := new(pacer)
		near, far := net.Pipe()
		defer far.Close()
		c := newPacedConn(near, near, p)
		defer c.Close()
		calls := maxUnsentByOne/unsentCall + 1
		read := make(chan int)
		go func() {
			p := make([]byte, 16<<10)
			n := 0
			for {
				more, err := c.Read(p)
				if n += more; err != nil {
					read <- n
					return
				}
			}
		}()
		go func() { _, _ = c.Write(frame(http2.FrameHeaders, 10)) }()
		header := new(bytes.Buffer)
		framer := http2.NewFramer(header, nil)
		sent := frames.PrefaceBytes
		if _, err := far.Write(make([]byte, frames.PrefaceBytes)); err != nil {
			t.Fatal(err)
		}
		for i := range calls {
			header.Reset()
			_ = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1), EndHeaders: true})
			if _, err := far.Write(header.Bytes()); err != nil {
				t.Fatal(err)
			}
			sent += header.Len()
		}
		more := make(chan struct{})
		go func() {
			_, _ = far.Write(header.Bytes())
			close(more)
		}()
		select {
		case <-more:
			t.Error("a connection that is full is read")
		case <-time.After(time.Minute):
		}
		if _, err := io.ReadFull(far, make([]byte, 19)); err != nil {
			t.Fatal(err)
		}
		<-more
		_ = far.Close()
		if n := <-read; n != sent+header.Len() {
			t.Errorf("%d bytes were read want %d", n, sent+header.Len())
		}
	})
}

// BenchmarkOutbox measures what a call costs besides its frames, with as many others.
func BenchmarkOutbox(b *testing.B) {
	for _, others := range []int{0, 1000} {
		b.Run(fmt.Sprint(others, " others"), func(b *testing.B) {
			o := &outbox{all: new(outboxes)}
			o.all.add(o)
			stream := uint32(1)
			for ; stream < uint32(2*others); stream += 2 {
				o.arrives(frames.Frame{Kind: frames.Headers, Stream: stream})
			}
			b.ReportAllocs()
			for b.Loop() {
				o.arrives(frames.Frame{Kind: frames.Headers, Stream: stream, Length: 50})
				o.handle(stream)
				o.answer(stream, 600, 100, true)
				o.write()
				o.leaves(frames.Frame{Kind: frames.Headers, Stream: stream})
				o.leaves(frames.Frame{Kind: frames.Data, Stream: stream, Length: 105})
				o.leaves(frames.Frame{Kind: frames.Headers, Flags: frames.EndStream, Stream: stream})
				o.wrote(nil)
				stream += 2
			}
		})
	}
}

// BenchmarkChecks measures a check over a connection in memory.
func BenchmarkChecks(b *testing.B) {
	e, err := engine.New(nil)
	if err != nil {
		b.Fatal(err)
	}
	defer e.Close()
	l := bufconn.Listen(1 << 20)
	server := grpc.NewServer(ServerOptions()...)
	Register(server, e)
	go func() { _ = server.Serve(l) }()
	defer server.Stop()
	conn, err := grpc.NewClient("passthrough:///localhost", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	client := checkv1.NewFlowControlServiceClient(conn)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := client.Check(b.Context(), &checkv1.CheckRequest{ControlPoint: "point"}); err != nil {
			b.Fatal(err)
		}
	}
}
