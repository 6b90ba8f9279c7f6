//go:build linux

package attack_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/headgate-go/headgate/internal/testing/rawtls"
)

// attacksOnTLS are attacks on what is below HTTP/2.
func attacksOnTLS(t *testing.T) map[string]assault {
	t.Helper()
	var priority bytes.Buffer // a frame that means nothing
	_ = http2.NewFramer(&priority, nil).WritePriority(1, http2.PriorityParam{Weight: 1})
	// The server's TLS wants data after 16 other records.
	after16 := func(other func(c *rawtls.Conn) error) func(c *rawtls.Conn) error {
		return func(c *rawtls.Conn) error {
			for range 16 {
				if err := other(c); err != nil {
					return err
				}
			}
			c.Data(priority.Bytes())
			return nil
		}
	}
	return map[string]assault{
		"updates of keys": records(after16((*rawtls.Conn).UpdateKey)),
		"empty records": records(after16(func(c *rawtls.Conn) error {
			c.Data(nil)
			return nil
		})),
		"records of a byte": records(func(c *rawtls.Conn) error {
			for _, b := range priority.Bytes() {
				c.Data([]byte{b})
			}
			return nil
		}),
		"handshakes":            handshakes(func(conn net.Conn) net.Conn { return conn }),
		"handshakes that break": handshakes(func(conn net.Conn) net.Conn { return breaks{conn} }),
		// Crypto/tls takes the first ones. Crypto/x509 makes 93 tries to verify a signature of the second ones.
		"many certificates":    certificates(t, 0, 99),
		"crossed certificates": certificates(t, 3, 30),
	}
}

// records sends records as fast as it can: those that some appends, again and again.
func records(some func(c *rawtls.Conn) error) assault {
	const connections, atOnce = 32, 16
	settings := make([]byte, 9)
	settings[3] = byte(http2.FrameSettings)
	return func(ctx context.Context, _ *testing.T, address string) {
		// The attack computes a lot, and the innocent client must not wait for that.
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2 * connections))
		together(ctx, connections, func() {
			conn := dial(ctx, address)
			if conn == nil {
				return
			}
			defer conn.Close()
			if tcp, ok := conn.(*net.TCPConn); ok {
				_ = tcp.SetWriteBuffer(16 << 10) // what waits there has cost as much
			}
			c, err := rawtls.Client(ctx, conn)
			if err != nil {
				return
			}
			var reading sync.WaitGroup
			defer reading.Wait()
			defer conn.Close()
			reading.Go(func() { _, _ = io.Copy(io.Discard, conn) })
			c.Data(append([]byte(http2.ClientPreface), settings...))
			for ctx.Err() == nil {
				for range atOnce {
					if some(c) != nil {
						return
					}
				}
				_ = conn.SetWriteDeadline(time.Now().Add(patience))
				if c.Flush() != nil {
					return
				}
			}
		})
	}
}

// handshakes makes handshakes, one after the other on many connections at a time.
func handshakes(of func(conn net.Conn) net.Conn) assault {
	return func(ctx context.Context, _ *testing.T, address string) {
		together(ctx, attackers, func() {
			conn := dial(ctx, address)
			if conn == nil {
				return
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(patience))
			_ = tls.Client(of(conn), rawtls.ClientConfig()).HandshakeContext(ctx)
		})
	}
}

// certificates makes handshakes with the certificates of rawtls.Crossed. It ends when the server has ended all of them.
func certificates(t *testing.T, first, second int) assault {
	t.Helper()
	const connections, patience = 32, 15 * time.Second
	crossed, err := rawtls.Crossed(first, second)
	if err != nil {
		t.Fatal(err)
	}
	config := rawtls.ClientConfig()
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &crossed, nil }
	return func(ctx context.Context, _ *testing.T, address string) {
		together(ctx, connections, func() {
			conn := dial(ctx, address)
			if conn == nil {
				return
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(patience))
			secured := tls.Client(conn, config)
			if secured.HandshakeContext(context.WithoutCancel(ctx)) == nil {
				_, _ = io.Copy(io.Discard, conn)
			}
		})
	}
}

// breaks is a connection that ends when the server has signed, so that the handshake costs the client less.
type breaks struct{ net.Conn }

func (b breaks) Read(p []byte) (int, error) {
	_, _ = b.Conn.Read(p)
	return 0, io.EOF
}
