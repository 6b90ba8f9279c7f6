package headgate_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/telemetry"
	"github.com/headgate-go/headgate/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	point      = "checkout"
	innerPoint = "inner"
)

// situation is what becomes of a flow before its function would run.
type situation struct {
	name     string
	params   flowctl.Params
	runs     bool
	decision flowctl.Decision
	fallback bool  // onReject is called
	err      error // what the flow's error matches; nil when accepted
	cancel   bool  // the caller's context has ended
	closed   bool  // the client is closed
	off      bool  // the client is nil
	dry      bool  // the client only watches
	rejects  bool  // the agent says no
	silent   bool  // the agent says nothing
}

// options are the client's.
func (s situation) options() []flowctl.Option {
	if s.dry {
		return []flowctl.Option{flowctl.WithDryRun()}
	}
	return nil
}

var situations = []situation{
	{name: "accepted", runs: true, decision: flowctl.Accepted},
	{name: "rejected", rejects: true, decision: flowctl.Rejected, fallback: true, err: flowctl.ErrRejected},
	{name: "unreachable open", silent: true, runs: true, decision: flowctl.Unreachable, err: flowctl.ErrUnreachable},
	{
		name: "unreachable closed", silent: true, params: flowctl.Params{OnUnreachable: flowctl.FailClosed},
		decision: flowctl.Unreachable, fallback: true, err: flowctl.ErrUnreachable,
	},
	{
		name: "ramp unreachable", silent: true, params: flowctl.Params{RampMode: true},
		decision: flowctl.Unreachable, fallback: true, err: flowctl.ErrUnreachable,
	},
	{name: "caller canceled", cancel: true, decision: flowctl.Canceled, err: context.Canceled},
	{name: "caller canceled with a cause", cancel: true, decision: flowctl.Canceled, err: errGone},
	{name: "invalid", params: flowctl.Params{Labels: map[string]string{"": "x"}}, decision: flowctl.Invalid, err: flowctl.ErrInvalid},
	{name: "client closed", closed: true, runs: true, decision: flowctl.Unreachable, err: flowctl.ErrClosed},
	{
		name: "client closed, fail closed", closed: true, params: flowctl.Params{OnUnreachable: flowctl.FailClosed},
		decision: flowctl.Unreachable, fallback: true, err: flowctl.ErrClosed,
	},
	{name: "nil client", off: true, runs: true, decision: flowctl.Accepted},
	{name: "dry run, rejected", dry: true, rejects: true, runs: true, decision: flowctl.Rejected, err: flowctl.ErrRejected},
	{
		name: "dry run, unreachable closed", dry: true, silent: true, runs: true, params: flowctl.Params{OnUnreachable: flowctl.FailClosed},
		decision: flowctl.Unreachable, err: flowctl.ErrUnreachable,
	},
	{name: "dry run, caller canceled", dry: true, cancel: true, runs: true, decision: flowctl.Canceled, err: context.Canceled},
}

var (
	errGone = errors.New("the caller has gone")
	errWork = errors.New("the work failed")
)

// outcome is how the function ends, or the fallback, when that is called instead.
type outcome struct {
	name   string
	do     func() (int, error)
	err    error
	panics bool
	exits  bool
	nested bool
	status flowctl.Status
}

var outcomes = []outcome{
	{name: "ok", do: func() (int, error) { return 42, nil }, status: flowctl.StatusOK},
	{name: "error", do: func() (int, error) { return 42, errWork }, err: errWork, status: flowctl.StatusError},
	{name: "panic", do: func() (int, error) { panic(errWork) }, panics: true, status: flowctl.StatusError},
	{name: "panic(nil)", do: func() (int, error) { panic(nil) }, panics: true, status: flowctl.StatusError},
	{name: "Goexit", do: func() (int, error) { runtime.Goexit(); return 0, nil }, exits: true, status: flowctl.StatusError},
	{name: "nested guard", nested: true, status: flowctl.StatusOK},
}

// form is a way to guard a function.
type form struct {
	name string
	call func(ctx context.Context, client headgate.Starter, point string, params flowctl.Params, fn func(context.Context) (int, error), onReject fallback.Func[int]) (int, error)

	noFallback bool
	blind      bool // cannot tell Goexit from a return
	detached   bool // the function has a context that does not end with the caller's; a caller whose own ends gives up
}

var forms = []form{
	{
		name: "Guard",
		call: func(ctx context.Context, client headgate.Starter, point string, params flowctl.Params, fn func(context.Context) (int, error), onReject fallback.Func[int]) (int, error) {
			return headgate.Guard(client, point, params, fn, onReject)(ctx)
		},
	},
	{
		name: "GuardFunc",
		call: func(ctx context.Context, client headgate.Starter, point string, params flowctl.Params, fn func(context.Context) (int, error), onReject fallback.Func[int]) (int, error) {
			return headgate.GuardFunc(client, point,
				func(context.Context, string) flowctl.Params { return params },
				func(ctx context.Context, arg string) (int, error) {
					if arg != "argument" {
						return 0, fmt.Errorf("fn got %q", arg)
					}
					return fn(ctx)
				},
				fallback.For[string](onReject))(ctx, "argument")
		},
	},
	{
		name: "Retrying",
		call: func(ctx context.Context, client headgate.Starter, point string, params flowctl.Params, fn func(context.Context) (int, error), onReject fallback.Func[int]) (int, error) {
			return headgate.Guard(headgate.Retrying(client, headgate.RetryPolicy{}), point, params, fn, onReject)(ctx)
		},
	},
	{
		name:     "Cached",
		detached: true,
		call: func(ctx context.Context, client headgate.Starter, point string, params flowctl.Params, fn func(context.Context) (int, error), onReject fallback.Func[int]) (int, error) {
			return headgate.Cached(client, point, params, fn, onReject, headgate.CachePolicy[int]{TTL: time.Minute})(ctx)
		},
	},
	{
		name:     "CachedFunc",
		detached: true,
		call:     cachedFunc("key"),
	},
	{
		name: "CachedFunc without a key",
		call: cachedFunc(""),
	},
	{
		name:       "Do",
		noFallback: true,
		call: func(ctx context.Context, client headgate.Starter, point string, params flowctl.Params, fn func(context.Context) (int, error), _ fallback.Func[int]) (int, error) {
			v := 0
			err := headgate.Do(ctx, client, point, params, func(ctx context.Context, flow *flowctl.Flow) error {
				if inner, ok := flowctl.FromContext(ctx); !ok || inner != flow {
					return errors.New("the context has another flow")
				}
				var err error
				v, err = fn(ctx)
				return err
			})
			return v, err
		},
	},
	{
		name:       "Start and EndWith",
		noFallback: true,
		blind:      true,
		call: func(ctx context.Context, client headgate.Starter, point string, params flowctl.Params, fn func(context.Context) (int, error), _ fallback.Func[int]) (v int, err error) {
			flow := client.Start(ctx, point, params)
			defer flow.EndWith(&err)
			if !flow.ShouldRun() {
				return 0, flow.Err()
			}
			return fn(flow.Context())
		},
	},
}

// cachedFunc is the form that CachedFunc is with a key.
func cachedFunc(key string) func(context.Context, headgate.Starter, string, flowctl.Params, func(context.Context) (int, error), fallback.Func[int]) (int, error) {
	return func(ctx context.Context, client headgate.Starter, point string, params flowctl.Params, fn func(context.Context) (int, error), onReject fallback.Func[int]) (int, error) {
		return headgate.CachedFunc(client, point,
			func(_ context.Context, arg string) flowctl.Params {
				params := params
				params.ResultCacheKey = arg
				return params
			},
			func(ctx context.Context, arg string) (int, error) {
				if arg != key {
					return 0, fmt.Errorf("fn got %q", arg)
				}
				return fn(ctx)
			},
			fallback.For[string](onReject), headgate.CachePolicy[int]{TTL: time.Minute})(ctx, key)
	}
}

// starter keeps the flows that a client starts.
type starter struct {
	client *flowctl.Client
	mu     sync.Mutex
	flows  []*flowctl.Flow
}

func (s *starter) Start(ctx context.Context, controlPoint string, params flowctl.Params) *flowctl.Flow {
	f := s.client.Start(ctx, controlPoint, params)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flows = append(s.flows, f)
	return f
}

// ended is how a flow that an agent answered was ended, as the agent saw it.
type ended struct {
	point  string
	status flowctl.Status
}

// A side is one kind of agent, set up for a situation.
type side struct {
	name  string
	setUp func(t *testing.T, s situation) (client *flowctl.Client, ends func() []ended)
}

var sides = []side{{"remote", remoteSide}, {"embedded", embeddedSide}, {"served", servedSide}}

// remoteSide is an agent over gRPC. It gives every flow a slot, so that each must be ended by a call.
func remoteSide(t *testing.T, s situation) (*flowctl.Client, func() []ended) {
	agent := flowtest.NewAgent(t)
	agent.Answer(flowtest.Answer{Slots: 1})
	switch {
	case s.rejects:
		agent.AnswerAt(point, flowtest.Answer{Slots: 1, Reason: flowctl.ReasonRateLimited})
	case s.silent:
		agent.AnswerAt(point, flowtest.Answer{Fail: status.Error(codes.Unavailable, "gone")})
	}
	opts := append(s.options(), flowctl.WithCheckTimeout(10*time.Second)) // no cell is about timeouts
	client := agent.Client(opts...)
	return client, func() []ended {
		if err := client.Close(t.Context()); err != nil {
			t.Errorf("Close() = %v", err)
		}
		if held := agent.Held(); held != 0 {
			t.Errorf("%d slots are held after all flows have ended", held)
		}
		var ends []ended
		for _, span := range agent.Spans() {
			ends = append(ends, ended{span.Response.GetControlPoint(), span.Status})
		}
		if calls := len(agent.Ends()); calls != len(ends) {
			t.Errorf("%d calls ended flows want %d", calls, len(ends))
		}
		return ends
	}
}

// recorder is an embedded agent that remembers how flows were ended.
type recorder struct {
	agentapi.Agent
	mu   sync.Mutex
	ends []ended
}

func (r *recorder) End(ctx context.Context, req *agentapi.Request, v *agentapi.Verdict, failed bool) (agentapi.Returns, error) {
	st := flowctl.StatusOK
	if failed {
		st = flowctl.StatusError
	}
	r.mu.Lock()
	r.ends = append(r.ends, ended{req.ControlPoint, st})
	r.mu.Unlock()
	return r.Agent.End(ctx, req, v, failed)
}

// oneSlot is an engine that lets one flow in at a time, or, where the agent is to say no, none.
func oneSlot(t *testing.T, s situation) *engine.Engine {
	slots := policy.ConcurrencyLimiter{Selectors: policy.At(point), Max: 1, MaxInflight: time.Hour}
	if s.rejects {
		slots.Max = 0
	}
	e, err := engine.New([]policy.Policy{{Name: "slots", Components: []policy.Component{slots}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	return e
}

// servedSide is an engine that is served over gRPC. What it hears of ends it tells by the telemetry that comes in.
func servedSide(t *testing.T, s situation) (*flowctl.Client, func() []ended) {
	e := oneSlot(t, s)
	server := grpc.NewServer(agent.ServerOptions()...)
	// The engine's own trace service counts; this one reads.
	var mu sync.Mutex
	var ends []ended
	agent.Register(only{server, "aperture.flowcontrol.check.v1.FlowControlService"}, e)
	telemetry.Register(server, func(_ context.Context, data *tracev1.TracesData) error {
		mu.Lock()
		defer mu.Unlock()
		for _, span := range data.GetResourceSpans()[0].GetScopeSpans()[0].GetSpans() {
			ends = append(ends, endOf(t, span))
		}
		return nil
	})
	opts := append(s.options(), flowctl.WithCheckTimeout(10*time.Second))
	client := dial(t, server, opts...)
	if s.silent {
		_ = e.Close() // then it answers Unavailable
	}
	return client, func() []ended {
		if err := client.Close(t.Context()); err != nil {
			t.Errorf("Close() = %v", err)
		}
		var v agentapi.Verdict
		switch err := e.Check(t.Context(), &agentapi.Request{ControlPoint: point}, &v); {
		case s.silent: // it was closed
			if !errors.Is(err, agentapi.ErrClosed) {
				t.Errorf("a check of the closed engine = %v want %v", err, agentapi.ErrClosed)
			}
		case err != nil || v.Rejected() != s.rejects:
			t.Errorf("a check after all flows have ended: rejected %v, %v want %v", v.Rejected(), err, s.rejects)
		}
		mu.Lock()
		defer mu.Unlock()
		return ends
	}
}

// dial has the server answer in memory until the test ends, and makes a client of it.
func dial(t *testing.T, server *grpc.Server, opts ...flowctl.Option) *flowctl.Client {
	listener := bufconn.Listen(1 << 20)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) { // it may not have begun
			t.Error(err)
		}
	})
	client, err := flowctl.Dial("passthrough:///localhost", append(opts, flowctl.WithInsecure(), flowctl.WithDialOptions(
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) })))...)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// only registers one of several services.
type only struct {
	grpc.ServiceRegistrar
	name string
}

func (o only) RegisterService(desc *grpc.ServiceDesc, impl any) {
	if desc.ServiceName == o.name {
		o.ServiceRegistrar.RegisterService(desc, impl)
	}
}

// endOf reads how a flow was ended from its record.
func endOf(t *testing.T, span *tracev1.Span) (e ended) {
	for _, kv := range span.GetAttributes() {
		switch text := kv.GetValue().GetStringValue(); kv.GetKey() {
		case "aperture.flow.status":
			e.status = flowctl.StatusError
			if text == "OK" {
				e.status = flowctl.StatusOK
			}
		case "aperture.check_response":
			wire, err := base64.StdEncoding.DecodeString(text)
			m := new(checkv1.CheckResponse)
			if err := errors.Join(err, proto.Unmarshal(wire, m)); err != nil {
				t.Error(err)
			}
			e.point = m.GetControlPoint()
		}
	}
	return e
}

func embeddedSide(t *testing.T, s situation) (*flowctl.Client, func() []ended) {
	e := oneSlot(t, s)
	agent := &recorder{Agent: e}
	client, err := flowctl.New(agent, s.options()...)
	if err != nil {
		t.Fatal(err)
	}
	if s.silent {
		_ = e.Close()
	}
	return client, func() []ended {
		if err := client.Close(t.Context()); err != nil {
			t.Errorf("Close() = %v", err)
		}
		agent.mu.Lock()
		defer agent.mu.Unlock()
		return agent.ends
	}
}

// TestMatrix holds every way to guard a function to the same promises, whatever becomes of the flow and of the function,
// over both kinds of agents.
func TestMatrix(t *testing.T) {
	for _, side := range sides {
		for _, s := range situations {
			for _, o := range outcomes {
				for _, form := range forms {
					if form.detached && s.cancel && s.runs {
						continue // TestCachedLeaderGivesUp
					}
					t.Run(fmt.Sprintf("%s/%s/%s/%s", side.name, s.name, o.name, form.name), func(t *testing.T) {
						cell{side, s, o, form}.run(t)
					})
				}
			}
		}
	}
}

type cell struct {
	side side
	s    situation
	o    outcome
	form form
}

func (c cell) run(t *testing.T) {
	client, ends := c.side.setUp(t, c.s)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	var cause error
	if c.s.cancel {
		if errors.Is(c.s.err, errGone) {
			cause = errGone
		}
		cancel(cause)
	}
	if c.s.closed {
		if err := client.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	starts := &starter{client: client}
	if c.s.off {
		starts.client = nil
	}

	ran, fellBack := 0, 0
	work := func(ctx context.Context) (int, error) {
		if !c.o.nested {
			return c.o.do()
		}
		return headgate.Guard(starts, innerPoint, flowctl.Params{}, func(context.Context) (int, error) { return 42, nil }, nil)(ctx)
	}
	fn := func(ctx context.Context) (int, error) {
		ran++
		if flow, ok := flowctl.FromContext(ctx); !ok || flow != starts.flows[0] {
			t.Error("fn's context lacks the flow")
		}
		return work(ctx)
	}
	onReject := func(ctx context.Context, err error) (int, error) {
		fellBack++
		if _, err := starts.flows[0].End(ctx); !errors.Is(err, flowctl.ErrEnded) {
			t.Error("onReject was called before the flow was ended")
		}
		if _, ok := flowctl.FromContext(ctx); ok {
			t.Error("onReject's context has a flow, which has ended")
		}
		if !errors.Is(err, c.s.err) {
			t.Errorf("onReject got %v want a match of %v", err, c.s.err)
		}
		return work(ctx)
	}

	var got result
	done := make(chan struct{})
	go func() {
		defer close(done)
		observe(&got, func() (int, error) { return c.form.call(ctx, starts, point, c.s.params, fn, onReject) })
	}()
	<-done

	wantRan, wantFellBack := 0, 0
	switch {
	case c.s.runs:
		wantRan = 1
	case c.s.fallback && !c.form.noFallback:
		wantFellBack = 1
	}
	if ran != wantRan || fellBack != wantFellBack {
		t.Fatalf("fn ran %d times, onReject %d times want %d, %d", ran, fellBack, wantRan, wantFellBack)
	}
	c.checkResult(t, got, wantRan+wantFellBack > 0, cause)
	c.checkFlow(t, starts)
	c.checkEnds(t, ends(), wantFellBack > 0)
}

// checkResult checks what the caller got.
func (c cell) checkResult(t *testing.T, got result, worked bool, cause error) {
	t.Helper()
	switch {
	case !worked:
		if got.value != 0 || !errors.Is(got.err, c.s.err) || got.panicked || got.exited {
			t.Errorf("got %+v want zero and a match of %v", got, c.s.err)
		}
		if cause != nil && !errors.Is(got.err, context.Canceled) {
			t.Errorf("error %v does not match the context's own", got.err)
		}
	case c.o.panics:
		if !got.panicked {
			t.Errorf("got %+v want a panic", got)
		}
		want := any(errWork)
		if _, ok := got.recovered.(*runtime.PanicNilError); ok && c.o.name == "panic(nil)" {
			want = got.recovered
		}
		if got.recovered != want {
			t.Errorf("panic value = %v want %v", got.recovered, want)
		}
	case c.o.exits:
		if !got.exited {
			t.Errorf("got %+v want a Goexit", got)
		}
	default:
		if got.value != 42 || got.err != c.o.err || got.panicked || got.exited { //nolint:errorlint // it must come back unchanged
			t.Errorf("got %+v want 42, %v", got, c.o.err)
		}
	}
}

// checkFlow checks the flow itself.
func (c cell) checkFlow(t *testing.T, starts *starter) {
	t.Helper()
	flow := starts.flows[0]
	if flow.Decision() != c.s.decision || flow.ShouldRun() != c.s.runs {
		t.Errorf("%s, ShouldRun() = %v want %s, %v", flow.Decision(), flow.ShouldRun(), c.s.decision, c.s.runs)
	}
	if err := flow.Err(); !errors.Is(err, c.s.err) {
		t.Errorf("Err() = %v want a match of %v", err, c.s.err)
	}
	for _, f := range starts.flows {
		if _, err := f.End(t.Context()); !errors.Is(err, flowctl.ErrEnded) {
			t.Errorf("%v was not ended", f)
		}
	}
}

// checkEnds checks that the agent heard of the end of the flow once, if it had answered, and with what status.
func (c cell) checkEnds(t *testing.T, ends []ended, fellBack bool) {
	t.Helper()
	var want []ended
	if c.s.decision == flowctl.Rejected || c.s.decision == flowctl.Accepted && !c.s.off {
		st := c.o.status
		switch {
		case !c.s.runs:
			st = flowctl.StatusError
		case c.o.exits && c.form.blind:
			st = flowctl.StatusOK
		}
		want = append(want, ended{point, st})
	}
	if c.o.nested && (c.s.runs || fellBack) && !c.s.off && !c.s.closed && !c.s.cancel && !(c.s.silent && c.side.name != "remote") {
		inner := ended{innerPoint, flowctl.StatusOK}
		if c.s.runs {
			want = append([]ended{inner}, want...)
		} else {
			want = append(want, inner)
		}
	}
	if fmt.Sprint(ends) != fmt.Sprint(want) {
		t.Errorf("the agent saw the ends %v want %v", ends, want)
	}
}

type result struct {
	value     int
	err       error
	panicked  bool
	recovered any
	exited    bool
}

// observe calls f and tells how it came back, if it did.
func observe(r *result, f func() (int, error)) {
	r.exited = true
	defer func() {
		if p := recover(); p != nil {
			r.exited, r.panicked, r.recovered = false, true, p
		}
	}()
	r.value, r.err = f()
	r.exited = false
}
