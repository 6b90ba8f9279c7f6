package agent

import (
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/headgate-go/headgate/internal/records"
)

// A handshake may compute for some time before it does not count any more: the application's callbacks may wait for something else. The
// slowest signature in use, by an RSA key of 4096 bits, takes a few milliseconds. Certificates of a client take longer. Crypto/x509 makes
// at most 100 tries to verify a signature of a chain, and some chains have it verify the same ones again and again. Keys of P-521 took
// 20 ms for each KiB. RSA keys of 8192 bits with the largest exponent took 11 ms, and 280 ms for 100 tries. Both take up to three times
// as long on a busy machine.
const (
	longestTurn     = 20 * time.Millisecond
	turnOfKiB       = 50 * time.Millisecond // more, for each KiB that the peer has sent
	longestOfChains = time.Second           // whatever the peer has sent
)

// turnAfter returns how long a turn may last when the peer has sent so many bytes.
func turnAfter(sent int) time.Duration {
	return min(longestTurn+time.Duration(sent)*turnOfKiB/1024, longestOfChains)
}

// newTurns returns as many turns as handshakes may compute at a time: half of the processors. A handshake waits in line for each turn.
func newTurns() chan struct{} { return make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2)) }

// A handshakeConn is a connection below TLS. Its handshake computes in turns. A turn begins when it has read, and ends when it reads
// or writes.
type handshakeConn struct {
	*records.Conn
	turns chan struct{}
	until time.Time // when the handshake has taken too long. GRPC's deadline ends reads and writes, but no wait for a turn
	done  atomic.Bool
	sent  int         // bytes that the peer has
	timer *time.Timer // ends a turn that takes long

	mu  sync.Mutex
	has bool // a turn
}

// handshake is ServerHandshake of credentials for TLS.
func (c *pacedCredentials) handshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	h := &handshakeConn{Conn: records.Below(raw), turns: c.turns, until: time.Now().Add(handshakeTimeout)}
	h.timer = time.AfterFunc(longestTurn, h.endTurn)
	h.timer.Stop()
	conn, info, err := c.TransportCredentials.ServerHandshake(h)
	h.done.Store(true)
	h.Done()
	h.timer.Stop()
	h.endTurn()
	if err != nil {
		return conn, info, err
	}
	paced := newPacedConn(conn, raw, c.pacer)
	if _, ok := info.(credentials.TLSInfo); ok { // others may use another implementation, which reads the connection otherwise
		h.Established()
		paced.below = h.Conn
	}
	return paced, info, nil
}

func (c *handshakeConn) Read(p []byte) (int, error) {
	if c.done.Load() {
		return c.Conn.Read(p)
	}
	c.endTurn()
	n, err := c.Conn.Read(p)
	c.sent += n
	if err != nil {
		return n, err
	}
	return n, c.beginTurn()
}

func (c *handshakeConn) Write(p []byte) (int, error) {
	if c.done.Load() {
		return c.Conn.Write(p)
	}
	c.endTurn()
	return c.Conn.Write(p) // crypto/tls computes before it writes, and reads before it computes again
}

// beginTurn waits for a turn.
func (c *handshakeConn) beginTurn() error {
	c.turns <- struct{}{} // each turn ends soon
	c.mu.Lock()
	c.has = true
	c.mu.Unlock()
	c.timer.Reset(turnAfter(c.sent))
	if time.Now().After(c.until) {
		return os.ErrDeadlineExceeded
	}
	return nil
}

// endTurn ends the turn, if there is one.
func (c *handshakeConn) endTurn() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.has {
		c.has = false
		<-c.turns
	}
}
