package redisstore

import (
	"bytes"
	"context"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// openLone opens a store whose connection for lone calls is there, and which does not check that by itself.
func openLone(t *testing.T, url string, opts ...Option) *Store {
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
	await(t, s.checking.take)
	check(t, s)
	return s
}

// check has the connection for lone calls be there.
func check(t *testing.T, s *Store) {
	t.Helper()
	await(t, func() bool {
		s.lone.check(s.ctx, time.Now().Add(time.Second))
		return there(s)
	})
}

// there reports whether the connection for lone calls is there, and free.
func there(s *Store) bool {
	took := s.lone.take()
	if took {
		s.lone.free()
	}
	return took
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

// The caller of a lone call sends it, unless its context may have to end the call before the bound does, or the bound is long, or the
// connection is in use, or another one has ended.
func TestFleetOwnCall(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	endless := func(t *testing.T) context.Context { return context.WithoutCancel(t.Context()) }
	canceled := func(t *testing.T) context.Context { return t.Context() }
	for _, tt := range []struct {
		name  string
		bound time.Duration
		ctx   func(*testing.T) context.Context
		but   func(*testing.T, *Store)
		own   bool
	}{
		{"no end", writeTimeout, endless, nil, true},
		{"no end, and the bound is longer than the client's", writeTimeout + 1, endless, nil, false},
		{"can be canceled", maxOwnBound, canceled, nil, true},
		{"can be canceled, and the bound is long", maxOwnBound + 1, canceled, nil, false},
		{"a late deadline", maxOwnBound, func(t *testing.T) context.Context { return withDeadline(t, time.Hour) }, nil, true},
		{"an early deadline", maxOwnBound, func(t *testing.T) context.Context { return withDeadline(t, maxOwnBound-1) }, nil, false},
		{"in use", writeTimeout, endless, func(t *testing.T, s *Store) {
			s.lone.mu.Lock()
			t.Cleanup(s.lone.free)
		}, false},
		{"another connection has ended", writeTimeout, endless, func(_ *testing.T, s *Store) {
			_ = (&wire{Conn: new(net.TCPConn), link: s.lone.link}).Close()
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := openLone(t, server.URL(), WithTimeout(tt.bound))
			if tt.but != nil {
				tt.but(t, s)
			}
			c := &call{asks: []asked{s.asked(one)}, done: make(chan struct{})}
			if sent := s.single.take.sendOwn(tt.ctx(t), c, time.Now()); sent != tt.own {
				t.Errorf("the caller sends: %v want %v", sent, tt.own)
			}
		})
	}
}

// Only the client of one server, and of the store's own, has a connection for lone calls. With several servers, another one may take the
// place of the one that it leads to.
func TestFleetLone(t *testing.T) {
	for name, url := range startFake(t).urls() {
		t.Run(name, func(t *testing.T) {
			s, err := Open(t.Context(), url)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := s.lone != nil, name == "alone"; got != want {
				t.Errorf("there is a connection for lone calls: %v want %v", got, want)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A call that its caller sends ends by the bound, also if the server does not answer it. The next one then does not have to connect, which
// the server may not answer either.
func TestFleetOwnCallUnanswered(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	proxy := redistest.StartProxy(t, server)
	s := openLone(t, proxy.URL(), WithTimeout(50*time.Millisecond))
	for _, lose := range []func(){func() {}, proxy.Close} {
		lose()
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
		check(t, s)
	}
}

// A call that finds no connection is not one that fails: it waits for the next one. Only a call that is under way when its connection is
// lost fails, or while the client finds out that it is.
func TestFleetOwnCallConnects(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	proxy := redistest.StartProxy(t, server)
	s := openLone(t, proxy.URL(), WithTimeout(writeTimeout))
	for range 50 {
		check(t, s)
		proxy.Close()
		await(t, func() bool { return !there(s) })
		failed := 0
		await(t, func() bool {
			err := takeOne(context.WithoutCancel(t.Context()), s)
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

// Calls of many callers, and checks between them, leave the connection as it is: the caller of a lone call sends it, and no goroutine of
// the client.
func TestFleetOwnCallAmongOthers(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	s := openLone(t, server.URL(), WithTimeout(writeTimeout))
	before := senders(t)
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			for range 100 {
				if err := takeOne(context.WithoutCancel(t.Context()), s); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 50 {
		s.lone.check(s.ctx, time.Now().Add(time.Second))
	}
	callers.Wait()
	if got := senders(t); got != before {
		t.Errorf("%d goroutines of clients send want %d", got, before)
	}
}

// senders returns how many goroutines of clients send.
func senders(t *testing.T) int {
	t.Helper()
	stacks := make([]byte, 1<<20)
	return bytes.Count(stacks[:runtime.Stack(stacks, true)], []byte("(*pipe)._backgroundWrite("))
}

// A closed store ends the calls that their callers send.
func TestFleetOwnCallAndClose(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	proxy := redistest.StartProxy(t, server)
	s, err := Open(t.Context(), proxy.URL(), WithTimeout(writeTimeout))
	if err != nil {
		t.Fatal(err)
	}
	check(t, s)
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
