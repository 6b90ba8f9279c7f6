package agent

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
)

// The bounds of a server, over all its connections.
const (
	maxOverdue      = 64                    // messages that are overdue at a time
	arrival         = 50 * time.Millisecond // how long a message may take to arrive before it is overdue
	patience        = time.Second           // how long a call may take to begin, before it is overdue; for another service, to get its message
	maxOpening      = 128 << 20             // bytes that calls take whose messages have not been read
	maxLinesOpening = maxOpening / 4        // bytes that streams of sessions take whose handlers have not begun
	callSize        = 8 << 10               // bytes that such a call takes besides its metadata: a goroutine, and what gRPC keeps of it
	maxRefusals     = 256                   // calls of a connection that are refused within lateFor because it has no room for them; then it ends
	maxLost         = 256                   // calls of a connection that were ended within lateFor because they were overdue; then it has no room
	lateFor         = time.Second           // how long calls that were refused or ended count against their connection
	maxUnread       = 64 << 20              // bytes of large requests that have arrived and are not read
	maxHeld         = 128 << 20             // bytes that requests keep that are being decided about, with their metadata and calls
	sparedHeld      = 32 << 20              // bytes more for requests that are not checks, because checks may wait for long
	smallHeld       = 4 << 10               // bytes of a request and of its metadata, each; one with no more does not count for maxHeld
	smallCheck      = 2 << 10               // the same for what a check keeps besides its call; its metadata may have smallHeld
	waitingCall     = 16 << 10              // bytes that a call keeps while its flow waits: half of it a goroutine's stack. Measured: 15 KiB
	keptLabel       = 96                    // bytes that a label keeps besides its text. Measured: 75
	keptHeader      = 192                   // the same for a header of CheckHTTP, which is also a label
	keptCacheKey    = 192                   // the same for a cache key, with what the answer has of it
	large           = 64 << 10              // bytes from which a request counts for maxUnread
	smallAnswer     = 1 << 10               // bytes of an answer up to which it may be compressed, and is sent whole however much is unread
)

// A gate bounds what the calls of one server have under way together. Streams of sessions have a gate of their own. Thousands of them
// can begin at a time, and checks do not wait for that gate's mutex.
type gate struct {
	mu       sync.Mutex
	opening  shares      // calls whose messages have not been read to their end, by what they take
	begun    queue       // those of them that no handler has, as far as is known
	arriving queue       // those whose messages arrive
	overdue  shares      // those that take longer
	lost     queue       // in opening, for calls that have been ended because they were overdue: their room is taken for lateFor
	sweep    *time.Timer // for these
	due      time.Time   // when sweep fires; zero if it does not

	readers        readers   // of large requests
	decompressions sync.Pool // those that are not under way
	buffers        sync.Pool // of large messages that are being decompressed
	unread         int
	held           int

	most int // bytes that calls take whose messages have not been read
}

// newGate makes a gate. A request of 4 MiB can take 50 ms to read. At most half of the processors read large requests,
// so that small ones do not wait for them.
func newGate() *gate {
	return &gate{
		most:    maxOpening,
		readers: readers{most: max(1, runtime.GOMAXPROCS(0)/2)},
	}
}

// newLineGate makes the gate of sessions' streams.
func newLineGate() *gate {
	g := newGate()
	g.most = maxLinesOpening
	return g
}

type callKey struct{}

// A call is an RPC that came through the gate. It is also the context of the RPC.
type call struct {
	context.Context
	cancel     context.CancelFunc
	gate       *gate
	connection any
	metadata   int        // bytes that it takes in memory, about
	allowance  *allowance // of the connection; nil if it is not known
	hasKey     bool       // the call has an API key, because calls need one
	owner      string

	// Guarded by the gate's mutex.
	begin time.Time // of the arrival
	open  place     // among those that are opening
	turn  place     // in begun, arriving, overdue or lost

	// Set with the gate's mutex. Nothing of the gate's has the call then.
	evicted atomic.Bool

	// The rest is the handler's.
	opened bool    // the message has been read to its end, or never will be
	kept   int     // bytes that count as held
	full   bool    // there was no room to read the request
	still  bool    // there is no room to hold it for long: the flow does not wait
	outbox *outbox // of the connection; nil if it is not known
	stream uint32  // of the connection
}

// call makes a context that the gate can end. It counts the call, whose message has not arrived, until ready. All such
// calls share their room by connection: if there is none, a connection with more than the others loses its oldest call. If
// that is the call's own connection, the call is refused, which costs less.
func (g *gate) call(ctx context.Context, connection any, sent metadata.MD) (*call, error) {
	c := &call{gate: g, connection: connection, metadata: weight(sent)}
	c.open.call, c.turn.call = c, c
	g.mu.Lock()
	defer g.mu.Unlock()
	c.begin = time.Now()
	g.forget(c.begin)
	if own := g.opening.by[connection]; own != nil && own.lost >= maxLost {
		return nil, g.refuse(c)
	}
	for g.opening.size+c.size() > g.most {
		most := g.opening.most()
		if most == nil || g.opening.of(c.connection)+c.size() >= most.size {
			return nil, g.refuse(c)
		}
		g.evict(most.calls.first.call).end()
	}
	c.Context, c.cancel = context.WithCancel(ctx)
	g.opening.add(&c.open, c.size())
	g.begun.push(&c.turn)
	g.arm()
	return c, nil
}

var (
	errOpening = status.Error(codes.Unavailable, "too many calls are under way whose messages have not arrived")
	errFlood   = status.Error(codes.Unavailable, "the connection keeps beginning calls whose messages do not arrive")
)

// refuse returns the error of a call that finds no room. A refusal costs as much as the call's header, which is too much
// for millions of them. So it is errFlood if the connection should end.
func (g *gate) refuse(c *call) error {
	own := g.opening.by[c.connection]
	if own == nil { // one call takes more than there is
		return errOpening
	}
	if c.begin.Sub(own.since) >= lateFor {
		own.since, own.refused = c.begin, 0
	}
	if own.refused++; own.refused <= maxRefusals {
		return errOpening
	}
	return errFlood
}

// size is what the call takes before its message arrives.
func (c *call) size() int { return callSize + c.metadata }

// forget drops calls that ended before a handler had them, as those with an unknown compression do, and the room of those
// that were ended.
func (g *gate) forget(now time.Time) {
	for p := g.begun.first; p != nil && p.call.Err() != nil; p = g.begun.first {
		g.drop(p.call)
	}
	for p := g.lost.first; p != nil && now.Sub(p.call.begin) >= lateFor; p = g.lost.first {
		g.opening.by[p.call.connection].lost--
		g.drop(p.call)
	}
}

// evict takes a call whose message has not arrived out of everything. The caller then ends it.
func (g *gate) evict(c *call) *call {
	c.evicted.Store(true)
	if c.turn.queue == &g.lost {
		g.opening.by[c.connection].lost--
	}
	g.drop(c)
	return c
}

// end ends a call that was evicted. What was lost has ended before.
func (c *call) end() {
	if c.cancel != nil {
		c.cancel()
	}
}

// drop ends what call and enter began.
func (g *gate) drop(c *call) {
	g.unqueue(c)
	g.opening.remove(&c.open, c.size())
}

func (g *gate) unqueue(c *call) {
	g.overdue.remove(&c.turn, 1)
	c.turn.leave()
}

// weight estimates the bytes that metadata takes in memory: four times its size as a header list, as measured for many
// small pairs.
func weight(sent metadata.MD) int {
	n := 0
	for key, values := range sent {
		for _, value := range values {
			n += 32 + len(key) + len(value)
		}
	}
	return 4 * n
}

func (c *call) Value(key any) any {
	if key == (callKey{}) {
		return c
	}
	return c.Context.Value(key)
}

// callOf returns the call that ctx belongs to; nil on a server without our options.
func callOf(ctx context.Context) *call {
	c, _ := ctx.Value(callKey{}).(*call)
	return c
}

// find finds the call's place in the outbox of its connection. It reports whether the call had none.
func (c *call) find(ctx context.Context) bool {
	if c == nil || c.outbox != nil || c.allowance == nil {
		return false
	}
	c.outbox, c.stream = c.allowance.pacer.outboxes.of(ctx)
	return c.outbox != nil
}

// compresses reports whether the call's messages are compressed otherwise than by gzip. GRPC decompresses such a message where it reads
// it: a few bytes become 4 MiB. So the call must end before. Calls of other services that are not streams are an exception, because gRPC
// reads their message before any interceptor runs. A gzip message stays as it is until decompress has it.
func compresses(ctx context.Context) bool {
	// The other way to ask is a stats handler, which costs every call.
	s, ok := grpc.ServerTransportStreamFromContext(ctx).(interface{ RecvCompress() string })
	return ok && s.RecvCompress() != "" && s.RecvCompress() != encoding.Identity && s.RecvCompress() != gzip.Name
}

var errEncoding = status.Error(codes.Unimplemented, "a message may be compressed by gzip only")

// enter begins the arrival of the call's message, which takes as much memory as was sent. The network bounds what is sent within the
// time of an arrival, and the number of messages that take longer is bounded. So slow messages make no other message wait.
func (c *call) enter() error {
	if c == nil {
		return nil
	}
	if c.evicted.Load() {
		return errEvicted // without the mutex, because there can be many
	}
	g := c.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	g.unqueue(c)
	if c.evicted.Load() {
		return errEvicted
	}
	c.begin = time.Now()
	g.arriving.push(&c.turn)
	g.arm()
	return nil
}

// arm calls endOverdue when the next call becomes overdue, if there are more than may be.
func (g *gate) arm() {
	var next time.Time
	if p := g.lost.first; p != nil {
		next = p.call.begin.Add(lateFor)
	} else if g.begun.size+g.arriving.size+g.overdue.size <= maxOverdue {
		return
	}
	sooner := func(q *queue, after time.Duration) {
		if p := q.first; p != nil {
			if then := p.call.begin.Add(after); next.IsZero() || then.Before(next) {
				next = then
			}
		}
	}
	sooner(&g.begun, patience)
	sooner(&g.arriving, arrival)
	if next.IsZero() || !g.due.IsZero() && !next.Before(g.due) {
		return
	}
	after := max(time.Until(next), arrival/8) // one sweep for all that are overdue by then
	g.due = next
	if g.sweep == nil {
		g.sweep = time.AfterFunc(after, g.endOverdue)
	} else {
		g.sweep.Reset(after)
	}
}

// endOverdue ends calls until no more than maxOverdue are overdue. Each time it ends the oldest call of the connection
// with the most overdue calls. Each call is looked at once, however many there are.
func (g *gate) endOverdue() {
	g.mu.Lock()
	now := time.Now()
	g.due = time.Time{}
	g.forget(now)
	late := func(q *queue, after time.Duration) {
		for p := q.first; p != nil && now.Sub(p.call.begin) >= after; p = q.first {
			p.leave()
			g.overdue.add(p, 1)
		}
	}
	late(&g.begun, patience)
	late(&g.arriving, arrival)
	var ended []*call
	for g.overdue.size > maxOverdue {
		c := g.evict(g.overdue.most().calls.first.call)
		ended = append(ended, c)
		room := &call{connection: c.connection, metadata: c.metadata, begin: now}
		room.open.call, room.turn.call = room, room
		g.opening.add(&room.open, room.size())
		g.opening.by[c.connection].lost++
		g.lost.push(&room.turn)
	}
	g.arm()
	g.mu.Unlock()
	for _, c := range ended {
		c.end()
	}
}

// leave is called when the message has arrived, or never will. It reports whether the gate ended the call before.
func (c *call) leave() (evicted bool) {
	if c == nil {
		return false
	}
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	c.gate.unqueue(c)
	return c.evicted.Load()
}

// ready is called when the message has been read to its end, or never will be. It reports whether the gate ended the call
// before.
func (c *call) ready() (evicted bool) {
	if c == nil || c.opened {
		return false
	}
	c.opened = true
	c.outbox.handle(c.stream)
	if c.evicted.Load() {
		return true
	}
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	c.gate.drop(c)
	return c.evicted.Load()
}

var errEvicted = status.Error(codes.Unavailable, "the message took too long to arrive while others waited")

// read reads a request that has arrived, by the function. At most half of the processors read large requests, and other
// large requests wait. It reports whether there was room for the request to wait. An error of its own is that of the
// call's context.
func (c *call) read(size int, by func() error) (fits bool, err error) {
	if c == nil || size < large {
		return true, by()
	}
	g := c.gate
	g.mu.Lock()
	if g.unread+size > maxUnread {
		c.full = true
		g.mu.Unlock()
		return false, nil
	}
	g.unread += size
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.unread -= size
	}()
	if err := g.readers.enter(c, c.connection); err != nil {
		return true, status.FromContextError(err).Err()
	}
	begin := time.Now()
	defer func() { g.readers.leave(c.connection, time.Since(begin)) }()
	return true, by()
}

// hold counts what the call keeps in memory until it is decided: the request as it was read, its metadata, which gRPC keeps, and
// the call itself. It reports whether there was room. Small requests need no room, so that large ones cannot keep them out of
// queues.
func (c *call) hold(m proto.Message, size int) bool {
	if c == nil {
		return true
	}
	most, small := maxHeld, smallCheck
	if !isCheck(m) {
		most, small = maxHeld+sparedHeld, smallHeld
	}
	if size > smallHeld {
		size = proto.Size(m) // of what was read
	}
	size += parts(m)
	if size <= small && c.metadata <= smallHeld {
		return true
	}
	size += c.metadata + waitingCall
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	if c.gate.held+size > most {
		c.still = true
		return false
	}
	c.gate.held += size
	c.kept = size
	return true
}

// parts estimates the bytes that the labels, headers and cache keys of a check keep besides their text.
func parts(m proto.Message) int {
	switch m := m.(type) {
	case *checkv1.CheckRequest:
		return keptLabel*len(m.GetLabels()) + keptCacheKey*len(m.GetCacheLookupRequest().GetGlobalCacheKeys())
	case *checkhttpv1.CheckHTTPRequest:
		return keptLabel*len(m.GetLabels()) + keptHeader*len(m.GetRequest().GetHeaders())
	}
	return 0
}

// done ends what hold began.
func (c *call) done() {
	if c == nil || c.kept == 0 {
		return
	}
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	c.gate.held -= c.kept
	c.kept = 0
}
