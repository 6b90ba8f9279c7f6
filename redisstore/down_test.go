//go:build unix

package redisstore_test

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/redisstore"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// calls are all that a program may ever ask a store about the key of a number, one kind of call each.
func calls() map[string]func(ctx context.Context, s *redisstore.Store, number int) error {
	keyAt := func(number int) shared.Key { return keyOf("c", strconv.Itoa(number)) }
	rule := budget(1e9)
	return map[string]func(context.Context, *redisstore.Store, int) error{
		"Take": func(ctx context.Context, s *redisstore.Store, n int) error {
			return s.Take(ctx, []shared.Ask{{Key: keyAt(n), Rule: rule, Tokens: 1}}, make([]shared.Answer, 1))
		},
		"Return": func(ctx context.Context, s *redisstore.Store, n int) error {
			return s.Return(ctx, []shared.Return{{Key: keyAt(n), Rule: rule, Tokens: 1, Unused: true}}, make([]shared.Result, 1))
		},
		"Look": func(ctx context.Context, s *redisstore.Store, n int) error {
			_, err := s.Look(ctx, keyAt(n), rule)
			return err
		},
		"Reset": func(ctx context.Context, s *redisstore.Store, n int) error { return s.Reset(ctx, keyAt(n)) },
		"Draw": func(ctx context.Context, s *redisstore.Store, n int) error {
			_, err := s.Draw(ctx, &shared.Drawing{Key: keyAt(n), Rule: rule})
			return err
		},
		"Get": func(ctx context.Context, s *redisstore.Store, n int) error {
			_, err := s.Get(ctx, []shared.CacheKey{cacheKeyAt(n)})
			return err
		},
		"Set": func(ctx context.Context, s *redisstore.Store, n int) error {
			return s.Set(ctx, cacheKeyAt(n), []byte("v"), time.Hour)
		},
		"Delete": func(ctx context.Context, s *redisstore.Store, n int) error { return s.Delete(ctx, cacheKeyAt(n)) },
		"Move": func(ctx context.Context, s *redisstore.Store, n int) error {
			_, err := s.Move(ctx, keyAt(n), 0, nil)
			return err
		},
	}
}

func cacheKeyAt(number int) shared.CacheKey { return shared.CacheKey{Key: strconv.Itoa(number)} }

// downBound is the bound of stores whose server is going to be silent.
const downBound = 100 * time.Millisecond

// A store notices that a server is away, and that it is back, by whichever calls its program makes. Those to the other servers of a
// cluster are not refused meanwhile.
func TestFleetBackAgain(t *testing.T) {
	t.Parallel()
	const keys = 12 // each of three servers has some of them
	for name, call := range calls() {
		for where, start := range map[string]func(t *testing.T) (url string, one *redistest.Server){
			"alone": func(t *testing.T) (string, *redistest.Server) {
				t.Helper()
				server := redistest.Start(t, redistest.Options{})
				return server.URL(), server
			},
			"cluster": func(t *testing.T) (string, *redistest.Server) {
				t.Helper()
				cluster := redistest.StartCluster(t, redistest.Options{})
				return cluster.URL(), cluster.Servers[1]
			},
		} {
			t.Run(name+", "+where, func(t *testing.T) {
				t.Parallel()
				url, server := start(t)
				store := open(t, url, redisstore.WithTimeout(downBound))
				ask := func(key int) error { return call(t.Context(), store, key) }
				for key := range keys {
					eventually(t, "call that succeeds", func() bool { return ask(key) == nil })
				}
				server.Stop()
				eventually(t, "store that is down", func() bool {
					for key := range keys {
						_ = ask(key)
					}
					return store.Down()
				})
				refused := 0
				for key := range keys {
					if errors.Is(ask(key), shared.ErrDown) {
						refused++
					}
				}
				if refused == 0 || where == "cluster" && refused == keys {
					t.Errorf("calls about %d of %d keys are refused", refused, keys)
				}
				server.Continue()
				eventually(t, "store that is not down", func() bool { return !store.Down() })
				for key := range keys {
					eventually(t, "call that succeeds again", func() bool { return ask(key) == nil })
				}
			})
		}
	}
}

// Values at several servers of a cluster are asked for together. A server that is away costs those that it has, and no others.
func TestFleetGetFromSeveral(t *testing.T) {
	t.Parallel()
	cluster := redistest.StartCluster(t, redistest.Options{})
	store := open(t, cluster.URL(), redisstore.WithTimeout(downBound))
	of := map[*redistest.Server]shared.CacheKey{} // a key of each
	for i := 0; len(of) < len(cluster.Servers); i++ {
		k := cacheKeyAt(i)
		eventually(t, "value that is kept", func() bool { return store.Set(t.Context(), k, []byte("v"), time.Hour) == nil })
		for _, server := range cluster.Servers {
			if slices.ContainsFunc(keysOf(t, server), func(name string) bool { return strings.Contains(name, ":cache:") }) {
				of[server] = k
			}
			server.Text("FLUSHALL")
		}
	}
	away := cluster.Servers[1]
	here := cluster.Other(away)
	away.Stop()
	for name, keys := range map[string][]shared.CacheKey{"first": {of[away], of[here]}, "last": {of[here], of[away]}} {
		eventually(t, "store that is down, with the key of the server that is away "+name, func() bool {
			_, err := store.Get(t.Context(), keys)
			if err == nil {
				t.Error("values came from a server that is away")
			}
			return errors.Is(err, shared.ErrDown)
		})
	}
	if _, err := store.Get(t.Context(), []shared.CacheKey{of[away]}); !errors.Is(err, shared.ErrDown) {
		t.Errorf("Get from the server that is away = %v want %v", err, shared.ErrDown)
	}
	for range 10 {
		if _, err := store.Get(t.Context(), []shared.CacheKey{of[here]}); errors.Is(err, shared.ErrDown) {
			t.Errorf("Get from a server that answers = %v", err)
		}
	}
}
