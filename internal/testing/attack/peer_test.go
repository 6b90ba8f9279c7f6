//go:build linux

package attack_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/internal/telemetry"
	"github.com/headgate-go/headgate/internal/wire"
)

const (
	flowService   = "/aperture.flowcontrol.check.v1.FlowControlService/"
	methodCheck   = flowService + "Check"
	methodHTTP    = checkhttpv1.FlowControlServiceHTTP_CheckHTTP_FullMethodName
	methodHealth  = "/grpc.health.v1.Health/Check"
	methodWatch   = "/grpc.health.v1.Health/Watch"
	largest       = 4<<20 - 1024 // bytes of a message that every agent takes
	patience      = 2 * time.Second
	streamsOfPeer = 100                    // of each connection that an attack has
	pauseOfBombs  = 800 * time.Millisecond // between calls that cost up to a hundred milliseconds each, so that the machine is not what is measured
)

// bytesCodec sends and receives bytes as they are.
type bytesCodec struct{}

func (bytesCodec) Marshal(v any) ([]byte, error) { return v.([]byte), nil }
func (bytesCodec) Unmarshal([]byte, any) error   { return nil }
func (bytesCodec) Name() string                  { return "proto" }

// field is a field of bytes.
func field(number protowire.Number, data []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), data)
}

// manyLabels are distinct entries of a map, as many as a message has room for.
func manyLabels(number protowire.Number) []byte {
	var m []byte
	for i := 0; len(m) < largest-32; i++ {
		m = append(m, field(number, append(field(1, fmt.Append(nil, "k", i)), field(2, nil)...))...)
	}
	return m
}

// sameLabel is one label again and again, which takes little room when it is compressed.
func sameLabel() []byte {
	entry := field(2, append(field(1, []byte("user_id")), field(2, []byte("x"))...))
	return bytes.Repeat(entry, largest/len(entry))
}

// A request is a call's method and message.
type request struct {
	method  string
	message []byte
}

// flood returns an assault: calls over a few connections, with pauses.
func flood(pause time.Duration, requests ...request) assault {
	return func(ctx context.Context, t *testing.T, address string) {
		const connections, callers = 2, 4
		var working sync.WaitGroup
		for range connections {
			conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			for i := range callers {
				working.Go(func() {
					for ; ctx.Err() == nil; i++ {
						r := requests[i%len(requests)]
						call, cancel := context.WithTimeout(ctx, patience)
						_ = conn.Invoke(call, r.method, r.message, new(int), grpc.ForceCodec(bytesCodec{}))
						cancel()
						sleep(ctx, pause)
					}
				})
			}
		}
		working.Wait()
	}
}

// compressed compresses the messages of requests.
func compressed(requests []request) {
	for i, r := range requests {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		_, _ = w.Write(r.message)
		_ = w.Close()
		requests[i].message = envelope(b.Len(), b.Bytes())
		requests[i].message[0] = 1
	}
}

// bomb returns an assault: calls whose messages are compressed, once for all of them.
func bomb(pause time.Duration, requests ...request) assault {
	compressed(requests)
	return func(ctx context.Context, _ *testing.T, address string) {
		each(ctx, 8, address, func(p *peer) {
			for i := range streamsOfPeer {
				r := requests[i%len(requests)]
				stream, err := p.call(r.method, nil, "grpc-encoding", "gzip")
				if err != nil || p.data(stream, true, r.message) != nil || ctx.Err() != nil {
					return
				}
				sleep(ctx, pause)
			}
		})
	}
}

// barrage returns an assault like bomb, without pauses: each of a few connections has 16 calls under way, and the next follows when one has
// ended.
func barrage(requests ...request) assault {
	const peers, underWay, calls = 4, 16, 200
	compressed(requests)
	return func(ctx context.Context, _ *testing.T, address string) {
		each(ctx, peers, address, func(p *peer) {
			for i := range calls {
				r := requests[i%len(requests)]
				stream, err := p.call(r.method, nil, "grpc-encoding", "gzip")
				if err != nil || p.data(stream, true, r.message) != nil {
					return
				}
				if i < underWay {
					continue
				}
				select {
				case <-p.ended:
				case <-p.done:
					return
				case <-ctx.Done():
					return
				}
			}
		})
	}
}

// A peer speaks HTTP/2 to a server, one frame at a time. It opens no flow-control windows, so it reads nothing of note.
type peer struct {
	conn   net.Conn
	framer *http2.Framer
	mu     sync.Mutex // of writes
	block  bytes.Buffer
	hpack  *hpack.Encoder
	next   uint32
	done   chan struct{}
	ended  chan struct{} // receives for each call that has ended, as far as it has room
}

// greet connects; nil when ctx has ended or the server does not want it.
func greet(ctx context.Context, address string, settings ...http2.Setting) *peer {
	p := connect(ctx, address, settings...)
	if p != nil {
		go p.read()
	}
	return p
}

// connect connects as greet does, and does not read.
func connect(ctx context.Context, address string, settings ...http2.Setting) *peer {
	conn := dial(ctx, address)
	if conn == nil {
		return nil
	}
	p := &peer{conn: conn, framer: http2.NewFramer(conn, conn), next: 1, done: make(chan struct{}), ended: make(chan struct{}, 64)}
	p.hpack = hpack.NewEncoder(&p.block)
	_ = conn.SetWriteDeadline(time.Now().Add(patience))
	_, err := conn.Write([]byte(http2.ClientPreface))
	if err != nil || p.framer.WriteSettings(settings...) != nil {
		_ = conn.Close()
		return nil
	}
	return p
}

// read reads frames until the connection ends.
func (p *peer) read() {
	defer close(p.done)
	for {
		f, err := p.framer.ReadFrame()
		if err != nil {
			return
		}
		p.mu.Lock()
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				_ = p.framer.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				_ = p.framer.WritePing(true, f.Data)
			}
		case *http2.HeadersFrame:
			if f.StreamEnded() {
				select {
				case p.ended <- struct{}{}:
				default:
				}
			}
		}
		p.mu.Unlock()
	}
}

func (p *peer) close() {
	_ = p.conn.Close()
	<-p.done
}

// call begins a call, with more after its headers' block, and returns its stream.
func (p *peer) call(method string, more []byte, pairs ...string) (stream uint32, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.conn.SetWriteDeadline(time.Now().Add(patience))
	p.block.Reset()
	for i, all := 0, append([]string{":method", "POST", ":scheme", "http", ":path", method, ":authority", "x", "content-type", "application/grpc", "te", "trailers"}, pairs...); i < len(all); i += 2 {
		_ = p.hpack.WriteField(hpack.HeaderField{Name: all[i], Value: all[i+1]})
	}
	block := append(bytes.Clone(p.block.Bytes()), more...)
	stream = p.next
	p.next += 2
	for first := true; first || len(block) > 0; first = false {
		piece := block[:min(len(block), 16384)]
		block = block[len(piece):]
		if first {
			err = p.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: piece, EndHeaders: len(block) == 0})
		} else {
			err = p.framer.WriteContinuation(stream, len(block) == 0, piece)
		}
		if err != nil {
			return 0, err
		}
	}
	return stream, nil
}

func (p *peer) data(stream uint32, end bool, data []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.conn.SetWriteDeadline(time.Now().Add(patience))
	for first := true; first || len(data) > 0; first = false {
		piece := data[:min(len(data), 16384)]
		data = data[len(piece):]
		if err := p.framer.WriteData(stream, end && len(data) == 0, piece); err != nil {
			return err
		}
	}
	return nil
}

func (p *peer) reset(stream uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.conn.SetWriteDeadline(time.Now().Add(patience))
	return p.framer.WriteRSTStream(stream, http2.ErrCodeCancel)
}

// write sends frames as they are.
func (p *peer) write(frames []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.conn.SetWriteDeadline(time.Now().Add(patience))
	_, err := p.conn.Write(frames)
	return err
}

// envelope is a message as gRPC sends it, with a length that need not be its own.
func envelope(length int, message []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(length)), message...)
}

func marshal(m proto.Message) []byte {
	data, _ := proto.Marshal(m)
	return data
}

// each runs one with each of so many peers at a time, again and again until ctx ends.
func each(ctx context.Context, peers int, address string, one func(p *peer)) {
	var working sync.WaitGroup
	for range peers {
		working.Go(func() {
			for ctx.Err() == nil {
				if p := greet(ctx, address); p != nil {
					one(p)
					p.close()
				}
				<-time.After(10 * time.Millisecond)
			}
		})
	}
	working.Wait()
}

// sleep waits, no longer than ctx lasts.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// waiters begins checks at the control point that wait in its queue, each with so many global cache keys of one byte. 500 a second
// begin, which is no flood for the processors, until there are 10,000.
func waiters(controlPoint string, keys int) assault {
	const peers, checks = 10, 1000 // of each
	var lookup []byte
	for i := range keys {
		lookup = append(lookup, field(3, []byte{byte('a' + i%26)})...)
	}
	return func(ctx context.Context, _ *testing.T, address string) {
		each(ctx, peers, address, func(p *peer) {
			for i := range checks {
				m := append(field(1, []byte(controlPoint)), field(4, lookup)...)
				m = append(m, field(2, append(field(1, []byte("tenant")), field(2, fmt.Append(nil, i))...))...)
				stream, err := p.call(methodCheck, nil)
				if err != nil || p.data(stream, true, envelope(len(m), m)) != nil || ctx.Err() != nil {
					return
				}
				sleep(ctx, 20*time.Millisecond)
			}
			<-ctx.Done()
		})
	}
}

// resets begins calls and takes them back at once.
func resets(method string) assault {
	return func(ctx context.Context, _ *testing.T, address string) {
		each(ctx, 4, address, func(p *peer) {
			for ctx.Err() == nil {
				for range 50 {
					stream, err := p.call(method, nil)
					if err != nil || p.reset(stream) != nil {
						return
					}
				}
				sleep(ctx, 20*time.Millisecond)
			}
		})
	}
}

// openCalls begins calls, sends no message, and connects again after a while: a server may end such a connection. What the
// headers cost by themselves is not what is measured.
func openCalls(method string) assault {
	return func(ctx context.Context, _ *testing.T, address string) {
		const calls = 1000
		each(ctx, 48, address, func(p *peer) {
			for i := range calls {
				if _, err := p.call(method, nil); err != nil {
					break
				}
				if i%50 == 0 {
					sleep(ctx, 20*time.Millisecond)
				}
			}
			sleep(ctx, patience)
		})
	}
}

// sessions begins sessions, and says nothing in them again and again: as much as the first window has room for, in frames of
// so many bytes. Empty messages are nothing but zeros. There are as many streams as a client without a key can have.
func sessions(frame int) assault {
	const streams = 1024
	var made atomic.Uint64
	return func(ctx context.Context, _ *testing.T, address string) {
		each(ctx, 8, address, func(p *peer) {
			for range streams {
				stream, err := p.call(sessionv1.SessionService_Session_FullMethodName, nil, wire.SessionHeader, fmt.Sprintf("%032x", 1+made.Add(1)/4))
				if err != nil || ctx.Err() != nil {
					return
				}
				var frames bytes.Buffer
				all := http2.NewFramer(&frames, nil)
				for range (60 << 10) / frame {
					_ = all.WriteData(stream, false, make([]byte, frame))
				}
				if err := p.write(frames.Bytes()); err != nil {
					return
				}
			}
			sleep(ctx, time.Minute)
		})
	}
}

// A storm makes the next frames that a peer sends, some thousand at a time.
type storm func(all *http2.Framer)

// storms sends frames as fast as it can, over so many connections for each kind.
func storms(connections int, kinds ...func(p *peer) storm) assault {
	return func(ctx context.Context, _ *testing.T, address string) {
		var working sync.WaitGroup
		for _, kind := range kinds {
			working.Go(func() {
				each(ctx, connections, address, func(p *peer) {
					next := kind(p)
					var frames bytes.Buffer
					all := http2.NewFramer(&frames, nil)
					for ctx.Err() == nil {
						frames.Reset()
						next(all)
						if err := p.write(frames.Bytes()); err != nil {
							return
						}
					}
				})
			})
		}
		working.Wait()
	}
}

// atOnce is how many frames, or calls, a storm makes at a time.
const atOnce = 2000

// again returns a storm of one frame.
func again(one func(all *http2.Framer)) func(p *peer) storm {
	return func(*peer) storm {
		return func(all *http2.Framer) {
			for range atOnce {
				one(all)
			}
		}
	}
}

// begins appends the header of a call, and returns its stream. A peer sends no other calls meanwhile.
func (p *peer) begins(all *http2.Framer, end bool, pairs ...string) (stream uint32) {
	p.block.Reset()
	for i := 0; i < len(pairs); i += 2 {
		_ = p.hpack.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
	}
	stream = p.next
	p.next += 2
	_ = all.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: p.block.Bytes(), EndHeaders: true, EndStream: end})
	return stream
}

// header is what calls of the method begin with.
func header(method string, more ...string) []string {
	return append([]string{":method", "POST", ":scheme", "http", ":path", method, ":authority", "x", "content-type", "application/grpc", "te", "trailers"}, more...)
}

func priorities() func(p *peer) storm {
	return again(func(all *http2.Framer) { _ = all.WritePriority(1, http2.PriorityParam{Weight: 1}) })
}

func acknowledgements() func(p *peer) storm {
	return again(func(all *http2.Framer) { _ = all.WritePing(true, [8]byte{}) })
}

func updates() func(p *peer) storm {
	return again(func(all *http2.Framer) { _ = all.WriteWindowUpdate(1, 1) })
}

// manySettings are frames of settings that are as long as they may be. gRPC compares each with the others.
func manySettings() func(p *peer) storm {
	var settings []http2.Setting
	for i := range 16384 / 6 {
		settings = append(settings, http2.Setting{ID: http2.SettingID(1000 + i)})
	}
	return func(*peer) storm {
		return func(all *http2.Framer) { _ = all.WriteSettings(settings...) }
	}
}

// continuations begin one header that never ends.
func continuations(p *peer) storm {
	begun := false
	return func(all *http2.Framer) {
		if !begun {
			begun = true
			_ = all.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x82}})
		}
		for range atOnce {
			_ = all.WriteContinuation(1, false, nil)
		}
	}
}

// refusals are calls without a key, or others that end before anything asks for the key. All but the first have equal headers, which are
// in the table of their compression: making them would take more than refusing them.
func refusals(pairs ...string) func(p *peer) storm {
	return func(p *peer) storm {
		first := true
		return func(all *http2.Framer) {
			if first {
				first = false
				p.begins(all, true, pairs...)
			}
			p.begins(all, true, pairs...)
			for range atOnce {
				_ = all.WriteHeaders(http2.HeadersFrameParam{StreamID: p.next, BlockFragment: p.block.Bytes(), EndHeaders: true, EndStream: true})
				p.next += 2
			}
		}
	}
}

// echoes makes calls that gRPC refuses before anything asks for the key, with a text of the call's header, percent-encoded. The text is in
// the table of its compression, so that each call but the first takes a few bytes.
func echoes(ctx context.Context, _ *testing.T, address string) {
	const connections, apart, perSecond = 16, 10 * time.Millisecond, 270
	text := strings.Repeat("%", 3700)
	kinds := [][]string{
		{":method", "POST", ":scheme", "http", ":path", "/a/b", ":authority", "x", "content-type", text},
		{":method", text, ":scheme", "http", ":path", "/a/b", ":authority", "x", "content-type", "application/grpc"},
		header("/a/b", "grpc-timeout", text),
		header("/a/b", "x-bin", text),
	}
	var next atomic.Int64
	each(ctx, connections, address, func(p *peer) {
		pairs := kinds[next.Add(1)%int64(len(kinds))]
		var frames bytes.Buffer
		all := http2.NewFramer(&frames, nil)
		for begin, made := time.Now(), 0; ctx.Err() == nil; sleep(ctx, apart) {
			frames.Reset()
			for due := int(perSecond * time.Since(begin).Seconds()); made <= due; made++ {
				p.begins(all, true, pairs...)
			}
			if err := p.write(frames.Bytes()); err != nil {
				return
			}
		}
	})
}

// dataOf sends data of so many bytes on the stream of a call that has ended.
func dataOf(size int) func(p *peer) storm {
	return func(p *peer) storm {
		stream, data := uint32(0), make([]byte, size)
		return func(all *http2.Framer) {
			if stream == 0 {
				stream = p.begins(all, true, header(methodCheck)...)
			}
			for range max(1, atOnce/max(1, size>>4)) {
				_ = all.WriteData(stream, false, data)
			}
		}
	}
}

// crumbs are calls whose messages come in frames of a byte.
func crumbs(p *peer) storm {
	const size = 250
	message := envelope(size, make([]byte, size))
	return func(all *http2.Framer) {
		for range atOnce / size {
			stream := p.begins(all, false, header(methodCheck)...)
			for i := range message {
				_ = all.WriteData(stream, i == len(message)-1, message[i:i+1])
			}
		}
	}
}

// crumbsInSessions are messages of sessions in frames of a byte. They say nothing.
func crumbsInSessions() func(p *peer) storm {
	const streams = 64
	var made atomic.Uint64
	return func(p *peer) storm {
		var ids []uint32
		return func(all *http2.Framer) {
			for len(ids) < streams {
				id := fmt.Sprintf("%032x", 1<<20+made.Add(1)/4)
				ids = append(ids, p.begins(all, false, header(sessionv1.SessionService_Session_FullMethodName, wire.SessionHeader, id)...))
			}
			for i := range atOnce {
				_ = all.WriteData(ids[i%streams], false, []byte{0})
			}
		}
	}
}

// returns begins sessions, fills the windows of all streams of a connection with as many returns as there is room for, and connects
// again. Thousands of streams with four messages each had innocent calls wait for a mutex.
func returns(ctx context.Context, _ *testing.T, address string) {
	const streams = 1020
	var message []byte
	for i := range uint64(wire.MostSettlements) {
		message = append(message, field(3, marshal(&sessionv1.Return{Id: i<<40 + 1, Check: rand.Uint64()}))...)
	}
	message = envelope(len(message), message)
	var made atomic.Uint64
	each(ctx, 8, address, func(p *peer) {
		var ids []uint32
		for range streams {
			stream, err := p.call(sessionv1.SessionService_Session_FullMethodName, nil, wire.SessionHeader, fmt.Sprintf("%032x", 1+made.Add(1)/4))
			if err != nil || ctx.Err() != nil {
				return
			}
			ids = append(ids, stream)
		}
		for range (64<<10 - 1) / len(message) {
			for some := range slices.Chunk(ids, 32) { // so that the attack itself costs little
				var frames bytes.Buffer
				all := http2.NewFramer(&frames, nil)
				for _, stream := range some {
					_ = all.WriteData(stream, false, message)
				}
				if err := p.write(frames.Bytes()); err != nil || ctx.Err() != nil {
					return
				}
			}
		}
		sleep(ctx, patience)
	})
}

// slowBodies begins calls with messages that are large and never end. Each piece is as large as the first window.
func slowBodies(methods ...string) assault {
	return func(ctx context.Context, _ *testing.T, address string) {
		each(ctx, attackers, address, func(p *peer) {
			for i := range 16 {
				stream, err := p.call(methods[i%len(methods)], nil)
				if err != nil || p.data(stream, false, envelope(largest, make([]byte, 60<<10))) != nil || ctx.Err() != nil {
					return
				}
				sleep(ctx, 50*time.Millisecond)
			}
			sleep(ctx, time.Second)
		})
	}
}

// slowMessages begins calls with small messages that never end, one on each of many connections, and again when the agent
// may have ended the call.
func slowMessages(method string) assault {
	return func(ctx context.Context, _ *testing.T, address string) {
		each(ctx, 3*attackers, address, func(p *peer) {
			for range streamsOfPeer {
				stream, err := p.call(method, nil)
				if err != nil || p.data(stream, false, envelope(100, make([]byte, 45))) != nil || ctx.Err() != nil {
					return
				}
				sleep(ctx, 100*time.Millisecond)
			}
		})
	}
}

// largeBodies sends messages that are as large as may be, and hold one label that policies name.
func largeBodies(method string) assault {
	label := field(2, append(field(1, []byte("user_id")), field(2, bytes.Repeat([]byte{'u'}, largest-64))...))
	return flood(pauseOfBombs, request{method, append(field(1, []byte("point")), label...)})
}

// headerFlood begins calls with as many indexed headers as fit into a frame or 30.
func headerFlood(method string) assault {
	return func(ctx context.Context, _ *testing.T, address string) {
		many := bytes.Repeat([]byte{0x80 | 62}, 480_000)
		each(ctx, 8, address, func(p *peer) {
			for range streamsOfPeer {
				if _, err := p.call(method, many, "a", ""); err != nil || ctx.Err() != nil {
					return
				}
				sleep(ctx, pauseOfBombs)
			}
		})
	}
}

// metadataFlood sends as much metadata as is allowed, with calls that do not end.
func metadataFlood(method string) assault {
	return func(ctx context.Context, _ *testing.T, address string) {
		var pairs []string
		for i := range 200 {
			pairs = append(pairs, fmt.Sprint("x-", i), strings.Repeat("v", 200))
		}
		each(ctx, 8, address, func(p *peer) {
			for range streamsOfPeer {
				if _, err := p.call(method, nil, pairs...); err != nil || ctx.Err() != nil {
					return
				}
				sleep(ctx, 50*time.Millisecond)
			}
		})
	}
}

// connections opens and closes connections as fast as it can, a few at a time.
func connections(ctx context.Context, _ *testing.T, address string) {
	each(ctx, 8, address, func(*peer) { sleep(ctx, 10*time.Millisecond) })
}

// unread fills the cache, and looks up all of it without reading the answers.
func unread(ctx context.Context, t *testing.T, address string) {
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	client := checkv1.NewFlowControlServiceClient(conn)
	var keys []string
	for i := range 15 {
		key := fmt.Sprint(i)
		keys = append(keys, key)
		_, _ = client.CacheUpsert(ctx, &checkv1.CacheUpsertRequest{GlobalCacheEntries: map[string]*checkv1.CacheEntry{key: {Key: key, Value: make([]byte, 3<<20)}}})
	}
	message := marshal(&checkv1.CacheLookupRequest{GlobalCacheKeys: keys})
	check := marshal(&checkv1.CheckRequest{ControlPoint: "point", CacheLookupRequest: &checkv1.CacheLookupRequest{GlobalCacheKeys: keys}})
	each(ctx, 16, address, func(p *peer) {
		for i := range streamsOfPeer {
			method, message := flowService+"CacheLookup", message
			if i%2 == 0 {
				method, message = methodCheck, check
			}
			stream, err := p.call(method, nil)
			if err != nil || p.data(stream, true, envelope(len(message), message)) != nil {
				return
			}
		}
		sleep(ctx, patience)
	})
}

// An unreadCall is a call whose answer is not read.
type unreadCall struct {
	request
	headers []string // besides those of all calls
	deaf    bool     // the connection is not read at all; otherwise the windows of its streams are closed
	reset   bool     // the call is taken back at once
}

// unreadAnswers makes calls over many connections as long as it may, and reads no answer. Each connection makes one kind of call.
func unreadAnswers(pause time.Duration, kinds ...unreadCall) assault {
	const connections = 34
	return func(ctx context.Context, _ *testing.T, address string) {
		var attacking sync.WaitGroup
		for i := range connections {
			attacking.Go(func() {
				for ; ctx.Err() == nil; sleep(ctx, 10*time.Millisecond) {
					kinds[i%len(kinds)].neglect(ctx, address, pause)
				}
			})
		}
		attacking.Wait()
	}
}

// neglect makes calls, some at once with pauses between, until the connection or ctx ends.
func (c unreadCall) neglect(ctx context.Context, address string, pause time.Duration) {
	const most = 10_000 // calls; then it makes few, to notice when the connection has ended
	atOnce := 25
	var p *peer
	if !c.deaf {
		p = greet(ctx, address, http2.Setting{ID: http2.SettingInitialWindowSize})
	} else if p = connect(ctx, address); p != nil {
		close(p.done)
	}
	if p == nil {
		return
	}
	defer p.close()
	message := envelope(len(c.message), c.message)
	for i := 0; ctx.Err() == nil; i += atOnce {
		if i >= most {
			atOnce = 1
		}
		var frames bytes.Buffer
		all := http2.NewFramer(&frames, nil)
		for range atOnce {
			stream := p.begins(all, false, header(c.method, c.headers...)...)
			_ = all.WriteData(stream, true, message)
			if c.reset {
				_ = all.WriteRSTStream(stream, http2.ErrCodeCancel)
			}
		}
		if err := p.write(frames.Bytes()); err != nil {
			return
		}
		sleep(ctx, pause)
	}
}

// unreadCalls are of all kinds.
func unreadCalls() []unreadCall {
	check := request{methodCheck, field(1, []byte("point"))}
	return []unreadCall{
		{request: check},
		{request: check, headers: heavy()},
		{request: check, deaf: true},
		{request: check, headers: heavy(), deaf: true},
		{request: check, headers: heavy(), deaf: true, reset: true},
		{request: request{flowService + "Nothing", nil}, headers: heavy(), deaf: true},
		{request: request{methodCheck, nil}, headers: append(heavy(), "grpc-encoding", "none"), deaf: true},
		{request: request{flowService + "FlowEnd", field(1, []byte("point"))}, headers: heavy()},
		{request: request{methodWatch, nil}, headers: heavy()},
	}
}

// heavy are headers that take much memory, and little on the network once they are in the table of their compression.
func heavy() []string {
	var pairs []string
	for i := range 100 {
		pairs = append(pairs, fmt.Sprint("x", i), "")
	}
	return slices.Concat(pairs, pairs, pairs, pairs)
}

// unreadLabels asks for answers with 56 KiB of labels, and reads none.
func unreadLabels(ctx context.Context, _ *testing.T, address string) {
	message := field(1, []byte("point"))
	for i := range 14 {
		message = append(message, field(2, append(field(1, fmt.Append(nil, "k", i)), field(2, bytes.Repeat([]byte{'v'}, 4090))...))...)
	}
	each(ctx, 16, address, func(p *peer) {
		for range 4 * streamsOfPeer {
			stream, err := p.call(methodCheck, nil)
			if err != nil || p.data(stream, true, envelope(len(message), message)) != nil || ctx.Err() != nil {
				return
			}
			sleep(ctx, 5*time.Millisecond)
		}
		sleep(ctx, patience)
	})
}

// unreadReflection asks reflection much on each of many streams, and reads nothing.
func unreadReflection(ctx context.Context, _ *testing.T, address string) {
	question := field(7, []byte("x")) // which services there are
	questions := bytes.Repeat(envelope(len(question), question), 1500)
	each(ctx, 12, address, func(p *peer) {
		for range streamsOfPeer {
			stream, err := p.call(reflectionv1.ServerReflection_ServerReflectionInfo_FullMethodName, nil)
			if err != nil || p.data(stream, false, questions) != nil || ctx.Err() != nil {
				return
			}
		}
		sleep(ctx, patience)
	})
}

// Bombs, by what they are made of.
func bombs() map[string]assault {
	of := func(element []byte) []byte { return bytes.Repeat(element, largest/len(element)) }
	lookup := func(number protowire.Number) []byte {
		return append(field(1, []byte("point")), field(4, of([]byte{byte(number<<3 | 2), 0}))...)
	}
	headers := append(field(4, []byte("point")), field(3, manyLabels(2))...)
	baggage := append(field(4, []byte("point")), field(3, field(2, append(field(1, []byte("baggage")), field(2, of([]byte("a=,b=,c=,")))...)))...)
	span := func(check []byte) []byte {
		attribute := field(9, append(field(1, []byte("aperture.check_response")), field(2, field(1, check))...))
		return field(1, field(2, field(2, attribute)))
	}
	return map[string]assault{
		"bombs of checks": bomb(pauseOfBombs, []request{
			{methodCheck, append(field(1, []byte("point")), of([]byte{0x12, 0})...)},
			{methodCheck, append(field(1, []byte("point")), manyLabels(2)...)},
			{methodCheck, lookup(3)},
			{methodHTTP, headers},
			{methodHTTP, baggage},
		}...),
		"bombs of slots and keys": bomb(pauseOfBombs, []request{
			{flowService + "FlowEnd", of([]byte{0x12, 0})},
			{flowService + "CacheLookup", of([]byte{0x1a, 0})},
			{flowService + "CacheDelete", of([]byte{0x1a, 0})},
			{flowService + "CacheUpsert", manyLabels(3)},
			{flowService + "CacheUpsert", of([]byte{0xc3, 0x3e, 0xc4, 0x3e})},
		}...),
		"bombs of spans": bomb(pauseOfBombs, []request{
			{telemetry.Export, field(1, field(2, of([]byte{0x12, 0})))},
			{telemetry.Export, of([]byte{0x0a, 0})},
			{telemetry.Export, of([]byte{0x78, 0})},
			{telemetry.Export, of(append(bytes.Repeat([]byte{0x7b}, 9990), bytes.Repeat([]byte{0x7c}, 9990)...))},
			{telemetry.Export, span([]byte(`{"limiterDecisions":[` + strings.Repeat("{},", largest/4) + `{}]}`))},
		}...),
	}
}

// zeros sends messages that decompress to 64 MiB.
func zeros(method string) assault {
	return bomb(pauseOfBombs, request{method, make([]byte, 64<<20)})
}

// slowHeaders sends an HTTP/1 request's header a few bytes at a time, and slowly sent bodies after whole ones.
func slowHeaders(ctx context.Context, _ *testing.T, address string) {
	var working sync.WaitGroup
	for i := range 4 * attackers {
		working.Go(func() {
			for ctx.Err() == nil {
				conn := dial(ctx, address)
				if conn == nil {
					return
				}
				request := "GET / HTTP/1.1\r\nHost: x\r\n"
				if i%2 == 0 {
					request = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
				}
				_, err := conn.Write([]byte(request))
				for ; err == nil && ctx.Err() == nil; sleep(ctx, 100*time.Millisecond) {
					_, err = conn.Write([]byte("X-A: b\r\n"))
				}
				_ = conn.Close()
			}
		})
	}
	working.Wait()
}

// headersOverHTTP sends requests with as many headers as a server takes.
func headersOverHTTP(ctx context.Context, _ *testing.T, address string) {
	var b strings.Builder
	b.WriteString("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nBaggage: ")
	for i := range 10_000 {
		fmt.Fprintf(&b, "a%d=%d,", i, i)
	}
	b.WriteString("\r\n")
	for i := range 50_000 {
		fmt.Fprintf(&b, "X-%d: v\r\n", i)
	}
	b.WriteString("\r\n")
	together(ctx, 8, func() {
		conn := dial(ctx, address)
		if conn == nil {
			return
		}
		_ = conn.SetDeadline(time.Now().Add(patience))
		_, _ = conn.Write([]byte(b.String()))
		_, _ = conn.Read(make([]byte, 1024))
		_ = conn.Close()
		sleep(ctx, pauseOfBombs)
	})
}
