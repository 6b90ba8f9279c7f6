// Package hostile has agents that a client must survive: they are broken, or they mean harm. Each is one way of treating
// a connection. They listen on loopback only.
package hostile

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/internal/testing/rawtls"
)

// An Agent is a way of treating connections.
type Agent struct {
	Name   string
	Secure bool // its clients use TLS

	// Serve treats one connection, until ctx ends or the connection does. Its caller closes the connection.
	Serve func(ctx context.Context, conn net.Conn)
}

// A Server is an agent at work.
type Server struct {
	Address     string
	connections atomic.Int64
}

// Connections counts the connections so far.
func (s *Server) Connections() int64 { return s.connections.Load() }

// Serve starts an agent, which ends with the test.
func Serve(t testing.TB, a Agent) *Server {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Address: l.Addr().String()}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			s.connections.Add(1)
			running.Go(func() {
				stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
				defer stop()
				a.Serve(ctx, conn)
				_ = conn.Close()
			})
		}
	})
	t.Cleanup(func() {
		cancel()
		_ = l.Close()
		running.Wait()
	})
	return s
}

// Agents are all of them.
func Agents() []Agent {
	agents := []Agent{
		{Name: "accepts and closes", Serve: func(context.Context, net.Conn) {}},
		{Name: "accepts and is silent", Serve: func(ctx context.Context, _ net.Conn) { <-ctx.Done() }},
		{Name: "reads nothing after the settings", Serve: func(ctx context.Context, conn net.Conn) {
			if begin(conn, setting(settingInitialWindow, 1<<30)) != nil {
				return
			}
			if _, _, _, err := read(conn); err != nil { // so that the client reads the settings even if nothing is buffered
				return
			}
			if write(conn, frameWindowUpdate, 0, 0, number(1<<30)) == nil {
				<-ctx.Done()
			}
		}},
		{Name: "speaks HTTP/1", Serve: func(_ context.Context, conn net.Conn) {
			_, _ = conn.Read(make([]byte, 1024))
			_, _ = io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
		}},
		{Name: "speaks TLS", Serve: func(_ context.Context, conn net.Conn) {
			_, _ = conn.Read(make([]byte, 1024))
			_, _ = conn.Write([]byte("\x15\x03\x03\x00\x02\x02\x32"))
		}},
		{Name: "sends garbage", Serve: func(_ context.Context, conn net.Conn) {
			_, _ = conn.Write(bytes.Repeat([]byte{0xff, 0x00, 0x13}, 10_000))
		}},
		{Name: "resets after the settings", Serve: func(_ context.Context, conn net.Conn) {
			if begin(conn) == nil {
				abort(conn)
			}
		}},
		{Name: "goes away at once", Serve: func(_ context.Context, conn net.Conn) {
			if begin(conn) == nil {
				_ = goAway(conn, 0)
			}
		}},
		{Name: "goes away soon", Serve: func(ctx context.Context, conn net.Conn) {
			if begin(conn) == nil {
				pause(ctx, 100*time.Millisecond)
				_ = goAway(conn, 0)
			}
		}},
		{Name: "goes away with each answer", Serve: func(_ context.Context, conn net.Conn) {
			_ = begin(conn)
			_ = each(conn, func(stream uint32) error {
				if err := answer(conn, stream, nil, ""); err != nil {
					return err
				}
				return errors.Join(goAway(conn, stream), io.EOF)
			})
		}},
		{Name: "goes away with each question", Serve: func(_ context.Context, conn net.Conn) {
			_ = begin(conn)
			_ = each(conn, func(uint32) error { return errors.Join(goAway(conn, 0), io.EOF) })
		}},
		{Name: "allows no streams", Serve: func(ctx context.Context, conn net.Conn) {
			if begin(conn, setting(settingMaxStreams, 0)) == nil {
				_, _ = io.Copy(io.Discard, conn)
			}
		}},
		{Name: "opens no window", Serve: func(ctx context.Context, conn net.Conn) {
			if begin(conn, setting(settingInitialWindow, 0)) == nil {
				_, _ = io.Copy(io.Discard, conn)
			}
		}},
		flood("floods settings", frame(frameSettings, 0, 0, setting(settingInitialWindow, 1<<16))),
		flood("floods pings", frame(framePing, 0, 0, make([]byte, 8))),
		flood("floods window updates", frame(frameWindowUpdate, 0, 1, number(1))),
		flood("floods resets", frame(frameRSTStream, 0, 1, number(0))),
		flood("floods empty data", frame(frameData, 0, 1, nil)),
		flood("floods data", frame(frameData, 0, 1, make([]byte, 16<<10))),
		flood("floods headers", frame(frameHeaders, flagEndHeaders, 1, bytes.Repeat([]byte{0x88}, 8<<10))),
		flood("floods unknown frames", frame(0xee, 0, 0, nil)),
		streams("answers with huge headers", func(w io.Writer, stream uint32) error {
			return headers(w, stream, 0, manyFields(4<<20))
		}),
		streams("answers with huge trailers", func(w io.Writer, stream uint32) error {
			if err := headers(w, stream, 0, field(":status", "200")+field("content-type", "application/grpc")); err != nil {
				return err
			}
			return headers(w, stream, flagEndStream, manyFields(4<<20))
		}),
		streams("answers with a status of a mebibyte", func(w io.Writer, stream uint32) error {
			return status(w, stream, "14", strings.Repeat("x", 1<<20))
		}),
		streams("answers with a status of 40 KiB", func(w io.Writer, stream uint32) error {
			return status(w, stream, "14", strings.Repeat("ä", 20<<10))
		}),
		streams("answers and never ends", func(w io.Writer, stream uint32) error {
			if err := headers(w, stream, 0, field(":status", "200")+field("content-type", "application/grpc")); err != nil {
				return err
			}
			return write(w, frameData, 0, stream, []byte{0, 0x7f, 0xff, 0xff, 0xff})
		}),
		endless("answers without end", func(stream uint32) []byte {
			return frame(frameData, 0, stream, make([]byte, 16380)) // of messages that are empty
		}),
		streams("resets each question", func(w io.Writer, stream uint32) error {
			return write(w, frameRSTStream, 0, stream, number(7))
		}),
	}
	agents = append(agents, forgetful()...)
	agents = append(agents, secure()...)
	for _, b := range bombs() {
		message := sync.OnceValue(b.message)
		zipped := sync.OnceValue(func() []byte { return zip(message()) })
		agents = append(agents, serve("answers "+b.name, message),
			streams("answers "+b.name+", gzipped", func(w io.Writer, stream uint32) error { return answer(w, stream, zipped(), "gzip") }))
	}
	return agents
}

// Text is an agent that refuses with a status of this code and text.
func Text(code, text string) Agent {
	return streams("refuses", func(w io.Writer, stream uint32) error { return status(w, stream, code, text) })
}

// Gzipped is an agent that answers with a compressed message, even if the client did not compress its own.
func Gzipped(message []byte) Agent {
	zipped := zip(message)
	return streams("compresses", func(w io.Writer, stream uint32) error { return answer(w, stream, zipped, "gzip") })
}

// Answering is an agent that answers every question with the same bytes.
func Answering(message []byte) Agent {
	return serve("answers", func() []byte { return message })
}

// A bomb is a message that is small on the wire, or as large as a client may take, and larger in memory.
type bomb struct {
	name    string
	message func() []byte
}

// bombs are for Check, CheckHTTP and FlowEnd. Each is tried on all of them.
func bombs() []bomb {
	const small, large = 250 << 10, 16<<20 - 64
	entry := func(n protowire.Number, inner []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, n, protowire.BytesType), inner)
	}
	fill := func(size int, element []byte) []byte { return bytes.Repeat(element, size/len(element)) }
	labels := func(size int) []byte { // of CheckResponse, without a value
		m := make([]byte, 0, size)
		for n := uint64(0); len(m) < size-16; n++ {
			key := strconv.FormatUint(n, 36)
			m = append(m, 7<<3|byte(protowire.BytesType), byte(len(key)+2), 1<<3|byte(protowire.BytesType), byte(len(key)))
			m = append(m, key...)
		}
		return m
	}
	metadata := func(value []byte) []byte { // of CheckHTTPResponse
		return entry(4, entry(1, append(entry(1, []byte("k")), entry(2, value)...)))
	}
	return []bomb{
		{"250 KiB of decisions", func() []byte { return fill(small, entry(12, nil)) }},
		{"8 KiB of decisions", func() []byte { return fill(8100, entry(12, nil)) }},
		{"16 MiB of decisions", func() []byte { return fill(large, entry(12, nil)) }},
		{"250 KiB of decisions to HTTP", func() []byte { return entry(5, fill(small, entry(12, nil))) }},
		{"250 KiB of labels", func() []byte { return labels(small) }},
		{"16 MiB of labels", func() []byte { return labels(large) }},
		{"250 KiB of returned slots", func() []byte { return fill(small, entry(1, nil)) }},
		{"250 KiB of metadata", func() []byte { return metadata(entry(6, fill(small, entry(1, nil)))) }},
		{"nested metadata", func() []byte {
			var nested []byte
			for range 4000 {
				nested = entry(6, entry(1, nested)) // of google.protobuf.Value a list, and of that a value
			}
			return metadata(nested)
		}},
		{"a value of 15 MiB", func() []byte { return entry(15, entry(1, entry(1, make([]byte, 15<<20)))) }},
		{"unknown fields", func() []byte { return fill(small, []byte{0xf8, 0x7f, 0}) }},
	}
}

// raw is a codec of messages that are encoded.
type raw struct{}

func (raw) Marshal(v any) ([]byte, error) {
	b, _ := v.([]byte)
	return b, nil
}
func (raw) Unmarshal([]byte, any) error { return nil }
func (raw) Name() string                { return "proto" }

// serve is an agent that keeps to HTTP/2 and gRPC, and answers every question with the same bytes.
func serve(name string, message func() []byte) Agent {
	return served(name, func(*grpc.Server) {}, grpc.ForceServerCodec(raw{}), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		var question []byte
		if err := stream.RecvMsg(&question); err != nil {
			return err
		}
		return stream.SendMsg(message())
	}))
}

// served is an agent that is a server of gRPC's own for each connection.
func served(name string, register func(*grpc.Server), opts ...grpc.ServerOption) Agent {
	return Agent{Name: name, Serve: func(_ context.Context, conn net.Conn) {
		s := grpc.NewServer(append(slices.Clip(opts), grpc.WaitForHandlers(true))...)
		register(s)
		defer s.Stop()
		l := &single{conn: make(chan net.Conn, 1), closed: make(chan struct{})}
		l.conn <- &watched{Conn: conn, l: l}
		_ = s.Serve(l)
	}}
}

// forgetful are agents that do not answer what clients say at the end of flows. So their clients keep something of each flow: slots that
// no call gives back, or a settlement.
func forgetful() []Agent {
	slots := func(number, label int) *checkv1.CheckResponse {
		m := new(checkv1.CheckResponse)
		for i := range number {
			m.LimiterDecisions = append(m.LimiterDecisions, &checkv1.LimiterDecision{Details: &checkv1.LimiterDecision_ConcurrencyLimiterInfo_{
				ConcurrencyLimiterInfo: &checkv1.LimiterDecision_ConcurrencyLimiterInfo{RequestId: fmt.Sprintf("%0*d", label, i)},
			}})
		}
		return m
	}
	many, few := slots(1300, 100), slots(800, 100)
	unsettled := func(id uint64) *checkv1.CheckResponse {
		return &checkv1.CheckResponse{AgentId: 7, SettlementId: id, AwaitsOutcome: true}
	}
	of := func(m *checkv1.CheckResponse) func(uint64) *checkv1.CheckResponse {
		return func(uint64) *checkv1.CheckResponse {
			m := proto.CloneOf(m)
			m.AgentId = 7
			return m
		}
	}
	acknowledge := func(stream sessionv1.SessionService_SessionServer) error {
		for n := uint64(1); ; n++ {
			m, err := stream.Recv()
			if err != nil {
				return err
			}
			if err := stream.Send(&sessionv1.SessionResponse{AgentId: 7, Heartbeat: &sessionv1.Heartbeat{Number: n, Acknowledges: m.GetHeartbeat().GetNumber()}}); err != nil {
				return err
			}
		}
	}
	drain := func(stream sessionv1.SessionService_SessionServer) error {
		if err := stream.Send(&sessionv1.SessionResponse{AgentId: 7, Drain: true}); err != nil {
			return err
		}
		return acknowledge(stream)
	}
	deaf := func(stream sessionv1.SessionService_SessionServer) error {
		if err := stream.Send(&sessionv1.SessionResponse{AgentId: 7}); err != nil {
			return err
		}
		<-stream.Context().Done()
		return nil
	}
	kinds := []struct {
		name    string
		check   func(id uint64) *checkv1.CheckResponse
		session func(stream sessionv1.SessionService_SessionServer) error
	}{
		{"answers with 1300 slots that it does not take back", of(many), acknowledge},
		{"answers with 800 slots that it does not take back", of(few), acknowledge},
		{"answers with 800 slots, and reads no session", of(few), deaf},
		{"answers with 800 slots, and ends each session", of(few), drain},
		{"answers with 800 slots of agents that are not there", func(id uint64) *checkv1.CheckResponse {
			m := proto.CloneOf(few)
			m.AgentId = id
			return m
		}, acknowledge},
		{"answers with settlements, and reads no session", unsettled, deaf},
		{"answers with settlements that it does not take", unsettled, acknowledge},
	}
	var agents []Agent
	for _, k := range kinds {
		s := &forgetter{check: k.check, session: k.session}
		agents = append(agents, served(k.name, func(server *grpc.Server) {
			checkv1.RegisterFlowControlServiceServer(server, s)
			checkhttpv1.RegisterFlowControlServiceHTTPServer(server, s)
			sessionv1.RegisterSessionServiceServer(server, s)
		}))
	}
	return agents
}

// A forgetter is an agent that loses what its clients say at the end of flows.
type forgetter struct {
	checkv1.UnimplementedFlowControlServiceServer // FlowEnd fails
	checkhttpv1.UnimplementedFlowControlServiceHTTPServer
	sessionv1.UnimplementedSessionServiceServer
	ids     atomic.Uint64
	check   func(id uint64) *checkv1.CheckResponse
	session func(stream sessionv1.SessionService_SessionServer) error
}

func (s *forgetter) Check(context.Context, *checkv1.CheckRequest) (*checkv1.CheckResponse, error) {
	return s.check(s.ids.Add(1)), nil
}

func (s *forgetter) CheckHTTP(context.Context, *checkhttpv1.CheckHTTPRequest) (*checkhttpv1.CheckHTTPResponse, error) {
	return &checkhttpv1.CheckHTTPResponse{CheckResponse: s.check(s.ids.Add(1))}, nil
}

func (s *forgetter) Session(stream sessionv1.SessionService_SessionServer) error {
	return s.session(stream)
}

// single listens for one connection, and until that is closed.
type single struct {
	conn   chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *single) Accept() (net.Conn, error) {
	select {
	case c := <-l.conn:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *single) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *single) Addr() net.Addr { return &net.TCPAddr{} }

type watched struct {
	net.Conn
	l *single
}

func (w *watched) Close() error { return errors.Join(w.Conn.Close(), w.l.Close()) }

// flood is an agent that sends the same frame as fast as it can after a question.
func flood(name string, f []byte) Agent {
	many := bytes.Repeat(f, max(1, 64<<10/len(f)))
	return Agent{Name: name, Serve: func(_ context.Context, conn net.Conn) {
		_ = begin(conn)
		_ = each(conn, func(uint32) error { return io.EOF })
		go func() { _, _ = io.Copy(io.Discard, conn) }() // ends with the connection, which the caller closes
		for {
			if _, err := conn.Write(many); err != nil {
				return
			}
		}
	}}
}

// secure are agents that flood their connections with records of TLS, so that what is above it sees little.
func secure() []Agent {
	config, err := rawtls.ServerConfig()
	of := func(name string, appends func(c *rawtls.Conn) error) Agent {
		return Agent{Name: name, Secure: true, Serve: func(ctx context.Context, conn net.Conn) {
			if err != nil {
				return
			}
			c, err := rawtls.Server(ctx, conn, config)
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(io.Discard, conn) }() // ends with the connection, which the caller closes
			c.Data(frame(frameSettings, 0, 0, nil))
			for {
				for range 16 { // crypto/tls wants data after that
					if appends(c) != nil {
						return
					}
				}
				c.Data(frame(framePing, flagAck, 0, make([]byte, 8)))
				if c.Flush() != nil {
					return
				}
			}
		}}
	}
	return []Agent{
		of("floods with updates of keys", (*rawtls.Conn).UpdateKey),
		of("floods with empty records", func(c *rawtls.Conn) error {
			c.Data(nil)
			return nil
		}),
	}
}

// endless is an agent that begins an answer to each question, and then sends the same on each stream, in turn and as fast
// as it can, also when the client has given the question up.
func endless(name string, f func(stream uint32) []byte) Agent {
	return Agent{Name: name, Serve: func(_ context.Context, conn net.Conn) {
		if begin(conn) != nil {
			return
		}
		var mu sync.Mutex
		var newest []byte // of the streams that came last
		streams := 0
		var running sync.WaitGroup
		defer running.Wait()
		defer func() { _ = conn.Close() }() // which ends the writer
		_ = each(conn, func(stream uint32) error {
			block := field(":status", "200") + field("content-type", "application/grpc")
			if err := headers(conn, stream, 0, block); err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			one := f(stream)
			newest = append(newest, one...)
			newest = newest[max(0, len(newest)-256*len(one)):]
			if streams++; streams > 1 {
				return nil
			}
			running.Go(func() {
				var many []byte
				for {
					mu.Lock()
					many = append(many[:0], newest...)
					mu.Unlock()
					if _, err := conn.Write(many); err != nil {
						return
					}
				}
			})
			return nil
		})
	}}
}

// streams is an agent that treats each question alone.
func streams(name string, respond func(w io.Writer, stream uint32) error) Agent {
	return Agent{Name: name, Serve: func(_ context.Context, conn net.Conn) {
		if begin(conn) != nil {
			return
		}
		_ = each(conn, func(stream uint32) error { return respond(conn, stream) })
	}}
}

// The parts of HTTP/2 that the agents need.
const (
	frameData         = 0
	frameHeaders      = 1
	frameRSTStream    = 3
	frameSettings     = 4
	framePing         = 6
	frameGoAway       = 7
	frameWindowUpdate = 8
	frameContinuation = 9

	flagAck        = 1
	flagEndStream  = 1
	flagEndHeaders = 4

	settingMaxStreams    = 3
	settingInitialWindow = 4

	preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
)

func number(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }

func setting(id uint16, value uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(nil, id), value)
}

func frame(kind, flags byte, stream uint32, payload []byte) []byte {
	n := len(payload)
	f := []byte{byte(n >> 16), byte(n >> 8), byte(n), kind, flags}
	return append(binary.BigEndian.AppendUint32(f, stream), payload...)
}

func write(w io.Writer, kind, flags byte, stream uint32, payload []byte) error {
	_, err := w.Write(frame(kind, flags, stream, payload))
	return err
}

// read reads a frame.
func read(conn net.Conn) (head [9]byte, stream uint32, payload []byte, err error) {
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return head, 0, nil, err
	}
	payload = make([]byte, int(head[0])<<16|int(head[1])<<8|int(head[2]))
	_, err = io.ReadFull(conn, payload)
	return head, binary.BigEndian.Uint32(head[5:]), payload, err
}

// begin reads the client's preface, and sends settings.
func begin(conn net.Conn, settings ...[]byte) error {
	if _, err := io.ReadFull(conn, make([]byte, len(preface))); err != nil {
		return err
	}
	return write(conn, frameSettings, 0, 0, bytes.Join(settings, nil))
}

func goAway(w io.Writer, last uint32) error {
	return write(w, frameGoAway, 0, 0, append(number(last), number(0)...))
}

// abort has the connection end with a reset.
func abort(conn net.Conn) {
	if c, ok := conn.(*net.TCPConn); ok {
		_ = c.SetLinger(0)
	}
	_ = conn.Close()
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// each calls f with each stream whose question has come whole, and does what keeps a connection going: acknowledgements,
// and windows for the client.
func each(conn net.Conn, f func(stream uint32) error) error {
	for {
		head, stream, payload, err := read(conn)
		if err != nil {
			return err
		}
		kind, flags := head[3], head[4]
		switch {
		case kind == frameSettings && flags&flagAck == 0:
			err = write(conn, frameSettings, flagAck, 0, nil)
		case kind == framePing && flags&flagAck == 0:
			err = write(conn, framePing, flagAck, 0, payload)
		case kind == frameData:
			if len(payload) > 0 {
				err = write(conn, frameWindowUpdate, 0, 0, number(uint32(len(payload))))
			}
			if flags&flagEndStream != 0 {
				err = errors.Join(err, f(stream))
			}
		}
		if err != nil {
			return err
		}
	}
}

// field is a header field, a literal that is not indexed.
func field(name, value string) string {
	return "\x00" + length(len(name)) + name + length(len(value)) + value
}

// length is an HPACK integer with a prefix of seven bits.
func length(n int) string {
	if n < 127 {
		return string([]byte{byte(n)})
	}
	b := []byte{127}
	for n -= 127; n >= 128; n /= 128 {
		b = append(b, byte(n%128)|128)
	}
	return string(append(b, byte(n)))
}

// manyFields are header fields of so many bytes.
func manyFields(size int) string {
	one := field("x-filler", strings.Repeat("v", 1000))
	return field(":status", "200") + field("content-type", "application/grpc") + strings.Repeat(one, size/len(one))
}

// headers sends a header block, in as many frames as it takes.
func headers(w io.Writer, stream uint32, flags byte, block string) error {
	kind := byte(frameHeaders)
	for {
		part := block[:min(len(block), 16<<10)]
		block = block[len(part):]
		if block == "" {
			flags |= flagEndHeaders
		}
		if err := write(w, kind, flags, stream, []byte(part)); err != nil || block == "" {
			return err
		}
		kind, flags = frameContinuation, 0
	}
}

// status ends a stream with trailers alone.
func status(w io.Writer, stream uint32, code, text string) error {
	return headers(w, stream, flagEndStream, field(":status", "200")+field("content-type", "application/grpc")+
		field("grpc-status", code)+field("grpc-message", text))
}

// answer sends a message, which is encoded and compressed, and a good end. It heeds no window.
func answer(w io.Writer, stream uint32, message []byte, encoding string) error {
	fields := field(":status", "200") + field("content-type", "application/grpc")
	compressed := byte(0)
	if encoding != "" {
		fields += field("grpc-encoding", encoding)
		compressed = 1
	}
	if err := headers(w, stream, 0, fields); err != nil {
		return err
	}
	data := append(append([]byte{compressed}, number(uint32(len(message)))...), message...)
	for len(data) > 0 {
		part := data[:min(len(data), 16<<10)]
		data = data[len(part):]
		if err := write(w, frameData, 0, stream, part); err != nil {
			return err
		}
	}
	return headers(w, stream, flagEndStream, field("grpc-status", "0"))
}

func zip(message []byte) []byte {
	var b bytes.Buffer
	w, _ := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	_, _ = w.Write(message) // a buffer takes everything
	_ = w.Close()
	return b.Bytes()
}
