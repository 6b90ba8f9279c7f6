package redisstore_test

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/rueidis"

	"github.com/headgate-go/headgate/redisstore"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// startServer starts a redis-server for the test, and returns its address. Args are further directives.
func startServer(tb testing.TB, args ...string) string {
	tb.Helper()
	return redistest.Start(tb, redistest.Options{Args: args}).Addr()
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

// infoNumber returns a number of INFO.
func infoNumber(tb testing.TB, info, name string) int64 {
	tb.Helper()
	for line := range strings.Lines(info) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), name+":"); ok {
			n, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				tb.Fatal(err)
			}
			return n
		}
	}
	tb.Fatalf("INFO has no %s", name)
	return 0
}

// ran returns how often the server ran a command.
func ran(t *testing.T, server *redistest.Server, command string) int64 {
	t.Helper()
	_, after, found := strings.Cut(server.Info("cmdstat_"+command), "calls=")
	if !found {
		return 0
	}
	number, _, _ := strings.Cut(after, ",")
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func userName(i int) string { return "user-" + strconv.Itoa(i) }
