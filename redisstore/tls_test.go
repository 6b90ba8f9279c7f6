//go:build unix && !darwin

package redisstore_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/headgate-go/headgate/redisstore"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// An authority issues certificates.
type authority struct {
	template, issuer *x509.Certificate
	key              *ecdsa.PrivateKey
	file             string // its own certificate
}

// newAuthority returns an authority of its own.
func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{template: &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}}
	a.issuer = a.template
	a.key, a.file, _ = a.issue(t, a.template)
	return a
}

// issue makes a key and its certificate, and returns them and the files that have them.
func (a *authority) issue(t *testing.T, template *x509.Certificate) (key *ecdsa.PrivateKey, certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer := a.key
	if signer == nil { // its own
		signer = key
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, a.issuer, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for file, block := range map[string]*pem.Block{
		certFile: {Type: "CERTIFICATE", Bytes: cert},
		keyFile:  {Type: "PRIVATE KEY", Bytes: private},
	} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return key, certFile, keyFile
}

// listenTLS has a server listen at another port, over TLS, and returns the port.
func listenTLS(t *testing.T, server *redistest.Server) string {
	t.Helper()
	var port string
	eventually(t, "port that is free", func() bool { // another process may take it before the server does
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		_, port, _ = net.SplitHostPort(l.Addr().String())
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		_, err = server.Do("CONFIG", "SET", "tls-port", port)
		return err == nil
	})
	return port
}

// overTLS is the URL of a server that this test's process asks over TLS. Go reads the system's authorities once in a process.
const overTLS = "HEADGATE_TEST_TLS"

// A server with TLS is used over TLS. If the system does not know who has issued its certificate, the error says so.
func TestFleetTLS(t *testing.T) {
	if url := os.Getenv(overTLS); url != "" {
		store, err := redisstore.Open(t.Context(), url, redisstore.WithTimeout(patient))
		if err != nil {
			fmt.Printf("error: %v.\n", err)
			return
		}
		mustTake(t, store, budget(1), "u", 1)
		if err := store.Close(); err != nil {
			t.Fatal(err)
		}
		fmt.Println("taken.")
		return
	}
	t.Parallel()
	ours, another := newAuthority(t), newAuthority(t)
	_, cert, key := ours.issue(t, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "server"}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	})
	server := redistest.Start(t, redistest.Options{Args: []string{
		"--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", ours.file, "--tls-auth-clients", "no",
	}})
	port := listenTLS(t, server)
	for _, tt := range []struct {
		name, url, authorities, want string
	}{
		{"the right authority", "rediss://127.0.0.1:" + port, ours.file, "taken."},
		{"another authority", "rediss://127.0.0.1:" + port, another.file, "certificate signed by unknown authority"},
		{"another name", "rediss://localhost:" + port, ours.file, "certificate is not valid for any names"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			exe, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), exe, "-test.run=^TestFleetTLS$")
			cmd.Env = append(os.Environ(), overTLS+"="+tt.url, "SSL_CERT_FILE="+tt.authorities, "SSL_CERT_DIR="+t.TempDir())
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), tt.want) {
				t.Errorf("%v want %q:\n%s", err, tt.want, out)
			}
		})
	}
}
