// Package rawtls sends records of TLS 1.3 one by one, also those that crypto/tls does not send.
package rawtls

import (
	"bytes"
	"context"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"strings"
	"time"
)

// The types of records.
const (
	handshake = 22
	data      = 23
)

// A Conn appends records, and sends them. Read reads bytes of records as they are. It is not safe for concurrent use, but one
// goroutine may read.
type Conn struct {
	net.Conn
	secret []byte // of what it sends
	aead   cipher.AEAD
	iv     []byte
	number uint64 // of the next record
	out    bytes.Buffer
}

// ClientConfig trusts any server. All its connections use TLS 1.3.
func ClientConfig() *tls.Config {
	return &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}} //nolint:gosec // of tests
}

// ServerConfig has a certificate that it makes.
func ServerConfig() (*tls.Config, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	certificate, err := Certificate(private)
	if err != nil {
		return nil, err
	}
	return &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}}, nil
}

// Certificate makes a certificate of this machine that the key signs itself.
func Certificate(private crypto.Signer) (tls.Certificate, error) {
	of := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(24 * time.Hour), DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	signed, err := x509.CreateCertificate(rand.Reader, of, of, private.Public(), private)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{signed}, PrivateKey: private}, nil
}

// Client makes a handshake as a client with ClientConfig.
func Client(ctx context.Context, conn net.Conn) (*Conn, error) {
	return begin(ctx, conn, ClientConfig(), "CLIENT_TRAFFIC_SECRET_0", tls.Client)
}

// Server makes a handshake as a server.
func Server(ctx context.Context, conn net.Conn, config *tls.Config) (*Conn, error) {
	config = config.Clone()
	config.SessionTicketsDisabled = true // they would be records with the first key
	return begin(ctx, conn, config, "SERVER_TRAFFIC_SECRET_0", tls.Server)
}

func begin(ctx context.Context, conn net.Conn, config *tls.Config, secret string, side func(net.Conn, *tls.Config) *tls.Conn) (*Conn, error) {
	var log bytes.Buffer
	config.KeyLogWriter = &log
	secured := side(conn, config)
	if err := secured.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	c := &Conn{Conn: conn}
	for line := range strings.Lines(log.String()) {
		if words := strings.Fields(line); len(words) == 3 && words[0] == secret {
			c.secret, _ = hex.DecodeString(words[2])
		}
	}
	if suite := secured.ConnectionState().CipherSuite; suite != tls.TLS_AES_128_GCM_SHA256 || c.secret == nil {
		return nil, fmt.Errorf("rawtls: the suite is %s", tls.CipherSuiteName(suite))
	}
	return c, c.rekey()
}

// expand is HKDF-Expand-Label of RFC 8446.
func (c *Conn) expand(label string, length int) ([]byte, error) {
	label = "tls13 " + label
	info := binary.BigEndian.AppendUint16(nil, uint16(length))
	info = append(append(info, byte(len(label))), label...)
	return hkdf.Expand(sha256.New, c.secret, string(append(info, 0)), length)
}

// rekey makes the keys of the secret.
func (c *Conn) rekey() error {
	key, err := c.expand("key", 16)
	if err != nil {
		return err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return err
	}
	if c.aead, err = cipher.NewGCM(block); err != nil {
		return err
	}
	c.number = 0
	c.iv, err = c.expand("iv", c.aead.NonceSize())
	return err
}

// Data appends a record of data, which may be empty.
func (c *Conn) Data(p []byte) { c.record(data, p, 0) }

func (c *Conn) record(kind byte, p []byte, padding int) {
	nonce := bytes.Clone(c.iv)
	for i := range 8 {
		nonce[len(nonce)-8+i] ^= byte(c.number >> (56 - 8*i))
	}
	c.number++
	header := binary.BigEndian.AppendUint16([]byte{data, 3, 3}, uint16(len(p)+1+padding+c.aead.Overhead()))
	c.out.Write(c.aead.Seal(header, nonce, append(append(bytes.Clone(p), kind), make([]byte, padding)...), header))
}

// UpdateKey appends a KeyUpdate that asks the peer for another, and changes the key. The record is padded, so that buffers do not
// hold thousands: making one costs as much as reading it.
func (c *Conn) UpdateKey() error {
	c.record(handshake, []byte{24, 0, 0, 1, 1}, 250)
	secret, err := c.expand("traffic upd", sha256.Size)
	if err != nil {
		return err
	}
	c.secret = secret
	return c.rekey()
}

// CloseBesideUpdates closes the other end of the connection while it reads, and the answers to so many KeyUpdates wait to be sent. The
// error says what went wrong. Close of crypto/tls would wait for 5 s, or for ever.
func (c *Conn) CloseBesideUpdates(updates int, end io.ReadCloser) error {
	read := make(chan error, 1)
	go func() {
		_, err := end.Read(make([]byte, 100))
		read <- err
	}()
	for range updates {
		if err := c.UpdateKey(); err != nil {
			return err
		}
	}
	if err := c.Flush(); err != nil { // one read of the other end takes all
		return err
	}
	if updates > 0 { // the answer begins
		if _, err := c.Read(make([]byte, 1)); err != nil {
			return err
		}
	}
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		_ = end.Close() // an alert is not sent
	}()
	var err error
	select {
	case <-closed:
	case <-time.After(3 * time.Second):
		err = errors.New("rawtls: Close waits")
		_ = c.Close()
		<-closed
	}
	if <-read == nil {
		err = errors.Join(err, errors.New("rawtls: there are data"))
	}
	return err
}

// Flush sends what was appended.
func (c *Conn) Flush() error {
	defer c.out.Reset()
	_, err := c.Conn.Write(c.out.Bytes())
	return err
}
