package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/headgate-go/headgate/internal/records"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/internal/testing/rawtls"
)

// rawServer has paced credentials for TLS.
func rawServer(t *testing.T, edit func(config *tls.Config)) *pacedCredentials {
	t.Helper()
	config, err := rawtls.ServerConfig()
	if err != nil {
		t.Fatal(err)
	}
	if edit != nil {
		edit(config)
	}
	p := new(pacer)
	p.finds.Store(true)
	return newPacedCredentials(credentials.NewTLS(config), p)
}

// rawConn is a connection whose client sends records one by one.
func rawConn(t *testing.T, creds *pacedCredentials) (*pacedConn, *rawtls.Conn) {
	t.Helper()
	near, far := net.Pipe()
	t.Cleanup(func() { _ = near.Close(); _ = far.Close() })
	served := make(chan net.Conn, 1)
	go func() {
		conn, _, _ := creds.ServerHandshake(near)
		served <- conn
	}()
	client, err := rawtls.Client(t.Context(), far)
	if err != nil {
		t.Fatal(err)
	}
	conn, ok := (<-served).(*pacedConn)
	if !ok {
		t.Fatal("there is no connection")
	}
	return conn, client
}

// Records that bring no data are read as slowly as frames that no call needs. A connection that sends them for long ends.
func TestUselessRecordsWait(t *testing.T) {
	priority := frame(2, 5)
	for _, tt := range []struct {
		name    string
		append  func(c *rawtls.Conn) error
		records int // for each frame
		most    int // records a second
	}{
		{"updates of keys", (*rawtls.Conn).UpdateKey, 16, unitsPerSecond / recordUnits},
		{"one update of keys", (*rawtls.Conn).UpdateKey, 1, unitsPerSecond / recordUnits},
		{"empty records", func(c *rawtls.Conn) error {
			c.Data(nil)
			return nil
		}, 16, unitsPerSecond / recordUnits},
		{"frames in records of their own", func(*rawtls.Conn) error { return nil }, 1, unitsPerSecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			creds := rawServer(t, nil)
			synctest.Test(t, func(t *testing.T) {
				conn, client := rawConn(t, creds)
				defer conn.Close()
				var sent atomic.Int64
				go func() { _, _ = io.Copy(io.Discard, client.Conn) }()
				go func() {
					for {
						for range tt.records {
							if tt.append(client) != nil {
								return
							}
						}
						client.Data(priority)
						if client.Flush() != nil {
							return
						}
						sent.Add(int64(tt.records))
					}
				}()
				begin := time.Now()
				p := make([]byte, 32<<10)
				var err error
				for err == nil && time.Since(begin) < 5*time.Second {
					_, err = conn.Read(p)
				}
				if took := time.Since(begin); !errors.Is(err, errBehind) || took < behindFor || took > behindFor+longestWait {
					t.Errorf("the connection ends after %v: %v want %v", took, err, errBehind)
				}
				seconds := int64(time.Since(begin) / time.Second)
				if most := int64(tt.most)*(seconds+1) + 1000; sent.Load() > most {
					t.Errorf("%d records want at most %d in %d s", sent.Load(), most, seconds)
				}
			})
		})
	}
}

// A client's calls do not wait, however they are spread over records. Each call has its own record, or each of its frames.
func TestRecordsOfCallsDoNotWait(t *testing.T) {
	frames := [][]byte{frame(1, 60), frame(0, 40), frame(8, 4), frame(8, 4), frame(6, 8)}
	for _, whole := range []bool{true, false} {
		creds := rawServer(t, nil)
		synctest.Test(t, func(t *testing.T) {
			conn, client := rawConn(t, creds)
			defer conn.Close()
			calls, bytes := race.Pick(500, 5000), 0
			for _, f := range frames {
				bytes += len(f)
			}
			go func() {
				client.Data(make([]byte, 24))
				for range calls {
					var all []byte
					for _, f := range frames {
						if all = append(all, f...); !whole {
							client.Data(f)
						}
					}
					if whole {
						client.Data(all)
					}
					if client.Flush() != nil {
						return
					}
				}
			}()
			begin, got := time.Now(), -24
			for p, handled := make([]byte, 32<<10), 0; got < calls*bytes; {
				n, err := conn.Read(p)
				if err != nil {
					t.Fatal(err)
				}
				for got += n; handled < (got+bytes-1)/bytes; handled++ {
					conn.opened().see()
					conn.opened().admit(600)
				}
			}
			if took := time.Since(begin); took > 0 {
				t.Errorf("%d calls waited for %v", calls, took)
			}
		})
	}
}

// Few handshakes compute at a time, and all have their turn. One that waits for something else, or for its peer, keeps none from theirs.
func TestHandshakesTakeTurns(t *testing.T) {
	const clients = 20
	for _, tt := range []struct {
		name    string
		compute time.Duration // of the application's callback
		silent  int           // peers that say nothing
		most    time.Duration // until all are done
	}{
		{"short", time.Millisecond, 0, clients*time.Millisecond + longestTurn},
		{"long", time.Second, 0, time.Second + clients*turnAfter(2<<10)},
		{"beside silent peers", time.Millisecond, 100, clients*time.Millisecond + longestTurn},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var now, most atomic.Int64
			creds := rawServer(t, func(config *tls.Config) {
				certificate := config.Certificates[0]
				config.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
					if n := now.Add(1); n > most.Load() {
						most.Store(n)
					}
					defer now.Add(-1)
					<-time.After(tt.compute)
					return &certificate, nil
				}
				config.Certificates = nil
			})
			synctest.Test(t, func(t *testing.T) {
				creds := &pacedCredentials{creds.TransportCredentials, false, creds.pacer, newTurns()} // the bubble's own channel
				var handshakes, silent sync.WaitGroup
				for range tt.silent {
					near, far := net.Pipe()
					defer far.Close()
					silent.Go(func() { _, _, _ = creds.ServerHandshake(near) })
				}
				synctest.Wait()
				begin := time.Now()
				for range clients {
					near, far := net.Pipe()
					defer far.Close()
					handshakes.Go(func() {
						conn, _, err := creds.Clone().ServerHandshake(near)
						if err != nil {
							t.Error(err)
							return
						}
						_ = conn.Close()
					})
					handshakes.Go(func() {
						if _, err := rawtls.Client(context.WithoutCancel(t.Context()), far); err != nil {
							t.Error(err)
						}
					})
				}
				handshakes.Wait()
				if took := time.Since(begin); took > tt.most {
					t.Errorf("%d handshakes took %v want at most %v", clients, took, tt.most)
				}
				if half := int64(max(1, runtime.GOMAXPROCS(0)/2)); tt.compute < longestTurn && most.Load() > half {
					t.Errorf("%d handshakes computed at a time want at most %d", most.Load(), half)
				}
				if n := len(creds.turns); n > 0 {
					t.Errorf("%d turns are left", n)
				}
			})
		})
	}
}

// A turn lasts the longer, the more the peer has sent.
func TestTurnsGrow(t *testing.T) {
	for _, tt := range []struct {
		name   string
		pieces []int
		want   time.Duration
	}{
		{"a byte", []int{1}, longestTurn + turnOfKiB/1024},
		{"1 KiB", []int{1024}, 70 * time.Millisecond},
		{"5 KiB in pieces", []int{1024, 1024, 3072}, 270 * time.Millisecond},
		{"more than ever takes longer", []int{30 << 10}, time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				near, far := net.Pipe()
				defer near.Close()
				defer far.Close()
				h := &handshakeConn{Conn: records.Below(near), turns: make(chan struct{}, 1), until: time.Now().Add(handshakeTimeout)}
				h.timer = time.AfterFunc(time.Hour, h.endTurn)
				go func() {
					for _, n := range tt.pieces {
						_, _ = far.Write(make([]byte, n))
					}
				}()
				for range tt.pieces {
					if _, err := h.Read(make([]byte, 32<<10)); err != nil {
						t.Fatal(err)
					}
				}
				begin := time.Now()
				h.turns <- struct{}{} // of another handshake
				if took := time.Since(begin); took != tt.want {
					t.Errorf("the turn lasts %v want %v", took, tt.want)
				}
			})
		})
	}
}

// A client can send the certificates that clients have, and no more of them than some.
func TestCertificatesOfClients(t *testing.T) {
	creds := rawServer(t, func(config *tls.Config) { config.ClientAuth = tls.RequireAnyClientCert })
	for _, tt := range []struct {
		name    string
		issuers int
		bits    int
		ok      bool
	}{
		{"five of 4096 bits", 4, 4096, true},
		{"ten of 8192 bits", 9, 8192, true},
		{"a hundred of 8192 bits", 99, 8192, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			certificate, err := rawtls.Certificate(private)
			if err != nil {
				t.Fatal(err)
			}
			issuers, err := rawtls.Issuers("issuer", tt.issuers, tt.bits)
			if err != nil {
				t.Fatal(err)
			}
			certificate.Certificate = append(certificate.Certificate, issuers...)
			near, far := net.Pipe()
			defer near.Close()
			config := rawtls.ClientConfig()
			config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &certificate, nil }
			var client sync.WaitGroup
			defer client.Wait()
			defer far.Close()
			client.Go(func() {
				if tls.Client(far, config).HandshakeContext(context.WithoutCancel(t.Context())) == nil {
					_, _ = io.Copy(io.Discard, far)
				}
			})
			conn, _, err := creds.ServerHandshake(near)
			if (err == nil) != tt.ok {
				t.Errorf("ServerHandshake() = %v", err)
			}
			if err == nil {
				_ = far.Close()
				_ = conn.Close()
			}
		})
	}
}

// A handshake that writes does not wait for a turn, and gives back the one it has.
func TestHandshakesWriteWithoutTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer near.Close()
		defer far.Close()
		h := &handshakeConn{Conn: records.Below(near), turns: make(chan struct{}, 1), has: true}
		h.turns <- struct{}{}
		go func() {
			_, _ = io.ReadFull(far, make([]byte, 2))
			h.turns <- struct{}{} // of another handshake
			_, _ = io.ReadFull(far, make([]byte, 2))
		}()
		for range 2 {
			if _, err := h.Write(make([]byte, 2)); err != nil {
				t.Error(err)
			}
			synctest.Wait()
		}
		if h.has || len(h.turns) != 1 {
			t.Errorf("the handshake has a turn: %t. %d turns are taken want 1", h.has, len(h.turns))
		}
	})
}

// A handshake that has waited for too long ends, and so does one whose peer goes away.
func TestHandshakesEnd(t *testing.T) {
	creds := rawServer(t, nil)
	for _, tt := range []struct {
		name string
		wait time.Duration
	}{
		{"too late", handshakeTimeout + time.Second},
		{"soon", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				creds := &pacedCredentials{creds.TransportCredentials, false, creds.pacer, make(chan struct{}, 1)}
				creds.turns <- struct{}{}
				near, far := net.Pipe()
				defer far.Close()
				ended := make(chan error, 1)
				go func() {
					_, _, err := creds.ServerHandshake(near)
					ended <- err
				}()
				go func() {
					_, _ = rawtls.Client(context.WithoutCancel(t.Context()), far)
				}()
				<-time.After(tt.wait)
				<-creds.turns
				if err := <-ended; (err == nil) != (tt.wait == 0) {
					t.Errorf("ServerHandshake() = %v", err)
				}
				if n := len(creds.turns); n > 0 {
					t.Errorf("%d turns are left", n)
				}
			})
		})
	}
}

// An ended connection is closed by its outbox.
type ended struct{ *pacedConn }

func (e ended) Close() error {
	e.outbox.end()
	return nil
}

// An outbox ends a connection whose listener has TLS of its own, also while the answer to a KeyUpdate waits to be sent.
func TestConnectionsOfTLSListenersEnd(t *testing.T) {
	config, err := rawtls.ServerConfig()
	if err != nil {
		t.Fatal(err)
	}
	near, far := net.Pipe()
	defer far.Close()
	server := tls.Server(near, config)
	conn := newPacedConn(server, server, new(pacer))
	defer conn.Close()
	handshake := make(chan error, 1)
	go func() { handshake <- server.Handshake() }()
	client, err := rawtls.Client(t.Context(), far)
	if err != nil {
		t.Fatal(err)
	}
	if err := <-handshake; err != nil {
		t.Fatal(err)
	}
	if err := client.CloseBesideUpdates(1, ended{conn}); err != nil {
		t.Error(err)
	}
}

// nameless are credentials of the application's own. They get the connection as it is.
type nameless struct {
	credentials.TransportCredentials
	got net.Conn
}

func (n *nameless) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "own"}
}

func (n *nameless) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	n.got = raw
	return raw, nil, nil
}

// foreignTLS are credentials of the application's own with the name of gRPC's.
type foreignTLS struct{ nameless }

func (*foreignTLS) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: records.SecurityTLS}
}

// The bound of what a peer sends in its handshake ends with the handshake, also that of another implementation.
func TestConnectionsHaveNoBoundOfHandshakes(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	own := new(foreignTLS)
	if _, _, err := newPacedCredentials(own, new(pacer)).ServerHandshake(near); err != nil {
		t.Fatal(err)
	}
	const sent = 2 * records.HandshakeBytes
	go func() {
		_, _ = far.Write(make([]byte, sent))
		_ = far.Close()
	}()
	if n, err := io.Copy(io.Discard, own.got); n != sent || err != nil {
		t.Errorf("the connection brings %d bytes, %v want %d", n, err, sent)
	}
}

// A connection below credentials that may not be TLS is the one that the listener made.
func TestOtherCredentialsGetTheConnection(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	own := new(nameless)
	if _, _, err := newPacedCredentials(own, new(pacer)).ServerHandshake(near); err != nil || own.got != near {
		t.Errorf("the credentials got %T, %v", own.got, err)
	}
}
