package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
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
