package records_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/headgate-go/headgate/internal/records"
	"github.com/headgate-go/headgate/internal/testing/rawtls"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// secured is a connection with TLS whose client sends records one by one.
func secured(t *testing.T) (below *records.Conn, server *tls.Conn, client *rawtls.Conn) {
	t.Helper()
	config, err := rawtls.ServerConfig()
	if err != nil {
		t.Fatal(err)
	}
	near, far := net.Pipe()
	t.Cleanup(func() { _ = near.Close(); _ = far.Close() })
	below = records.Below(near)
	server = tls.Server(below, config)
	handshake := make(chan error, 1)
	go func() { handshake <- server.Handshake() }()
	if client, err = rawtls.Client(t.Context(), far); err != nil {
		t.Fatal(err)
	}
	if err := <-handshake; err != nil {
		t.Fatal(err)
	}
	return below, server, client
}

// Records that bring no data count, and others do not, however they come in pieces.
func TestUselessRecords(t *testing.T) {
	data := func(size int) func(c *rawtls.Conn) error {
		return func(c *rawtls.Conn) error {
			c.Data(make([]byte, size))
			return nil
		}
	}
	for _, tt := range []struct {
		name    string
		records []func(c *rawtls.Conn) error
		useless int
		data    int // bytes
	}{
		{"data", slices.Repeat([]func(c *rawtls.Conn) error{data(30)}, 50), 0, 1500},
		{"data of a byte", slices.Repeat([]func(c *rawtls.Conn) error{data(1)}, 50), 0, 50},
		{"large data", slices.Repeat([]func(c *rawtls.Conn) error{data(16384), data(1)}, 3), 0, 3 * 16385},
		{"updates of keys", slices.Repeat([]func(c *rawtls.Conn) error{data(7), (*rawtls.Conn).UpdateKey}, 20), 20, 140},
		{"updates of keys behind large data", append(slices.Repeat([]func(c *rawtls.Conn) error{(*rawtls.Conn).UpdateKey}, 16), data(16384)), 16, 16384},
		{"empty records", slices.Repeat([]func(c *rawtls.Conn) error{data(0), data(0), data(5), data(0)}, 20), 60, 100},
	} {
		for _, piece := range []int{1, 100, 1 << 20} { // that the network brings at a time
			if piece == 1 && tt.data > 10_000 {
				continue // it takes long
			}
			for _, room := range []int{13, 1000, 32 << 10} { // for data
				synctest.Test(t, func(t *testing.T) {
					below, server, client := secured(t)
					below.Established()
					var sent bytes.Buffer
					conn := client.Conn
					client.Conn = buffer{conn, &sent}
					for _, appends := range tt.records {
						if err := appends(client); err != nil {
							t.Fatal(err)
						}
					}
					client.Data([]byte("."))
					if err := client.Flush(); err != nil {
						t.Fatal(err)
					}
					go func() { _, _ = io.Copy(io.Discard, conn) }()
					go func() {
						for part := range slices.Chunk(sent.Bytes(), piece) {
							if _, err := conn.Write(part); err != nil {
								return
							}
						}
					}()
					useless, total := 0, 0
					p := make([]byte, room)
					var err error
					for err == nil {
						var n, more int
						n, more, err = below.ReadAbove(server, p)
						total += n
						useless += more
						if total == tt.data+1 {
							_ = conn.Close()
						}
					}
					if !errors.Is(err, io.EOF) || total != tt.data+1 || useless != tt.useless {
						t.Errorf("%s in pieces of %d into %d: %d useless, %d bytes, %v want %d, %d", tt.name, piece, room, useless, total, err, tt.useless, tt.data)
					}
				})
			}
		}
	}
}

// A peer can send 64 KiB in its handshake, and as much as it likes after that.
func TestHandshakeBound(t *testing.T) {
	for _, tt := range []struct {
		name string
		done func(c *records.Conn) // nil: it is not
		sent int
		want int
	}{
		{"as much as the bound", nil, records.HandshakeBytes, records.HandshakeBytes},
		{"more", nil, records.HandshakeBytes + 1, records.HandshakeBytes},
		{"more after it", (*records.Conn).Established, 3 * records.HandshakeBytes, 3 * records.HandshakeBytes},
		{"more after that of another implementation", (*records.Conn).Done, 3 * records.HandshakeBytes, 3 * records.HandshakeBytes},
	} {
		t.Run(tt.name, func(t *testing.T) {
			near, far := net.Pipe()
			defer near.Close()
			below := records.Below(near)
			if tt.done != nil {
				tt.done(below)
			}
			go func() {
				_, _ = far.Write(make([]byte, tt.sent))
				_ = far.Close()
			}()
			got, failed := 0, error(nil)
			for p := make([]byte, 1000); failed == nil; {
				var n int
				n, failed = below.Read(p)
				got += n
			}
			if full := tt.done == nil; got != tt.want || errors.Is(failed, io.EOF) == full {
				t.Errorf("Read() = %d bytes, %v want %d", got, failed, tt.want)
			}
		})
	}
}

// Without TLS there are no records to count.
func TestNoRecords(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	go func() {
		_, _ = far.Write([]byte("data"))
		_ = far.Close()
	}()
	var none *records.Conn
	none.Closing()
	p := make([]byte, 10)
	if n, useless, err := none.ReadAbove(near, p); string(p[:n]) != "data" || useless != 0 || err != nil {
		t.Errorf("ReadAbove() = %q, %d, %v", p[:n], useless, err)
	}
	if n, useless, err := none.ReadAbove(near, p); n != 0 || useless != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("ReadAbove() = %d, %d, %v want %v", n, useless, err, io.EOF)
	}
}

// buffer keeps what is written.
type buffer struct {
	net.Conn
	to *bytes.Buffer
}

func (b buffer) Write(p []byte) (int, error) { return b.to.Write(p) }

// An above is what is above TLS.
type above struct {
	below *records.Conn
	conn  net.Conn
}

func (a above) Read(p []byte) (int, error) {
	n, _, err := a.below.ReadAbove(a.conn, p)
	return n, err
}

func (a above) Close() error {
	a.below.Closing()
	return a.conn.Close()
}

// A connection whose peer reads nothing ends soon, also when an answer to a KeyUpdate waits to be sent.
func TestClosing(t *testing.T) {
	for _, tt := range []struct {
		name    string
		updates int
	}{
		{"idle", 0},
		{"an update of keys", 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			below, server, client := secured(t)
			below.Established()
			if err := client.CloseBesideUpdates(tt.updates, above{below, server}); err != nil {
				t.Error(err)
			}
		})
	}
}

// The socket's options are the raw connection's.
func TestSyscallConn(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	if _, err := records.Below(near).SyscallConn(); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("SyscallConn() = %v want %v", err, errors.ErrUnsupported)
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := new(net.Dialer).DialContext(context.WithoutCancel(t.Context()), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if raw, err := records.Below(conn).SyscallConn(); raw == nil || err != nil {
		t.Errorf("SyscallConn() = %v, %v", raw, err)
	}
	below := records.Below(conn)
	_ = below.SetReadDeadline(time.Now())
	if _, err := below.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read() = %v want %v", err, os.ErrDeadlineExceeded)
	}
}
