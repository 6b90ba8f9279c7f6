package agent

import (
	"errors"
	"io"
	"net"
	"sync"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"

	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/engine"
)

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
