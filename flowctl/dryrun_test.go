package flowctl_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
)

// The agent learns whether the client runs the flow whatever it says.
func TestDryRunIsSaid(t *testing.T) {
	for _, dry := range []bool{false, true} {
		for name, params := range map[string]flowctl.Params{
			"plain":  {},
			"own":    {RampMode: true},
			"labels": {Labels: many("k", 64)},
			"lookup": {ResultCacheKey: "key"},
			"HTTP":   {HTTP: &flowctl.HTTPRequest{Method: "GET"}},
		} {
			agent := flowtest.NewAgent(t)
			opts := []flowctl.Option{flowctl.WithLabels(map[string]string{"d": "v"}), flowctl.WithCheckTimeout(time.Minute)}
			if dry {
				opts = append(opts, flowctl.WithDryRun())
			}
			client := agent.Client(opts...)
			_, _ = client.Start(t.Context(), "point", params).End(t.Context())
			check := agent.Checks()[0]
			if check.Request.GetDryRun() != dry || check.HTTP != nil && check.HTTP.GetDryRun() != dry {
				t.Errorf("%s: a check says %v and %v want %v", name, check.Request, check.HTTP, dry)
			}
		}
	}
}

// hangAt has calls of the method get no answer.
func hangAt(method string) grpc.DialOption {
	return grpc.WithChainUnaryInterceptor(func(ctx context.Context, called string, req, reply any, cc *grpc.ClientConn,
		invoke grpc.UnaryInvoker, opts ...grpc.CallOption,
	) error {
		if !strings.HasSuffix(called, "/"+method) {
			return invoke(ctx, called, req, reply, cc, opts...)
		}
		<-ctx.Done()
		return status.FromContextError(ctx.Err()).Err()
	})
}

// An agent that does not know of dry runs gives no value with a rejection: the client asks for it, in the time that is
// left, and what goes wrong is a lookup's error and not the flow's.
func TestDryRunAtOtherAgents(t *testing.T) {
	params := flowctl.Params{ResultCacheKey: "result", GlobalCacheKeys: []string{"global"}, CheckTimeout: time.Second}
	rejected := flowtest.Answer{Reason: flowctl.ReasonRateLimited, RetryAfter: time.Minute}
	t.Run("value", func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.SetResult("point", "result", []byte("found"))
		agent.Answer(rejected)
		flow := agent.Client(flowctl.WithDryRun()).Start(t.Context(), "point", params)
		defer func() { _, _ = flow.End(t.Context()) }()
		if value, hit, err := flow.ResultCache(); string(value) != "found" || !hit || err != nil {
			t.Errorf("ResultCache() = %q, %v, %v want a hit", value, hit, err)
		}
		if value, hit, err := flow.GlobalCache("global"); hit || err != nil {
			t.Errorf("GlobalCache() = %q, %v, %v want a miss", value, hit, err)
		}
		if !errors.Is(flow.Err(), flowctl.ErrRejected) || flow.RetryAfter() != time.Minute {
			t.Errorf("Err() = %v, RetryAfter() = %v want the rejection", flow.Err(), flow.RetryAfter())
		}
	})
	t.Run("in force", func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.SetResult("point", "result", []byte("found"))
		agent.Answer(rejected)
		flow := agent.Client().Start(t.Context(), "point", params)
		defer func() { _, _ = flow.End(t.Context()) }()
		if _, hit, err := flow.ResultCache(); hit || !errors.Is(err, flowctl.ErrRejected) {
			t.Errorf("ResultCache() = %v, %v want the rejection", hit, err)
		}
	})
	t.Run("hangs at the lookup", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			agent := flowtest.NewAgent(t)
			client := agent.Client(flowctl.WithDryRun(), flowctl.WithDialOptions(hangAt("CacheLookup")))
			agent.Answer(flowtest.Answer{Reason: flowctl.ReasonRateLimited, Delay: 600 * time.Millisecond})
			begin := time.Now()
			flow := client.Start(t.Context(), "point", params)
			defer func() { _, _ = flow.End(t.Context()) }()
			if took := time.Since(begin); took != time.Second || flow.Decision() != flowctl.Rejected || !flow.ShouldRun() {
				t.Errorf("%v after %v want it rejected, and to run, after a second", flow, took)
			}
			if _, hit, err := flow.ResultCache(); hit || err == nil || errors.Is(err, flowctl.ErrRejected) {
				t.Errorf("ResultCache() = %v, %v want what went wrong with the lookup", hit, err)
			}
			if _, hit, err := flow.GlobalCache("global"); hit || err == nil || errors.Is(err, flowctl.ErrRejected) {
				t.Errorf("GlobalCache() = %v, %v want what went wrong with the lookup", hit, err)
			}
		})
	})
	t.Run("what the lookup brings is bounded", func(t *testing.T) {
		entries := mem.BufferSlice{mem.SliceBuffer(bytes.Repeat([]byte{0x12, 0}, 4097))} // of the map
		refused := false
		look := grpc.WithChainUnaryInterceptor(func(ctx context.Context, called string, req, reply any, cc *grpc.ClientConn,
			invoke grpc.UnaryInvoker, opts ...grpc.CallOption,
		) error {
			if !strings.HasSuffix(called, "/CacheLookup") {
				return invoke(ctx, called, req, reply, cc, opts...)
			}
			for _, o := range opts {
				if forced, ok := o.(grpc.ForceCodecV2CallOption); ok {
					refused = forced.CodecV2.Unmarshal(entries, new(checkv1.CacheLookupResponse)) != nil
				}
			}
			return status.Error(codes.Internal, strings.Repeat("ä", 10<<10))
		})
		agent := flowtest.NewAgent(t)
		agent.Answer(rejected)
		flow := agent.Client(flowctl.WithDryRun(), flowctl.WithDialOptions(look)).Start(t.Context(), "point", params)
		defer func() { _, _ = flow.End(t.Context()) }()
		if _, _, err := flow.ResultCache(); len(inFull(err)) > 2<<10 {
			t.Errorf("an error of %d bytes: %.100s…", len(inFull(err)), inFull(err))
		}
		if !refused {
			t.Error("4097 entries are decoded")
		}
	})
	t.Run("a component in dry run does not name the rejection", func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{Response: &checkv1.CheckResponse{
			DecisionType: checkv1.CheckResponse_DECISION_TYPE_REJECTED,
			LimiterDecisions: []*checkv1.LimiterDecision{
				{ComponentId: "dry", Dropped: true, DryRun: true, WaitTime: durationpb.New(time.Hour)},
				{ComponentId: "force", Dropped: true},
			},
		}})
		flow := agent.Client().Start(t.Context(), "point", flowctl.Params{})
		defer func() { _, _ = flow.End(t.Context()) }()
		rejected, ok := errors.AsType[*flowctl.RejectedError](flow.Err())
		if !ok || rejected.Component() != "force" {
			t.Errorf("Err() = %+v want one of the component in force", flow.Err())
		}
	})
}
