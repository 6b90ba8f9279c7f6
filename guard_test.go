package headgate_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/testing/sides"
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

// newSide is an agent of the kind, set up for the situation. A scripted one gives every flow a slot, so that each must be
// ended by a call. An engine lets one flow in at a time, or, where the agent is to say no, none.
func newSide(t *testing.T, kind sides.Kind, s situation) *sides.Side {
	slots := policy.ConcurrencyLimiter{Selectors: policy.At(point), Max: 1, MaxInflight: time.Hour}
	if s.rejects {
		slots.Max = 0
	}
	setup := sides.Setup{Policies: sides.Policies(slots), Options: []flowctl.Option{flowctl.WithCheckTimeout(10 * time.Second)}} // no cell is about timeouts
	if s.dry {
		setup.Options = append(setup.Options, flowctl.WithDryRun())
	}
	side := setup.New(t, kind)
	if side.Script != nil {
		side.Answer(flowtest.Answer{Slots: 1})
		if s.rejects {
			side.Script.AnswerAt(point, flowtest.Answer{Slots: 1, Reason: flowctl.ReasonRateLimited})
		}
	}
	if s.silent {
		side.Silence()
	}
	return side
}

// TestMatrix holds every way to guard a function to the same promises, whatever becomes of the flow and of the function,
// over all kinds of agents.
func TestMatrix(t *testing.T) {
	for _, kind := range sides.AllAndStored {
		for _, s := range situations {
			for _, o := range outcomes {
				for _, form := range forms {
					if form.detached && s.cancel && s.runs {
						continue // TestCachedLeaderGivesUp
					}
					t.Run(fmt.Sprintf("%s/%s/%s/%s", kind, s.name, o.name, form.name), func(t *testing.T) {
						cell{kind, s, o, form}.run(t)
					})
				}
			}
		}
	}
}

type cell struct {
	kind sides.Kind
	s    situation
	o    outcome
	form form
}

func (c cell) run(t *testing.T) {
	side := newSide(t, c.kind, c.s)
	client := side.Client
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
	c.checkEnds(t, side, wantFellBack > 0)
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
func (c cell) checkEnds(t *testing.T, side *sides.Side, fellBack bool) {
	t.Helper()
	var want []sides.End
	if c.s.decision == flowctl.Rejected || c.s.decision == flowctl.Accepted && !c.s.off {
		st := c.o.status
		switch {
		case !c.s.runs:
			st = flowctl.StatusError
		case c.o.exits && c.form.blind:
			st = flowctl.StatusOK
		}
		want = append(want, sides.End{ControlPoint: point, Status: st})
	}
	if c.o.nested && (c.s.runs || fellBack) && !c.s.off && !c.s.closed && !c.s.cancel && !c.s.silent {
		inner := sides.End{ControlPoint: innerPoint, Status: flowctl.StatusOK}
		if c.s.runs {
			want = append([]sides.End{inner}, want...)
		} else {
			want = append(want, inner)
		}
	}
	ends := side.Ends()
	if !slices.Equal(ends, want) {
		t.Errorf("the agent saw the ends %v want %v", ends, want)
	}
	if held := side.Held(); held != 0 {
		t.Errorf("%d slots are held after all flows have ended", held)
	}
	if calls, _ := side.Returned(); side.Script != nil && calls != len(ends) {
		t.Errorf("%d calls ended flows want %d", calls, len(ends))
	}
	if side.Script == nil && !c.s.silent { // the engine agrees
		var v agentapi.Verdict
		if err := side.Agent.Check(t.Context(), &agentapi.Request{ControlPoint: point}, &v); err != nil || v.Rejected() != c.s.rejects {
			t.Errorf("a check after all flows have ended: rejected %v, %v want %v", v.Rejected(), err, c.s.rejects)
		}
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
