package agent

import (
	"context"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"github.com/headgate-go/headgate/internal/frames"
)

// The bounds of what the agent has to send and clients have not read. A call counts from its header until its answer has left, but not
// while a handler has it.
const (
	maxUnsent      = 128 << 20   // bytes, over all connections; beyond, a connection ends
	maxUnsentByOne = 16 << 20    // of one connection; beyond, answers lose what can be spared
	unsentCall     = 4 << 10     // bytes that a call takes besides its metadata and messages
	unsentMessage  = 512         // bytes that a message takes besides its own
	unsentHeader   = 32          // bytes that a call's metadata takes for each byte of its header's frames, until a handler has it
	unsentLong     = time.Second // the most that counts of the time for which bytes have not left, so that few bytes do not outweigh many
	unsentBriefly  = unsentLong / 100
)

// outboxes are those of a server's connections. The zero value is ready. They are safe for concurrent use.
type outboxes struct {
	size atomic.Int64 // of all
	path atomic.Pointer[streamPath]

	mu   sync.Mutex
	open map[*outbox]struct{}
}

// add adds that of a connection that begins.
func (all *outboxes) add(o *outbox) {
	all.mu.Lock()
	defer all.mu.Unlock()
	if all.open == nil {
		all.open = make(map[*outbox]struct{})
	}
	all.open[o] = struct{}{}
}

// remove removes that of a connection that has ended.
func (all *outboxes) remove(o *outbox) {
	all.mu.Lock()
	defer all.mu.Unlock()
	all.drop(o)
}

// drop is remove with the mutex.
func (all *outboxes) drop(o *outbox) {
	delete(all.open, o)
	o.mu.Lock()
	defer o.mu.Unlock()
	all.size.Add(-int64(o.counted))
	o.ended, o.size, o.counted, o.streams, o.resets = true, 0, 0, nil, nil
}

// relieve ends connections until the others have room: first that with the largest weight.
func (all *outboxes) relieve() {
	var ends []func()
	all.mu.Lock()
	now := time.Now()
	for all.size.Load() > maxUnsent {
		var worst *outbox
		most := time.Duration(0)
		for o := range all.open {
			if weight := o.weight(now); weight > most {
				worst, most = o, weight
			}
		}
		if worst == nil {
			break
		}
		all.drop(worst)
		ends = append(ends, worst.end)
	}
	all.mu.Unlock()
	for _, end := range ends {
		end()
	}
}

// An outbox is what a connection has to send, by the streams of HTTP/2 that are open. It follows the connection's frames. A nil outbox
// counts nothing, and has room.
type outbox struct {
	all *outboxes
	end func() // ends the connection

	sending frames.Follower // the writer's

	mu      sync.Mutex
	streams map[uint32]outgoing
	most    int    // streams that the map has had
	last    uint32 // the latest stream
	size    int
	counted int // of size in all.size
	ended   bool

	// A turn is as many bytes as there were when it began. It has ended when as many have left.
	since time.Time // when the turn began; zero for none
	turn  int       // bytes of the turn that have not left

	writing bool
	resets  []uint32 // streams that the client has reset while writing
}

// outgoing is what a stream takes.
type outgoing struct {
	call     int // bytes of the call besides its messages; 0 while a handler has it
	messages int // bytes of messages that have not left
	wire     int // the same as they are sent
	reset    bool
}

// unlock also adds what has changed to the size of all.
func (o *outbox) unlock() {
	more := o.size - o.counted
	o.counted = o.size
	o.mu.Unlock()
	if more != 0 && o.all.size.Add(int64(more)) > maxUnsent && more > 0 {
		o.all.relieve()
	}
}

// weight is the bytes, multiplied by the time that the turn has lasted. A connection without a turn begins one.
func (o *outbox) weight(now time.Time) time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.size == 0 {
		return 0
	}
	if o.since.IsZero() {
		o.since, o.turn = now, o.size
	}
	return time.Duration(o.size>>9) * min(max(now.Sub(o.since), unsentBriefly), unsentLong)
}

// set replaces what the stream takes.
func (o *outbox) set(stream uint32, before, after outgoing) {
	o.streams[stream] = after
	o.grow(after.call + after.messages - before.call - before.messages)
}

func (o *outbox) grow(by int) {
	o.size += by
	if by < 0 && !o.since.IsZero() {
		if o.turn += by; o.turn <= 0 {
			o.since = time.Time{}
		}
	}
}

// remove forgets a stream.
func (o *outbox) remove(stream uint32) {
	if s, ok := o.streams[stream]; ok {
		o.grow(-s.call - s.messages)
		if delete(o.streams, stream); len(o.streams) == 0 && o.most > 1<<10 {
			o.streams, o.most = nil, 0 // a map does not shrink
		}
	}
}

// arrive notes a frame that has arrived, with the mutex.
func (o *outbox) arrive(f frames.Frame) {
	switch {
	case o.ended:
	case f.Kind == frames.Headers && f.Stream > o.last:
		if o.streams == nil {
			o.streams = make(map[uint32]outgoing)
		}
		o.last = f.Stream
		o.set(f.Stream, outgoing{}, outgoing{call: headed(unsentCall, f)})
		o.most = max(o.most, len(o.streams))
	case f.Kind == frames.Continuation:
		if s, ok := o.streams[f.Stream]; ok {
			longer := s
			longer.call = headed(s.call, f)
			o.set(f.Stream, s, longer)
		}
	case f.Kind == frames.RSTStream && o.writing:
		// GRPC may have to write much before it forgets the answer.
		if s, ok := o.streams[f.Stream]; ok && !s.reset {
			s.reset = true
			o.streams[f.Stream] = s
			o.resets = append(o.resets, f.Stream)
		}
	case f.Kind == frames.RSTStream:
		o.remove(f.Stream)
	}
}

// headed returns what a call takes with one more frame of its header.
func headed(call int, f frames.Frame) int {
	return min(call+unsentHeader*f.Length, unsentCall+4*maxHeaders) // as weight has it
}

// leave notes a frame that has left, with the mutex.
func (o *outbox) leave(f frames.Frame) {
	switch {
	case f.Kind == frames.RSTStream || (f.Kind == frames.Headers || f.Kind == frames.Data) && f.Flags&frames.EndStream != 0:
		o.remove(f.Stream)
	case f.Kind == frames.Data:
		if s, ok := o.streams[f.Stream]; ok && s.wire > 0 {
			n := min(f.Length, s.wire)
			left := s
			left.messages -= int(int64(s.messages) * int64(n) / int64(s.wire))
			left.wire -= n
			o.set(f.Stream, s, left)
		}
	}
}

// write is called before bytes are written, and wrote after it, with those that were.
func (o *outbox) write() {
	o.mu.Lock()
	o.writing = true
	o.mu.Unlock()
}

func (o *outbox) wrote(p []byte) {
	o.mu.Lock()
	defer o.unlock()
	o.sending.Each(p, o.leave, nil)
	o.writing = false
	for _, stream := range o.resets {
		o.remove(stream)
	}
	o.resets = nil
}

// full reports whether the connection should not be read: it has much to send, and its client does not read.
func (o *outbox) full() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.writing && o.size > maxUnsentByOne
}

// handle is called when a handler has the stream.
func (o *outbox) handle(stream uint32) {
	if o == nil {
		return
	}
	o.mu.Lock()
	defer o.unlock()
	if s, ok := o.streams[stream]; ok {
		after := s
		after.call = 0
		o.set(stream, s, after)
	}
}

// lend takes room for bytes of a message to come, and reports whether there was room.
func (o *outbox) lend(stream uint32, size int) bool {
	if o == nil {
		return true
	}
	o.mu.Lock()
	defer o.unlock()
	if o.size+size > maxUnsentByOne {
		return false
	}
	if s, ok := o.streams[stream]; ok {
		after := s
		after.messages += size
		o.set(stream, s, after)
	}
	return true
}

// send counts one more message that the stream sends, which is not compressed. It reports whether there was room.
func (o *outbox) send(stream uint32, size int) bool {
	if o == nil {
		return true
	}
	o.mu.Lock()
	defer o.unlock()
	messages := unsentMessage + kept(size)
	if o.size+messages > maxUnsentByOne {
		return false
	}
	if s, ok := o.streams[stream]; ok {
		after := s
		after.messages += messages
		after.wire += messageHeader + size
		o.set(stream, s, after)
	}
	return true
}

// answer counts the answer of a stream whose handler has ended, instead of what was lent, and of the messages if there is no answer
// (a size of 0). It reports whether there was room, and takes room if it must.
func (o *outbox) answer(stream uint32, metadata, size int, must bool) bool {
	if o == nil {
		return true
	}
	o.mu.Lock()
	defer o.unlock()
	s, ok := o.streams[stream]
	if !ok {
		return true
	}
	after := s
	after.call = unsentCall + metadata
	if s.wire == 0 { // of a stream some may have left
		after.messages, after.wire = kept(size), messageHeader+size
	}
	if !must && o.size+after.call+after.messages-s.call-s.messages > maxUnsentByOne {
		return false
	}
	o.set(stream, s, after)
	return true
}

// messageHeader is the bytes that gRPC sends before a message.
const messageHeader = 5

// A streamPath is where gRPC keeps the connection and the number of a stream. There is no other way to learn them. If a future release
// keeps them elsewhere, they are not found, and what clients do not read is not bounded.
type streamPath struct {
	stream, transport  reflect.Type
	id, at, connection []int
}

// of returns the outbox of the connection by which the call with the context came, and the call's stream; nil if they are not found.
func (all *outboxes) of(ctx context.Context) (o *outbox, stream uint32) {
	v := reflect.ValueOf(grpc.ServerTransportStreamFromContext(ctx))
	if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct {
		return nil, 0
	}
	v = v.Elem()
	path := all.path.Load()
	if path == nil || path.stream != v.Type() {
		if path = newStreamPath(v); path == nil {
			return nil, 0
		}
		all.path.Store(path)
	}
	transport := v.FieldByIndex(path.at).Elem().Elem()
	if transport.Type() != path.transport {
		return nil, 0
	}
	conn := transport.FieldByIndex(path.connection).Elem()
	if conn.Type() != reflect.TypeFor[*pacedConn]() {
		return nil, 0
	}
	return (*pacedConn)(conn.UnsafePointer()).outbox, uint32(v.FieldByIndex(path.id).Uint())
}

// newStreamPath looks a stream's fields up; nil if they are not as expected.
func newStreamPath(stream reflect.Value) *streamPath {
	id, found := stream.Type().FieldByName("id")
	at, has := stream.Type().FieldByName("st")
	if !found || !has || id.Type.Kind() != reflect.Uint32 || at.Type.Kind() != reflect.Interface {
		return nil
	}
	transport := stream.FieldByIndex(at.Index).Elem()
	if transport.Kind() != reflect.Pointer || transport.Elem().Kind() != reflect.Struct {
		return nil
	}
	connection, ok := transport.Elem().Type().FieldByName("conn")
	if !ok || connection.Type.Kind() != reflect.Interface {
		return nil
	}
	return &streamPath{stream.Type(), transport.Elem().Type(), id.Index, at.Index, connection.Index}
}
