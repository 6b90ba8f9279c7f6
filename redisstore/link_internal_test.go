package redisstore

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// openLinked opens a store whose connection has been used.
func openLinked(t *testing.T, url string, opts ...Option) *Store {
	t.Helper()
	s, err := Open(t.Context(), url, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	await(t, func() bool { return takeOne(t.Context(), s) == nil })
	return s
}

// await waits for a condition.
func await(t *testing.T, condition func() bool) {
	t.Helper()
	for begin := time.Now(); !condition(); <-time.After(time.Millisecond) {
		if time.Since(begin) > 30*time.Second {
			t.Fatal("it does not come to that")
		}
	}
}

// one asks for a token of a key that has many.
var one = shared.Ask{
	Key:    shared.Key{Policy: "policy", Component: "0"},
	Rule:   &shared.Rule{Kind: shared.Bucket, Capacity: 1e6, Interval: time.Hour},
	Tokens: 1,
}

func takeOne(ctx context.Context, s *Store) error {
	return s.Take(ctx, []shared.Ask{one}, make([]shared.Answer, 1))
}

// running returns how many send for a lane.
func running(l *lane) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.running
}

// withDeadline returns a context that ends after a time.
func withDeadline(t *testing.T, after time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), after)
	t.Cleanup(cancel)
	return ctx
}

// The caller of a lone call sends it, unless its context may have to end the call before the bound does, or the bound is long.
func TestFleetOwnCall(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	for _, tt := range []struct {
		name  string
		bound time.Duration
		ctx   func(*testing.T) context.Context
		own   bool
	}{
		{"no end", time.Minute, func(t *testing.T) context.Context { return context.WithoutCancel(t.Context()) }, true},
		{"can be canceled", maxOwnBound, func(t *testing.T) context.Context { return t.Context() }, true},
		{"can be canceled, and the bound is long", maxOwnBound + 1, func(t *testing.T) context.Context { return t.Context() }, false},
		{"a late deadline", maxOwnBound, func(t *testing.T) context.Context { return withDeadline(t, time.Hour) }, true},
		{"an early deadline", maxOwnBound, func(t *testing.T) context.Context { return withDeadline(t, maxOwnBound-1) }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := openLinked(t, server.URL(), WithTimeout(tt.bound))
			await(t, func() bool { return running(s.single.take) == 0 })
			c := &call{asks: []asked{s.asked(one)}, done: make(chan struct{})}
			if sent := s.single.take.sendOwn(tt.ctx(t), c, time.Now()); sent != tt.own {
				t.Errorf("the caller sends: %v want %v", sent, tt.own)
			}
		})
	}
}

// A call whose caller sends it ends by the bound, also if the connection is gone and the server does not greet the next one: the client
// would wait for longer.
func TestFleetOwnCallWithoutConnection(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	proxy := redistest.StartProxy(t, server)
	s := openLinked(t, proxy.URL(), WithTimeout(50*time.Millisecond))
	for range 3 {
		proxy.Close()
		proxy.Hold()
		for range 10 {
			began := time.Now()
			_ = takeOne(context.WithoutCancel(t.Context()), s)
			if took := time.Since(began); took >= writeTimeout {
				t.Fatalf("a call took %v with a bound of 50ms", took)
			}
		}
		proxy.Release()
		await(t, func() bool { return takeOne(context.WithoutCancel(t.Context()), s) == nil })
	}
}

// A call that finds no connection is not one that fails: it waits for the next one. Only a call that is under way when a connection is lost
// fails.
func TestFleetOwnCallConnects(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	proxy := redistest.StartProxy(t, server)
	s := openLinked(t, proxy.URL(), WithTimeout(30*time.Second))
	ctx := context.WithoutCancel(t.Context())
	for range 50 {
		proxy.Close()
		failed := 0
		await(t, func() bool {
			err := takeOne(ctx, s)
			if errors.Is(err, errUnconnected) {
				t.Fatal(err)
			}
			if err != nil {
				failed++
			}
			return err == nil
		})
		if failed > 1 {
			t.Errorf("%d calls failed, one after the other", failed)
		}
	}
}

// A closed store ends the calls that their callers send.
func TestFleetOwnCallAndClose(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	proxy := redistest.StartProxy(t, server)
	s, err := Open(t.Context(), proxy.URL(), WithTimeout(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	await(t, func() bool { return takeOne(t.Context(), s) == nil })
	proxy.Hold()
	done := make(chan error, 1)
	go func() { done <- takeOne(context.WithoutCancel(t.Context()), s) }()
	await(t, func() bool { return running(s.single.take) == 1 })
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; err == nil {
		t.Error("a call succeeded without an answer")
	}
	if err := takeOne(context.WithoutCancel(t.Context()), s); err == nil {
		t.Error("a call of a closed store succeeded")
	}
}
