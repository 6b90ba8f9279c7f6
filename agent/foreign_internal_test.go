package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	grpcreflection "google.golang.org/grpc/reflection"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/internal/frames"
)

// withReflection is a connection to a server with our options, and the services that other programs add.
func withReflection(t *testing.T) func() *grpc.ClientConn {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0") // in memory all have one address
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(ServerOptions()...)
	healthv1.RegisterHealthServer(server, health.NewServer())
	grpcreflection.Register(server)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return func() *grpc.ClientConn {
		conn, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
}

func reflect1(ctx context.Context, conn *grpc.ClientConn) error {
	stream, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}}); err != nil && !errors.Is(err, io.EOF) { // Recv has its reason
		return err
	}
	m, err := stream.Recv()
	if err == nil && len(m.GetListServicesResponse().GetService()) == 0 {
		return fmt.Errorf("the answer is %v", m)
	}
	return err
}

// Of the streams of other services few are under way, of one connection and of all. Watches of the health service are not
// among them.
func TestForeignStreams(t *testing.T) {
	connect := withReflection(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for i := range maxForeign / maxForeignByOne {
		conn := connect()
		for range maxForeignByOne {
			if err := reflect1(ctx, conn); err != nil {
				t.Fatal(err)
			}
		}
		if err := reflect1(ctx, conn); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("one more stream of connection %d: %v want ResourceExhausted", i, err)
		}
	}
	conn := connect()
	if err := reflect1(ctx, conn); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one more stream of another connection: %v want ResourceExhausted", err)
	}
	for i := range 2 * maxForeign {
		stream, err := healthv1.NewHealthClient(conn).Watch(ctx, new(healthv1.HealthCheckRequest))
		if err == nil {
			_, err = stream.Recv()
		}
		if err != nil {
			t.Fatalf("watch %d: %v", i, err)
		}
	}
	cancel()
	for reflect1(t.Context(), conn) != nil { // until the server knows of the ends
		if t.Context().Err() != nil {
			t.Fatal("ends make no room")
		}
		<-time.After(time.Millisecond)
	}
}

// The answer to a call of another service counts as an answer of the agent's own does, and finds room or not.
func TestForeignAnswersNeedRoom(t *testing.T) {
	const others = 101 // the stream that has what others take
	for _, tt := range []struct {
		name   string
		size   int // of the answer
		others int
		want   codes.Code
	}{
		{"small", 100, 0, codes.OK},
		{"small, without room", 100, maxUnsentByOne - unsentCall, codes.OK},
		{"large", 40 << 10, 0, codes.OK},
		{"large, without room", 40 << 10, maxUnsentByOne - 40<<10, codes.ResourceExhausted},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newFullServer(t, 1<<16, func(server *grpc.Server) {
					server.RegisterService(&grpc.ServiceDesc{ServiceName: "other", Methods: []grpc.MethodDesc{{
						MethodName: "Ask",
						Handler: func(_ any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
							request := new(healthv1.HealthCheckRequest)
							if err := decode(request); err != nil {
								return nil, err
							}
							return intercept(ctx, request, new(grpc.UnaryServerInfo), func(ctx context.Context, _ any) (any, error) {
								o := callOf(ctx).outbox
								o.arrives(frames.Frame{Kind: frames.Headers, Stream: others})
								o.handle(others)
								if !o.lend(others, tt.others) {
									t.Error("others have no room")
								}
								return &healthv1.HealthCheckRequest{Service: strings.Repeat("s", tt.size)}, nil
							})
						},
					}}}, nil)
				})
				conn, err := grpc.NewClient("passthrough:///localhost", grpc.WithTransportCredentials(insecure.NewCredentials()),
					grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return s.listener.DialContext(ctx) }))
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				answer := new(healthv1.HealthCheckRequest)
				err = conn.Invoke(t.Context(), "/other/Ask", new(healthv1.HealthCheckRequest), answer)
				if status.Code(err) != tt.want || err == nil && len(answer.GetService()) != tt.size {
					t.Errorf("the answer has %d bytes, %v want %d, %v", len(answer.GetService()), err, tt.size, tt.want)
				}
				synctest.Wait()
				if n := s.unsent(); n != tt.others {
					t.Errorf("%d bytes are unsent want %d", n, tt.others)
				}
			})
		})
	}
}

// Watches of the health service count as long as they last. So a connection that begins very many ends.
func TestWatchesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const most = 10
		s := newFullServer(t, 1<<16)
		s.paces.outboxes.size.Store(maxUnsent - most*2*callSize) // as if others had the rest
		c := s.connect(t)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_, _ = io.Copy(io.Discard, c.conn)
		}()
		for range 2 * most {
			if _, err := c.call(healthv1.Health_Watch_FullMethodName, nil, "content-type", "application/grpc"); err != nil {
				break
			}
			synctest.Wait()
		}
		select {
		case <-ended:
		default:
			t.Errorf("%d Watches are under way", 2*most)
		}
	})
}

type bareStream struct {
	grpc.ServerStream
	ctx  context.Context
	sent int
}

func (s *bareStream) Context() context.Context { return s.ctx }

func (s *bareStream) SendMsg(any) error {
	s.sent++
	return nil
}

// What a stream of another service sends counts until it has left, and the stream ends where there is no room.
func TestForeignAnswersCount(t *testing.T) {
	c := newCall()
	c.outbox.handle(1)
	bare := &bareStream{ctx: context.Background()}
	stream := countedStream{bare, c}
	var err error
	for err == nil && bare.sent <= maxUnsentByOne {
		err = stream.SendMsg(&healthv1.HealthCheckResponse{Status: healthv1.HealthCheckResponse_SERVING})
	}
	const size = 2
	if want := maxUnsentByOne / (unsentMessage + size); status.Code(err) != codes.ResourceExhausted || bare.sent != want {
		t.Fatalf("after %d messages: %v want ResourceExhausted after %d", bare.sent, err, want)
	}
	for range bare.sent {
		c.outbox.wrote(frame(http2.FrameData, messageHeader+size))
	}
	if n := c.outbox.size; n != 0 {
		t.Errorf("%d bytes are unsent", n)
	}
}
