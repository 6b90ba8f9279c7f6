package flowctl_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/sides"
)

// holding answers every check with slots, and fails those calls of FlowEnd that it is told to.
type holding struct {
	checkv1.UnimplementedFlowControlServiceServer
	answer *checkv1.CheckResponse
	fails  map[int]bool // by the number of the call

	calls    int // one after the other
	returned map[string]int
	largest  int
}

func (h *holding) Check(context.Context, *checkv1.CheckRequest) (*checkv1.CheckResponse, error) {
	return h.answer, nil
}

func (h *holding) FlowEnd(_ context.Context, m *checkv1.FlowEndRequest) (*checkv1.FlowEndResponse, error) {
	h.calls++
	h.largest = max(h.largest, proto.Size(m))
	if h.fails[h.calls-1] {
		return nil, status.Error(codes.ResourceExhausted, "too large")
	}
	response := new(checkv1.FlowEndResponse)
	for _, ref := range m.GetInflightRequests() {
		h.returned[ref.GetRequestId()]++
		response.TokenReturnStatuses = append(response.TokenReturnStatuses, &checkv1.TokenReturnStatus{InflightRequestRef: ref, Returned: true})
	}
	return response, nil
}

// A flow with many slots ends by as many calls as it takes, each of which an agent accepts. If one fails, the others give
// back theirs.
func TestFlowEndsByManyCalls(t *testing.T) {
	for _, tt := range []struct {
		name         string
		slots, label int
		fails        map[int]bool
		calls        int
		back         int // at least
	}{
		{"one slot", 1, 3, nil, 1, 1},
		{"800 slots", 800, 3, nil, 1, 800},
		{"1200 slots", 1200, 3, nil, 2, 1200},
		{"long labels", 600, 340, nil, 2, 600},
		{"the first call fails", 600, 340, map[int]bool{0: true}, 2, 50},
		{"the second call fails", 600, 340, map[int]bool{1: true}, 2, 400},
	} {
		t.Run(tt.name, func(t *testing.T) {
			agent := &holding{answer: new(checkv1.CheckResponse), fails: tt.fails, returned: make(map[string]int)}
			for i := range tt.slots {
				agent.answer.LimiterDecisions = append(agent.answer.LimiterDecisions, &checkv1.LimiterDecision{
					PolicyName: "p", ComponentId: "root.0",
					Details: &checkv1.LimiterDecision_ConcurrencyLimiterInfo_{ConcurrencyLimiterInfo: &checkv1.LimiterDecision_ConcurrencyLimiterInfo{
						Label: strings.Repeat("x", tt.label), RequestId: fmt.Sprint("slot-", i),
					}},
				})
			}
			server := grpc.NewServer()
			checkv1.RegisterFlowControlServiceServer(server, agent)
			client := sides.Dial(t, server, flowctl.WithoutTelemetry(), flowctl.WithEndTimeout(time.Minute), flowctl.WithCheckTimeout(-1))
			flow := client.Start(t.Context(), "point", flowctl.Params{})
			if flow.Decision() != flowctl.Accepted {
				t.Fatal(flow.Err())
			}
			got, err := flow.End(t.Context())
			if (err != nil) != (tt.fails != nil) {
				t.Errorf("End() = %v want an error: %v", err, tt.fails != nil)
			}
			if got.Held != tt.slots || got.Returned != len(agent.returned) || got.Returned < tt.back || tt.fails != nil && got.Returned == tt.slots {
				t.Errorf("End() = %+v, the agent has %d of %d slots back, want at least %d", got, len(agent.returned), tt.slots, tt.back)
			}
			if agent.calls != tt.calls || agent.largest > 192<<10 {
				t.Errorf("%d calls of at most %d bytes want %d of at most 192 KiB", agent.calls, agent.largest, tt.calls)
			}
			for id, n := range agent.returned {
				if n != 1 {
					t.Errorf("%s is back %d times", id, n)
				}
			}
		})
	}
}
