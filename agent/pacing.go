package agent

import (
	"errors"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"

	"github.com/headgate-go/headgate/internal/frames"
	"github.com/headgate-go/headgate/internal/records"
)

// What a connection sends costs units, about a microsecond of a processor each, and calls and answers earn them. Without units the
// connection is not read. A call earns more than an honest client's frames for it cost, so that only other frames count.
const (
	frameUnits   = 1
	callUnits    = 16      // of the header of a call, besides its frame's: a refused call costs more than other frames
	headerBytes  = 64      // a frame other than DATA costs one unit more for each so many bytes
	settingBytes = 6       // of an entry of a SETTINGS frame
	settingUnits = 64      // of such an entry: gRPC may go through all calls of the connection for it
	recordUnits  = 16      // of a record of TLS that brings no data: it may change the keys, and ask for an answer
	readUnits    = 1       // of a read that brings few bytes, besides its frames, unless no more may be read at once
	smallRead    = 512     // bytes
	largeData    = 1 << 10 // a DATA frame of so many bytes or more is free if it is part of a message
	largePerUnit = 4 << 10 // one that is not costs one unit more for each so many bytes
	unseenUnits  = 1000    // of a call that gRPC has refused before the tap handle: its answer repeats text of the header, percent-encoded
	answerHeader = 256     // bytes of the header of an answer that are free
	answerBytes  = 16      // other bytes of it cost a unit for each so many, unless the answer is a handler's

	callEarns     = callUnits + 16 // of a call that is let in, besides what its header cost
	callEarnsData = 4 << 20        // bytes of large DATA frames: one message
	messageEarns  = 4              // of a message of a stream
	answerPerUnit = 4 << 10        // the connection earns a unit for each so many bytes that the agent sends: clients acknowledge them

	mostUnits = 1 << 16  // that a connection can have earned, or owe
	mostData  = 64 << 20 // bytes of large DATA frames
)

// What connections get without earning it.
const (
	firstUnits     = 500 // of a connection that begins
	firstRead      = 64  // bytes that it may read at once, besides the rest of a frame, so that few calls come before they are counted
	mostRead       = 32 << 10
	callReads      = 16     // bytes more for each call that is let in, until gRPC refuses one before the tap handle
	unitsPerSecond = 5000   // the most that a connection gets in a second, and the most that it has after a pause
	ownUnits       = 100    // that a connection gets in a second at least, however many others want some
	sharedUnits    = 40_000 // that all connections together get in a second for each processor, besides ownUnits
	wakingUnits    = 64     // that a connection has when its wait ends, so that it is not woken for each frame
	shortestWait   = 20 * time.Millisecond
	longestWait    = time.Second
	behindFor      = 3 * time.Second // a connection that has been behind for so long is closed
)

var errBehind = errors.New("headgate: the connection sends too many frames that are of no use")

// A pacer bounds what the connections of one server cost besides calls that are let in. It is safe for concurrent use.
type pacer struct {
	finds      atomic.Bool // calls that were let in have found their connections: nothing waits on a server where they never do
	allowances sync.Map    // of connections that are open, by what connectionOf returns for their calls
	outboxes   outboxes

	mu    sync.Mutex // also of opening and closing connections
	begin time.Time  // of the current second
	left  float64    // shared units for it
	count int        // connections that have drawn on the allowance since begin
	last  int        // the same of the second before
}

// allowance returns that of the connection by which a call came; nil if it is unknown.
func (p *pacer) allowance(connection any) *allowance {
	found, ok := p.allowances.Load(connection)
	if !ok {
		return nil
	}
	a, _ := found.(*allowance)
	return a
}

// open returns the allowance of a connection that begins. Connections with equal addresses have one together, because their calls
// cannot be told apart.
func (p *pacer) open(connection any) *allowance {
	p.mu.Lock()
	defer p.mu.Unlock()
	found, _ := p.allowances.LoadOrStore(connection, &allowance{pacer: p, balance: firstUnits, drew: time.Now()})
	a, _ := found.(*allowance)
	a.connections++
	return a
}

func (p *pacer) close(connection any, a *allowance) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if a.connections--; a.connections == 0 {
		p.allowances.Delete(connection)
	}
}

// draw returns the units of a connection that has drawn none since then. All connections that draw have equal shares.
func (p *pacer) draw(since, now time.Time) float64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if age := now.Sub(p.begin); age >= time.Second {
		if p.last = p.count; age >= 2*time.Second {
			p.last = 0
		}
		p.begin, p.count, p.left = now, 0, float64(sharedUnits*runtime.GOMAXPROCS(0))
	}
	if since.Before(p.begin) {
		p.count++
	}
	seconds := min(now.Sub(since), time.Second).Seconds()
	shared := max(0, min((p.rate()-ownUnits)*seconds, p.left))
	p.left -= shared
	return ownUnits*seconds + shared
}

// rate is how many units a connection gets in a second.
func (p *pacer) rate() float64 {
	return min(unitsPerSecond, ownUnits+float64(sharedUnits*runtime.GOMAXPROCS(0))/float64(max(p.count, p.last, 1)))
}

// wait is about how long it takes to get so many units.
func (p *pacer) wait(units float64) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return max(shortestWait, min(time.Duration(units/p.rate()*float64(time.Second)), longestWait))
}

// An allowance is the units of a connection. The connection is behind from its first wait until it has firstUnits and no read has
// waited for longestWait.
type allowance struct {
	pacer       *pacer
	connections int // guarded by the pacer's mutex

	mu      sync.Mutex
	balance float64
	known   int       // bytes more than firstRead that it may read at once
	seen    int       // calls that the tap handle has seen, and unseen has not looked at
	data    int       // bytes of large DATA frames that are free
	drew    time.Time // when it last drew on the pacer
	behind  time.Time // since when the connection has been behind; zero if it is not
	waited  time.Time // when a read last had to wait
}

// earn adds units, and bytes of large DATA frames. A nil allowance earns nothing.
func (a *allowance) earn(units float64, data int) {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.balance = min(a.balance+units, mostUnits)
	a.data = min(a.data+data, mostData)
}

// see notes a call that the tap handle sees.
func (a *allowance) see() {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.seen++
}

// unseen takes units for those of so many calls of a connection that the tap handle has not seen. GRPC is done with their headers. If
// several connections have the allowance, each finds as many calls as it has had, because all of theirs have been seen.
func (a *allowance) unseen(calls int, free bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	seen := min(calls, a.seen)
	a.seen -= seen
	if calls -= seen; calls > 0 && !free {
		a.known = 0
		a.balance = max(a.balance-float64(calls*unseenUnits), -mostUnits)
	}
}

// admit adds what a call that is let in earns. Its metadata takes so many bytes in memory, which are more than in frames.
func (a *allowance) admit(metadata int) {
	if a == nil {
		return
	}
	if !a.pacer.finds.Load() {
		a.pacer.finds.Store(true)
	}
	a.earn(callEarns+float64(metadata/headerBytes), callEarnsData)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.known = min(a.known+callReads, mostRead-firstRead)
}

// spend takes units for what has arrived: so many, and those for large DATA frames that are not free.
func (a *allowance) spend(units, large, data int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.data >= data {
		a.data -= data
	} else {
		units += large*frameUnits + data/largePerUnit
	}
	a.balance = max(a.balance-float64(units), -mostUnits)
}

// read returns how many of so many bytes may be read now, where so many are left of a frame. If there are none, it returns how long to
// wait. Waited reports whether the caller has waited for this read. A connection without calls reads less than gRPC would, so that it
// cannot send thousands of frames before it waits.
func (a *allowance) read(most, left int, waited bool) (bytes int, wait time.Duration, err error) {
	if !a.pacer.finds.Load() {
		return most, 0, nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.balance <= 0 {
		now := time.Now()
		if now.Sub(a.drew) >= behindFor { // what it had has lasted for so long
			a.behind = time.Time{}
		}
		if drawn := a.pacer.draw(a.drew, now); a.balance+drawn < unitsPerSecond {
			a.balance += drawn
		} else {
			a.balance = unitsPerSecond
		}
		a.drew = now
		if a.balance <= 0 {
			if a.behind.IsZero() {
				a.behind = now
			} else if now.Sub(a.behind) >= behindFor {
				return 0, 0, errBehind
			}
			return 0, a.pacer.wait(wakingUnits - a.balance), nil
		}
	}
	if !a.behind.IsZero() {
		// A wait may bring many units, if other connections have ended meanwhile. So firstUnits alone do not say that the
		// connection sends less.
		if now := time.Now(); waited {
			a.waited = now
		} else if a.balance >= firstUnits && now.Sub(a.waited) >= longestWait {
			a.behind = time.Time{}
		}
	}
	most = min(most, left+firstRead+a.known)
	if a.data == 0 {
		most = min(most, max(2*smallRead, 9*int(a.balance))) // a frame has at least 9 bytes
	}
	return most, 0, nil
}

// pacedCredentials are the credentials of a server whose connections are paced, and have outboxes.
type pacedCredentials struct {
	credentials.TransportCredentials
	plain bool // the application has given none
	pacer *pacer
	turns chan struct{} // of handshakes
}

func newPacedCredentials(creds credentials.TransportCredentials, p *pacer) *pacedCredentials {
	if creds == nil {
		return &pacedCredentials{insecure.NewCredentials(), true, p, nil}
	}
	return &pacedCredentials{creds, false, p, newTurns()}
}

func (c *pacedCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if c.Info().SecurityProtocol == records.SecurityTLS { // other credentials may want the connection as it is
		return c.handshake(raw)
	}
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return conn, info, err
	}
	if c.plain {
		info = nil // as on a server without credentials
	}
	return newPacedConn(conn, raw, c.pacer), info, nil
}

func (c *pacedCredentials) Clone() credentials.TransportCredentials {
	return &pacedCredentials{c.TransportCredentials.Clone(), c.plain, c.pacer, c.turns}
}

// A pacedConn is read as fast as its allowance lasts. One goroutine may read it, and one may write, as gRPC does.
type pacedConn struct {
	net.Conn
	address net.Addr // of the peer. It is always the same value, because calls find their connection by it
	pacer   *pacer
	ready   *readyReader  // nil if the connection has no such thing
	below   *records.Conn // below gRPC's own TLS; nil if the connection has none
	sent    atomic.Int64  // bytes that have earned nothing yet
	outbox  *outbox

	// The reader's.
	frames frames.Follower
	calls  int  // whose headers have begun, and which have not been looked for among those that the tap handle has seen
	header bool // the last frame is of a call's header
	whole  bool // it is the last one of the header
	units  int  // of what is being looked at
	large  int  // DATA frames in it that are large
	data   int  // bytes of these
	timer  *time.Timer

	mu        sync.Mutex
	allowance *allowance // nil until the first read
	deadline  time.Time  // of reads
	changed   chan struct{}
	closed    chan struct{}
	isClosed  bool
}

// newPacedConn returns a connection that is raw below the security of conn. Its outbox closes what is below TLS, also below that of the
// application's listener: TLS would wait until its client reads.
func newPacedConn(conn, raw net.Conn, p *pacer) *pacedConn {
	if secured, ok := raw.(interface{ NetConn() net.Conn }); ok && secured.NetConn() != nil {
		raw = secured.NetConn()
	}
	end := func() { _ = raw.Close() }
	return &pacedConn{
		Conn: conn, address: conn.RemoteAddr(), pacer: p, ready: newReadyReader(conn), outbox: &outbox{all: &p.outboxes, end: end},
		frames: frames.After(frames.PrefaceBytes), changed: make(chan struct{}, 1), closed: make(chan struct{}),
	}
}

func (c *pacedConn) RemoteAddr() net.Addr { return c.address }

func (c *pacedConn) Read(p []byte) (int, error) {
	a, most, err := c.wait(len(p))
	if err != nil {
		return 0, err
	}
	n, err := c.read(a, p[:most])
	c.arrived(a, p[:n], n == most && most < len(p))
	return n, err
}

// read reads, and counts the records of TLS that bring no data.
func (c *pacedConn) read(a *allowance, p []byte) (int, error) {
	n, useless, err := c.below.ReadAbove(c.Conn, p)
	if useless > 0 {
		a.spend(useless*recordUnits, 0, 0)
	}
	return n, err
}

// ReadOnReady is what gRPC calls instead of Read, because a connection that is idle then keeps no buffer.
func (c *pacedConn) ReadOnReady(size int, pool mem.BufferPool) (buf *[]byte, n int, err error) {
	a, most, err := c.wait(size)
	if err != nil {
		return nil, 0, err
	}
	if c.ready != nil {
		buf, n, err = c.ready.read(size, most, pool)
	} else {
		buf = pool.Get(size)
		n, err = c.read(a, (*buf)[:most])
	}
	if n > 0 {
		c.arrived(a, (*buf)[:n], n == most && most < size)
	} else if buf != nil {
		pool.Put(buf)
		buf = nil
	}
	return buf, n, err
}

// wait waits until the connection may be read, and returns how many bytes of so many.
func (c *pacedConn) wait(most int) (a *allowance, bytes int, err error) {
	if a = c.opened(); a == nil {
		return nil, 0, net.ErrClosed
	}
	for c.outbox.full() {
		if err := c.sleep(shortestWait); err != nil {
			return nil, 0, err
		}
	}
	c.handled(a)
	for waited := false; ; waited = true {
		bytes, wait, err := a.read(most, c.frames.Left(), waited)
		if wait == 0 || err != nil {
			return a, bytes, err // after an error gRPC closes the connection
		}
		if err := c.sleep(wait); err != nil {
			return nil, 0, err
		}
	}
}

// handled looks for the calls whose headers have arrived. Before gRPC reads again, it has called the tap handle for each of them that it
// has not refused. Once the connection does not take calls any more, gRPC drops them without an answer.
func (c *pacedConn) handled(a *allowance) {
	coming := 0
	if c.header && (!c.whole || c.frames.Left() > 0) {
		coming = 1
	}
	if calls := c.calls - coming; calls > 0 {
		c.calls = coming
		a.unseen(calls, !c.pacer.finds.Load() || c.outbox.drains.Load())
	}
}

// opened returns the connection's allowance; nil if it is closed. Before the first read gRPC may drop the connection without closing it.
func (c *pacedConn) opened() *allowance {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.allowance == nil && !c.isClosed {
		c.allowance = c.pacer.open(connectionAt(c.address))
		c.pacer.outboxes.add(c.outbox)
	}
	return c.allowance
}

// sleep waits for so long, or until the connection is closed, or its read deadline has passed.
func (c *pacedConn) sleep(d time.Duration) error {
	if c.timer == nil {
		c.timer = time.NewTimer(d)
	} else {
		c.timer.Reset(d)
	}
	defer c.timer.Stop()
	for {
		c.mu.Lock()
		deadline := c.deadline
		c.mu.Unlock()
		if !deadline.IsZero() {
			left := time.Until(deadline)
			if left <= 0 {
				return os.ErrDeadlineExceeded
			}
			if left < d {
				c.timer.Reset(left)
			}
		}
		select {
		case <-c.timer.C:
			return nil
		case <-c.closed:
			return net.ErrClosed
		case <-c.changed:
		}
	}
}

// arrived counts what has been read. Cut says that no more could be.
func (c *pacedConn) arrived(a *allowance, p []byte, cut bool) {
	if len(p) == 0 {
		return
	}
	c.units, c.large, c.data = 0, 0, 0
	if len(p) < smallRead && !cut {
		c.units = readUnits
	}
	c.outbox.mu.Lock()
	c.frames.Each(p, c.count, nil)
	c.outbox.unlock()
	if c.units+c.large > 0 {
		a.spend(c.units, c.large, c.data)
	}
}

// count counts a frame, with the outbox's mutex.
func (c *pacedConn) count(f frames.Frame) {
	c.outbox.arrive(f)
	if f.Kind == frames.Headers {
		c.calls++
	}
	c.header, c.whole = f.Kind == frames.Headers || f.Kind == frames.Continuation, f.Flags&frames.EndHeaders != 0
	switch {
	case f.Kind == frames.Data && f.Length >= largeData:
		c.large++
		c.data += f.Length
	case f.Kind == frames.Data:
		c.units += frameUnits
	case f.Kind == frames.Headers:
		c.units += frameUnits + callUnits + f.Length/headerBytes
	case f.Kind == frames.Settings:
		c.units += frameUnits + f.Length/settingBytes*settingUnits
	default:
		c.units += frameUnits + f.Length/headerBytes
	}
}

func (c *pacedConn) Write(p []byte) (int, error) {
	c.outbox.write()
	n, err := c.Conn.Write(p)
	if units := c.outbox.wrote(p[:n]); units > 0 {
		if a := c.opened(); a != nil {
			a.spend(units, 0, 0)
		}
	}
	if c.sent.Add(int64(n)) >= answerPerUnit {
		if sent := c.sent.Swap(0); sent > 0 {
			if a := c.opened(); a != nil {
				a.earn(float64(sent)/answerPerUnit, 0)
			}
		}
	}
	return n, err
}

func (c *pacedConn) Close() error {
	c.mu.Lock()
	if !c.isClosed {
		c.isClosed = true
		close(c.closed)
		if c.allowance != nil {
			c.pacer.close(connectionAt(c.address), c.allowance)
			c.pacer.outboxes.remove(c.outbox)
			c.allowance = nil
		}
	}
	c.mu.Unlock()
	c.below.Closing()
	return c.Conn.Close()
}

func (c *pacedConn) SetDeadline(t time.Time) error {
	c.setReadDeadline(t)
	return c.Conn.SetDeadline(t)
}

func (c *pacedConn) SetReadDeadline(t time.Time) error {
	c.setReadDeadline(t)
	return c.Conn.SetReadDeadline(t)
}

func (c *pacedConn) setReadDeadline(t time.Time) {
	c.mu.Lock()
	c.deadline = t
	c.mu.Unlock()
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// SyscallConn is for gRPC's channelz, which shows the socket's options.
func (c *pacedConn) SyscallConn() (syscall.RawConn, error) {
	if s, ok := c.Conn.(syscall.Conn); ok {
		return s.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}
