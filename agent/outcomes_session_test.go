package agent_test

import (
	"context"
	"errors"
	"math"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/telemetry"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// twoFailures is a circuit breaker that two failures open, for a minute.
func twoFailures() []policy.Component {
	return []policy.Component{policy.CircuitBreaker{
		ID: "breaker", Selectors: policy.At("point"), FailureCount: 2, SlowAfter: 1500 * time.Millisecond,
		Window: time.Hour, OpenDuration: time.Minute,
	}}
}

func (a *agentOfSessions) breaker(t *testing.T) engine.Usage {
	t.Helper()
	c, err := a.engine.Component("p", "breaker")
	if err != nil {
		t.Fatal(err)
	}
	usage, err := c.Peek(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	return usage
}

// clientOf is a client of the agent that has telemetry.
func (a *agentOfSessions) clientOf(t *testing.T, opts ...flowctl.Option) *flowctl.Client {
	t.Helper()
	client, err := flowctl.Dial("passthrough:///localhost", append(opts, flowctl.WithInsecure(), a.dialer())...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close(context.WithoutCancel(t.Context())) })
	synctest.Wait() // for the session
	return client
}

// A circuit breaker learns from a session at once how the session's flows end. The spans that come later count no flow again.
func TestOutcomesOfClients(t *testing.T) {
	failed := func(_ context.CancelFunc, f *flowctl.Flow) { f.SetError(errors.New("failed")) }
	lasts := func(d time.Duration) func(context.CancelFunc, *flowctl.Flow) {
		return func(context.CancelFunc, *flowctl.Flow) { <-time.After(d) }
	}
	for _, tt := range []struct {
		name   string
		work   func(cancel context.CancelFunc, f *flowctl.Flow)
		flows  int
		cached bool
		want   string
	}{
		{"errors", failed, 2, false, "open"},
		{"one error", failed, 1, false, "closed"},
		{"successes", func(context.CancelFunc, *flowctl.Flow) {}, 9, false, "closed"},
		{"slow flows", lasts(1600 * time.Millisecond), 2, false, "open"},
		{"flows that are not slow", lasts(1400 * time.Millisecond), 9, false, "closed"},
		{"canceled flows", func(cancel context.CancelFunc, f *flowctl.Flow) {
			<-time.After(2 * time.Second)
			cancel()
			f.SetError(context.Canceled)
		}, 9, false, "closed"},
		{"errors beside cached results", failed, 9, true, "closed"},
	} {
		for name, opts := range map[string][]flowctl.Option{"telemetry": nil, "no telemetry": {flowctl.WithoutTelemetry()}} {
			t.Run(tt.name+", "+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					a := newAgentOfSessions(t, twoFailures())
					client := a.clientOf(t, opts...)
					var params flowctl.Params
					if tt.cached {
						params.ResultCacheKey = "key"
						flow := client.Start(t.Context(), "point", params)
						if err := flow.SetResultCache(t.Context(), []byte("value"), time.Hour); err != nil {
							t.Fatal(err)
						}
						_, _ = flow.End(t.Context())
					}
					for range tt.flows {
						<-time.After(time.Microsecond)
						ctx, cancel := context.WithCancel(t.Context())
						flow := client.Start(ctx, "point", params)
						if flow.Decision() != flowctl.Accepted || !flow.CheckResponse().GetAwaitsOutcome() {
							t.Fatal(flow, flow.CheckResponse())
						}
						tt.work(cancel, flow)
						begin := time.Now()
						if r, err := flow.End(t.Context()); err != nil || r != (flowctl.EndResponse{}) || time.Since(begin) != 0 {
							t.Errorf("End() = %+v, %v after %v", r, err, time.Since(begin))
						}
						cancel()
					}
					synctest.Wait()
					if got := a.breaker(t).State; got != tt.want {
						t.Errorf("the breaker is %s at once want %s", got, tt.want)
					}
					<-time.After(5 * time.Second) // the spans have come
					if got := a.breaker(t).State; got != tt.want {
						t.Errorf("the breaker is %s later want %s", got, tt.want)
					}
				})
			})
		}
	}
}

// Close sends what was said of flows just before it.
func TestOutcomesBeforeClose(t *testing.T) {
	for name, opts := range map[string][]flowctl.Option{"telemetry": nil, "no telemetry": {flowctl.WithoutTelemetry()}} {
		for _, tt := range []struct {
			name string
			meet func(*agentOfSessions)
			took time.Duration
			fail bool
			want string
		}{
			{"an agent that answers", func(*agentOfSessions) {}, 0, false, "open"},
			{"an agent that is slow", func(a *agentOfSessions) {
				a.unplug()
				time.AfterFunc(500*time.Millisecond, a.plug)
			}, 500 * time.Millisecond, false, "open"},
			{"an agent that is not reached", (*agentOfSessions).unplug, 2*time.Second + 10*time.Millisecond, true, "closed"},
			{"a connection that is cut", (*agentOfSessions).cut, 0, false, "closed"},
		} {
			t.Run(tt.name+", "+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					a := newAgentOfSessions(t, twoFailures())
					client := a.clientOf(t, opts...)
					var flows [2]*flowctl.Flow
					for i := range flows {
						<-time.After(time.Microsecond)
						flows[i] = client.Start(t.Context(), "point", flowctl.Params{})
						flows[i].SetError(errors.New("failed"))
					}
					tt.meet(a)
					for _, flow := range flows {
						if _, err := flow.End(t.Context()); err != nil {
							t.Error(err)
						}
					}
					ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
					defer cancel()
					begin := time.Now()
					err := client.Close(ctx)
					if took := time.Since(begin); len(opts) > 0 && (took != tt.took || (err != nil) != tt.fail) {
						t.Errorf("Close() = %v after %v want %v", err, took, tt.took)
					}
					if got := a.breaker(t).State; len(opts) > 0 && got != tt.want || got != "open" && tt.want == "open" {
						t.Errorf("the breaker is %s want %s", got, tt.want)
					}
					a.cut()
				})
			})
		}
	}
}

// A probe that was canceled gives its place back at once, and so does one whose caller had gone when the answer came.
func TestOutcomesOfProbes(t *testing.T) {
	for _, tt := range []struct {
		name  string
		probe func(t *testing.T, a *agentOfSessions, client *flowctl.Client)
		want  string
	}{
		{"canceled", func(t *testing.T, _ *agentOfSessions, client *flowctl.Client) {
			ctx, cancel := context.WithCancel(t.Context())
			flow := client.Start(ctx, "point", flowctl.Params{})
			cancel()
			flow.SetError(context.Canceled)
			_, _ = flow.End(t.Context())
		}, "half-open"},
		{"late", func(t *testing.T, a *agentOfSessions, client *flowctl.Client) {
			ctx, cancel := context.WithCancel(t.Context())
			a.unplug()
			time.AfterFunc(10*time.Millisecond, cancel)
			time.AfterFunc(20*time.Millisecond, a.plug)
			flow := client.Start(ctx, "point", flowctl.Params{})
			if flow.Decision() != flowctl.Canceled {
				t.Error(flow)
			}
			_, _ = flow.End(t.Context())
		}, "half-open"},
		{"failed", func(t *testing.T, _ *agentOfSessions, client *flowctl.Client) {
			flow := client.Start(t.Context(), "point", flowctl.Params{})
			flow.SetError(errors.New("failed"))
			_, _ = flow.End(t.Context())
		}, "open"},
		{"well", func(t *testing.T, _ *agentOfSessions, client *flowctl.Client) {
			_, _ = client.Start(t.Context(), "point", flowctl.Params{}).End(t.Context())
		}, "closed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAgentOfSessions(t, twoFailures())
				client := a.dial(t)
				for range 2 {
					flow := client.Start(t.Context(), "point", flowctl.Params{})
					flow.SetError(errors.New("failed"))
					_, _ = flow.End(t.Context())
				}
				<-time.After(time.Minute)
				tt.probe(t, a, client)
				synctest.Wait()
				if got := a.breaker(t); got.State != tt.want || got.InFlight != 0 {
					t.Errorf("the breaker is %s with %d probes want %s", got.State, got.InFlight, tt.want)
				}
			})
		})
	}
}

// Outcomes that are said while the connection is lost come on the next one.
func TestOutcomesAreSentAgain(t *testing.T) {
	for name, disturb := range map[string]func(*network){"before they arrive": (*network).unplug, "after they have arrived": (*network).muzzle} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAgentOfSessions(t, twoFailures())
				client := a.dial(t)
				flows := []*flowctl.Flow{client.Start(t.Context(), "point", flowctl.Params{}), client.Start(t.Context(), "point", flowctl.Params{})}
				end := func(f *flowctl.Flow) {
					f.SetError(errors.New("failed"))
					if _, err := f.End(t.Context()); err != nil {
						t.Error(err)
					}
				}
				disturb(a.network)
				end(flows[0])
				<-time.After(time.Second)
				a.cut()
				a.plug()
				<-time.After(5 * time.Second)
				if got := a.breaker(t).State; got != "closed" {
					t.Errorf("the breaker is %s by one failure", got)
				}
				end(flows[1])
				synctest.Wait()
				if got := a.breaker(t).State; got != "open" {
					t.Errorf("the breaker is %s by two failures", got)
				}
			})
		})
	}
}

// countedStream counts what the agent says on a session's stream, which is an answer to each message.
type countedStream struct {
	grpc.ServerStream
	n *atomic.Int32
}

func (s countedStream) SendMsg(m any) error {
	s.n.Add(1)
	return s.ServerStream.SendMsg(m)
}

// Flows that no circuit breaker has admitted cost no message more, at agents of Headgate and at others. Where one has, the outcome of a
// flow goes with its costs.
func TestOutcomesThatNobodyAwaits(t *testing.T) {
	for _, tt := range []struct {
		name, point string
		opts        []grpc.ServerOption
		costs       bool
		want        int32
		state       string
		left        float64
	}{
		{"a breaker", "point", nil, false, 2, "open", 98},
		{"a breaker, and costs", "point", nil, true, 2, "open", 90},
		{"no breaker at the control point", "other", nil, false, 0, "closed", 98},
		{"no breaker, and costs", "other", nil, true, 2, "closed", 90},
		{"an agent without sessions", "point", []grpc.ServerOption{sides.WithoutSessions()}, true, 0, "closed", 98},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var said atomic.Int32
				limit := policy.RateLimiter{
					ID: "limit", Selectors: append(policy.At("point"), policy.At("other")...), Capacity: 100, Interval: time.Hour, TokensLabel: "tokens",
				}
				a := serveSessions(t, append(twoFailures(), limit), append(append(agent.ServerOptions(), grpc.ChainStreamInterceptor(
					func(server any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
						return handle(server, countedStream{stream, &said})
					})), tt.opts...)...)
				client := a.dial(t)
				flows := []*flowctl.Flow{client.Start(t.Context(), tt.point, flowctl.Params{}), client.Start(t.Context(), tt.point, flowctl.Params{})}
				synctest.Wait()
				before := said.Load()
				for _, flow := range flows {
					flow.SetError(errors.New("failed"))
					if tt.costs {
						flow.Settle("tokens", 5)
					}
					_, _ = flow.End(t.Context())
					synctest.Wait()
				}
				if got := said.Load() - before; got != tt.want {
					t.Errorf("the ends of the flows cost %d messages want %d", got, tt.want)
				}
				if got := a.breaker(t).State; got != tt.state {
					t.Errorf("the breaker is %s want %s", got, tt.state)
				}
				c, err := a.engine.Component("p", "limit")
				if err != nil {
					t.Fatal(err)
				}
				if got, err := c.Peek(t.Context(), ""); err != nil || got.Remaining != tt.left {
					t.Errorf("%v tokens are left, %v want %v", got.Remaining, err, tt.left)
				}
			})
		})
	}
}

// What a peer can say of the two flows of its session. A session that is the peer's own says no more than the flows could.
func TestOutcomesOfPeers(t *testing.T) {
	type peer struct {
		flows []*checkv1.CheckResponse
		say   func(i int, o *sessionv1.Outcome) (settled bool)
		other func(i int, o *sessionv1.Outcome) (settled bool) // another session
		span  func(i int)                                      // of an error
	}
	failed := &sessionv1.Outcome{Status: sessionv1.Outcome_STATUS_ERROR}
	ok := func(took *durationpb.Duration) *sessionv1.Outcome {
		return &sessionv1.Outcome{Status: sessionv1.Outcome_STATUS_OK, Took: took}
	}
	for _, tt := range []struct {
		name    string
		do      func(p peer) (settled bool)
		settled bool
		want    string
	}{
		{"two errors", func(p peer) bool { return p.say(0, failed) && p.say(1, failed) }, true, "open"},
		{"an error again", func(p peer) bool { return p.say(0, failed) && p.say(0, failed) }, true, "closed"},
		{"an error, then its span", func(p peer) bool { defer p.span(0); return p.say(0, failed) }, true, "closed"},
		{"an error, after its span", func(p peer) bool { p.span(0); return p.say(0, failed) }, true, "closed"},
		{"an error, and the span of the other", func(p peer) bool { p.span(1); return p.say(0, failed) }, true, "open"},
		{"errors of another session", func(p peer) bool { return p.other(0, failed) || p.other(1, failed) }, false, "closed"},
		{"nothing", func(p peer) bool { return p.say(0, nil) && p.say(1, nil) }, true, "closed"},
		{"nothing, and errors later", func(p peer) bool {
			return p.say(0, nil) && p.say(1, new(sessionv1.Outcome)) && p.say(0, failed) && p.say(1, failed)
		}, true, "open"},
		{"a status that it does not know, and errors later", func(p peer) bool {
			return p.say(0, &sessionv1.Outcome{Status: 77}) && p.say(0, failed) && p.say(1, failed)
		}, true, "open"},
		{"unknown, and errors later", func(p peer) bool {
			unknown := &sessionv1.Outcome{Status: sessionv1.Outcome_STATUS_UNKNOWN}
			return p.say(0, unknown) && p.say(1, unknown) && p.say(0, failed) && p.say(1, failed)
		}, true, "closed"},
		{"slow", func(p peer) bool {
			<-time.After(2 * time.Second)
			return p.say(0, ok(durationpb.New(1600*time.Millisecond))) && p.say(1, ok(durationpb.New(math.MaxInt64)))
		}, true, "open"},
		{"not slow, said late", func(p peer) bool {
			<-time.After(2 * time.Second)
			return p.say(0, ok(durationpb.New(1400*time.Millisecond))) && p.say(1, ok(durationpb.New(0)))
		}, true, "closed"},
		{"longer than since the check", func(p peer) bool {
			return p.say(0, ok(durationpb.New(time.Hour))) && p.say(1, ok(durationpb.New(time.Hour)))
		}, true, "closed"},
		{"no time, said late", func(p peer) bool {
			<-time.After(2 * time.Second)
			return p.say(0, ok(nil)) && p.say(1, ok(nil))
		}, true, "closed"},
		{"a negative time", func(p peer) bool {
			return p.say(0, ok(durationpb.New(-1))) || p.say(1, ok(&durationpb.Duration{Seconds: math.MaxInt64, Nanos: -1}))
		}, false, "closed"},
		{"a negative time, and errors later", func(p peer) bool {
			return !p.say(0, ok(durationpb.New(-1))) && p.say(0, failed) && p.say(1, failed)
		}, true, "open"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAgentOfSessions(t, twoFailures())
				conn := a.conn(t)
				own, foreign := a.stream(t, sessionA, ""), a.stream(t, sessionB, "")
				say(t, own, heartbeat)
				say(t, foreign, heartbeat)
				p := peer{}
				for range 2 {
					<-time.After(time.Microsecond) // two flows of one time are the same to a span
					m, err := checkv1.NewFlowControlServiceClient(conn).Check(withSession(t.Context(), sessionA, ""),
						&checkv1.CheckRequest{ControlPoint: "point", ExpectEnd: true})
					if err != nil || !m.GetAwaitsOutcome() || m.GetSettlementId() == 0 {
						t.Fatal(m, err)
					}
					p.flows = append(p.flows, m)
				}
				by := func(stream sessionv1.SessionService_SessionClient) func(int, *sessionv1.Outcome) bool {
					return func(i int, o *sessionv1.Outcome) bool {
						return say(t, stream, &sessionv1.SessionRequest{Settlements: []*sessionv1.Settlement{
							{Id: p.flows[i].GetSettlementId(), Outcome: o},
						}}).GetResults()[0].GetSettled()
					}
				}
				p.say, p.other = by(own), by(foreign)
				p.span = func(i int) {
					spans := []*tracev1.Span{report{answer: p.flows[i], status: "Error"}.span()}
					data := &tracev1.TracesData{ResourceSpans: []*tracev1.ResourceSpans{{ScopeSpans: []*tracev1.ScopeSpans{{Spans: spans}}}}}
					if err := conn.Invoke(t.Context(), telemetry.Export, data, new(emptypb.Empty)); err != nil {
						t.Error(err)
					}
				}
				if settled := tt.do(p); settled != tt.settled {
					t.Errorf("settled is %v want %v", settled, tt.settled)
				}
				if got := a.breaker(t).State; got != tt.want {
					t.Errorf("the breaker is %s want %s", got, tt.want)
				}
			})
		})
	}
}
