package redistest

import (
	"net"
	"sync"
)

// A Proxy passes connections on to a server, and what comes back as the test wants it.
type Proxy struct {
	listener net.Listener
	to       func() string // the address to pass to
	url      func(addr string) string

	mu    sync.Mutex
	conns map[net.Conn]bool
	left  int           // how many bytes of replies still pass; below 0 for all
	lost  bool          // no reply passes
	held  chan struct{} // no reply passes until it is closed; nil if none is held
	ended bool

	done sync.WaitGroup
}

// StartProxy starts a proxy that passes all on to the server.
func StartProxy(tb TB, server *Server) *Proxy {
	tb.Helper()
	p := StartRelay(tb, server.Addr)
	p.url = func(addr string) string { return server.at("redis", addr) }
	return p
}

// StartRelay starts a proxy that passes each new connection on to the address that to returns then. It may be that of any server. The
// proxy has no URL.
func StartRelay(tb TB, to func() string) *Proxy {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // it does not block
	if err != nil {
		tb.Fatalf("redistest: %v", err)
	}
	p := &Proxy{listener: l, to: to, conns: map[net.Conn]bool{}, left: -1}
	p.done.Go(p.accept)
	tb.Cleanup(func() {
		p.mu.Lock()
		p.ended = true
		p.mu.Unlock()
		_ = l.Close()
		p.Close()
		p.done.Wait()
	})
	return p
}

// Addr returns the proxy's host and port.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// URL returns where the server is through the proxy.
func (p *Proxy) URL() string { return p.url(p.Addr()) }

// Cut lets so many more bytes of replies pass, of all connections together. Then the proxy closes the connection that the next byte is
// of. All replies of other connections pass after that.
func (p *Proxy) Cut(after int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.left = after
}

// Lose has the proxy keep all replies from now on, until [Proxy.Close]. The server gets what is sent to it.
func (p *Proxy) Lose() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lost = true
}

// Hold has the proxy keep all replies from now on, until [Proxy.Release] or Close: they pass then.
func (p *Proxy) Hold() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held = make(chan struct{})
}

// Release has replies pass that were held.
func (p *Proxy) Release() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.release()
}

func (p *Proxy) release() {
	if p.held != nil {
		close(p.held)
		p.held = nil
	}
}

// Close closes all connections. New ones pass all on.
func (p *Proxy) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lost = false
	p.release()
	for conn := range p.conns {
		_ = conn.Close()
	}
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return // it is closed
		}
		server, err := net.Dial("tcp", p.to()) //nolint:noctx // to the loopback interface
		if err != nil {
			_ = client.Close() // the server is killed
			continue
		}
		if !p.add(client, server) {
			return
		}
		p.done.Go(func() { p.pass(client, server, nil) })
		p.done.Go(func() { p.pass(server, client, p.replies) })
	}
}

// add has a pair of connections closed with the proxy. It reports whether the proxy is not closed yet.
func (p *Proxy) add(conns ...net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, conn := range conns {
		if p.ended {
			_ = conn.Close()
			continue
		}
		p.conns[conn] = true
	}
	return !p.ended
}

// pass copies what comes from one connection to another, as far as the filter lets it, and then closes both.
func (p *Proxy) pass(from, to net.Conn, filter func([]byte) (passes []byte, cut bool)) {
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, conn := range []net.Conn{from, to} {
			_ = conn.Close()
			delete(p.conns, conn)
		}
	}()
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		passes, cut := buffer[:n], false
		if filter != nil {
			passes, cut = filter(passes)
		}
		if len(passes) > 0 {
			if _, err := to.Write(passes); err != nil {
				return
			}
		}
		if err != nil || cut {
			return
		}
	}
}

// replies returns what passes of a reply, and reports whether the connection is cut after it.
func (p *Proxy) replies(b []byte) (passes []byte, cut bool) {
	p.mu.Lock()
	held := p.held
	p.mu.Unlock()
	if held != nil {
		<-held
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.lost:
		return nil, false
	case p.left < 0:
		return b, false
	case len(b) <= p.left:
		p.left -= len(b)
		return b, false
	default:
		left := p.left
		p.left = -1
		return b[:left], true
	}
}
