package flowctl

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc/credentials"

	"github.com/headgate-go/headgate/internal/records"
	"github.com/headgate-go/headgate/internal/testing/rawtls"
)

// dialRaw is a connection with TLS to an agent that sends records one by one.
func dialRaw(t *testing.T) (*connection, *rawtls.Conn) {
	t.Helper()
	config, err := rawtls.ServerConfig()
	if err != nil {
		t.Fatal(err)
	}
	near, far := net.Pipe()
	t.Cleanup(func() { _ = near.Close(); _ = far.Close() })
	type served struct {
		agent *rawtls.Conn
		err   error
	}
	serving := make(chan served, 1)
	go func() {
		agent, err := rawtls.Server(context.WithoutCancel(t.Context()), far, config)
		serving <- served{agent, err}
	}()
	creds := &trackedCredentials{credentials.NewTLS(rawtls.ClientConfig()), newConnections(new(atomic.Uint64))}
	conn, _, err := creds.ClientHandshake(t.Context(), "localhost", near)
	if err != nil {
		t.Fatal(err)
	}
	s := <-serving
	if s.err != nil {
		t.Fatal(s.err)
	}
	c, ok := conn.(*connection)
	if !ok {
		t.Fatalf("the connection is %T", conn)
	}
	return c, s.agent
}

// A connection that brings records without data ends soon. One that brings data does not, however small its records are.
func TestUselessRecords(t *testing.T) {
	const most = 20_000 // records
	for _, tt := range []struct {
		name   string
		append func(c *rawtls.Conn) error
		want   error
	}{
		{"updates of keys", (*rawtls.Conn).UpdateKey, errFlood},
		{"empty records", func(c *rawtls.Conn) error {
			c.Data(nil)
			return nil
		}, errFlood},
		{"data", func(c *rawtls.Conn) error {
			c.Data([]byte{0})
			return nil
		}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, agent := dialRaw(t)
				defer c.Close()
				var sent atomic.Int64
				go func() { _, _ = io.Copy(io.Discard, agent.Conn) }()
				go func() {
					defer agent.Close()
					agent.Data([]byte{0x10, 0, 0, 0xee, 0, 0, 0, 0, 0}) // one long frame
					for sent.Load() < most {
						for range 16 {
							if tt.append(agent) != nil {
								return
							}
						}
						agent.Data([]byte{0})
						if agent.Flush() != nil {
							return
						}
						sent.Add(16)
					}
				}()
				p := make([]byte, 32<<10)
				var err error
				for err == nil {
					_, err = c.Read(p)
				}
				if !errors.Is(err, cmp.Or(tt.want, io.EOF)) || tt.want != nil && sent.Load() > 2*frameCredit/framesOfRecord {
					t.Errorf("Read() = %v after %d records want %v", err, sent.Load(), tt.want)
				}
			})
		})
	}
}

// A connection whose agent reads nothing ends soon, also when the answer to a KeyUpdate cannot be sent.
func TestCloseBesideUpdatesOfKeys(t *testing.T) {
	c, agent := dialRaw(t)
	if err := agent.CloseBesideUpdates(1, c); err != nil {
		t.Error(err)
	}
}

// own are credentials of the application's that are not known to be TLS.
type own struct {
	credentials.TransportCredentials
	got net.Conn
}

func (o *own) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "own"}
}

func (o *own) ClientHandshake(_ context.Context, _ string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	o.got = raw
	return raw, nil, nil
}

// Credentials that may not be TLS get the connection that was dialled.
func TestOtherCredentialsGetTheConnection(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	creds := new(own)
	if _, _, err := (&trackedCredentials{creds, newConnections(new(atomic.Uint64))}).ClientHandshake(t.Context(), "", near); err != nil || creds.got != near {
		t.Errorf("the credentials got %T, %v", creds.got, err)
	}
}

// ownTLS are credentials of the application's with the name of gRPC's.
type ownTLS struct{ own }

func (*ownTLS) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: records.SecurityTLS}
}

// The bound of what an agent sends in its handshake ends with the handshake, also that of another implementation.
func TestConnectionsHaveNoBoundOfHandshakes(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	creds := new(ownTLS)
	if _, _, err := (&trackedCredentials{creds, newConnections(new(atomic.Uint64))}).ClientHandshake(t.Context(), "", near); err != nil {
		t.Fatal(err)
	}
	const sent = 2 * records.HandshakeBytes
	go func() {
		_, _ = far.Write(make([]byte, sent))
		_ = far.Close()
	}()
	if n, err := io.Copy(io.Discard, creds.got); n != sent || err != nil {
		t.Errorf("the connection brings %d bytes, %v want %d", n, err, sent)
	}
}
