package grpcguard_test

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/grpcguard"
	"github.com/headgate-go/headgate/internal/testing/race"
)

// TestManyCalls makes many calls, 64 at a time, half of them guarded at the server and half at the client. Some
// fail, some panic, and some are canceled and left. Each is one flow, and every flow ends once.
func TestManyCalls(t *testing.T) {
	const inFlight = 64
	calls := race.Pick(300, 10_000)
	for _, a := range agentSides {
		t.Run(a.name, func(t *testing.T) {
			s := a.start(t, false)
			var served atomic.Int64
			svc := &service{do: func(context.Context) error {
				switch served.Add(1) % 10 {
				case 1:
					return status.Error(codes.NotFound, "not found")
				case 2:
					return errBroken
				case 3:
					panic(errBroken)
				}
				return nil
			}}
			// The other server recovers as well.
			skip := grpcguard.WithSkip(func(context.Context, grpcguard.Call) bool { return true })
			atServer, stopServer := serve(t, loopback, svc.register, guarded(s))
			atClient, stopClient := serve(t, loopback, svc.register, guarded(s, skip), guarding(s)...)
			clients := [2]testgrpc.TestServiceClient{testgrpc.NewTestServiceClient(atServer), testgrpc.NewTestServiceClient(atClient)}

			var wg sync.WaitGroup
			work := make(chan int)
			for range inFlight {
				wg.Go(func() {
					for n := range work {
						if n%5 == 4 {
							leave(t, clients[n%2])
							continue
						}
						switch err := testMethods[n/2%4].call(t.Context(), clients[n%2]); status.Code(err) {
						case codes.OK, codes.NotFound, codes.Unknown, codes.Internal:
						default:
							t.Errorf("call %d: %v", n, err)
						}
					}
				})
			}
			for n := range calls {
				work <- n
			}
			close(work)
			wg.Wait()
			stopServer()
			stopClient()
			// A context that was canceled ends flows in the background.
			for by := time.Now().Add(time.Minute); s.held() > 0 && time.Now().Before(by); {
				runtime.Gosched()
			}

			flows := s.starts.all()
			if len(flows) != calls {
				t.Errorf("%d flows want %d", len(flows), calls)
			}
			for _, flow := range flows {
				if flow.Decision() != flowctl.Accepted {
					t.Errorf("%v: %v", flow, flow.Err())
				}
				if _, err := flow.End(t.Context()); !errors.Is(err, flowctl.ErrEnded) {
					t.Errorf("%v was not ended", flow)
				}
			}
			count := make(map[flowctl.Status]int)
			for _, end := range s.ends() {
				count[end.Status]++
			}
			// Four fifths of the calls are served to their end, and a fifth of these fail or panic.
			if ok, failed := count[flowctl.StatusOK], count[flowctl.StatusError]; ok+failed != calls || failed != calls*16/100 {
				t.Errorf("%d flows ended well and %d failed want %d", ok, failed, calls)
			}
			if held := s.held(); held != 0 {
				t.Errorf("%d slots are held", held)
			}
		})
	}
}

// leave begins a stream and leaves it to its context.
func leave(t *testing.T, client testgrpc.TestServiceClient) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := client.FullDuplexCall(ctx)
	if err != nil {
		t.Error(err)
		return
	}
	if err := stream.Send(&testgrpc.StreamingOutputCallRequest{Payload: payload}); err != nil {
		t.Error(err)
	}
	if _, err := stream.Recv(); err != nil { // else the server may not get to see it
		t.Error(err)
	}
}
