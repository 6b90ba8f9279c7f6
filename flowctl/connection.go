package flowctl

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/headgate-go/headgate/internal/frames"
	"github.com/headgate-go/headgate/internal/records"
)

// The bounds of connections that are dialled.
const (
	connectEvery = 500 * time.Millisecond // on average, to one address
	connectBurst = 3

	maxHeaderList = 64 << 10 // bytes of a header or trailer
	maxUnderWay   = 48 << 20 // bytes of answers that have come in part, and of what follows answers

	// A connection counts for the agent when it has brought an answer, or has lasted for so long.
	provingAge = time.Second

	// What frames cost: one each, and one for each KiB. Headers expand, so they cost one for each 32 bytes, and more if
	// they are not those of an answer. Data of an answer are free, and data that follow it are not. The client earns credit
	// by what it sends, and by the time that passes.
	frameCredit    = 8192
	frameCreditMax = 65536
	framesPerCall  = 64 // headers, data, trailers, window updates and pings
	framesPerFrame = 4
	framesEvery    = time.Second / 4096
	framesOfRecord = 16  // of a record of TLS that brings no data: it may change the keys, and ask for an answer
	smallData      = 256 // DATA frames with fewer bytes are not free, even in an answer
	mostPadding    = 256 // of a frame, with the byte that says how much it is
)

var (
	errFlood    = errors.New("the agent floods the connection with frames")
	errUnderWay = errors.New("too many large answers are under way")
)

// connections has the connections of a remote that dials. It sits between the transport's security and HTTP/2, because
// three things are seen nowhere above: an answer that comes after its check has timed out, a connection that ends
// without any answer, and an answer that is compressed without a request for that. It sits above the dialer, because
// the dialer may be the application's, and because a dialer of our own would keep gRPC from using a proxy.
type connections struct {
	epoch    time.Time
	received *atomic.Uint64 // counts reads on connections that have proved themselves
	opened   atomic.Uint64  // counts the calls that were sent, and what is said in sessions
	writing  atomic.Int64   // how many connections are being written to
	underWay atomic.Int64   // bytes of answers that have not come whole, and of what follows answers
	fresh    chan struct{}  // receives when a connection is made
	goAway   chan struct{}  // receives when an agent asks for another connection
	made     atomic.Uint64  // how many connections were made
	gone     atomic.Uint64  // the newest of them, counted so, instead of which an agent has asked for another one

	mu   sync.Mutex
	open map[*connection]struct{}
	next map[string]time.Duration // by address: when the connections so far would all have had their turn
}

func newConnections(received *atomic.Uint64) *connections {
	return &connections{
		epoch: time.Now(), received: received, fresh: make(chan struct{}, 1), goAway: make(chan struct{}, 1),
		open: make(map[*connection]struct{}), next: make(map[string]time.Duration),
	}
}

// await puts pauses between connections to one address. gRPC itself pauses only after a failed attempt, and for gRPC an
// attempt has not failed once the server has sent anything of HTTP/2.
func (cs *connections) await(ctx context.Context, address string) error {
	now := time.Since(cs.epoch)
	cs.mu.Lock()
	if len(cs.next) > 64 {
		for a, next := range cs.next {
			if next <= now {
				delete(cs.next, a)
			}
		}
	}
	next := max(cs.next[address], now) + connectEvery
	cs.next[address] = next
	cs.mu.Unlock()
	wait := next - connectBurst*connectEvery - now
	if wait <= 0 {
		return nil
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// stirred reports whether anything came since then on an open connection that has not proved itself: it is not known to
// be an agent's.
func (cs *connections) stirred(since time.Time) bool {
	t := int64(since.Sub(cs.epoch))
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for c := range cs.open {
		if !c.gone.Load() && !c.proved.Load() && c.last.Load() >= t {
			return true
		}
	}
	return false
}

// abandon closes all connections at once.
func (cs *connections) abandon() {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for c := range cs.open {
		_ = c.raw.Close()
	}
}

// trackedCredentials make connections of what is dialled.
type trackedCredentials struct {
	credentials.TransportCredentials
	connections *connections
}

func (t *trackedCredentials) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	address := ""
	if a := raw.RemoteAddr(); a != nil {
		address = a.String()
	}
	if err := t.connections.await(ctx, address); err != nil {
		return nil, nil, err
	}
	var below *records.Conn
	if t.Info().SecurityProtocol == records.SecurityTLS { // other credentials may want the connection as it is
		below = records.Below(raw)
		raw = below
	}
	conn, info, err := t.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		return nil, nil, err
	}
	if _, ok := info.(credentials.TLSInfo); below != nil && ok {
		below.Established()
	} else if below != nil { // others may use another implementation, which reads the connection otherwise
		below.Done()
		below = nil
	}
	cs := t.connections
	now := time.Since(cs.epoch)
	c := &connection{
		Conn: conn, raw: raw, below: below, connections: cs, began: now, credited: now, number: cs.made.Add(1),
		streams: make(map[uint32]stream), credit: frameCredit, out: frames.After(frames.PrefaceBytes),
	}
	cs.mu.Lock()
	cs.open[c] = struct{}{}
	cs.mu.Unlock()
	notify(cs.fresh)
	return c, info, nil
}

func (t *trackedCredentials) Clone() credentials.TransportCredentials {
	return &trackedCredentials{t.TransportCredentials.Clone(), t.connections}
}

// notify lets one receiver know, now or later.
func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// forget takes back what notify has let nobody know yet.
func forget(c chan struct{}) {
	select {
	case <-c:
	default:
	}
}

// A connection follows the frames that it carries.
type connection struct {
	net.Conn
	raw         net.Conn      // below the transport's security
	below       *records.Conn // raw, if the security is gRPC's own TLS; nil if not
	connections *connections
	began       time.Duration // since the connections' epoch
	number      uint64        // of those that were made

	last   atomic.Int64 // when anything was read, since the epoch
	proved atomic.Bool
	gone   atomic.Bool // it ends, or has ended

	in  frames.Follower // of the reader
	out frames.Follower // of the writer

	mu       sync.Mutex
	streams  map[uint32]stream // those that are open
	newest   uint32            // the stream that was opened last
	credit   int
	shift    uint8         // by which the bytes of headers cost less
	credited time.Duration // credit for the time until then has been added
	underWay int64
}

// A stream is a call. The answer to a unary call is one message. gRPC keeps what follows the answer until the stream ends. A
// session's stream is one on which the client says more than one thing. What comes there is read at once.
type stream struct {
	says     framing // of the client's messages
	session  bool    // the client has said more than one thing
	asked    bool    // the first byte of the question has been seen
	compress bool    // the question is compressed, so the answer may be
	whole    bool    // the answer has come
	blocks   uint8   // of headers that have come: an answer has two
	have     uint8   // bytes of a message's prefix
	prefix   [5]byte // compressed or not, and length
	rest     uint32  // bytes of the message to come
	underWay uint32  // bytes that have come of the answer, and once it is whole, of what follows
}

// read reads, and counts the records of TLS that bring no data.
func (c *connection) read(p []byte) (int, error) {
	n, useless, err := c.below.ReadAbove(c.Conn, p)
	if useless > 0 {
		c.mu.Lock()
		c.credit -= useless * framesOfRecord
		c.mu.Unlock()
	}
	return n, err
}

func (c *connection) Read(p []byte) (int, error) {
	n, err := c.read(p)
	if n > 0 {
		now := time.Since(c.connections.epoch)
		c.last.Store(int64(now))
		if refused := c.arrived(p[:n], now); refused != nil {
			c.gone.Store(true)
			return 0, refused
		}
		if !c.proved.Load() && now-c.began >= provingAge {
			c.proved.Store(true)
		}
		if c.proved.Load() {
			c.connections.received.Add(1)
		}
	}
	if err != nil {
		c.gone.Store(true)
	}
	return n, err
}

func (c *connection) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.out.Each(p, c.sends, c.sendsData)
	c.mu.Unlock()
	c.connections.writing.Add(1)
	defer c.connections.writing.Add(-1)
	return c.Conn.Write(p)
}

func (c *connection) Close() error {
	c.gone.Store(true)
	c.mu.Lock()
	c.connections.underWay.Add(-c.underWay)
	c.underWay = 0
	clear(c.streams)
	c.mu.Unlock()
	c.connections.mu.Lock()
	delete(c.connections.open, c)
	c.connections.mu.Unlock()
	c.below.Closing()
	return c.Conn.Close()
}

// sends notes a frame that the client sends.
func (c *connection) sends(f frames.Frame) {
	switch f.Kind {
	case frames.Headers:
		c.connections.opened.Add(1)
		c.streams[f.Stream] = stream{}
		c.newest = max(c.newest, f.Stream)
		c.earn(framesPerCall)
	case frames.RSTStream:
		c.ended(f.Stream)
		c.earn(framesPerCall)
	case frames.Data:
		c.earn(framesPerFrame)
	}
}

func (c *connection) sendsData(f frames.Frame, p []byte, _ bool) {
	s, ok := c.streams[f.Stream]
	if !ok || len(p) == 0 {
		return
	}
	if !s.asked {
		s.asked, s.compress = true, p[0] != 0
	}
	if more := s.says.follow(p); more > 0 {
		s.session, s.whole = true, false
		c.carry(-int64(s.underWay))
		s.underWay = 0
		c.connections.opened.Add(uint64(more))
	}
	c.streams[f.Stream] = s
}

// A framing follows the messages of a stream, each of which has a prefix of five bytes that ends with its length.
type framing struct {
	began bool // the first message has
	have  uint8
	rest  uint32
}

// follow returns how many messages begin in p, without the first one of the stream.
func (f *framing) follow(p []byte) (more int) {
	for len(p) > 0 {
		if f.have == 5 { // within a message
			n := min(uint64(f.rest), uint64(len(p)))
			p = p[n:]
			if f.rest -= uint32(n); f.rest == 0 {
				f.have = 0
			}
			continue
		}
		if f.have == 0 {
			if f.began {
				more++
			}
			f.began = true
		} else {
			f.rest = f.rest<<8 | uint32(p[0])
		}
		if f.have++; f.have == 5 && f.rest == 0 {
			f.have = 0
		}
		p = p[1:]
	}
	return more
}

func (c *connection) earn(n int) { c.credit = min(c.credit+n, frameCreditMax) }

// ended forgets a stream.
func (c *connection) ended(id uint32) {
	if s, ok := c.streams[id]; ok {
		c.carry(-int64(s.underWay))
		delete(c.streams, id)
	}
}

// carry counts bytes of answers that have not come whole, and of what follows answers.
func (c *connection) carry(n int64) {
	c.underWay += n
	c.connections.underWay.Add(n)
}

// arrived follows what the agent sent. After an error the connection must not be read any more.
func (c *connection) arrived(p []byte, now time.Duration) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.in.Each(p, c.receives, c.receivesData)
	if c.credit < 0 {
		earned := min((now-c.credited)/framesEvery, frameCreditMax)
		c.earn(int(earned))
		c.credited = now
		if c.credit < 0 {
			return errFlood
		}
	}
	if c.connections.underWay.Load() > maxUnderWay && c.underWay > 0 {
		return errUnderWay
	}
	return nil
}

// receives notes a frame that the agent sends.
func (c *connection) receives(f frames.Frame) {
	s, known := c.streams[f.Stream]
	small := smallData
	if f.Flags&frames.Padded != 0 {
		small += mostPadding
	}
	switch {
	case f.Kind == frames.Headers:
		c.shift = 3
		if known && s.blocks < 2 {
			s.blocks++
			c.streams[f.Stream] = s
			c.shift = 5
		}
		c.credit -= 1 + f.Length>>c.shift
	case f.Kind == frames.Continuation:
		c.credit -= 1 + f.Length>>c.shift
	case f.Kind != frames.Data || !known || s.whole || f.Length < small:
		c.credit -= 1 + f.Length>>10
	}
	switch f.Kind {
	case frames.GoAway:
		for gone := &c.connections.gone; ; {
			if of := gone.Load(); of >= c.number || gone.CompareAndSwap(of, c.number) {
				break
			}
		}
		notify(c.connections.goAway)
		if !c.proved.Load() {
			c.gone.Store(true)
		}
	case frames.Data, frames.Headers, frames.RSTStream:
		if f.Stream > 0 && f.Stream <= c.newest { // also one that is over: an answer may come late
			c.proved.Store(true)
		}
		if f.Kind == frames.RSTStream || f.Kind == frames.Headers && f.Flags&frames.EndStream != 0 {
			c.ended(f.Stream)
		}
	}
}

// The first byte of a message is 0 unless the message is compressed. gRPC decompresses whatever the process has a
// compressor for, and offers that to the agent; its option against that has no effect (grpc-go 1.85). If the byte has a
// value that gRPC does not know, gRPC refuses this message, and nothing else on the connection.
const (
	formatPlain   = 0
	formatRefused = 255
	refusedFormat = "unexpected payload format 255" // how gRPC's error then ends
)

// receivesData follows the messages that the agent sends. An answer is only one. What follows it is under way until the
// stream ends, which is when the agent or the client says so: the client does that once gRPC has let go of the stream.
func (c *connection) receivesData(f frames.Frame, p []byte, end bool) {
	s, known := c.streams[f.Stream]
	if !known {
		return
	}
	before := s.underWay
	for len(p) > 0 {
		var n int
		if s.rest > 0 {
			n = int(min(uint64(s.rest), uint64(len(p))))
			s.rest -= uint32(n)
			s.underWay += uint32(n)
		} else {
			if s.have == 0 && p[0] != formatPlain && !s.compress {
				p[0] = formatRefused
			}
			n = copy(s.prefix[s.have:], p)
			s.have += uint8(n)
			if s.whole {
				s.underWay += uint32(n)
			}
			if s.have == uint8(len(s.prefix)) {
				s.have, s.rest = 0, binary.BigEndian.Uint32(s.prefix[1:])
			}
		}
		if !s.whole && s.have == 0 && s.rest == 0 {
			s.whole, s.underWay = !s.session, 0
		}
		p = p[n:]
	}
	c.carry(int64(s.underWay) - int64(before))
	c.streams[f.Stream] = s
	if end && f.Flags&frames.EndStream != 0 {
		c.ended(f.Stream)
	}
}
