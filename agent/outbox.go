package agent

import (
	"cmp"
	"context"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"github.com/headgate-go/headgate/internal/frames"
)

// The bounds of what the agent has to send and clients have not read. A call counts from its header until its answer has left, but not
// while a handler has it.
const (
	maxUnsent      = 128 << 20           // bytes, over all connections; beyond, connections end
	enoughUnsent   = maxUnsent / 16 * 15 // they end until this is left, so that connections are not weighed again at once
	maxUnsentByOne = 16 << 20            // of one connection; beyond, answers lose what can be spared
	unsentCall     = 4 << 10             // bytes that a call takes besides its metadata and messages
	unsentMessage  = 512                 // bytes that a message takes besides its own
	unsentHeader   = 32                  // bytes that a call's metadata takes for each byte of its header's frames, until a handler has it
	unsentLong     = time.Second         // the most that a turn's time counts, so that few bytes do not outweigh many
	unsentBriefly  = unsentLong / 100    // the least that it counts, so that what has just come counts by its bytes
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

// relieve ends connections until the others have room: first those with the largest weights.
func (all *outboxes) relieve() {
	all.mu.Lock()
	defer all.mu.Unlock()
	if all.size.Load() <= maxUnsent { // another has just done so
		return
	}
	type weighed struct {
		*outbox
		weight time.Duration
	}
	now := time.Now()
	var worst []weighed
	for o := range all.open {
		if weight := o.weight(now); weight > 0 {
			worst = append(worst, weighed{o, weight})
		}
	}
	slices.SortFunc(worst, func(a, b weighed) int { return cmp.Compare(b.weight, a.weight) })
	for _, o := range worst {
		if all.size.Load() <= enoughUnsent {
			break
		}
		all.drop(o.outbox)
		go o.end() // the connection may be the application's own, and take long to close
	}
}

// An outbox is what a connection has to send, by the streams of HTTP/2 that are open. It follows the connection's frames. A nil outbox
// counts nothing, and has room.
type outbox struct {
	all *outboxes
	end func() // ends the connection

	// The writer's.
	sending  frames.Follower
	farewell bool // a GOAWAY frame has left
	dear     bool // the last frame was of an answer's header that costs units
	units    int  // of what is being looked at

	drains atomic.Bool // the connection takes no more calls

	mu      sync.Mutex
	streams map[uint32]outgoing
	most    int    // streams that the map has had
	last    uint32 // the latest stream
	size    int
	counted int // of size in all.size
	ended   bool

	// A turn is as many bytes as there were when it began. It has ended when as many have left. Then the next one begins, if there
	// are bytes.
	since time.Time // when the turn began
	turn  int       // bytes of the turn that have not left; 0 for no turn

	writing atomic.Bool // the writer's; it ends with the mutex
	resets  []uint32    // streams that the client has reset while writing
}

// outgoing is what a stream takes.
type outgoing struct {
	call     int // bytes of the call besides its messages; 0 while a handler has it
	messages int // bytes of messages that have not left
	wire     int // the same as they are sent
	handled  bool
	reset    bool
}

func (s outgoing) size() int { return s.call + s.messages }

// unlock also adds what has changed to the size of all.
func (o *outbox) unlock() {
	more := o.size - o.counted
	o.counted = o.size
	o.mu.Unlock()
	if more != 0 && o.all.size.Add(int64(more)) > maxUnsent && more > 0 {
		o.all.relieve()
	}
}

// weight is the bytes, multiplied by the time that the turn has lasted.
func (o *outbox) weight(now time.Time) time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	return time.Duration(o.size>>9) * min(max(now.Sub(o.since), unsentBriefly), unsentLong)
}

// update changes what a stream takes, if it is open.
func (o *outbox) update(stream uint32, change func(s outgoing) outgoing) {
	if before, ok := o.streams[stream]; ok {
		after := change(before)
		o.streams[stream] = after
		o.grow(after.size() - before.size())
	}
}

func (o *outbox) grow(by int) {
	o.size += by
	if by < 0 {
		o.turn = max(0, o.turn+by)
	}
	if o.turn == 0 && o.size > 0 {
		o.since, o.turn = time.Now(), o.size
	}
}

// remove forgets a stream.
func (o *outbox) remove(stream uint32) {
	if s, ok := o.streams[stream]; ok {
		o.grow(-s.size())
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
		s := outgoing{call: headed(unsentCall, f)}
		o.streams[f.Stream] = s
		o.grow(s.size())
		o.most = max(o.most, len(o.streams))
	case f.Kind == frames.Continuation:
		o.update(f.Stream, func(s outgoing) outgoing {
			s.call = headed(s.call, f)
			return s
		})
	case f.Kind == frames.RSTStream && o.writing.Load():
		// GRPC may have to write much before it forgets the answer.
		o.update(f.Stream, func(s outgoing) outgoing {
			if !s.reset {
				s.reset = true
				o.resets = append(o.resets, f.Stream)
			}
			return s
		})
	case f.Kind == frames.RSTStream:
		o.remove(f.Stream)
	}
}

// headed returns what a call takes with one more frame of its header. GRPC refuses a call whose header list is longer than maxHeaders.
// So no call takes more than the metadata of so many bytes do, which are counted fourfold.
func headed(call int, f frames.Frame) int {
	return min(call+unsentHeader*f.Length, unsentCall+4*maxHeaders)
}

// leave notes a frame that has left, with the mutex.
func (o *outbox) leave(f frames.Frame) {
	o.charge(f)
	switch {
	case f.Kind == frames.GoAway: // the second one: the first says that it will follow
		o.drains.Store(o.farewell)
		o.farewell = true
	case f.Kind == frames.RSTStream || (f.Kind == frames.Headers || f.Kind == frames.Data) && f.Flags&frames.EndStream != 0:
		o.remove(f.Stream)
	case f.Kind == frames.Data:
		o.update(f.Stream, func(s outgoing) outgoing {
			if s.wire > 0 {
				n := min(f.Length, s.wire)
				s.messages -= int(int64(s.messages) * int64(n) / int64(s.wire))
				s.wire -= n
			}
			return s
		})
	}
}

// charge counts units for the header of an answer that is not a handler's. Its text is gRPC's, and may repeat text of the call's header.
// What an application's handler answers costs nothing. Nothing is known of a call that the client has reset.
func (o *outbox) charge(f frames.Frame) {
	switch f.Kind {
	case frames.Headers:
		s, ok := o.streams[f.Stream]
		if o.dear = ok && !s.handled; o.dear {
			o.units += max(0, f.Length-answerHeader) / answerBytes
		}
	case frames.Continuation:
		if o.dear {
			o.units += f.Length / answerBytes
		}
	}
}

// write is called before bytes are written, and wrote after it, with those that were. Wrote returns the units of these bytes.
func (o *outbox) write() { o.writing.Store(true) }

func (o *outbox) wrote(p []byte) (units int) {
	o.mu.Lock()
	defer o.unlock()
	o.units = 0
	o.sending.Each(p, o.leave, nil)
	o.writing.Store(false)
	for _, stream := range o.resets {
		o.remove(stream)
	}
	o.resets = nil
	return o.units
}

// full reports whether the connection should not be read: it has much to send, and its client does not read.
func (o *outbox) full() bool {
	if !o.writing.Load() {
		return false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.size > maxUnsentByOne
}

// handle is called when a handler has the stream.
func (o *outbox) handle(stream uint32) {
	if o == nil {
		return
	}
	o.mu.Lock()
	defer o.unlock()
	o.update(stream, func(s outgoing) outgoing {
		s.call, s.handled = 0, true
		return s
	})
}

// lend takes room for bytes of an answer to come, and reports whether there was room.
func (o *outbox) lend(stream uint32, size int) bool { return o.take(stream, size, 0) }

// send counts one more message that the stream sends, which is not compressed. It reports whether there was room.
func (o *outbox) send(stream uint32, size int) bool {
	return o.take(stream, unsentMessage+kept(size), messageHeader+size)
}

// take takes room for bytes of messages. As many as wire says are sent for them; 0 if that is not known yet.
func (o *outbox) take(stream uint32, size, wire int) bool {
	if o == nil {
		return true
	}
	o.mu.Lock()
	defer o.unlock()
	if o.size+size > maxUnsentByOne {
		return false
	}
	o.update(stream, func(s outgoing) outgoing {
		s.messages += size
		s.wire += wire
		return s
	})
	return true
}

// lasts counts so many bytes of a call until it ends, also while a handler has it.
func (o *outbox) lasts(stream uint32, size int) {
	if o == nil {
		return
	}
	o.mu.Lock()
	defer o.unlock()
	o.update(stream, func(s outgoing) outgoing {
		s.call = size
		return s
	})
}

// answer counts the answer of a call whose handler has ended, instead of what was lent. Of a stream, which has no answer besides its
// messages, the size is 0, and messages that have not left still count. It reports whether there was room, and takes room if it must.
func (o *outbox) answer(stream uint32, metadata, size int, must bool) bool {
	if o == nil {
		return true
	}
	o.mu.Lock()
	defer o.unlock()
	fits := true
	o.update(stream, func(s outgoing) outgoing {
		after := s
		after.call = unsentCall + metadata
		if s.wire == 0 { // of a stream some may have left
			after.messages, after.wire = kept(size), messageHeader+size
		}
		if fits = must || o.size+after.size()-s.size() <= maxUnsentByOne; !fits {
			return s
		}
		return after
	})
	return fits
}

// messageHeader is the bytes that gRPC sends before a message.
const messageHeader = 5

// A streamPath is where gRPC keeps the connection and the number of a stream. GRPC does not tell them otherwise. If a future release
// keeps them elsewhere, they are not found, and what clients do not read is not bounded.
type streamPath struct {
	stream, transport reflect.Type
	id, at            []int // of stream: its number, and its transport
	connection        []int // of transport
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
