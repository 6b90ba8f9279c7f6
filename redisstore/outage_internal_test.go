package redisstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
)

// The store logs an outage once, and its end. It logs outages at most once a minute, and one that lasts until then all the same.
func TestOutageLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		s := &Store{
			timeout: 50 * time.Millisecond, epoch: time.Now(), ctx: t.Context(), kicked: make(chan struct{}, 1),
			logger: slog.New(slog.NewTextHandler(&log, nil)),
		}
		one, other := s.newShard("a"), s.newShard("b")
		wait := func(d time.Duration) { <-time.After(d) }
		fails := func(sh *shard) {
			for range gateFailures {
				sent := time.Now()
				wait(s.timeout)
				_ = s.evidence(sh, context.DeadlineExceeded, sent)
			}
		}
		for _, step := range []struct {
			name          string
			do            func()
			begins, again int // lines so far
		}{
			{"an answer", func() { _ = s.evidence(one, nil, time.Now()) }, 0, 0},
			{"an outage", func() { fails(one) }, 1, 0},
			{"it goes on for long", func() { wait(time.Hour); fails(one) }, 1, 0},
			{"it ends", func() { _ = s.evidence(one, nil, time.Now()) }, 1, 1},
			{"an outage after more than a minute", func() { wait(time.Minute); fails(one) }, 2, 1},
			{"it ends too", func() { _ = s.evidence(one, nil, time.Now()) }, 2, 2},
			{"short outages", func() {
				for range 10 {
					fails(one)
					fails(other)
					_ = s.evidence(one, nil, time.Now())
					_ = s.evidence(other, nil, time.Now())
				}
			}, 2, 2},
			{"one that lasts", func() { fails(other); wait(time.Minute); fails(other) }, 3, 2},
			{"the other shard answers", func() { _ = s.evidence(one, nil, time.Now()) }, 3, 2},
			{"the last ends", func() { _ = s.evidence(other, nil, time.Now()) }, 3, 3},
		} {
			step.do()
			begins, again := strings.Count(log.String(), "does not answer"), strings.Count(log.String(), "answers again")
			if begins != step.begins || again != step.again {
				t.Errorf("%s: %d lines that it does not answer, and %d that it does want %d and %d", step.name, begins, again, step.begins, step.again)
			}
		}
	})
}

// openFake opens a store at a server that is honest until it is to answer otherwise.
func openFake(t *testing.T, bound time.Duration) (*fakeServer, *Store) {
	t.Helper()
	server := startFake(t)
	s, err := Open(t.Context(), server.urls()["alone"], WithTimeout(bound))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return server, s
}

// A server that answers, and runs no script, is down until it runs scripts.
func TestOutageWithoutScripts(t *testing.T) {
	for name, reply := range map[string]string{"list": "*0\r\n", "number": ":-1\r\n", "map": "%1\r\n$1\r\na\r\n:1\r\n", "text": "$3\r\nabc\r\n"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server, s := openFake(t, time.Second/10)
			var scripts atomic.Int64
			server.answer(func(args []string) string {
				if strings.HasPrefix(args[0], "EVAL") {
					scripts.Add(1)
					return reply
				}
				return server.honest(args)
			})
			await(t, func() bool {
				if err := takeOne(t.Context(), s); !errors.Is(err, errReply) && !errors.Is(err, shared.ErrDown) && !errors.Is(err, errTimeout) {
					t.Fatalf("Take = %v want %v", err, errReply)
				}
				return s.Down()
			})
			asked := scripts.Load()
			await(t, func() bool {
				if !s.Down() {
					t.Fatal("the store is not down although the server runs no script")
				}
				return scripts.Load() >= asked+3 // the leases too are renewed by a script
			})
			server.answer(server.honest)
			await(t, func() bool { return !s.Down() })
		})
	}
}

// Whichever calls get answers without sense, the server counts as down, and callers get the error for that.
func TestOutageBySenselessAnswers(t *testing.T) {
	k := shared.CacheKey{Key: "k"}
	for name, call := range map[string]func(ctx context.Context, s *Store) error{
		"Take": takeOne,
		"Return": func(ctx context.Context, s *Store) error {
			return s.Return(ctx, []shared.Return{{Key: one.Key, Rule: one.Rule, Tokens: 1, Unused: true}}, make([]shared.Result, 1))
		},
		"Look":  func(ctx context.Context, s *Store) error { _, err := s.Look(ctx, one.Key, one.Rule); return err },
		"Reset": func(ctx context.Context, s *Store) error { return s.Reset(ctx, one.Key) },
		"Draw": func(ctx context.Context, s *Store) error {
			_, err := s.Draw(ctx, &shared.Drawing{Key: one.Key, Rule: one.Rule})
			return err
		},
		"Get":    func(ctx context.Context, s *Store) error { _, err := s.Get(ctx, []shared.CacheKey{k}); return err },
		"Set":    func(ctx context.Context, s *Store) error { return s.Set(ctx, k, []byte("v"), time.Hour) },
		"Delete": func(ctx context.Context, s *Store) error { return s.Delete(ctx, k) },
		"Move":   func(ctx context.Context, s *Store) error { _, err := s.Move(ctx, one.Key, 0, nil); return err },
	} {
		for kind, reply := range map[string]string{"a list": "*0\r\n", "a map": "%1\r\n+a\r\n:1\r\n"} {
			t.Run(name+", "+kind, func(t *testing.T) {
				t.Parallel()
				server, s := openFake(t, time.Second/10)
				server.answer(func([]string) string { return reply })
				senseless := 0
				await(t, func() bool {
					err := call(t.Context(), s)
					if err == nil {
						t.Fatal("the call succeeded")
					}
					if errors.Is(err, errReply) {
						senseless++
					}
					return s.Down()
				})
				if senseless == 0 {
					t.Errorf("no call failed with %v", errReply)
				}
			})
		}
	}
}

// A value that could not be read is not stored.
func TestSetOfLargeValue(t *testing.T) {
	server, s := openFake(t, 30*time.Second)
	k := shared.CacheKey{Key: "k"}
	if err := s.Set(t.Context(), k, make([]byte, maxCached+1), time.Hour); !errors.Is(err, errValue) {
		t.Errorf("Set of a value that is too large = %v want %v", err, errValue)
	}
	if err := s.Set(t.Context(), k, make([]byte, 1<<20), time.Hour); err != nil {
		t.Errorf("Set of a large value = %v", err)
	}
	server.answer(func(args []string) string {
		if args[0] == "GET" {
			return fmt.Sprintf("$%d\r\n%s\r\n", maxCached, strings.Repeat("a", maxCached))
		}
		return server.honest(args)
	})
	if values, err := s.Get(t.Context(), []shared.CacheKey{k}); err != nil || len(values[0]) != maxCached {
		t.Errorf("Get of the largest value = %v", err)
	}
}
