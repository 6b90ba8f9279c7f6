package redisstore_test

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/headgate-go/headgate/redisstore"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

func TestFleetOpen(t *testing.T) {
	for _, tt := range []struct {
		name       string
		server     []string
		logs, lack string
	}{
		{"keeps nothing", nil, "append-only", "evicts"},
		{"append-only", []string{"--appendonly", "yes"}, "", "append-only"},
		{"evicts", []string{"--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"}, "noeviction", ""},
		{"would evict, if its memory had a limit", []string{"--maxmemory-policy", "allkeys-lru"}, "noeviction", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			address := startServer(t, tt.server...)
			var logs bytes.Buffer
			s, err := redisstore.Open(t.Context(), "redis://"+address, redisstore.WithLogger(slog.New(slog.NewTextHandler(&logs, nil))))
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			if got := logs.String(); !strings.Contains(got, tt.logs) || tt.lack != "" && strings.Contains(got, tt.lack) {
				t.Errorf("logs:\n%swant %q, and not %q", got, tt.logs, tt.lack)
			}
		})
	}
}

func TestFleetOpenFails(t *testing.T) {
	for _, tt := range []struct {
		name   string
		server redistest.Options
		acl    []string
		user   string
		want   string
	}{
		{"wrong password", redistest.Options{Password: "right"}, nil, "user:s3cret@", "WRONGPASS"},
		{"scripts refused", redistest.Options{}, []string{"ACL", "SETUSER", "default", "-eval", "-evalsha"}, "", "scripts"},
		{"time refused", redistest.Options{}, []string{"ACL", "SETUSER", "default", "-time"}, "", "scripts"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			address := redistest.Start(t, tt.server).Addr()
			if tt.acl != nil {
				do(t, newClient(t, address), tt.acl...)
			}
			s, err := redisstore.Open(t.Context(), "redis://"+tt.user+address)
			if err == nil {
				_ = s.Close()
				t.Fatal("no error")
			}
			if text := err.Error(); !strings.Contains(text, tt.want) || strings.Contains(text, "s3cret") {
				t.Errorf("error = %v want %q, without the password", err, tt.want)
			}
		})
	}
}

// A server may refuse to tell about itself, as managed ones do. Then it is not known what it does, and it is used all the same.
func TestFleetOpenWithoutInfo(t *testing.T) {
	address := startServer(t)
	do(t, newClient(t, address), "ACL", "SETUSER", "default", "-info", "-config")
	var logs bytes.Buffer
	s, err := redisstore.Open(t.Context(), "redis://"+address, redisstore.WithLogger(slog.New(slog.NewTextHandler(&logs, nil))))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if got := logs.String(); !strings.Contains(got, "not known") || strings.Contains(got, "WARN") {
		t.Errorf("logs:\n%swant that it is not known, and no warning", got)
	}
}

// A server that nobody listens at is an error, and leaves nothing behind.
func TestFleetOpenUnreachable(t *testing.T) {
	if s, err := redisstore.Open(t.Context(), "redis://127.0.0.1:1"); err == nil {
		_ = s.Close()
		t.Error("no error")
	}
}

// If its context's deadline ends Open, its error is a timeout to net, net/http and os.
func TestOpenReturnsTimeouts(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0") // it accepts connections, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	for name, timeout := range map[string]time.Duration{"passed": -1, "passes": 50 * time.Millisecond} {
		for _, target := range []string{"redis://%s", "redis://%s?cluster=true", "redis+sentinel://%s/primary"} {
			t.Run(name+"/"+target, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), timeout)
				defer cancel()
				_, err := redisstore.Open(ctx, strings.ReplaceAll(target, "%s", silent.Addr().String()))
				if err == nil || !os.IsTimeout(err) || !(&url.Error{Err: err}).Timeout() {
					t.Errorf("%v is no timeout", err)
				}
			})
		}
	}
}

func TestFleetOptions(t *testing.T) {
	client := newClient(t, startServer(t))
	for _, tt := range []struct {
		name   string
		option redisstore.Option
	}{
		{"WithNamespace", redisstore.WithNamespace("")},
		{"WithNamespace", redisstore.WithNamespace("a{b")},
		{"WithTimeout", redisstore.WithTimeout(0)},
		{"WithLease", redisstore.WithLease(1)},
		{"WithLogger", redisstore.WithLogger(nil)},
	} {
		if s, err := redisstore.New(client, tt.option); err == nil {
			_ = s.Close()
			t.Errorf("New(%s) = no error", tt.name)
		} else if !strings.Contains(err.Error(), tt.name) {
			t.Errorf("New(%s) = %v want one that names it", tt.name, err)
		}
	}
}
