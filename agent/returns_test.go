package agent_test

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/flowctl"
)

// holds wants so many flows to hold a slot.
func (a *agentOfSessions) holds(t *testing.T, want int, when string) {
	t.Helper()
	if got := a.inFlight(); got != want {
		t.Errorf("%d flows hold a slot %s want %d", got, when, want)
	}
}

// The end of a flow that does not reach the agent comes with the session, whatever it met.
func TestEndsThatMeetNoAgent(t *testing.T) {
	for _, tt := range []struct {
		name  string
		meets func(*testing.T, *agentOfSessions, *flowctl.Client)
		held  int // before the agent is reached again
		again func(*agentOfSessions)
	}{
		{"an agent that is not reached", func(_ *testing.T, a *agentOfSessions, _ *flowctl.Client) { a.unplug() }, 1, func(a *agentOfSessions) { a.plug() }},
		{"an agent that is reached anew", func(_ *testing.T, a *agentOfSessions, _ *flowctl.Client) { a.unplug() }, 1, func(a *agentOfSessions) {
			a.cut()
			a.plug()
		}},
		{"an agent whose answer is not heard", func(_ *testing.T, a *agentOfSessions, _ *flowctl.Client) { a.muzzle() }, 0, func(a *agentOfSessions) {
			a.cut()
			a.plug()
		}},
		{"an agent that counts as dead", func(t *testing.T, a *agentOfSessions, client *flowctl.Client) {
			a.unplug()
			for range 5 { // which opens the breaker
				flow := client.Start(t.Context(), "other", flowctl.Params{})
				_, _ = flow.End(t.Context())
			}
		}, 1, func(a *agentOfSessions) { a.plug() }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAgentOfSessions(t, oneSlot(time.Hour))
				client := a.dial(t)
				flow := client.Start(t.Context(), "point", flowctl.Params{})
				if flow.Decision() != flowctl.Accepted {
					t.Fatal(flow, flow.Err())
				}
				tt.meets(t, a, client)
				if r, err := flow.End(t.Context()); r.Held != 1 || r.Returned != 0 || err == nil {
					t.Errorf("End() = %+v, %v", r, err)
				}
				a.holds(t, tt.held, "before the agent is reached again")
				tt.again(a)
				<-time.After(3 * time.Second) // for a connection
				a.holds(t, 0, "after it")
				next := client.Start(t.Context(), "point", flowctl.Params{})
				<-time.After(30 * time.Second)
				a.holds(t, 1, "when the next one has begun") // the return has not taken its slot
				if r, err := next.End(t.Context()); r.Returned != 1 || err != nil {
					t.Errorf("End() = %+v, %v of the next flow", r, err)
				}
			})
		})
	}
}

// The end of a flow that a balancer sends to another agent comes to the flow's own, with the session that drains there.
func TestEndsThatMeetAnotherAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, next := newAgentOfSessions(t, oneSlot(time.Hour)), newAgentOfSessions(t, oneSlot(time.Hour))
		client := a.dial(t)
		flow := client.Start(t.Context(), "point", flowctl.Params{})
		a.mu.Lock()
		a.listener = next.listener
		a.mu.Unlock()
		a.service.Drain()
		begin := time.Now()
		stopped := make(chan struct{})
		go func() {
			a.server.GracefulStop()
			close(stopped)
		}()
		<-time.After(5 * time.Second)
		other := client.Start(t.Context(), "point", flowctl.Params{})
		next.holds(t, 1, "at the next agent")
		a.holds(t, 1, "at the agent that drains")
		if r, err := flow.End(t.Context()); r.Held != 1 || err != nil {
			t.Errorf("End() = %+v, %v", r, err)
		}
		<-stopped
		if took := time.Since(begin); took > 6*time.Second {
			t.Errorf("the agent has stopped after %v", took)
		}
		a.holds(t, 0, "at the agent that has stopped")
		next.holds(t, 1, "at the next agent")
		if r, err := other.End(t.Context()); r.Returned != 1 || err != nil {
			t.Errorf("End() = %+v, %v at the next agent", r, err)
		}
	})
}

// Ends of many flows come all, in as many messages as it takes.
func TestManyEndsThatMeetNoAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const many = 1000
		a := newAgentOfSessions(t, slotsFor(many))
		client := a.dial(t)
		flows := make([]*flowctl.Flow, many)
		for i := range flows {
			if flows[i] = client.Start(t.Context(), "point", flowctl.Params{}); flows[i].Decision() != flowctl.Accepted {
				t.Fatal(flows[i], flows[i].Err())
			}
		}
		a.unplug()
		ended, end := context.WithCancel(t.Context())
		end()
		for _, flow := range flows[1:] {
			go func() { _, _ = flow.End(ended) }()
		}
		<-time.After(2 * time.Second)
		a.holds(t, many, "while nothing is carried")
		a.plug()
		<-time.After(2 * time.Second)
		a.holds(t, 1, "after it")
		if r, err := flows[0].End(t.Context()); r.Returned != 1 || err != nil {
			t.Errorf("End() = %+v, %v of a flow that went on", r, err)
		}
	})
}

// A flow that was admitted by an answer which its client did not get holds nothing.
func TestAnswersThatDoNotArrive(t *testing.T) {
	for _, tt := range []struct {
		name   string
		params flowctl.Params
		cancel bool // the caller's context ends
		again  func(*agentOfSessions)
	}{
		{"check", flowctl.Params{}, false, plugAgain},
		{"check that waits", flowctl.Params{MaxWait: time.Minute, CheckTimeout: 2 * time.Second}, false, plugAgain},
		{"check of a request", flowctl.Params{HTTP: &flowctl.HTTPRequest{Method: "GET", Path: "/"}}, false, plugAgain},
		{"check that is canceled", flowctl.Params{CheckTimeout: -1}, true, plugAgain},
		{"check on a connection that is cut", flowctl.Params{}, false, func(a *agentOfSessions) {
			a.cut()
			a.plug()
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAgentOfSessions(t, slotsFor(3))
				client := a.dial(t)
				keeps := client.Start(t.Context(), "point", flowctl.Params{}) // so that its session lives
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				a.muzzle()
				granted := make(chan int, 1)
				time.AfterFunc(time.Second/10, func() { granted <- a.inFlight() }) // before the check is given up
				if tt.cancel {
					time.AfterFunc(time.Second, cancel)
				}
				flow := client.Start(ctx, "point", tt.params)
				if d := flow.Decision(); d != flowctl.Unreachable && !tt.cancel || d != flowctl.Canceled && tt.cancel {
					t.Errorf("%v, %v", flow, flow.Err())
				}
				_, _ = flow.End(ctx)
				if got := <-granted; got != 2 {
					t.Errorf("%d flows hold a slot before the check is given up want 2", got)
				}
				tt.again(a)
				<-time.After(3 * time.Second)
				a.holds(t, 1, "after the agent was heard again")
				<-time.After(time.Minute)
				if r, err := keeps.End(t.Context()); r.Returned != 1 || err != nil {
					t.Errorf("End() = %+v, %v of the flow that went on", r, err)
				}
			})
		})
	}
}

func plugAgain(a *agentOfSessions) { a.plug() }

// The same holds for the first flows of a client, whose checks are part of a session that the client has heard nothing of yet.
func TestFirstAnswersThatDoNotArrive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		answers := make(chan struct{}) // closed when those of the session arrive
		a := serveSessions(t, slotsFor(3), append(agent.ServerOptions(),
			grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
				return handle(srv, lateStream{stream, answers})
			}),
			grpc.ChainUnaryInterceptor(func(ctx context.Context, m any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
				answer, err := handle(ctx, m)
				<-ctx.Done()
				<-time.After(time.Millisecond) // at the deadline itself, the client might still hear it
				return answer, err
			}))...)
		client := a.dial(t)
		flow := client.Start(t.Context(), "point", flowctl.Params{})
		if flow.Decision() != flowctl.Unreachable {
			t.Errorf("%v, %v", flow, flow.Err())
		}
		_, _ = flow.End(t.Context())
		a.holds(t, 1, "before the check is given up")
		close(answers)
		<-time.After(3 * time.Second)
		a.holds(t, 0, "after the agent was heard")
	})
}

// A lateStream sends nothing before the channel is closed.
type lateStream struct {
	grpc.ServerStream
	sends <-chan struct{}
}

func (s lateStream) SendMsg(m any) error {
	select {
	case <-s.sends:
		return s.ServerStream.SendMsg(m)
	case <-s.Context().Done():
		return s.Context().Err()
	}
}

// A check that its client has given up gets nothing, whichever of the two comes first, and only the session's own.
func TestChecksThatAreGivenUp(t *testing.T) {
	giveUp := &sessionv1.SessionRequest{Returns: []*sessionv1.Return{{Id: 7, Check: 3}}}
	for _, tt := range []struct {
		name     string
		session  string // that gives it up
		number   uint64 // of the check
		before   bool   // it is given up before
		late     time.Duration
		admitted bool
		held     int
	}{
		{"after it", sessionA, 3, false, 0, true, 0},
		{"long after it", sessionA, 3, false, 19 * time.Second, true, 0},
		{"after it, another one", sessionA, 4, false, 0, true, 1},
		{"after it, one without a number", sessionA, 0, false, 0, true, 1},
		{"after it, by another session", sessionB, 3, false, 0, true, 1},
		{"before it", sessionA, 3, true, 0, false, 0},
		{"before it, another one", sessionA, 4, true, 0, true, 1},
		{"before it, by another session", sessionB, 3, true, 0, true, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAgentOfSessions(t, oneSlot(time.Hour))
				stub := checkv1.NewFlowControlServiceClient(a.conn(t))
				own := a.stream(t, sessionA, "")
				say(t, own, heartbeat)
				by := own
				if tt.session != sessionA {
					by = a.stream(t, tt.session, "")
					say(t, by, heartbeat)
				}
				gives := func() {
					for range 2 { // a client that has not heard the answer
						if got := say(t, by, giveUp).GetReturned(); !slices.Equal(got, []uint64{7}) {
							t.Errorf("returned = %v", got)
						}
					}
				}
				if tt.before {
					gives()
				}
				answer, err := stub.Check(withSession(t.Context(), sessionA, ""),
					&checkv1.CheckRequest{ControlPoint: "point", SessionCheck: tt.number})
				if admitted := err == nil && answer.GetDecisionType() == checkv1.CheckResponse_DECISION_TYPE_ACCEPTED; admitted != tt.admitted {
					t.Errorf("%v, %v", answer, err)
				}
				if err != nil && status.Code(err) != codes.Canceled {
					t.Error(err)
				}
				if !tt.before {
					for range tt.late / time.Second {
						<-time.After(time.Second)
						say(t, own, heartbeat)
					}
					gives()
				}
				a.holds(t, tt.held, "in the end")
			})
		})
	}
}
