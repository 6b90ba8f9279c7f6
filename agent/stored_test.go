package agent_test

import (
	"context"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/internal/testing/sharedtest"
	"github.com/headgate-go/headgate/internal/wire"
	"github.com/headgate-go/headgate/policy"
)

// What one message has about many flows goes to the store by one call, and the heartbeat that comes with it is answered before.
func TestStoredSessions(t *testing.T) {
	const flows, late = 200, 20 * time.Millisecond
	returns := func(answers []*checkv1.CheckResponse) *sessionv1.SessionRequest {
		m := new(sessionv1.SessionRequest)
		for i, answer := range answers {
			m.Returns = append(m.Returns, &sessionv1.Return{Id: uint64(i + 1), Slots: wire.Held(answer)})
		}
		return m
	}
	givenUp := func(answers []*checkv1.CheckResponse) *sessionv1.SessionRequest {
		m := new(sessionv1.SessionRequest)
		for i := range answers {
			m.Returns = append(m.Returns, &sessionv1.Return{Id: uint64(i + 1), Check: uint64(i + 1)})
		}
		return m
	}
	settled := func(answers []*checkv1.CheckResponse) *sessionv1.SessionRequest {
		m := new(sessionv1.SessionRequest)
		for _, answer := range answers {
			m.Settlements = append(m.Settlements, &sessionv1.Settlement{
				Id: answer.GetSettlementId(), Costs: []*sessionv1.Cost{{Label: "cost", Tokens: 3}},
			})
		}
		return m
	}
	limiter := policy.ConcurrencyLimiter{ID: "c", Selectors: policy.At("point"), Max: flows, MaxInflight: time.Hour, LimitBy: "user"}
	scheduler := policy.ConcurrencyScheduler{ID: "c", Selectors: policy.At("point"), Max: flows, MaxInflight: time.Hour, LimitBy: "user"}
	for _, tt := range []struct {
		name string
		c    policy.Component
		says func([]*checkv1.CheckResponse) *sessionv1.SessionRequest
		left float64 // of a user, afterwards
	}{
		{"slots of a limiter", limiter, returns, flows},
		{"slots of a scheduler", scheduler, returns, flows},
		{"checks at a limiter that are given up", limiter, givenUp, flows},
		{"checks at a scheduler that are given up", scheduler, givenUp, flows},
		{"costs", policy.RateLimiter{
			ID: "c", Selectors: policy.At("point"), Capacity: 3 * flows, Interval: time.Hour, LimitBy: "user", TokensLabel: "cost",
		}, settled, 3*flows - 3*flows/10},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := sharedtest.New().Instance()
				e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{tt.c}}}, engine.WithStore(store))
				if err != nil {
					t.Fatal(err)
				}
				a := serveEngine(t, e, agent.ServerOptions()...)
				stream := a.stream(t, sessionA, "")
				if err := stream.Send(heartbeat); err != nil {
					t.Fatal(err)
				}
				if _, err := stream.Recv(); err != nil {
					t.Fatal(err)
				}
				answers := make([]*checkv1.CheckResponse, flows)
				for i := range answers {
					answers[i], err = checkv1.NewFlowControlServiceClient(a.conn(t)).Check(withSession(t.Context(), sessionA, ""), &checkv1.CheckRequest{
						ControlPoint: "point", Labels: map[string]string{"user": strconv.Itoa(i % 10)}, SessionCheck: uint64(i + 1),
					})
					if err != nil || answers[i].GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_ACCEPTED {
						t.Fatal(answers[i], err)
					}
				}
				store.Behave(sharedtest.Behavior{Late: late})
				calls, began := store.Counted().Return, time.Now()
				m := tt.says(answers)
				m.Heartbeat = &sessionv1.Heartbeat{Number: 2}
				if err := stream.Send(m); err != nil {
					t.Fatal(err)
				}
				response, err := stream.Recv()
				if err != nil || response.GetHeartbeat().GetAcknowledges() != 2 || time.Since(began) > 0 {
					t.Errorf("%v, %v after %v want the heartbeat's answer at once", response, err, time.Since(began))
				}
				response, err = stream.Recv()
				if got := len(response.GetReturned()) + len(response.GetResults()); err != nil || got != flows || time.Since(began) > late {
					t.Errorf("%d returns and settlements, %v after %v want %d after one call", got, err, time.Since(began), flows)
				}
				for _, result := range response.GetResults() {
					if !result.GetSettled() {
						t.Errorf("settlement %d was not taken", result.GetId())
					}
				}
				if got := store.Counted().Return - calls; got != 1 {
					t.Errorf("%d calls of the store want one", got)
				}
				c, err := e.Component("p", "c")
				if err != nil {
					t.Fatal(err)
				}
				if u, err := c.Peek(t.Context(), "7"); err != nil || u.Remaining != tt.left {
					t.Errorf("Peek = %+v, %v want %v left", u, err, tt.left)
				}
			})
		})
	}
}

// The end of a flow with many slots asks the store once.
func TestStoredFlowEnd(t *testing.T) {
	const slots, late = 40, 20 * time.Millisecond
	synctest.Test(t, func(t *testing.T) {
		var components []policy.Component
		for range slots {
			components = append(components, policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour})
		}
		store := sharedtest.New().Instance()
		e, err := engine.New([]policy.Policy{{Name: "p", Components: components}}, engine.WithStore(store))
		if err != nil {
			t.Fatal(err)
		}
		client := checkv1.NewFlowControlServiceClient(serveEngine(t, e, agent.ServerOptions()...).conn(t))
		answer, err := client.Check(t.Context(), &checkv1.CheckRequest{ControlPoint: "point", ExpectEnd: true})
		if err != nil {
			t.Fatal(err)
		}
		store.Behave(sharedtest.Behavior{Late: late})
		began := time.Now()
		r, err := client.FlowEnd(t.Context(), &checkv1.FlowEndRequest{InflightRequests: wire.Held(answer)})
		if took := time.Since(began); err != nil || len(r.GetTokenReturnStatuses()) != slots || took > late {
			t.Errorf("%d statuses, %v after %v want %d after one call", len(r.GetTokenReturnStatuses()), err, took, slots)
		}
		for _, one := range r.GetTokenReturnStatuses() {
			if !one.GetReturned() {
				t.Errorf("%v was not returned", one)
			}
		}
		if got := store.Counted().Return; got != 1 {
			t.Errorf("%d calls of the store want one", got)
		}
	})
}

// A check that is given up gives back a slot that the agent has granted without the store, too.
func TestStoredChecksGivenUpInAnOutage(t *testing.T) {
	for name, c := range map[string]policy.Component{
		"limiter":   policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour},
		"scheduler": policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := sharedtest.New().Instance()
				store.Behave(sharedtest.Behavior{Err: shared.ErrDown})
				e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{c}}}, engine.WithStore(store))
				if err != nil {
					t.Fatal(err)
				}
				a := serveEngine(t, e, agent.ServerOptions()...)
				stream := a.stream(t, sessionA, "")
				say := func(m *sessionv1.SessionRequest) {
					t.Helper()
					if err := stream.Send(m); err != nil {
						t.Fatal(err)
					}
					if _, err := stream.Recv(); err != nil {
						t.Fatal(err)
					}
				}
				say(heartbeat)
				for number := range uint64(3) {
					ctx, cancel := context.WithTimeout(withSession(t.Context(), sessionA, ""), 100*time.Millisecond)
					defer cancel()
					answer, err := checkv1.NewFlowControlServiceClient(a.conn(t)).Check(ctx, &checkv1.CheckRequest{ControlPoint: "point", SessionCheck: number + 1})
					if err != nil || answer.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_ACCEPTED {
						t.Errorf("check %d: %v, %v want it accepted", number, answer, err)
					}
					say(&sessionv1.SessionRequest{Returns: []*sessionv1.Return{{Id: number + 1, Check: number + 1}}})
				}
			})
		})
	}
}
