package agent

import (
	"io"
	"net"
	"syscall"

	"google.golang.org/grpc/mem"
)

// A readyReader reads a socket into a buffer that it takes from a pool when something has arrived. gRPC has its own, but only for
// connections that are not wrapped.
type readyReader struct {
	raw syscall.RawConn
	try func(fd uintptr) bool

	// Those of the read that is under way.
	size, most int
	pool       mem.BufferPool
	buf        *[]byte
	n          int
	err        error
}

// newReadyReader returns nil for what is no socket: other connections may have decrypted what came by the socket.
func newReadyReader(conn net.Conn) *readyReader {
	var socket syscall.Conn
	switch conn := conn.(type) {
	case *net.TCPConn:
		socket = conn
	case *net.UnixConn:
		socket = conn
	default:
		return nil
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return nil
	}
	r := &readyReader{raw: raw}
	r.try = func(fd uintptr) bool {
		r.buf = r.pool.Get(r.size)
		for {
			r.n, r.err = syscall.Read(int(fd), (*r.buf)[:r.most])
			if r.err != syscall.EINTR { //nolint:errorlint // it is never wrapped
				break
			}
		}
		if r.n > 0 {
			return true
		}
		r.pool.Put(r.buf)
		r.buf, r.n = nil, 0
		return r.err != syscall.EAGAIN //nolint:errorlint // it is never wrapped
	}
	return r
}

// read reads at most so many bytes into a buffer of the pool's that has the size. There is no buffer if it returns an error.
func (r *readyReader) read(size, most int, pool mem.BufferPool) (*[]byte, int, error) {
	r.size, r.most, r.pool = size, most, pool
	err := r.raw.Read(r.try)
	buf, n, failed := r.buf, r.n, r.err
	r.pool, r.buf, r.n, r.err = nil, nil, 0, nil
	switch {
	case n > 0:
		return buf, n, nil
	case err != nil:
		return nil, 0, err
	case failed != nil:
		return nil, 0, failed
	default:
		return nil, 0, io.EOF
	}
}
