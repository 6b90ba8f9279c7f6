package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
	"google.golang.org/grpc/test/bufconn"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
)

// Calls whose messages do not arrive share their room. A connection that has few loses none, and finds room while others
// have taken all.
func TestCallsThatHaveNoMessageShareRoom(t *testing.T) {
	heavy := metadata.Pairs("m", string(make([]byte, 4<<10)))
	for _, tt := range []struct {
		name string
		sent metadata.MD
	}{{"without metadata", nil}, {"with metadata", heavy}} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { // no call becomes overdue, however slow the machine is
				g := newGate()
				innocent := g.callFrom("innocent")
				var all []*call
				refused := 0
				for i := range 2 * maxOpening / callSize {
					c, err := g.call(context.Background(), i%48, tt.sent)
					if err != nil {
						if status.Code(err) != codes.Unavailable {
							t.Fatalf("call() = %v want Unavailable", err)
						}
						refused++
						continue
					}
					all = append(all, c)
				}
				if refused < maxOpening/callSize {
					t.Errorf("%d calls were refused", refused)
				}
				if g.opening.size > maxOpening {
					t.Errorf("calls take %d bytes want at most %d", g.opening.size, maxOpening)
				}
				for i := range 100 {
					c, err := g.call(context.Background(), fmt.Sprint("another ", i), nil)
					if err != nil || c.enter() != nil || c.ready() {
						t.Fatalf("a connection that has nothing finds no room: %v", err)
					}
				}
				if innocent.enter() != nil || innocent.Err() != nil || innocent.ready() {
					t.Error("the call of the connection with one was ended")
				}
				evicted := 0
				for _, c := range all {
					err := c.enter()
					if wasEvicted := c.ready(); wasEvicted != (err != nil) || wasEvicted != (c.Err() != nil) {
						t.Fatalf("enter() = %v, ready() = %v", err, wasEvicted)
					} else if wasEvicted {
						evicted++
					}
				}
				if evicted > 100 {
					t.Errorf("%d calls made room for one at a time", evicted)
				}
				if len(g.opening.by) != 0 || len(g.opening.order) != 0 || g.opening.size != 0 || g.begun.size+g.arriving.size+g.overdue.size != 0 {
					t.Errorf("%d connections have %d bytes; %d, %d and %d calls are left", len(g.opening.by), g.opening.size, g.begun.size, g.arriving.size, g.overdue.size)
				}
			})
		})
	}
}

// Calls that end before a handler has them are forgotten with the next.
func TestCallsThatEndBeforeTheyBeginAreForgotten(t *testing.T) {
	g := newGate()
	for range 100 {
		g.callFrom("a").cancel()
	}
	if g.begun.size != 1 || g.opening.size != callSize {
		t.Errorf("%d calls are left, with %d bytes want 1", g.begun.size, g.opening.size)
	}
}

// The room of calls that were ended stays taken for a second, so that new ones of their connection find none.
func TestLostCallsTakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		fill := func() (n int) {
			for ; ; n++ {
				c, err := g.call(context.Background(), "many", nil)
				if err != nil {
					return n
				}
				if err := c.enter(); err != nil {
					t.Fatal(err)
				}
			}
		}
		const most = maxOpening / callSize
		if n := fill(); n != most {
			t.Errorf("%d calls are let in want %d", n, most)
		}
		<-time.After(2 * arrival)
		synctest.Wait()
		if g.overdue.size != maxOverdue || g.lost.size != most-maxOverdue {
			t.Errorf("%d calls are overdue, and %d lost", g.overdue.size, g.lost.size)
		}
		if n := fill(); n != 0 {
			t.Errorf("%d more calls are let in want none", n)
		}
		var others []*call
		for i := range 2 * most {
			if c, err := g.call(context.Background(), i%100, nil); err == nil {
				others = append(others, c)
			}
		}
		if len(others) < most*9/10 {
			t.Errorf("%d calls of other connections find room want about %d", len(others), most)
		}
		for _, c := range others {
			c.ready()
		}
		few := g.callFrom("few") // one of those that are lost makes room
		if few.enter() != nil || few.ready() {
			t.Error("a call of another connection was ended")
		}
		<-time.After(lateFor)
		if n := fill(); n < most-maxOverdue {
			t.Errorf("%d more calls are let in later want %d", n, most-maxOverdue)
		}
	})
}

// A connection that goes on beginning calls while it has the most ends.
func TestFloodsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		for range maxOpening / callSize {
			g.callFrom("many")
		}
		for i := range 2 * maxRefusals {
			want := errOpening
			if i >= maxRefusals {
				want = errFlood
			}
			if _, err := g.call(context.Background(), "many", nil); !errors.Is(err, want) {
				t.Fatalf("call %d: %v want %v", i, err, want)
			}
			<-time.After(time.Millisecond)
		}
		<-time.After(lateFor - 2*maxRefusals*time.Millisecond)
		if _, err := g.call(context.Background(), "many", nil); !errors.Is(err, errOpening) {
			t.Errorf("a call after a second: %v want %v", err, errOpening)
		}
	})
}

// A connection is closed from the tap handle, where a call has a deadline and where it has none.
func TestCloseConnection(t *testing.T) {
	for _, timeout := range []time.Duration{0, time.Hour} {
		listener := bufconn.Listen(1 << 16)
		closed := make(chan bool, 1)
		server := grpc.NewServer(grpc.InTapHandle(func(ctx context.Context, _ *tap.Info) (context.Context, error) {
			closed <- closeConnection(ctx)
			return ctx, nil
		}))
		served := make(chan error, 1)
		go func() { served <- server.Serve(listener) }()
		conn, err := grpc.NewClient("passthrough:///localhost", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		if timeout > 0 {
			ctx, cancel = context.WithTimeout(t.Context(), timeout)
		}
		_, err = checkv1.NewFlowControlServiceClient(conn).Check(ctx, new(checkv1.CheckRequest))
		if !<-closed || status.Code(err) != codes.Unavailable {
			t.Errorf("with a timeout of %v: a call over a connection that is closed: %v want Unavailable", timeout, err)
		}
		cancel()
		_ = conn.Close()
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}
}

// The connection with the most is always known.
func TestShares(t *testing.T) {
	g := newGate()
	var s shares
	var calls []*call
	for i, connection := range []any{"a", "b", "c", "b", "c", "b", "a", nil, "b"} {
		c := g.callFrom(connection)
		c.begin = time.Unix(int64(i), 0)
		calls = append(calls, c)
		s.add(&c.open, 1)
	}
	// The connection with the most loses its oldest call; of several, that with the oldest call.
	for _, want := range []int{1, 3, 0, 2, 5, 4, 6, 7, 8} {
		c := s.most().calls.first.call
		if c != calls[want] {
			t.Errorf("the next is call %v want %v", c.begin.Unix(), want)
		}
		s.remove(&c.open, 1)
		s.remove(&c.open, 1) // no more
	}
	if s.most() != nil || s.size != 0 {
		t.Errorf("%d are left", s.size)
	}
}
