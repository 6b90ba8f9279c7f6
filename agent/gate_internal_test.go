package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/policy"
)

// callFrom is a call by a connection.
func (g *gate) callFrom(connection any) *call {
	c, err := g.call(context.Background(), connection, nil)
	if err != nil {
		panic(err) // no test has so many
	}
	return c
}

// Requests share their room until they are decided about. A check that finds none is marked, so that it does not wait, and
// another request is refused.
func TestRequestsShareRoom(t *testing.T) {
	g := newGate()
	request := func(size int) proto.Message {
		m := &checkv1.CheckRequest{Labels: map[string]string{"k": ""}}
		m.Labels["k"] = string(make([]byte, size-proto.Size(m)-6))
		return m
	}
	heavy := metadata.MD{}
	for i := range 1800 {
		heavy.Append(fmt.Sprint(1000+i), "")
	}
	var held []*call
	full := request(4 << 20)
	fill := func(m proto.Message, least int) {
		for n := 0; ; n++ {
			c := g.callFrom("a")
			if !c.hold(m, proto.Size(m)) {
				if n < least {
					t.Fatalf("there is room for %d requests of %d bytes, want %d", n, proto.Size(m), least)
				}
				return
			}
			held = append(held, c)
		}
	}
	fill(full, maxHeld/(4<<20)-1)
	fill(request(smallCheck), 100)
	few, many := &checkv1.CheckRequest{CacheLookupRequest: new(checkv1.CacheLookupRequest)}, &checkv1.CheckRequest{CacheLookupRequest: new(checkv1.CacheLookupRequest)}
	for i := range 1000 {
		key := string(rune('a' + i%26))
		if i < 5 {
			few.CacheLookupRequest.GlobalCacheKeys = append(few.CacheLookupRequest.GlobalCacheKeys, key)
		}
		many.CacheLookupRequest.GlobalCacheKeys = append(many.CacheLookupRequest.GlobalCacheKeys, key)
	}
	labels := func(n int) *checkv1.CheckRequest {
		m := &checkv1.CheckRequest{Labels: make(map[string]string)}
		for i := range n {
			m.Labels[fmt.Sprint(i)] = "x"
		}
		return m
	}
	tests := []struct {
		name     string
		message  proto.Message
		metadata metadata.MD
		fits     bool
	}{
		{"small", request(smallCheck - keptLabel), nil, true},
		{"small with usual metadata", request(smallCheck - keptLabel), metadata.Pairs("user-agent", "grpc-go/1.85.0", ":authority", "localhost", "content-type", "application/grpc"), true},
		{"larger", request(smallCheck - keptLabel + 16), nil, false},
		{"small with heavy metadata", request(100), heavy, false},
		{"few cache keys", few, nil, true},
		{"a small message with many cache keys", many, nil, false},
		{"few labels", labels(10), nil, true},
		{"a small message with many labels", labels(60), nil, false},
		{"a small message with many headers", &checkhttpv1.CheckHTTPRequest{Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{Headers: labels(20).GetLabels()}}, nil, false},
		{"no check", &checkv1.FlowEndRequest{ControlPoint: string(make([]byte, smallHeld-3))}, nil, true},
		{"no check, larger", &checkv1.FlowEndRequest{ControlPoint: string(make([]byte, 2*smallHeld))}, nil, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, err := g.call(context.Background(), "a", tt.metadata)
			if err != nil {
				t.Fatal(err)
			}
			got := c.hold(tt.message, proto.Size(tt.message))
			defer c.done()
			if got != tt.fits || c.still == tt.fits || c.full {
				t.Errorf("hold() = %v, still %v, full %v want %v, %v, false", got, c.still, c.full, tt.fits, !tt.fits)
			}
		})
	}

	data, err := proto.Marshal(&checkv1.CheckRequest{ControlPoint: "point", Labels: map[string]string{"user_id": string(make([]byte, large))}})
	if err != nil {
		t.Fatal(err)
	}
	named := map[string]bool{"user_id": true}
	decide := func() (m *checkv1.CheckResponse, err error) {
		c := g.callFrom("b")
		response, err := through(c, func(into any) error { return newCodec().Unmarshal(mem.BufferSlice{mem.SliceBuffer(data)}, into) },
			func(decode func(any) error) (any, error) {
				req := new(checkv1.CheckRequest)
				if err := decode(req); err != nil {
					return nil, err
				}
				if c.still {
					return nil, errMarked
				}
				return new(checkv1.CheckResponse), nil
			}, func(data []byte, m proto.Message) error { return readRequest(data, m, named) })
		m, _ = response.(*checkv1.CheckResponse)
		return m, err
	}
	if _, err := decide(); !errors.Is(err, errMarked) {
		t.Errorf("a large check beyond the room is not marked: %v", err)
	}
	for _, c := range held {
		c.done()
	}
	if _, err := decide(); err != nil {
		t.Errorf("a large check that has room: %v", err)
	}
	if g.held != 0 {
		t.Errorf("%d bytes are held after all calls", g.held)
	}
}

var errMarked = errors.New("marked")

// Slow messages keep no other waiting.
func TestSlowMessagesKeepNoOtherWaiting(t *testing.T) {
	const connections = 4 * maxOverdue
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		var slow sync.WaitGroup
		var end atomic.Bool
		for i := range connections {
			slow.Go(func() {
				for !end.Load() { // a call that is ended is renewed
					c := g.callFrom(i)
					if err := c.enter(); err != nil {
						t.Errorf("enter() = %v", err)
					}
					select {
					case <-c.Done():
					case <-time.After(time.Second):
					}
					c.leave()
				}
			})
		}
		<-time.After(connections / maxOverdue * arrival) // until each connection has lost a call
		for range 50 {
			<-time.After(7 * time.Millisecond)
			begin := time.Now()
			c := g.callFrom("other")
			if err := c.enter(); err != nil || time.Since(begin) > 0 {
				t.Errorf("enter() = %v after %v want a place at once", err, time.Since(begin))
			}
			if c.leave() {
				t.Error("a call was ended that had just begun")
			}
		}
		end.Store(true)
		slow.Wait()
	})
}

// Of the messages that do not end only so many last, and the connection with the most loses the oldest.
func TestFewSlowMessagesLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		few := g.callFrom("few")
		if err := few.enter(); err != nil {
			t.Fatal(err)
		}
		var many []*call
		for range 3 * maxOverdue {
			c := g.callFrom("many")
			if err := c.enter(); err != nil {
				t.Fatal(err)
			}
			many = append(many, c)
			<-time.After(time.Microsecond)
		}
		<-time.After(2 * arrival)
		synctest.Wait()
		if few.leave() {
			t.Error("the call of the connection with few was ended")
		}
		for i, c := range many {
			if want := i < len(many)-maxOverdue+1; c.leave() != want || (c.Err() != nil) != want {
				t.Errorf("call %d: ended %v want %v", i, !want, want)
			}
		}
		if n := g.arriving.size + g.overdue.size; n != 0 {
			t.Errorf("%d calls are left", n)
		}
	})
}

// Large requests are read one after the other, and those that wait for it share their room. Small ones do not wait.
func TestLargeRequestsAreReadInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		g.readers.most = 1
		const size = 4 << 20
		reading, end := 0, make(chan struct{})
		read := func() error {
			reading++
			<-end
			return nil
		}
		var calls sync.WaitGroup
		for range maxUnread / size {
			calls.Go(func() {
				if fits, err := g.callFrom("a").read(size, read); !fits || err != nil {
					t.Errorf("read() = %v, %v want true, nil", fits, err)
				}
			})
		}
		synctest.Wait()
		if reading != 1 {
			t.Errorf("%d requests are read at a time want 1", reading)
		}
		if fits, err := g.callFrom("b").read(large-1, func() error { return errMarked }); !fits || !errors.Is(err, errMarked) {
			t.Errorf("a small request: read() = %v, %v want true, %v", fits, err, errMarked)
		}
		beyond := g.callFrom("b")
		if fits, err := beyond.read(large, read); fits || err != nil || !beyond.full {
			t.Errorf("a large request beyond the room: read() = %v, %v want false, nil", fits, err)
		}
		close(end)
		calls.Wait()
		if reading != maxUnread/size || g.unread != 0 || g.readers.busy != 0 {
			t.Errorf("%d requests were read, %d bytes and %d readers are left want %d, 0, 0", reading, g.unread, g.readers.busy, maxUnread/size)
		}

		if err := g.readers.enter(t.Context(), "b"); err != nil {
			t.Fatal(err)
		}
		gone := g.callFrom("c")
		gone.cancel()
		if fits, err := gone.read(large, read); !fits || status.Code(err) != codes.Canceled {
			t.Errorf("a call that was canceled: read() = %v, %v want true, Canceled", fits, err)
		}
	})
}

// A check whose request has no room is decided at once, and does not wait in queues.
func TestChecksWithoutRoomDoNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{
			policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour},
		}}})
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		s := handler{service: &Service{engine: e.Agent(), sessions: newSessions(e.Agent())}}
		begin := time.Now()
		for _, want := range []checkv1.CheckResponse_DecisionType{checkv1.CheckResponse_DECISION_TYPE_ACCEPTED, checkv1.CheckResponse_DECISION_TYPE_REJECTED} {
			c := newGate().callFrom("a")
			c.still = true
			got, err := s.Check(c, &checkv1.CheckRequest{ControlPoint: "point"})
			if err != nil || got.GetDecisionType() != want || time.Since(begin) != 0 {
				t.Errorf("a check has %v after %v, %v want %v at once", got.GetDecisionType(), time.Since(begin), err, want)
			}
		}
	})
}
