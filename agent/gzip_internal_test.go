package agent

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	grpcgzip "google.golang.org/grpc/encoding/gzip"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/mem"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/testing/race"
)

// compress compresses a message as a client does, and marks it as the server's decompressor does.
func compress(t *testing.T, message []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, _ = w.Write(message)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return marked(t, b.Bytes())
}

func marked(t *testing.T, data []byte) []byte {
	t.Helper()
	data, err := keepGzip{}.Do(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// Small messages are decompressed at once. Those that become large, and those that already are, wait for their turns.
func TestDecompress(t *testing.T) {
	var empty bytes.Buffer
	if err := gzip.NewWriter(&empty).Close(); err != nil {
		t.Fatal(err)
	}
	empties := bytes.Repeat(empty.Bytes(), large/empty.Len()+1) // which are long to decompress, although nothing comes of them
	noise := make([]byte, 2*large)
	for i, n := 0, uint32(1); i < len(noise); i++ {
		n = n*1664525 + 1013904223
		noise[i] = byte(n >> 24)
	}
	for _, tt := range []struct {
		name    string
		message []byte
		size    int // of what is read; 0: nothing is
		waits   bool
		want    codes.Code
	}{
		{"nothing", compress(t, nil), 0, false, codes.OK},
		{"small", compress(t, make([]byte, 100)), 100, false, codes.OK},
		{"as large as needs no turn", compress(t, make([]byte, large-1)), large - 1, false, codes.OK},
		{"a byte more", compress(t, make([]byte, large)), large, true, codes.OK},
		{"large before it is decompressed", compress(t, noise), len(noise), true, codes.OK},
		{"long, of nothing", marked(t, empties), 0, true, codes.OK},
		{"the largest", compress(t, make([]byte, maxMessage)), maxMessage, true, codes.OK},
		{"too large", compress(t, make([]byte, maxMessage+1)), 0, true, codes.ResourceExhausted},
		{"much too large", compress(t, make([]byte, race.Pick(16, 64)<<20)), 0, true, codes.ResourceExhausted},
		{"no gzip", marked(t, []byte("no gzip")), 0, false, codes.Internal},
		{"the mark alone", marked(t, nil), 0, false, codes.Internal},
		{"cut", compress(t, make([]byte, 1000))[:15], 0, false, codes.Internal},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGate()
				g.readers.most = 1
				if err := g.readers.enter(t.Context(), "other"); err != nil {
					t.Fatal(err)
				}
				got, ended := 0, false
				go func() {
					fits, err := g.callFrom("a").decompress(tt.message, func(plain []byte) error {
						got = len(plain)
						return nil
					})
					if ended = true; !fits || status.Code(err) != tt.want {
						t.Errorf("decompress() = %v, %v want true, %v", fits, err, tt.want)
					}
				}()
				synctest.Wait()
				if ended == tt.waits {
					t.Errorf("it waits: %v want %v", !ended, tt.waits)
				}
				g.readers.leave("other", 0)
				synctest.Wait()
				if !ended || got != tt.size || g.unread != 0 || g.readers.busy != 0 {
					t.Errorf("ended %v, %d bytes are read want %d; %d bytes and %d readers are left", ended, got, tt.size, g.unread, g.readers.busy)
				}
			})
		})
	}
}

// Messages that wait to be decompressed have their beginnings in memory. Only those whose turn it is are whole.
func TestDecompressingTakesLittle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		g.readers.most = 1
		bomb := compress(t, make([]byte, maxMessage))
		var calls sync.WaitGroup
		for range 64 {
			calls.Go(func() {
				if fits, err := g.callFrom("a").decompress(bomb, func([]byte) error { return nil }); !fits || err != nil {
					t.Errorf("decompress() = %v, %v want true, nil", fits, err)
				}
			})
		}
		calls.Wait()
		kept := 0
		for d, ok := g.decompressions.Get().(*decompression); ok; d, ok = g.decompressions.Get().(*decompression) {
			kept += d.plain.Cap()
		}
		if most := 64 * 4 * large; kept > most {
			t.Errorf("%d bytes are kept for messages that waited want at most %d", kept, most)
		}
	})
}

// The next turn is that of the connection which has taken the least time of late, and of several the one that has waited the longest.
func TestTurnsGoToThoseWhoTookLittle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &readers{most: 1}
		read := func(connection any, takes time.Duration) {
			if err := r.enter(t.Context(), connection); err != nil {
				t.Error(err)
			}
			<-time.After(takes)
			r.leave(connection, takes)
		}
		for range 10 {
			read("heavy", 50*time.Millisecond)
		}
		var order []string
		var calls sync.WaitGroup
		wait := func(connection string) {
			calls.Go(func() {
				if err := r.enter(t.Context(), connection); err != nil {
					t.Error(err)
				}
				order = append(order, connection)
				<-time.After(50 * time.Millisecond)
				r.leave(connection, 50*time.Millisecond)
			})
			synctest.Wait()
		}
		for _, connection := range []string{"heavy", "heavy", "heavy", "light", "lighter", "light"} {
			wait(connection)
		}
		calls.Wait()
		if want := []string{"heavy", "light", "lighter", "light", "heavy", "heavy"}; !slices.Equal(order, want) {
			t.Errorf("turns went to %v want %v", order, want)
		}
		if r.busy != 0 || len(r.waiting) != 0 {
			t.Errorf("%d are busy and %d wait after all", r.busy, len(r.waiting))
		}
		for i := range 1000 { // what was taken is forgotten
			read(fmt.Sprint(i), time.Microsecond)
		}
		<-time.After(time.Minute)
		read("last", 0)
		if n := len(r.taken); n > 1 {
			t.Errorf("%d connections are remembered want the last", n)
		}
	})
}

// Messages for other services than the agent's own are decompressed up to 64 KiB.
func TestForeignMessagesAreSmall(t *testing.T) {
	encoded := func(m proto.Message) []byte {
		data, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	question := func(size int) []byte {
		return encoded(&reflectionv1.ServerReflectionRequest{Host: strings.Repeat("x", size)})
	}
	named := func(size int) []byte {
		return encoded(&healthv1.HealthCheckRequest{Service: strings.Repeat("x", size)})
	}
	for _, tt := range []struct {
		name string
		data []byte
		into proto.Message
		want error
	}{
		{"small", compress(t, question(100)), new(reflectionv1.ServerReflectionRequest), nil},
		{"large", compress(t, question(maxForeignMessage)), new(reflectionv1.ServerReflectionRequest), errLarge},
		{"a bomb", compress(t, question(4<<20-100)), new(reflectionv1.ServerReflectionRequest), errLarge},
		{"large, and not compressed", question(1 << 20), new(reflectionv1.ServerReflectionRequest), nil},
		{"no gzip", marked(t, []byte("no")), new(reflectionv1.ServerReflectionRequest), errGzip},
		{"a name of a service", compress(t, named(100)), new(healthv1.HealthCheckRequest), nil},
		{"a long name", compress(t, named(4<<20-100)), new(healthv1.HealthCheckRequest), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := newCodec().Unmarshal(mem.BufferSlice{mem.SliceBuffer(tt.data)}, tt.into); !errors.Is(err, tt.want) {
				t.Errorf("Unmarshal() = %v want %v", err, tt.want)
			}
			if m, ok := tt.into.(*healthv1.HealthCheckRequest); ok && len(m.GetService()) > maxServiceOf {
				t.Errorf("a name of %d bytes is kept", len(m.GetService()))
			}
		})
	}
}

// An otherCompressor is one that the program has besides gzip.
type otherCompressor struct{ used atomic.Bool }

func (*otherCompressor) Name() string { return "other" }

func (*otherCompressor) Compress(w io.Writer) (io.WriteCloser, error) { return nopCloser{w}, nil }

func (c *otherCompressor) Decompress(r io.Reader) (io.Reader, error) {
	c.used.Store(true)
	return r, nil
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// A message that is compressed otherwise than by gzip is refused before it is decompressed, as on an agent that has no other compressor.
func TestOtherCompressionsAreRefused(t *testing.T) {
	other := new(otherCompressor)
	encoding.RegisterCompressor(other)
	synctest.Test(t, func(t *testing.T) {
		s := newFullServer(t, 1<<16)
		conn, err := grpc.NewClient("passthrough:///localhost", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return s.listener.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		client := checkv1.NewFlowControlServiceClient(conn)
		request := &checkv1.CheckRequest{ControlPoint: "point"}
		if _, err := client.Check(t.Context(), request, grpc.UseCompressor(other.Name())); status.Code(err) != codes.Unimplemented || other.used.Load() {
			t.Errorf("Check() = %v want Unimplemented", err)
		}
		stream, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context(), grpc.UseCompressor(other.Name()))
		if err != nil {
			t.Fatal(err)
		}
		_ = stream.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}})
		if _, err := stream.Recv(); status.Code(err) != codes.Unimplemented || other.used.Load() {
			t.Errorf("a stream of another service ends with %v want Unimplemented", err)
		}
		for _, name := range []string{grpcgzip.Name, encoding.Identity} {
			if _, err := client.Check(t.Context(), request, grpc.UseCompressor(name)); err != nil {
				t.Errorf("Check() with %s: %v", name, err)
			}
		}
	})
}
