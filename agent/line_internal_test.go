package agent

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/internal/wire"
)

// openLines opens streams of so many sessions of an owner.
func openLines(t *testing.T, all *sessions, by string, n int) []*line {
	t.Helper()
	var lines []*line
	for i := range n {
		l, err := all.open([16]byte{by[0], byte(i), byte(i >> 8)}, by, nil)
		if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, l)
	}
	return lines
}

// Messages that are not handled share their room. One owner cannot take all, and has some even if others leave none. What is
// handled, and what a stream had when it ended, gives its room back.
func TestUnhandledMessagesShareRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New(nil)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		all := newSessions(e.Agent())
		const size = wire.MaxSessionMessage + unhandledSize
		fill := func(lines []*line) (taken int) {
			for _, l := range lines {
				for l.take(size) == nil {
					taken++
				}
			}
			return taken
		}
		one := openLines(t, all, "a", 1)[0]
		if got := fill([]*line{one}); got != 2 {
			t.Errorf("a stream has room for %d messages want those of a client, which are 2", got)
		}
		if err := one.take(size); !errors.Is(err, errFast) {
			t.Errorf("one more: %v want %v", err, errFast)
		}
		all.close(one)
		lines := make(map[string][]*line)
		for _, tt := range []struct {
			owner string
			want  int // bytes
		}{{"b", maxUnhandledByOne}, {"c", maxUnhandledByOne}, {"d", ownUnhandled}} {
			lines[tt.owner] = openLines(t, all, tt.owner, maxSessionsByOne)
			if got := fill(lines[tt.owner]); got != tt.want/size && got != tt.want/size+1 {
				t.Errorf("owner %s has room for %d messages want %d", tt.owner, got, tt.want/size)
			}
		}
		last := lines["d"][maxSessionsByOne-1]
		if err := last.take(size); !errors.Is(err, errUnhandled) {
			t.Errorf("without room: %v want %v", err, errUnhandled)
		}
		lines["d"][0].handled(size)
		if err := last.take(size); err != nil {
			t.Errorf("after a message was handled: %v", err)
		}
		for _, of := range lines {
			for _, l := range of {
				all.close(l)
				l.handled(size) // by the handler, too late
				if err := l.take(size); err == nil {
					t.Fatal("a stream that has ended takes room")
				}
			}
		}
		if left := all.unhandled.Load(); left != 0 {
			t.Errorf("%d bytes are left", left)
		}
		<-time.After(time.Minute)
	})
}

// Of an owner few messages are handled at a time, so that those of others need not wait for them.
func TestOwnersTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New(nil)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		all := newSessions(e.Agent())
		first, second := openLines(t, all, "a", 1)[0].session.owner, openLines(t, all, "b", 1)[0].session.owner
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var mu sync.Mutex
		handling, over := 0, 0
		var working sync.WaitGroup
		for range 4 * maxHandledByOne {
			working.Go(func() {
				done, err := all.turn(ctx, first, 0)
				mu.Lock()
				if err != nil {
					over++
					mu.Unlock()
					return
				}
				handling++
				mu.Unlock()
				<-ctx.Done()
				done()
			})
		}
		synctest.Wait()
		if handling != maxHandledByOne {
			t.Errorf("%d messages of an owner are handled at a time want %d", handling, maxHandledByOne)
		}
		if done, err := all.turn(ctx, second, 0); err != nil {
			t.Errorf("a message of another owner: %v", err)
		} else {
			done()
		}
		cancel()
		working.Wait()
		if handling+over != 4*maxHandledByOne || len(all.turns)+len(first.turns) != 0 {
			t.Errorf("%d were handled and %d ended; %d turns are left", handling, over, len(all.turns)+len(first.turns))
		}
	})
}

// What an owner's messages hold is handled at a bounded rate. A stream that ends does not make others wait longer.
func TestPaceOfOwners(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pace
		ctx, cancel := context.WithCancel(t.Context())
		begin := time.Now()
		for range 100 {
			go func() { _ = p.wait(ctx, 100, 1000, 500) }()
		}
		synctest.Wait()
		<-time.After(time.Second)
		cancel()
		synctest.Wait()
		if err := p.wait(t.Context(), 100, 1000, 500); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took < time.Second || took > 1200*time.Millisecond {
			t.Errorf("after those that wait have ended, one is handled after %v want about 1.1s", took)
		}
	})
}

// Streams besides the first of each session are bounded: a session's oldest stream then makes room for its next.
func TestSpareStreamsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New(nil)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		all := newSessions(e.Agent())
		first := openLines(t, all, "a", maxSparesByOne+1)
		second := openLines(t, all, "a", maxSparesByOne+1)
		for i, l := range first {
			if replaced := errors.Is(l.reason(nil), errReplaced); replaced != (i == maxSparesByOne) {
				t.Fatalf("stream %d was replaced: %v", i, replaced)
			}
		}
		for _, l := range append(first, second...) {
			all.close(l)
		}
		if all.spares != 0 || first[0].session.owner.spares != 0 {
			t.Errorf("%d streams are left, %d of the owner", all.spares, first[0].session.owner.spares)
		}
		<-time.After(time.Minute)
	})
}

// serveLines serves sessions by TCP, because connections in memory have one address.
func serveLines(t *testing.T) (address string) {
	t.Helper()
	e, err := engine.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(ServerOptions()...)
	Register(server, e)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := errors.Join(<-served, e.Close()); err != nil {
			t.Error(err)
		}
	})
	return listener.Addr().String()
}

// A connection has few streams of sessions.
func TestStreamsOfSessionsByConnection(t *testing.T) {
	address := serveLines(t)
	made := byte(0)
	for range 2 {
		conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		made++
		for i := range byte(maxLinesByOne + 1) {
			ctx := metadata.AppendToOutgoingContext(t.Context(), wire.SessionHeader, wire.SessionText([16]byte{made, i, 1}))
			stream, err := sessionv1.NewSessionServiceClient(conn).Session(ctx)
			if err != nil {
				t.Fatal(err)
			}
			_ = stream.Send(&sessionv1.SessionRequest{Heartbeat: new(sessionv1.Heartbeat)})
			if _, err := stream.Recv(); (status.Code(err) == codes.ResourceExhausted) != (i == maxLinesByOne) {
				t.Fatalf("stream %d of connection %d: %v", i, made, err)
			}
		}
	}
}

// What a stream can have in gRPC's buffers does not grow, however fast a client sends and acknowledges pings.
func TestWindowsDoNotGrow(t *testing.T) {
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", serveLines(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	framer := http2.NewFramer(conn, conn)
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	if err := framer.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex // of writes
	grown := make(chan uint32, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		var most uint32
		defer func() { grown <- most }()
		for {
			f, err := framer.ReadFrame()
			if err != nil {
				return
			}
			mu.Lock()
			switch f := f.(type) {
			case *http2.SettingsFrame:
				if size, ok := f.Value(http2.SettingInitialWindowSize); ok {
					most = max(most, size)
				}
				if !f.IsAck() {
					_ = framer.WriteSettingsAck()
				}
			case *http2.PingFrame:
				if f.Data == [8]byte{'l', 'a', 's', 't'} {
					mu.Unlock()
					return
				}
				if !f.IsAck() {
					_ = framer.WritePing(true, f.Data)
				}
			}
			mu.Unlock()
		}
	}()
	var block writerOf
	encoder := hpack.NewEncoder(&block)
	for id := uint32(1); id < 400; id += 2 { // each fills a window, of a message that is refused
		block = block[:0]
		for _, pair := range [][2]string{
			{":method", "POST"},
			{":scheme", "http"},
			{":path", sessionv1.SessionService_Session_FullMethodName},
			{":authority", "x"},
			{"content-type", "application/grpc"},
			{"te", "trailers"},
		} {
			_ = encoder.WriteField(hpack.HeaderField{Name: pair[0], Value: pair[1]})
		}
		mu.Lock()
		err := framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block, EndHeaders: true})
		for range 3 {
			err = errors.Join(err, framer.WriteData(id, false, make([]byte, 16<<10)))
		}
		mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
	}
	mu.Lock()
	err = framer.WritePing(false, [8]byte{'l', 'a', 's', 't'})
	mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	if most := <-grown; most > streamWindow {
		t.Errorf("a stream has a window of %d bytes want at most %d", most, streamWindow)
	}
	<-ended
}

// A writerOf appends what is written.
type writerOf []byte

func (w *writerOf) Write(data []byte) (int, error) {
	*w = append(*w, data...)
	return len(data), nil
}
