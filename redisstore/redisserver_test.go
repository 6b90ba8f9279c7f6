package redisstore_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/redis/rueidis"

	"github.com/headgate-go/headgate/redisstore"
)

// startServer starts a redis-server for the test, and returns its address. Args are those of the server.
func startServer(tb testing.TB, args ...string) string {
	tb.Helper()
	path, err := exec.LookPath("redis-server")
	if err != nil {
		if os.Getenv("HEADGATE_TEST_REDIS") == "required" {
			tb.Fatal("HEADGATE_TEST_REDIS is required, and there is no redis-server")
		}
		tb.Skip("no redis-server is installed: nothing was tested")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // it only finds a port
	if err != nil {
		tb.Fatal(err)
	}
	address := l.Addr().String()
	_, port, _ := net.SplitHostPort(address)
	_ = l.Close()
	args = append([]string{"--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", tb.TempDir()}, args...)
	server := exec.Command(path, args...) //nolint:noctx // it ends with the test
	if err := server.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		_ = server.Process.Kill()
		_ = server.Wait()
	})
	for deadline := time.Now().Add(10 * time.Second); ; {
		conn, err := net.DialTimeout("tcp", address, time.Second) //nolint:noctx // it is bounded
		if err == nil {
			_ = conn.Close()
			return address
		}
		if time.Now().After(deadline) {
			tb.Fatalf("redis-server does not listen: %v", err)
		}
		<-time.After(5 * time.Millisecond)
	}
}

// newClient returns a client of the server.
func newClient(tb testing.TB, address string) rueidis.Client {
	tb.Helper()
	client, err := rueidis.NewClient(rueidis.ClientOption{
		InitAddress: []string{address}, ForceSingleClient: true, DisableCache: true, AlwaysPipelining: true, DisableRetry: true,
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(client.Close)
	return client
}

// newStore returns a store in a namespace of its own.
func newStore(tb testing.TB, client rueidis.Client, opts ...redisstore.Option) *redisstore.Store {
	tb.Helper()
	opts = append([]redisstore.Option{redisstore.WithNamespace(tb.Name()), redisstore.WithTimeout(5 * time.Second)}, opts...)
	s, err := redisstore.New(client, opts...)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = s.Close() })
	return s
}

// do runs a command.
func do(tb testing.TB, client rueidis.Client, command ...string) string {
	tb.Helper()
	r := client.Do(context.Background(), client.B().Arbitrary(command...).Build())
	if err := r.Error(); err != nil && !rueidis.IsRedisNil(err) {
		tb.Fatalf("%s: %v", command[0], err)
	}
	value, err := r.ToAny()
	if err != nil {
		return ""
	}
	return fmt.Sprint(value)
}
