package agent_test

import (
	"context"
	"errors"
	"net"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

// Closing an engine rejects the flows that wait, at either kind of agent: none of them runs because of a shutdown. Flows
// that start afterwards are Unreachable, and flows in flight still end.
func TestCloseRejectsWaitingFlows(t *testing.T) {
	at, hour := policy.At("point"), time.Hour
	byTokens := policy.Scheduler{TokensLabel: "tokens"}
	for _, tt := range []struct {
		name       string
		components []policy.Component
		tokens     []string // of the flows that wait
		held       int      // slots, of a flow in flight
	}{
		{"for a slot", []policy.Component{
			policy.ConcurrencyScheduler{Selectors: at, Max: 1, MaxInflight: hour},
		}, []string{"1", "1", "1"}, 1},
		{"for tokens", []policy.Component{
			policy.QuotaScheduler{Selectors: at, Capacity: 3, Fill: 1, Interval: hour, Scheduler: byTokens},
		}, []string{"3", "3", "3"}, 0},
		{"behind a flow that wants more than there is", []policy.Component{
			policy.QuotaScheduler{Selectors: at, Capacity: 3, Fill: 1, Interval: hour, Scheduler: byTokens},
		}, []string{"3", "1", "1"}, 0},
		{"with a slot, for tokens", []policy.Component{
			policy.ConcurrencyScheduler{Selectors: at, Max: 2, MaxInflight: hour},
			policy.QuotaScheduler{Selectors: at, Capacity: 3, Fill: 1, Interval: hour, Scheduler: byTokens},
		}, []string{"3", "1", "1"}, 1},
		{"while another scheduler tells when to retry", []policy.Component{
			policy.QuotaScheduler{Selectors: at, Capacity: 3, Fill: 1, Interval: hour, Scheduler: byTokens},
			policy.QuotaScheduler{Selectors: at, Capacity: 1, Fill: 1, Interval: time.Minute},
		}, []string{"3", "1", "1"}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			overEngines(t, []policy.Policy{{Name: "p", Components: tt.components}}, func(t *testing.T, e *engine.Engine, client *flowctl.Client) {
				params := func(tokens string) flowctl.Params {
					return flowctl.Params{Labels: map[string]string{"tokens": tokens}, CheckTimeout: 9 * hour}
				}
				first := client.Start(t.Context(), "point", params("1"))
				if !first.ShouldRun() {
					t.Fatal(first.Err())
				}
				begin := time.Now()
				retry := headgate.RetryPolicy{Attempts: -1, Budget: -1}
				var wg sync.WaitGroup
				for _, tokens := range tt.tokens {
					wg.Go(func() {
						_, err := headgate.Guard(headgate.Retrying(client, retry), "point", params(tokens),
							func(context.Context) (int, error) { t.Errorf("a flow ran after %v", time.Since(begin)); return 0, nil }, nil)(t.Context())
						var rejected *flowctl.RejectedError
						if !errors.As(err, &rejected) || rejected.Reason != flowctl.ReasonNoTokens || rejected.RetryAfter() != 0 {
							t.Errorf("error = %v want a rejection for want of tokens, without a time to retry", err)
						}
					})
					synctest.Wait()
				}
				<-time.After(time.Second)
				_ = e.Close()
				wg.Wait()
				if took := time.Since(begin); took != time.Second {
					t.Errorf("the flows were answered after %v want at once, after 1s", took)
				}
				if got, err := first.End(t.Context()); got.Held != tt.held || got.Returned != tt.held || err != nil {
					t.Errorf("End() = %+v, %v want %d slots back", got, err, tt.held)
				}
				next := client.Start(t.Context(), "point", params("1"))
				if next.Decision() != flowctl.Unreachable || !next.ShouldRun() {
					t.Errorf("%v, %v want it unreachable", next, next.Err())
				}
				closed := uint64(0)
				for _, c := range e.Stats().Components {
					for _, w := range c.Workloads {
						closed += w.Closed
					}
				}
				if closed != uint64(len(tt.tokens)) {
					t.Errorf("%d flows count as closed want %d", closed, len(tt.tokens))
				}
			})
		})
	}
}

// The cause of such a rejection is in its error, where the agent is an engine in the process.
func TestCloseIsTheCause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{
			policy.ConcurrencyScheduler{ID: "slots", Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour},
		}}})
		if err != nil {
			t.Fatal(err)
		}
		client, err := flowctl.New(e)
		if err != nil {
			t.Fatal(err)
		}
		client.Start(t.Context(), "point", flowctl.Params{})
		time.AfterFunc(time.Second, func() { _ = e.Close() })
		flow := client.Start(t.Context(), "point", flowctl.Params{CheckTimeout: time.Minute})
		rejected, ok := errors.AsType[*flowctl.RejectedError](flow.Err())
		if !ok || rejected.Cause() != flowctl.CauseClosed || rejected.Component() != "slots" {
			t.Errorf("error = %v want a rejection by the component, caused by the close", flow.Err())
		}
	})
}

// A server that stops gracefully waits for checks that wait. Closing its engine answers them, and the server is done.
func TestCloseLetsTheServerStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New(scheduler())
		if err != nil {
			t.Fatal(err)
		}
		l := bufconn.Listen(1 << 16)
		server := grpc.NewServer(agent.ServerOptions()...)
		agent.Register(server, e)
		done := make(chan error, 1)
		go func() { done <- server.Serve(l) }()
		dialer := grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) })
		stub := (&served{dialer: dialer}).stub(t)
		const waiting = 50
		var wg sync.WaitGroup
		for i := range waiting + 1 {
			wg.Go(func() {
				m, err := stub.Check(t.Context(), &checkv1.CheckRequest{ControlPoint: "point", Labels: map[string]string{"i": strconv.Itoa(i)}})
				if err != nil {
					t.Errorf("Check() = %v, %v want an answer", status.Code(err), err)
				} else if rejected := m.GetDecisionType() == checkv1.CheckResponse_DECISION_TYPE_REJECTED; rejected != (i > 0) ||
					rejected && m.GetRejectReason() != checkv1.CheckResponse_REJECT_REASON_NO_TOKENS {
					t.Errorf("flow %d: %v, %v want the ones that waited rejected", i, m.GetDecisionType(), m.GetRejectReason())
				}
			})
			synctest.Wait()
		}
		begin := time.Now()
		stopped := make(chan struct{})
		go func() { server.GracefulStop(); close(stopped) }()
		time.AfterFunc(3*time.Second, func() { _ = e.Close() })
		<-stopped
		wg.Wait()
		if took := time.Since(begin); took != 3*time.Second {
			t.Errorf("the server stopped after %v want 3s, when the engine was closed", took)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		if _, err := stub.Check(t.Context(), &checkv1.CheckRequest{ControlPoint: "point"}); status.Code(err) != codes.Unavailable {
			t.Errorf("Check() = %v want Unavailable", err)
		}
	})
}
