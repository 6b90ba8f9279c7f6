package flowctl_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/flowinfo"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

const ms = time.Millisecond

// An outcome is what is decided about a flow that has to wait, and when.
type outcome struct {
	after    time.Duration
	decision flowctl.Decision
	cause    flowctl.RejectCause
	short    bool // of time, because of the caller's deadline
}

// When a flow that has to wait is decided about. A slot comes free after 10 s. An agent that does not know MaxWait answers
// then.
func TestMaxWait(t *testing.T) {
	const never = 0
	type key struct{ maxWait, checkTimeout, deadline time.Duration }
	timedOut := func(after time.Duration, short bool) outcome {
		return outcome{after, flowctl.Rejected, flowctl.CauseTimeout, short}
	}
	at := func(after time.Duration, d flowctl.Decision) outcome { return outcome{after: after, decision: d} }
	now := outcome{0, flowctl.Rejected, flowctl.CauseQueueTooLong, false}
	accepted := at(10*time.Second, flowctl.Accepted)
	engines, others := make(map[key]outcome), make(map[key]outcome)
	for _, checkTimeout := range []time.Duration{0, 200 * ms} {
		timeout := checkTimeout
		if timeout == 0 {
			timeout = 300 * ms // the client's
		}
		// Rows: no deadline; 100 ms, which is before all else; 5 s, which is after.
		for maxWait, want := range map[time.Duration][3]outcome{
			0:              {timedOut(timeout-10*ms, false), timedOut(90*ms, true), timedOut(timeout-10*ms, false)},
			-1:             {accepted, timedOut(90*ms, true), timedOut(4990*ms, true)},
			flowctl.NoWait: {now, now, now},
			time.Second:    {timedOut(time.Second, false), timedOut(90*ms, true), timedOut(time.Second, false)},
		} {
			for i, deadline := range []time.Duration{never, 100 * ms, 5 * time.Second} {
				engines[key{maxWait, checkTimeout, deadline}] = want[i]
			}
		}
		unreachable := func(wait time.Duration) outcome { return at(wait+timeout, flowctl.Unreachable) }
		early, late := at(100*ms, flowctl.Canceled), at(5*time.Second, flowctl.Canceled) // when the agent ends the call
		for maxWait, want := range map[time.Duration][3]outcome{
			0:              {unreachable(0), early, unreachable(0)},
			-1:             {accepted, early, late},
			flowctl.NoWait: {unreachable(flowctl.NoWait), early, unreachable(flowctl.NoWait)},
			time.Second:    {unreachable(time.Second), early, unreachable(time.Second)},
		} {
			for i, deadline := range []time.Duration{never, 100 * ms, 5 * time.Second} {
				others[key{maxWait, checkTimeout, deadline}] = want[i]
			}
		}
	}
	setup := sides.Setup{
		Policies: sides.Policies(policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour}),
		Options:  []flowctl.Option{flowctl.WithCheckTimeout(300 * ms)},
	}
	for k, want := range engines {
		t.Run(fmt.Sprintf("MaxWait=%v/CheckTimeout=%v/deadline=%v", k.maxWait, k.checkTimeout, k.deadline), func(t *testing.T) {
			setup.InBubbles(t, sides.AllAndStored, func(t *testing.T, side *sides.Side) {
				want := want
				if side.Kind == sides.Scripted {
					want = others[k]
					side.Answer(flowtest.Answer{}, flowtest.Answer{Delay: 10 * time.Second})
				}
				holder := side.Client.Start(t.Context(), "point", flowctl.Params{CheckTimeout: time.Minute})
				if holder.Decision() != flowctl.Accepted {
					t.Fatal(holder.Err())
				}
				free := time.AfterFunc(10*time.Second, func() { _, _ = holder.End(context.WithoutCancel(t.Context())) })
				defer free.Stop()
				ctx := t.Context()
				if k.deadline != never {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, k.deadline)
					defer cancel()
				}
				begin := time.Now()
				flow := side.Client.Start(ctx, "point", flowctl.Params{MaxWait: k.maxWait, CheckTimeout: k.checkTimeout})
				took := time.Since(begin)
				got := outcome{after: took, decision: flow.Decision()}
				info, _ := flowinfo.From(flow.Context())
				got.short = info.ShortOfTime()
				if rejected, ok := errors.AsType[*flowctl.RejectedError](flow.Err()); ok {
					got.cause = rejected.Cause()
				}
				// A timeout of more than 99,999,999 ns travels in microseconds, rounded up.
				slack := time.Microsecond
				if side.Kind == sides.Stored { // which is asked every 5 ms at the most while flows wait
					slack += 5 * time.Millisecond
				}
				if d := got.after - want.after; d > 0 && d < slack {
					got.after = want.after
				}
				if got != want {
					t.Errorf("got %+v want %+v: %v", got, want, flow.Err())
				}
				_, _ = flow.End(ctx)
			})
		})
	}
}

// What of MaxWait travels: nothing that an agent does not need, and the deadline that is for those that do not know it.
func TestMaxWaitOnTheWire(t *testing.T) {
	for _, tt := range []struct {
		name           string
		params         flowctl.Params
		opts           []flowctl.Option
		field, timeout time.Duration // 0: none
	}{
		{"not set", flowctl.Params{}, nil, 0, 200 * ms},
		{"set", flowctl.Params{MaxWait: time.Second}, nil, time.Second, 1200 * ms},
		{"with a check timeout", flowctl.Params{MaxWait: time.Second, CheckTimeout: time.Second}, nil, time.Second, 2 * time.Second},
		{"without a check timeout", flowctl.Params{MaxWait: time.Second, CheckTimeout: -1}, nil, time.Second, 1200 * ms},
		{"until the deadline", flowctl.Params{MaxWait: -1}, nil, 0, 0},
		{"no wait", flowctl.Params{MaxWait: flowctl.NoWait}, nil, flowctl.NoWait, 200 * ms},
		{"no wait without a check timeout", flowctl.Params{MaxWait: flowctl.NoWait, CheckTimeout: -1}, nil, flowctl.NoWait, 200 * ms},
		{"a dry run, in which no flow waits", flowctl.Params{MaxWait: time.Hour}, []flowctl.Option{flowctl.WithDryRun()}, 0, 200 * ms},
		{"in ramp mode", flowctl.Params{MaxWait: time.Second, RampMode: true}, nil, time.Second, 1200 * ms},
		{"with defaults", flowctl.Params{MaxWait: time.Second}, []flowctl.Option{flowctl.WithLabels(map[string]string{"a": "b"})}, time.Second, 1200 * ms},
	} {
		for _, kind := range []string{"Check", "CheckHTTP"} {
			t.Run(tt.name+"/"+kind, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					script := flowtest.NewAgent(t)
					client := script.Client(tt.opts...)
					params := tt.params
					if kind == "CheckHTTP" {
						params.HTTP = get(nil)
					}
					for range 2 { // the second shares what the first had
						_, _ = client.Start(t.Context(), "point", params).End(t.Context())
					}
					for _, check := range script.Checks() {
						field := check.Request.GetMaxWait()
						if check.HTTP != nil {
							field = check.HTTP.GetMaxWait()
						} else if tt.name == "with defaults" && check.Request.GetLabels()["a"] != "b" {
							t.Errorf("labels: %v", check.Request.GetLabels())
						}
						if (field != nil) != (tt.field != 0) || field.AsDuration() != tt.field {
							t.Errorf("max_wait = %v want %v", field, tt.field)
						}
						if d := check.Timeout - tt.timeout; d < 0 || d > time.Microsecond {
							t.Errorf("the timeout is %v want %v", check.Timeout, tt.timeout)
						}
					}
				})
			})
		}
	}
}

// The longest times there are do not overflow.
func TestMaxWaitWithoutEnd(t *testing.T) {
	sides.Setup{}.InBubbles(t, sides.AllAndStored, func(t *testing.T, side *sides.Side) {
		flow := side.Client.Start(t.Context(), "point", flowctl.Params{MaxWait: math.MaxInt64, CheckTimeout: math.MaxInt64})
		if flow.Decision() != flowctl.Accepted {
			t.Errorf("%v: %v", flow, flow.Err())
		}
		_, _ = flow.End(t.Context())
	})
}

// lookups counts what a client asks besides checks, and answers as the test says.
type lookups struct {
	mu       sync.Mutex
	times    []time.Time
	under    int
	answer   func(ctx context.Context) error // nil: the agent answers
	together bool
}

func (l *lookups) intercept(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if method != checkv1.FlowControlService_CacheLookup_FullMethodName {
		return invoke(ctx, method, req, reply, conn, opts...)
	}
	l.mu.Lock()
	l.times = append(l.times, time.Now())
	l.under++
	l.together = l.together || l.under > 1
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.under--
	}()
	if l.answer != nil {
		return l.answer(ctx)
	}
	return invoke(ctx, method, req, reply, conn, opts...)
}

// check wants at most one lookup at a time, and one a second.
func (l *lookups) check(t *testing.T) int {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.together {
		t.Error("the agent was asked twice at once")
	}
	for i := range l.times {
		if i > 0 && l.times[i].Sub(l.times[i-1]) < time.Second {
			t.Errorf("the agent was asked after %v", l.times[i].Sub(l.times[i-1]))
		}
	}
	return len(l.times)
}

// A frozen agent is found within the check timeout and 2 s, however long flows may wait, and opens the agent breaker. On a
// connection of the application's too.
func TestFrozenAgentIsFoundWhileFlowsWait(t *testing.T) {
	for _, timeout := range []time.Duration{ms, 200 * ms, 999 * ms, 1001 * ms, 2500 * ms, 7 * time.Second} {
		for _, frozen := range []time.Duration{0, 100 * ms, 1100 * ms, 2050 * ms, 61 * time.Second} { // after which time it freezes
			for _, maxWait := range []time.Duration{-1, time.Hour} {
				for _, own := range []bool{true, false} {
					t.Run(fmt.Sprintf("%v/frozen after %v/MaxWait=%v/ours=%v", timeout, frozen, maxWait, own), func(t *testing.T) {
						synctest.Test(t, func(t *testing.T) { findFrozen(t, timeout, frozen, maxWait, own) })
					})
				}
			}
		}
	}
}

func findFrozen(t *testing.T, timeout, frozen, maxWait time.Duration, own bool) {
	t.Helper()
	script, asked := flowtest.NewAgent(t), new(lookups)
	intercept := grpc.WithChainUnaryInterceptor(asked.intercept)
	var client *flowctl.Client
	if own {
		client = script.Client(flowctl.WithDialOptions(intercept), flowctl.WithoutTelemetry())
	} else {
		conn, err := grpc.NewClient("passthrough:///localhost", script.Dialer(), intercept, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if client, err = flowctl.Dial("", flowctl.WithConn(conn), flowctl.WithoutTelemetry()); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = client.Close(t.Context()) }()
	}
	// The connection is there, and proven.
	flow := client.Start(t.Context(), "point", flowctl.Params{CheckTimeout: time.Minute})
	if flow.Decision() != flowctl.Accepted {
		t.Fatal(flow.Err())
	}
	<-time.After(2 * time.Second)
	script.Answer(flowtest.Answer{Delay: 30 * time.Minute})
	start := time.Now()
	time.AfterFunc(frozen, script.Freeze)
	var flows sync.WaitGroup
	for i := range 6 {
		flows.Go(func() {
			<-time.After(time.Duration(i) * 10 * ms) // not all at once
			begin := time.Now()
			flow := client.Start(t.Context(), "point", flowctl.Params{MaxWait: maxWait, CheckTimeout: timeout})
			since := start.Add(frozen)
			if begin.After(since) {
				since = begin
			}
			if took := time.Since(since); flow.Decision() != flowctl.Unreachable || took < min(timeout, time.Second) || took > timeout+2*time.Second {
				t.Errorf("%v, %v after %v", flow, flow.Err(), took)
			}
		})
	}
	flows.Wait()
	asked.check(t)
	begin := time.Now()
	if flow := client.Start(t.Context(), "point", flowctl.Params{}); flow.Decision() != flowctl.Unreachable || time.Since(begin) != 0 {
		t.Errorf("%v after %v: the breaker is closed", flow, time.Since(begin))
	}
}

// stuckConn is a connection to a peer that reads nothing any more, once it is stuck.
type stuckConn struct {
	net.Conn
	stuck  *atomic.Bool
	once   sync.Once
	closed chan struct{}
}

func (c *stuckConn) Write(b []byte) (int, error) {
	if c.stuck.Load() {
		<-c.closed
		return 0, net.ErrClosed
	}
	return c.Conn.Write(b)
}

func (c *stuckConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// An agent that does not even read the question is found as well.
func TestAgentThatReadsNothingIsFoundWhileFlowsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		script, stuck := flowtest.NewAgent(t), new(atomic.Bool)
		script.Answer(flowtest.Answer{Delay: time.Hour})
		client := script.Client(flowctl.WithoutTelemetry(), flowctl.WithDialOptions(
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				conn, err := script.DialContext(ctx)
				return &stuckConn{Conn: conn, stuck: stuck, closed: make(chan struct{})}, err
			})))
		if err := client.Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(10*time.Second+time.Millisecond, func() { stuck.Store(true) })
		// A check that cannot be sent whole keeps the question from being sent.
		time.AfterFunc(10*time.Second+100*time.Millisecond, func() { client.Start(t.Context(), "point", flowctl.Params{}) })
		begin := time.Now()
		flow := client.Start(t.Context(), "point", flowctl.Params{MaxWait: -1})
		if took := time.Since(begin); flow.Decision() != flowctl.Unreachable || took > 12*time.Second+201*time.Millisecond {
			t.Errorf("%v, %v after %v", flow, flow.Err(), took)
		}
	})
}

// A flow waits on as long as the agent lives, however the agent answers what it is asked meanwhile.
func TestFlowsWaitWhileTheAgentLives(t *testing.T) {
	fails := func(code codes.Code) func(context.Context) error {
		return func(context.Context) error { return status.Error(code, "no") }
	}
	hangs := func(ctx context.Context) error {
		<-ctx.Done()
		return status.FromContextError(ctx.Err()).Err()
	}
	const wait = 30 * time.Second
	for _, tt := range []struct {
		name    string
		params  flowctl.Params
		answer  func(context.Context) error
		traffic bool // another flow starts now and then
		want    int  // questions
	}{
		{"answers", flowctl.Params{MaxWait: -1}, nil, false, 30},
		{"bounded", flowctl.Params{MaxWait: time.Minute}, nil, false, 30},
		{"does not know the question", flowctl.Params{MaxWait: -1}, fails(codes.Unimplemented), false, 30},
		{"refuses the question", flowctl.Params{MaxWait: -1}, fails(codes.PermissionDenied), false, 30},
		{"drains", flowctl.Params{MaxWait: -1}, fails(codes.Unavailable), false, 30},
		{"answers other calls", flowctl.Params{MaxWait: -1}, hangs, true, 30},
		{"without MaxWait", flowctl.Params{CheckTimeout: time.Minute}, nil, false, 0},
		{"without a check timeout", flowctl.Params{MaxWait: -1, CheckTimeout: -1}, nil, false, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				script, asked := flowtest.NewAgent(t), &lookups{answer: tt.answer}
				script.AnswerAt("point", flowtest.Answer{Delay: wait})
				client := script.Client(flowctl.WithDialOptions(grpc.WithChainUnaryInterceptor(asked.intercept)), flowctl.WithoutTelemetry())
				if tt.traffic {
					ticker := time.NewTicker(900 * ms)
					stop := make(chan struct{})
					var others sync.WaitGroup
					others.Go(func() {
						for {
							select {
							case <-ticker.C:
								_, _ = client.Start(t.Context(), "other", flowctl.Params{}).End(t.Context())
							case <-stop:
								return
							}
						}
					})
					defer others.Wait()
					defer close(stop)
				}
				begin := time.Now()
				flow := client.Start(t.Context(), "point", tt.params)
				if took := time.Since(begin); flow.Decision() != flowctl.Accepted || took != wait {
					t.Errorf("%v, %v after %v", flow, flow.Err(), took)
				}
				if got := asked.check(t); got != tt.want {
					t.Errorf("the agent was asked %d times want %d", got, tt.want)
				}
				<-time.After(time.Minute)
				if got := asked.check(t); got != tt.want {
					t.Errorf("the agent was asked %d times want %d: nothing waits any more", got, tt.want)
				}
			})
		})
	}
}

// A question that cannot be sent, because as many calls are under way as the agent allows, proves nothing. The agent knows
// no sessions.
func TestFlowsWaitAtAnAgentWithoutRoomForAQuestion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New(sides.Policies(policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour}))
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		server := grpc.NewServer(append(agent.ServerOptions(), grpc.MaxConcurrentStreams(2), sides.WithoutSessions())...)
		agent.Register(server, e)
		client := sides.Dial(t, server, flowctl.WithoutTelemetry())
		local, err := flowctl.New(e)
		if err != nil {
			t.Fatal(err)
		}
		holder := local.Start(t.Context(), "point", flowctl.Params{})
		var flows sync.WaitGroup
		for range 2 {
			flows.Go(func() {
				flow := client.Start(t.Context(), "point", flowctl.Params{MaxWait: time.Hour})
				if flow.Decision() != flowctl.Accepted {
					t.Errorf("%v: %v", flow, flow.Err())
				}
				_, _ = flow.End(t.Context())
			})
		}
		<-time.After(time.Minute)
		_, _ = holder.End(t.Context())
		flows.Wait()
	})
}
