// Package records counts the records of TLS that bring no data, such as KeyUpdates and empty records. A peer can send them without
// end, and what reads the connection above TLS does not see them. The package also bounds what a peer can send in its handshake.
package records

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"syscall"
	"time"
)

// SecurityTLS is what gRPC's credentials for TLS call themselves.
const SecurityTLS = "tls"

const headerBytes = 5 // type, version and length of a record

// HandshakeBytes is how much a peer may send in its handshake. Crypto/tls takes 256 KiB of certificates. Five certificates with RSA keys
// of 4096 bits have less than 10 KiB.
const HandshakeBytes = 64 << 10

var errHandshake = fmt.Errorf("records: the peer's handshake is longer than %d bytes", HandshakeBytes)

// farewell is how long an alert may take to be sent after Closing. A peer that reads nothing never gets it.
const farewell = time.Millisecond

// A Conn is a connection below TLS, as crypto/tls uses it: it reads only when it has gone through all records that have come whole.
// One goroutine may read it and what is above TLS.
type Conn struct {
	net.Conn
	closing atomic.Bool
	done    atomic.Bool // the handshake

	// The reader's.
	begun   int // bytes of the handshake
	most    int // bytes of a read; any number if it is 0
	header  [headerBytes]byte
	have    int // bytes of the next header
	rest    int // bytes of the record to come
	whole   int // records that have come whole since the last read
	data    int // those of them whose data have been read
	useless int // records without data that ReadAbove has not returned
}

// Below returns the connection for TLS to use instead of raw.
func Below(raw net.Conn) *Conn { return &Conn{Conn: raw} }

func (c *Conn) Read(p []byte) (int, error) {
	c.useless += max(0, c.whole-c.data)
	c.whole, c.data = 0, 0
	if c.most > 0 {
		p = p[:min(len(p), c.most)]
	}
	if c.done.Load() {
		n, err := c.Conn.Read(p)
		c.follow(p[:n])
		return n, err
	}
	if c.begun == HandshakeBytes {
		return 0, errHandshake
	}
	n, err := c.Conn.Read(p[:min(len(p), HandshakeBytes-c.begun)])
	c.begun += n
	c.follow(p[:n])
	return n, err
}

// follow counts the records that end in p.
func (c *Conn) follow(p []byte) {
	for len(p) > 0 {
		if c.rest == 0 {
			n := copy(c.header[c.have:], p)
			c.have += n
			p = p[n:]
			if c.have < headerBytes {
				return
			}
			c.have, c.rest = 0, int(binary.BigEndian.Uint16(c.header[3:]))
		}
		n := min(c.rest, len(p))
		c.rest -= n
		p = p[n:]
		if c.rest == 0 {
			c.whole++
		}
	}
}

// Done ends the bound of the handshake. Another goroutine may read meanwhile.
func (c *Conn) Done() { c.done.Store(true) }

// Established ends the bound of the handshake, and forgets its records.
func (c *Conn) Established() {
	c.Done()
	c.whole, c.useless = 0, 0
}

// ReadAbove reads what is above TLS. It reads no more from the connection at a time than p has room for. It also returns how many
// records without data came since the last call, before those of its own last read. A record counts as useless also if p has room for
// exactly the rest of it, which no peer gains by. With a nil Conn there are no records: ReadAbove only reads.
func (c *Conn) ReadAbove(above net.Conn, p []byte) (n, useless int, err error) {
	if c == nil {
		n, err = above.Read(p)
		return n, 0, err
	}
	c.most = len(p)
	n, err = above.Read(p)
	if n > 0 && n < len(p) { // or else the record may have more
		c.data++
	}
	useless, c.useless = c.useless, 0
	return n, useless, err
}

// Closing prepares the connection for Close of what is above TLS. That waits for writes, and those of crypto/tls that answer
// KeyUpdates have no deadline. A nil Conn needs no preparation.
func (c *Conn) Closing() {
	if c == nil {
		return
	}
	c.closing.Store(true)
	_ = c.SetWriteDeadline(time.Time{})
}

// SetWriteDeadline sets a deadline that is soon after Closing.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	if c.closing.Load() {
		t = time.Now().Add(farewell)
	}
	return c.Conn.SetWriteDeadline(t)
}

// SyscallConn is for gRPC, which looks at the socket's options and sets some.
func (c *Conn) SyscallConn() (syscall.RawConn, error) {
	if s, ok := c.Conn.(syscall.Conn); ok {
		return s.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}
