package agent_test

import (
	"context"
	"runtime"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/internal/testing/heap"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/internal/testing/sides"
)

// Calls that are refused for their key leave nothing behind, whatever their deadline is.
func TestRefusedCallsLeaveNoMemory(t *testing.T) {
	e, err := engine.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	server := grpc.NewServer(agent.ServerOptions(agent.WithKeys(func(string) (string, bool) { return "", false }))...)
	agent.Register(server, e)
	conn, err := grpc.NewClient("passthrough:///localhost", grpc.WithTransportCredentials(insecure.NewCredentials()), sides.Serve(t, server))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stub := checkv1.NewFlowControlServiceClient(conn)
	for _, tt := range []struct {
		name    string
		timeout time.Duration
	}{
		{"no deadline", 0},
		{"a deadline in an hour", time.Hour},
	} {
		t.Run(tt.name, func(t *testing.T) {
			calls := func(n int) {
				for range n {
					ctx, cancel := t.Context(), context.CancelFunc(func() {})
					if tt.timeout > 0 {
						ctx, cancel = context.WithTimeout(ctx, tt.timeout)
					}
					_, err := stub.Check(ctx, &checkv1.CheckRequest{ControlPoint: "point"})
					cancel()
					if status.Code(err) != codes.Unauthenticated {
						t.Fatalf("Check() = %v want Unauthenticated", err)
					}
				}
			}
			memory := func() (left int64, allocated uint64) {
				left = heap.Live()
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				return left, m.TotalAlloc
			}
			calls(100)
			n := race.Pick(1200, 5000)
			before, allocatedBefore := memory()
			begin := time.Now()
			calls(n)
			took := time.Since(begin)
			after, allocated := memory()
			grown, perCall := after-before, (allocated-allocatedBefore)/uint64(n)
			t.Logf("%v a call; %d bytes are allocated and %d are left", took/time.Duration(n), perCall, grown/int64(n))
			if perCall > 1<<20 {
				t.Errorf("%d bytes are allocated for a call want at most 1 MiB", perCall)
			}
			if grown > int64(100*n) {
				t.Errorf("%d bytes a call are left", grown/int64(n))
			}
		})
	}
}
