package agent

import (
	"context"
	"maps"
	"runtime"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// The bounds of a server, over all its connections.
const (
	maxArriving    = 64                    // compressed messages that arrive at a time, of 4 MiB each at the most; as many others are overdue
	arrival        = 50 * time.Millisecond // how long a message may take to arrive before it is overdue
	lateFor        = time.Second           // how long a connection that lost an overdue message goes after others
	maxLate        = 1024                  // connections that are remembered for lateFor
	maxUnread      = 64 << 20              // bytes of large requests that have arrived and are not read
	maxHeld        = 128 << 20             // bytes of requests that are being decided about, and of their metadata
	smallHeld      = 4 << 10               // bytes of a request, and of its metadata, up to which they do not count for maxHeld
	large          = 64 << 10              // bytes from which a request counts for maxUnread
	maxUnsent      = 64 << 20              // bytes of answers that clients have not read
	maxUnsentByOne = maxUnsent / 4         // of one connection
	ownUnsent      = 128 << 10             // of one connection, even if others leave no room
	smallAnswer    = 1 << 10               // bytes up to which an answer does not count: gRPC does not report when it has sent it
	smallValues    = 4 << 10               // bytes of values up to which they count only with the answer
)

// A gate bounds what the calls of one server have under way together.
type gate struct {
	mu       sync.Mutex
	arriving []*call           // those with compressed messages, in the order in which they were let in
	waiting  []*turn           // one for each connection that has calls waiting, in the order in which they get their turns
	late     map[any]time.Time // when a connection lost an overdue message
	timer    *time.Timer

	plain map[*call]struct{} // those that arrive with other messages
	sweep *time.Timer        // for the overdue ones among these
	armed bool               // sweep is to fire

	readers chan struct{} // has an element for each call that reads a large request
	unread  int
	held    int
	unsent  int
	by      map[any]int // unsent, by connection
}

// A turn is the calls of one connection that wait to be let in. Connections get turns one after the other, so that those
// with few calls do not wait for those with many.
type turn struct {
	connection any
	calls      []*call
	late       bool // its turn comes after those that are not late
}

// newGate makes a gate. A request of 4 MiB can take 50 ms to read. At most half of the processors read large requests,
// so that small ones do not wait for them.
func newGate() *gate {
	return &gate{
		late:    make(map[any]time.Time),
		plain:   make(map[*call]struct{}),
		by:      make(map[any]int),
		readers: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2)),
	}
}

type callKey struct{}

// A call is an RPC that came through the gate. It is also the context of the RPC.
type call struct {
	context.Context
	cancel     context.CancelFunc
	gate       *gate
	connection any
	compressed bool // the message may be
	metadata   int  // bytes that it takes in memory, about

	// Guarded by the gate's mutex.
	begin   time.Time     // of the arrival
	in      chan struct{} // closed when a call that waits is let in; nil for one that need not wait
	evicted bool

	// The rest is the handler's.
	kept   int   // bytes that count as held
	full   bool  // there was no room to read the request
	still  bool  // there is no room to hold it for long: the flow does not wait
	values int   // bytes of cached values in the answer
	loan   *loan // for the answer; nil for one that does not count
}

// call makes a context that the gate can end.
func (g *gate) call(ctx context.Context, sent metadata.MD) context.Context {
	c := &call{gate: g, connection: connectionOf(ctx), metadata: weight(sent)}
	c.Context, c.cancel = context.WithCancel(ctx)
	return c
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

// compresses reports whether the call's message may be compressed.
func compresses(ctx context.Context) bool {
	// The other way to ask is a stats handler, which costs every call.
	s, ok := grpc.ServerTransportStreamFromContext(ctx).(interface{ RecvCompress() string })
	return !ok || s.RecvCompress() != "" && s.RecvCompress() != encoding.Identity
}

// enter waits until the call's message may be read. Only a compressed message waits: a few bytes of it become 4 MiB at
// once, so the number of such messages is bounded. Other messages take as much memory as was sent. The network bounds
// what is sent within the time of an arrival, and the number of messages that take longer is bounded. So slow messages
// make no other message wait.
func (c *call) enter() error {
	if c == nil {
		return nil
	}
	g := c.gate
	g.mu.Lock()
	if !c.compressed {
		defer g.mu.Unlock()
		c.begin = time.Now()
		g.plain[c] = struct{}{}
		if len(g.plain) > maxArriving && !g.armed {
			g.arm(arrival)
		}
		return nil
	}
	if len(g.waiting) == 0 && g.admit(c) {
		g.mu.Unlock()
		return nil
	}
	c.in = make(chan struct{})
	if i := slices.IndexFunc(g.waiting, func(t *turn) bool { return t.connection == c.connection }); i >= 0 {
		g.waiting[i].calls = append(g.waiting[i].calls, c)
	} else {
		lost, ok := g.late[c.connection]
		g.queue(&turn{connection: c.connection, calls: []*call{c}, late: ok && time.Since(lost) < lateFor})
	}
	g.next()
	g.mu.Unlock()
	select {
	case <-c.in:
		return nil
	case <-c.Done():
		c.leave()
		return status.FromContextError(c.Err()).Err()
	}
}

// queue puts the turn behind the others, and before those that are late.
func (g *gate) queue(t *turn) {
	i := len(g.waiting)
	if !t.late {
		if late := slices.IndexFunc(g.waiting, func(t *turn) bool { return t.late }); late >= 0 {
			i = late
		}
	}
	g.waiting = slices.Insert(g.waiting, i, t)
}

// arm calls endOverdue after some time.
func (g *gate) arm(after time.Duration) {
	g.armed = true
	if g.sweep == nil {
		g.sweep = time.AfterFunc(after, g.endOverdue)
	} else {
		g.sweep.Reset(after)
	}
}

// endOverdue ends calls until no more than maxArriving are overdue. Each time it ends the oldest call of the connection
// with the most overdue calls.
func (g *gate) endOverdue() {
	g.mu.Lock()
	defer g.mu.Unlock()
	now, next := time.Now(), arrival
	type late struct {
		*call
		newer int // of its connection
	}
	var overdue []late
	for c := range g.plain {
		if age := now.Sub(c.begin); age >= arrival {
			overdue = append(overdue, late{call: c})
		} else {
			next = min(next, arrival-age)
		}
	}
	if len(overdue) > maxArriving {
		slices.SortFunc(overdue, func(a, b late) int { return b.begin.Compare(a.begin) })
		of := make(map[any]int)
		for i, c := range overdue {
			overdue[i].newer = of[c.connection]
			of[c.connection]++
		}
		slices.SortStableFunc(overdue, func(a, b late) int { return a.newer - b.newer })
		for _, c := range overdue[maxArriving:] {
			c.evicted = true
			c.cancel()
			delete(g.plain, c.call)
		}
	}
	if g.armed = false; len(g.plain) > maxArriving {
		g.arm(max(next, arrival/8)) // one sweep for all that are overdue by then
	}
}

// admit lets the call in if there is room, or if there is a call that can make room.
func (g *gate) admit(c *call) bool {
	now := time.Now()
	if len(g.arriving) >= maxArriving {
		i := g.slowest(now)
		if i < 0 {
			return false
		}
		g.arriving[i].evicted = true
		g.arriving[i].cancel()
		if len(g.late) >= maxLate {
			maps.DeleteFunc(g.late, func(_ any, lost time.Time) bool { return now.Sub(lost) >= lateFor })
		}
		if len(g.late) < maxLate {
			g.late[g.arriving[i].connection] = now
		}
		g.arriving = slices.Delete(g.arriving, i, i+1)
	}
	c.begin = now
	g.arriving = append(g.arriving, c)
	return true
}

// slowest returns the place of the call that makes room: the oldest of the connection with the most overdue calls. It
// returns -1 if no call is overdue.
func (g *gate) slowest(now time.Time) int {
	overdue := make(map[any]int)
	most, of := 0, -1
	for i, c := range slices.Backward(g.arriving) {
		if now.Sub(c.begin) < arrival {
			continue
		}
		overdue[c.connection]++
		if n := overdue[c.connection]; n >= most {
			most, of = n, i
		}
	}
	return of
}

// next lets calls in while there is room, and sets a timer for the others.
func (g *gate) next() {
	for len(g.waiting) > 0 {
		t := g.waiting[0]
		c := t.calls[0]
		if !g.admit(c) {
			wait := arrival - time.Since(g.arriving[0].begin)
			if g.timer == nil {
				g.timer = time.AfterFunc(wait, func() {
					g.mu.Lock()
					defer g.mu.Unlock()
					g.next()
				})
			} else {
				g.timer.Reset(wait)
			}
			return
		}
		close(c.in)
		t.calls = t.calls[1:]
		g.waiting = g.waiting[1:]
		if len(t.calls) > 0 {
			g.queue(t)
		}
	}
}

// leave is called when the message has arrived, or never will. It reports whether the gate ended the call before.
func (c *call) leave() (evicted bool) {
	if c == nil {
		return false
	}
	g := c.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	if !c.compressed {
		delete(g.plain, c)
		return c.evicted
	}
	if i := slices.Index(g.arriving, c); i >= 0 {
		g.arriving = slices.Delete(g.arriving, i, i+1)
		g.next()
		return false
	}
	for i, t := range g.waiting {
		if j := slices.Index(t.calls, c); j >= 0 {
			if t.calls = slices.Delete(t.calls, j, j+1); len(t.calls) == 0 {
				g.waiting = slices.Delete(g.waiting, i, i+1)
			}
			break
		}
	}
	return c.evicted
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
	select {
	case g.readers <- struct{}{}:
	case <-c.Done():
		return true, status.FromContextError(c.Err()).Err()
	}
	defer func() { <-g.readers }()
	return true, by()
}

// hold counts what the call keeps in memory until it is decided: the request, and its metadata, which gRPC keeps. It
// reports whether there was room. Small requests need no room, so that large ones cannot keep them out of queues.
func (c *call) hold(m proto.Message, size int) bool {
	if c == nil || size <= smallHeld && c.metadata <= smallHeld {
		return true
	}
	if size > smallHeld {
		size = proto.Size(m) // of what was read
	}
	size += c.metadata
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	if c.gate.held+size > maxHeld {
		c.still = true
		return false
	}
	c.gate.held += size
	c.kept = size
	return true
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
