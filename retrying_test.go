package headgate_test

import (
	"context"
	"errors"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/grpcguard"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/internal/testing/sharedtest"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// overScripts runs f in a bubble over all kinds of agents, each of which gives the answers, the last of them for ever.
// Without any it accepts.
func overScripts(t *testing.T, answers []flowtest.Answer, f func(t *testing.T, agent *sides.Side), opts ...flowctl.Option) {
	t.Helper()
	sides.Setup{Answers: answers, Options: opts}.InBubbles(t, sides.All, f)
}

// reckoning are the kinds of agents for tests of what a client works out by itself in hundreds of calls. The one in the
// process is asked in a tenth of the time that others take.
var reckoning = race.Pick([]sides.Kind{sides.Embedded}, sides.All)

// overLimits runs f in a bubble over engines with a real limit that lets one flow a second in.
func overLimits(t *testing.T, f func(t *testing.T, client *flowctl.Client)) {
	t.Helper()
	limit := policy.RateLimiter{Selectors: policy.At(point), Capacity: 1, Fill: 1, Interval: time.Second}
	sides.Setup{Policies: sides.Policies(limit)}.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) { f(t, side.Client) })
}

// What a store keeps out while it does not answer comes back when it does.
func TestRetryingOutlastsAnOutageOfAStore(t *testing.T) {
	for name, c := range map[string]policy.Component{
		"limiter": policy.RateLimiter{
			Selectors: policy.At(point), Capacity: 1, Fill: 1, Interval: time.Second, OnOutage: policy.OutageClosed,
		},
		"scheduler": policy.ConcurrencyScheduler{
			Selectors: policy.At(point), Max: 1, MaxInflight: time.Hour, OnOutage: policy.OutageClosed,
		},
	} {
		for _, kind := range sides.Engines {
			t.Run(name+"/"+string(kind), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					store := sharedtest.New().Instance()
					side := sides.Setup{Policies: sides.Policies(c), EngineOptions: []engine.Option{engine.WithStore(store)}}.New(t, kind)
					store.Behave(sharedtest.Behavior{Err: shared.ErrDown})
					defer time.AfterFunc(1500*time.Millisecond, func() { store.Behave(sharedtest.Behavior{}) }).Stop()
					began := time.Now()
					flow := headgate.Retrying(side.Client, exactly(headgate.RetryPolicy{})).Start(t.Context(), point, flowctl.Params{})
					if took := time.Since(began); flow.Decision() != flowctl.Accepted || took != 2*time.Second {
						t.Errorf("%v after %v want it accepted after 2 s", flow, took)
					}
					_, _ = flow.End(t.Context())
				})
			})
		}
	}
}

func rejected(after time.Duration) flowtest.Answer {
	return flowtest.Answer{Reason: flowctl.ReasonRateLimited, RetryAfter: after}
}

var (
	accepted = flowtest.Answer{}
	silent   = flowtest.Answer{Fail: status.Error(codes.Unavailable, "gone"), RetryAfter: time.Second} // which does not count
)

// exactly is a policy whose waits are just as long as RetryAfter.
func exactly(p headgate.RetryPolicy) headgate.RetryPolicy {
	p.Jitter = -1
	return p
}

func TestRetryingAttempts(t *testing.T) {
	closed := flowctl.Params{OnUnreachable: flowctl.FailClosed}
	tests := []struct {
		name    string
		policy  headgate.RetryPolicy
		params  flowctl.Params
		answers []flowtest.Answer
		opts    []flowctl.Option
		flows   int
		waited  time.Duration
		err     error         // what onReject gets; nil: fn runs
		wait    time.Duration // what that says
	}{
		{name: "accepted", flows: 1},
		{
			name: "rejected once", answers: []flowtest.Answer{rejected(time.Second), accepted},
			flows: 2, waited: time.Second,
		},
		{
			name: "rejected twice", answers: []flowtest.Answer{rejected(time.Second), rejected(3 * time.Second), accepted},
			flows: 3, waited: 4 * time.Second,
		},
		{
			name: "the shortest wait", answers: []flowtest.Answer{rejected(1), accepted},
			flows: 2, waited: time.Millisecond,
		},
		{
			name: "three attempts by default", answers: []flowtest.Answer{rejected(time.Second), rejected(time.Second), rejected(5 * time.Second), accepted},
			flows: 3, waited: 2 * time.Second, err: flowctl.ErrRejected, wait: 5 * time.Second,
		},
		{
			name: "one attempt", policy: headgate.RetryPolicy{Attempts: 1}, answers: []flowtest.Answer{rejected(time.Second), accepted},
			flows: 1, err: flowctl.ErrRejected, wait: time.Second,
		},
		{
			name: "five attempts", policy: headgate.RetryPolicy{Attempts: 5}, answers: []flowtest.Answer{rejected(time.Second)},
			flows: 5, waited: 4 * time.Second, err: flowctl.ErrRejected, wait: time.Second,
		},
		{
			name: "any number of attempts, until the budget is spent", policy: headgate.RetryPolicy{Attempts: -1}, answers: []flowtest.Answer{rejected(time.Second)},
			flows: 11, waited: 10 * time.Second, err: flowctl.ErrRejected, wait: time.Second,
		},
		{
			name: "any number of attempts", policy: headgate.RetryPolicy{Attempts: -1, Budget: -1},
			answers: append(slices.Repeat([]flowtest.Answer{rejected(time.Second)}, 200), accepted),
			flows:   201, waited: 200 * time.Second,
		},
		{
			name: "nobody knows when", answers: []flowtest.Answer{rejected(0), accepted},
			flows: 1, err: flowctl.ErrRejected,
		},
		{
			name: "nobody knows when the second time", answers: []flowtest.Answer{rejected(time.Second), rejected(0), accepted},
			flows: 2, waited: time.Second, err: flowctl.ErrRejected,
		},
		{
			name: "the longest wait", policy: headgate.RetryPolicy{MaxWait: time.Second}, answers: []flowtest.Answer{rejected(time.Second), accepted},
			flows: 2, waited: time.Second,
		},
		{
			name: "longer than the longest wait", policy: headgate.RetryPolicy{MaxWait: time.Second}, answers: []flowtest.Answer{rejected(time.Second + 1), accepted},
			flows: 1, err: flowctl.ErrRejected, wait: time.Second + 1,
		},
		{
			name: "a negative longest wait is none", policy: headgate.RetryPolicy{MaxWait: -1}, answers: []flowtest.Answer{rejected(time.Hour), accepted},
			flows: 2, waited: time.Hour,
		},
		{
			name: "within the flow's MaxWait", params: flowctl.Params{MaxWait: 2 * time.Second},
			answers: []flowtest.Answer{rejected(time.Second), rejected(time.Second), accepted}, flows: 3, waited: 2 * time.Second,
		},
		{
			name: "not within the flow's MaxWait", params: flowctl.Params{MaxWait: time.Second - 1}, answers: []flowtest.Answer{rejected(time.Second), accepted},
			flows: 1, err: flowctl.ErrRejected, wait: time.Second,
		},
		{
			name: "not within what is left of the flow's MaxWait", params: flowctl.Params{MaxWait: 3*time.Second - 1},
			answers: []flowtest.Answer{rejected(time.Second), rejected(2 * time.Second), accepted},
			flows:   2, waited: time.Second, err: flowctl.ErrRejected, wait: 2 * time.Second,
		},
		{
			name: "the flow is not to wait", params: flowctl.Params{MaxWait: flowctl.NoWait}, answers: []flowtest.Answer{rejected(time.Millisecond), accepted},
			flows: 1, err: flowctl.ErrRejected, wait: time.Millisecond,
		},
		{
			name: "the flow may wait as long as it takes", params: flowctl.Params{MaxWait: -1}, answers: []flowtest.Answer{rejected(time.Hour), accepted},
			flows: 2, waited: time.Hour,
		},
		{name: "unreachable open", answers: []flowtest.Answer{silent, accepted}, flows: 1},
		{
			name: "unreachable closed", params: closed, answers: []flowtest.Answer{silent, accepted},
			flows: 1, err: flowctl.ErrUnreachable,
		},
		{
			name: "unreachable closed the second time", params: closed, answers: []flowtest.Answer{rejected(time.Second), silent, accepted},
			flows: 2, waited: time.Second, err: flowctl.ErrUnreachable,
		},
		{
			name: "unreachable in ramp mode the second time", params: flowctl.Params{RampMode: true}, answers: []flowtest.Answer{rejected(time.Second), silent, accepted},
			flows: 2, waited: time.Second, err: flowctl.ErrUnreachable,
		},
		{
			name: "unreachable open the second time", answers: []flowtest.Answer{rejected(time.Second), silent, accepted},
			flows: 2, waited: time.Second, err: flowctl.ErrRejected, wait: time.Second,
		},
		{
			name: "unreachable open the third time", answers: []flowtest.Answer{rejected(time.Second), rejected(3 * time.Second), silent, accepted},
			flows: 3, waited: 4 * time.Second, err: flowctl.ErrRejected, wait: 3 * time.Second,
		},
		{
			name: "dry run", opts: []flowctl.Option{flowctl.WithDryRun()}, answers: []flowtest.Answer{rejected(time.Second), accepted},
			flows: 1,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			overScripts(t, tt.answers, func(t *testing.T, agent *sides.Side) {
				starts := &starter{client: agent.Client}
				ran, fellBack := 0, 0
				retry := headgate.Guard(headgate.Retrying(starts, exactly(tt.policy)), point, tt.params, func(ctx context.Context) (int, error) {
					ran++
					if flow, ok := flowctl.FromContext(ctx); !ok || flow != starts.flows[len(starts.flows)-1] {
						t.Error("fn's context lacks the last flow")
					}
					return 42, nil
				}, func(ctx context.Context, err error) (int, error) {
					fellBack++
					allEnded(t, starts)
					if !errors.Is(err, tt.err) {
						t.Errorf("onReject got %v want a match of %v", err, tt.err)
					}
					if wait, _ := fallback.RetryAfter(err); wait != tt.wait {
						t.Errorf("onReject was told to wait %v want %v", wait, tt.wait)
					}
					return 42, nil
				})
				began := time.Now()
				if got, err := retry(t.Context()); got != 42 || err != nil {
					t.Errorf("retry() = %d, %v want 42", got, err)
				}
				if took := time.Since(began); took != tt.waited {
					t.Errorf("the waits took %v want %v", took, tt.waited)
				}
				if len(starts.flows) != tt.flows || agent.Asked() != tt.flows {
					t.Errorf("%d flows, %d checks want %d", len(starts.flows), agent.Asked(), tt.flows)
				}
				if fell := tt.err != nil; ran+fellBack != 1 || fell != (fellBack == 1) {
					t.Errorf("fn ran %d times, onReject %d times", ran, fellBack)
				}
				allEnded(t, starts)
			}, tt.opts...)
		})
	}
}

// allEnded checks that each flow has ended.
func allEnded(t *testing.T, starts *starter) {
	t.Helper()
	starts.mu.Lock()
	flows := slices.Clone(starts.flows)
	starts.mu.Unlock()
	for i, f := range flows {
		if _, err := f.End(t.Context()); !errors.Is(err, flowctl.ErrEnded) {
			t.Errorf("flow %d of %d was not ended", i+1, len(flows))
		}
	}
}

// A call that comes too early is let in as soon as there is room, and not a moment before.
func TestRetryingWaitsForTheLimit(t *testing.T) {
	overLimits(t, func(t *testing.T, client *flowctl.Client) {
		retry := headgate.Guard(headgate.Retrying(client, exactly(headgate.RetryPolicy{Attempts: 2})), point, flowctl.Params{}, work, nil)
		began := time.Now()
		for range 5 {
			if got, err := retry(t.Context()); got != 42 || err != nil {
				t.Errorf("retry() = %d, %v want 42", got, err)
			}
		}
		if took := time.Since(began); took != 4*time.Second {
			t.Errorf("five calls took %v want 4s", took)
		}
	})
}

// An agent that takes its time to end a flow does not make the wait longer.
func TestRetryingSlowEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{Reason: flowctl.ReasonRateLimited, RetryAfter: time.Second, Slots: 1}, accepted)
		agent.AnswerEnds(flowtest.Answer{Delay: 900 * time.Millisecond}, accepted)
		began := time.Now()
		got, err := headgate.Guard(headgate.Retrying(agent.Client(), exactly(headgate.RetryPolicy{})), point, flowctl.Params{}, work, nil)(t.Context())
		if took := time.Since(began); got != 42 || err != nil || took != time.Second {
			t.Errorf("retry() = %d, %v after %v want 42 after 1s", got, err, took)
		}
		if held := agent.Held(); held != 0 {
			t.Errorf("%d slots are held", held)
		}
	})
}

func TestRetryingWithoutClient(t *testing.T) {
	var off *flowctl.Client
	for name, client := range map[string]headgate.Starter{"nil": nil, "nil client": off} {
		if got, err := headgate.Guard(headgate.Retrying(client, headgate.RetryPolicy{}), point, flowctl.Params{}, work, nil)(t.Context()); got != 42 || err != nil {
			t.Errorf("%s: retry() = %d, %v want 42", name, got, err)
		}
	}
}

// Without a fallback the caller gets the last rejection.
func TestRetryingRejection(t *testing.T) {
	overScripts(t, []flowtest.Answer{rejected(time.Second), rejected(2 * time.Second)}, func(t *testing.T, agent *sides.Side) {
		got, err := headgate.Guard(headgate.Retrying(agent.Client, headgate.RetryPolicy{Attempts: 2}), point, flowctl.Params{}, work, nil)(t.Context())
		rejection, ok := errors.AsType[*flowctl.RejectedError](err)
		if got != 0 || !ok || rejection.ControlPoint != point || rejection.RetryAfter() != 2*time.Second {
			t.Errorf("retry() = %d, %v want the second rejection", got, err)
		}
	})
}

func TestRetryingJitter(t *testing.T) {
	const after, calls = time.Second, 200
	tests := []struct {
		name     string
		jitter   float64
		min, max time.Duration
		spread   bool
	}{
		{name: "default", min: after, max: after + after/5, spread: true},
		{name: "none", jitter: -1, min: after, max: after},
		{name: "not a number", jitter: math.NaN(), min: after, max: after},
		{name: "double", jitter: 1, min: after, max: 2 * after, spread: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sides.Setup{Answers: []flowtest.Answer{rejected(after)}}.InBubbles(t, reckoning, func(t *testing.T, agent *sides.Side) {
				retry := headgate.Guard(headgate.Retrying(agent.Client, headgate.RetryPolicy{Attempts: 2, Jitter: tt.jitter, Budget: -1}), point, flowctl.Params{}, work, fallback.Value(0))
				shortest, longest := time.Duration(math.MaxInt64), time.Duration(0)
				for range calls {
					began := time.Now()
					_, _ = retry(t.Context())
					took := time.Since(began)
					shortest, longest = min(shortest, took), max(longest, took)
				}
				if shortest < tt.min || longest > tt.max {
					t.Errorf("waits of %v to %v want %v to %v", shortest, longest, tt.min, tt.max)
				}
				// One in 10^19 runs has no wait in the first fifth of the range, or none in the last.
				if width := tt.max - tt.min; tt.spread && (shortest > tt.min+width/5 || longest < tt.max-width/5) {
					t.Errorf("waits of %v to %v want them spread from %v to %v", shortest, longest, tt.min, tt.max)
				}
			})
		})
	}
}

// A wait that is too long for the clock is endless, not short.
func TestRetryingForever(t *testing.T) {
	const year = 365 * 24 * time.Hour
	for _, after := range []time.Duration{49 * year, 25 * year} { // clients take a longer one for none
		for _, jitter := range []float64{0, 10, math.MaxFloat64} {
			overScripts(t, []flowtest.Answer{rejected(after)}, func(t *testing.T, agent *sides.Side) {
				ctx, cancel := context.WithCancel(t.Context())
				time.AfterFunc(time.Minute, cancel)
				retry := headgate.Guard(headgate.Retrying(agent.Client, headgate.RetryPolicy{Jitter: jitter}), point, flowctl.Params{}, work, nil)
				if _, err := retry(ctx); !errors.Is(err, context.Canceled) {
					t.Errorf("retry() = %v", err)
				}
				if agent.Asked() != 1 {
					t.Errorf("%d checks want 1", agent.Asked())
				}
			})
		}
	}
}

func TestRetryingDeadline(t *testing.T) {
	tests := []struct {
		name     string
		deadline time.Duration
		jitter   float64
		flows    int
	}{
		{name: "long before", deadline: time.Millisecond, jitter: -1, flows: 1},
		{name: "just before", deadline: 3*time.Second - 1, jitter: -1, flows: 1},
		{name: "at the end of the wait", deadline: 3 * time.Second, jitter: -1, flows: 1},
		{name: "after the wait", deadline: 3*time.Second + 1, jitter: -1, flows: 2},
		{name: "after the longest wait", deadline: 6*time.Second + 1, jitter: 1, flows: 2},
		{name: "after the wait, whatever the jitter", deadline: 3*time.Second + 1, jitter: 1e6, flows: 2},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			overScripts(t, []flowtest.Answer{rejected(3 * time.Second), accepted}, func(t *testing.T, agent *sides.Side) {
				ctx, cancel := context.WithTimeout(t.Context(), tt.deadline)
				defer cancel()
				began := time.Now()
				_, err := headgate.Guard(headgate.Retrying(agent.Client, headgate.RetryPolicy{Jitter: tt.jitter}), point, flowctl.Params{}, work, nil)(ctx)
				took := time.Since(began)
				if agent.Asked() != tt.flows {
					t.Errorf("%d checks want %d", agent.Asked(), tt.flows)
				}
				switch {
				case tt.flows == 1 && (!errors.Is(err, flowctl.ErrRejected) || took != 0):
					t.Errorf("retry() = %v after %v want the rejection at once", err, took)
				case tt.flows == 2 && (err != nil || took < 3*time.Second):
					t.Errorf("retry() = %v after %v want no error, after 3s", err, took)
				}
			})
		})
	}
}

// A caller who goes during the wait gets the error of its context, at once and not that of the flow.
func TestRetryingCanceled(t *testing.T) {
	tests := []struct {
		name  string
		cause error
		err   error
	}{
		{name: "without a cause", err: context.Canceled},
		{name: "with a cause", cause: errGone, err: errGone},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			overScripts(t, []flowtest.Answer{rejected(time.Minute)}, func(t *testing.T, agent *sides.Side) {
				starts := &starter{client: agent.Client}
				retry := headgate.Guard(headgate.Retrying(starts, headgate.RetryPolicy{}), point, flowctl.Params{}, func(context.Context) (int, error) {
					t.Error("fn ran")
					return 0, nil
				}, func(context.Context, error) (int, error) {
					t.Error("onReject was called")
					return 0, nil
				})
				ctx, cancel := context.WithCancelCause(t.Context())
				time.AfterFunc(time.Second, func() {
					allEnded(t, starts) // before the wait, not after it
					cancel(tt.cause)
				})
				began := time.Now()
				got, err := retry(ctx)
				if got != 0 || !errors.Is(err, context.Canceled) || !errors.Is(err, tt.err) || errors.Is(err, flowctl.ErrRejected) {
					t.Errorf("retry() = %d, %v want a match of the context's error and its cause", got, err)
				}
				if took := time.Since(began); took != time.Second {
					t.Errorf("retry() took %v want 1s", took)
				}
				if agent.Asked() != 1 {
					t.Errorf("%d checks want 1", agent.Asked())
				}
				allEnded(t, starts)
			})
		})
	}
}

// A retry that was not made is not paid for.
func TestRetryingCanceledBudget(t *testing.T) {
	overScripts(t, []flowtest.Answer{rejected(time.Second)}, func(t *testing.T, agent *sides.Side) {
		retry := headgate.Guard(headgate.Retrying(agent.Client, headgate.RetryPolicy{Attempts: -1, Budget: math.SmallestNonzeroFloat64}), point, flowctl.Params{}, work, nil)
		for range 100 {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(time.Millisecond, cancel)
			_, _ = retry(ctx)
		}
		before := agent.Asked()
		_, _ = retry(t.Context())
		if retries := agent.Asked() - before - 1; before != 100 || retries != 10 {
			t.Errorf("%d checks, and then %d retries want 100, 10", before, retries)
		}
	})
}

// What fn does on a later try is as with Guard: the flow is ended, once, and nothing is retried or recovered.
func TestRetryingSecondTry(t *testing.T) {
	nested := (&flowctl.RejectedError{ControlPoint: innerPoint}).WithRetryAfter(time.Second)
	tests := append([]outcome{
		{name: "a rejection", do: func() (int, error) { return 42, nested }, err: nested, status: flowctl.StatusError},
	}, outcomes...)
	for _, o := range tests {
		if o.nested {
			continue // a guard that is accepted; this is about one that is not
		}
		t.Run(o.name, func(t *testing.T) {
			overScripts(t, []flowtest.Answer{rejected(time.Second), accepted}, func(t *testing.T, agent *sides.Side) {
				ran := 0
				retry := headgate.Guard(headgate.Retrying(agent.Client, headgate.RetryPolicy{}), point, flowctl.Params{}, func(context.Context) (int, error) {
					ran++
					return o.do()
				}, fallback.Value(-1))
				var got result
				done := make(chan struct{})
				go func() {
					defer close(done)
					observe(&got, func() (int, error) { return retry(t.Context()) })
				}()
				<-done
				if got.panicked != o.panics || got.exited != o.exits || got.err != o.err { //nolint:errorlint // it must come back unchanged
					t.Errorf("got %+v want %+v", got, o)
				}
				if ran != 1 {
					t.Errorf("fn ran %d times want once", ran)
				}
				want := []sides.End{{ControlPoint: point, Status: flowctl.StatusError}, {ControlPoint: point, Status: o.status}}
				if ends := agent.Ends(); !slices.Equal(ends, want) {
					t.Errorf("the flows ended as %v want %v", ends, want)
				}
			})
		})
	}
}

// A flow that fn itself starts, and that is rejected, is no reason to run fn again.
func TestRetryingNested(t *testing.T) {
	overLimits(t, func(t *testing.T, client *flowctl.Client) {
		inner := headgate.Guard(client, point, flowctl.Params{}, work, nil)
		ran := 0
		outer := headgate.Guard(headgate.Retrying(client, headgate.RetryPolicy{}), "outer", flowctl.Params{}, func(ctx context.Context) (int, error) {
			ran++
			return inner(ctx)
		}, fallback.Value(-1))
		if got, err := outer(t.Context()); got != 42 || err != nil {
			t.Fatalf("outer() = %d, %v want 42", got, err)
		}
		got, err := outer(t.Context())
		if wait, ok := fallback.RetryAfter(err); got != 0 || !errors.Is(err, flowctl.ErrRejected) || !ok || wait != time.Second {
			t.Errorf("outer() = %d, %v want the inner rejection", got, err)
		}
		if ran != 2 {
			t.Errorf("fn ran %d times in two calls", ran)
		}
	})
}

// Callers who are all rejected must not become three times as many.
func TestRetryingFlood(t *testing.T) {
	calls := race.Pick(300, 1000)
	overScripts(t, []flowtest.Answer{rejected(time.Second)}, func(t *testing.T, agent *sides.Side) {
		retry := headgate.Guard(headgate.Retrying(agent.Client, headgate.RetryPolicy{}), point, flowctl.Params{CheckTimeout: -1}, work, fallback.Value(-1))
		var wg sync.WaitGroup
		for range calls {
			wg.Go(func() {
				if got, err := retry(t.Context()); got != -1 || err != nil {
					t.Errorf("retry() = %d, %v want the fallback", got, err)
				}
			})
		}
		wg.Wait()
		// Ten that there were, a tenth that calls add, and of these those are lost that find a full budget.
		if retries := agent.Asked() - calls; retries < calls/10 || retries > calls/10+10 {
			t.Errorf("%d retries want %d to %d", retries, calls/10, calls/10+10)
		}
	})
}

// The same against a limit that lets some of them in.
func TestRetryingFloodOfALimit(t *testing.T) {
	calls := race.Pick(300, 1000)
	overLimits(t, func(t *testing.T, client *flowctl.Client) {
		starts := &starter{client: client}
		retry := headgate.Guard(headgate.Retrying(starts, headgate.RetryPolicy{}), point, flowctl.Params{CheckTimeout: -1}, work, nil)
		var good atomic.Int64
		var wg sync.WaitGroup
		for range calls {
			wg.Go(func() {
				switch got, err := retry(t.Context()); {
				case err == nil && got == 42:
					good.Add(1)
				case !errors.Is(err, flowctl.ErrRejected):
					t.Errorf("retry() = %d, %v", got, err)
				}
			})
		}
		wg.Wait()
		if n := good.Load(); n < 2 || n > 4 { // the first, and one for each second of waiting
			t.Errorf("%d calls were let in want 2 to 4", n)
		}
		if retries := len(starts.flows) - calls; retries > calls/10+10 {
			t.Errorf("%d retries want at most %d", retries, calls/10+10)
		}
		allEnded(t, starts)
	})
}

func TestRetryingBudget(t *testing.T) {
	tests := []struct {
		name    string
		budget  float64
		calm    int // calls that are accepted, before
		calls   int // calls that are rejected, with one retry at the most
		retries int
	}{
		{name: "fresh", calls: 10, retries: 10},
		{name: "one for ten calls", calls: 100, retries: 10 + 10},
		{name: "for a quarter of the calls", budget: 0.25, calls: 100, retries: 10 + 25},
		{name: "for all calls", budget: 1, calls: 200, retries: 200},
		{name: "for more than all calls", budget: math.Inf(1), calls: 200, retries: 200},
		{name: "not a number", budget: math.NaN(), calls: 100, retries: 10},
		{name: "next to none", budget: 1e-300, calls: 100, retries: 10},
		{name: "none", budget: -1, calls: 200, retries: 200},
		{name: "calls that are let in count", calm: 300, calls: 40, retries: 40},
		{name: "a hundred at the most", budget: 0.3, calm: 400, calls: 200, retries: 100 + 59},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			answers := append(slices.Repeat([]flowtest.Answer{accepted}, tt.calm), rejected(time.Second))
			sides.Setup{Answers: answers}.InBubbles(t, reckoning, func(t *testing.T, agent *sides.Side) {
				retry := headgate.Guard(headgate.Retrying(agent.Client, headgate.RetryPolicy{Attempts: 2, Budget: tt.budget}), point, flowctl.Params{}, work, nil)
				for range tt.calm + tt.calls {
					_, _ = retry(t.Context())
				}
				if retries := agent.Asked() - tt.calm - tt.calls; retries != tt.retries {
					t.Errorf("%d retries want %d", retries, tt.retries)
				}
			})
		})
	}
}

// However much a call adds, there is no more than the most.
func TestRetryingBudgetIsFull(t *testing.T) {
	overScripts(t, []flowtest.Answer{rejected(time.Second)}, func(t *testing.T, agent *sides.Side) {
		retry := headgate.Guard(headgate.Retrying(agent.Client, headgate.RetryPolicy{Attempts: -1, Budget: math.Inf(1)}), point, flowctl.Params{}, work, nil)
		for range 2 {
			before := agent.Asked()
			_, _ = retry(t.Context())
			if retries := agent.Asked() - before - 1; retries != 100 {
				t.Errorf("%d retries want 100", retries)
			}
		}
	})
}

// What is spent comes back with the calls, and not with time.
func TestRetryingBudgetRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		retry := headgate.Guard(headgate.Retrying(agent.Client(), headgate.RetryPolicy{Attempts: -1}), point, flowctl.Params{}, work, nil)
		retries := func(answer flowtest.Answer, calls int) int {
			agent.Answer(answer)
			before := len(agent.Checks())
			for range calls {
				_, _ = retry(t.Context())
			}
			return len(agent.Checks()) - before - calls
		}
		if got := retries(rejected(time.Second), 1); got != 10 {
			t.Errorf("%d retries of a fresh function want 10", got)
		}
		<-time.After(time.Hour)
		if got := retries(rejected(time.Second), 1); got != 0 {
			t.Errorf("%d retries without calls want 0", got)
		}
		retries(accepted, 47)
		if got := retries(rejected(time.Second), 1); got != 5 {
			t.Errorf("%d retries after 50 calls want 5", got)
		}
	})
}

// Each function has a budget of its own.
func TestRetryingBudgetsAreApart(t *testing.T) {
	overScripts(t, []flowtest.Answer{rejected(time.Second)}, func(t *testing.T, agent *sides.Side) {
		for range 3 {
			before := agent.Asked()
			_, _ = headgate.Guard(headgate.Retrying(agent.Client, headgate.RetryPolicy{Attempts: -1}), point, flowctl.Params{}, work, nil)(t.Context())
			if retries := agent.Asked() - before - 1; retries != 10 {
				t.Errorf("%d retries want 10", retries)
			}
		}
	})
}

// One function for many callers, some of whom go while they wait.
func TestRetryingConcurrently(t *testing.T) {
	overLimits(t, func(t *testing.T, client *flowctl.Client) {
		starts := &starter{client: client}
		var running atomic.Int64
		retry := headgate.Guard(headgate.Retrying(starts, headgate.RetryPolicy{Attempts: -1, Budget: -1}), point, flowctl.Params{CheckTimeout: -1}, func(context.Context) (int, error) {
			return int(running.Add(1)), nil
		}, nil)
		var wg sync.WaitGroup
		var good, gone atomic.Int64
		for i := range 100 {
			wg.Go(func() {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if i%2 == 0 {
					time.AfterFunc(time.Duration(i)*time.Millisecond, cancel)
				}
				switch _, err := retry(ctx); {
				case err == nil:
					good.Add(1)
				case errors.Is(err, context.Canceled):
					gone.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if good.Load()+gone.Load() != 100 || good.Load() < 50 || running.Load() != good.Load() {
			t.Errorf("%d were let in, %d ran, %d went", good.Load(), running.Load(), gone.Load())
		}
		allEnded(t, starts)
	})
}

// A retry that can come before the deadline does, however long the jitter could be, and leaves time for an answer.
func TestRetryingJitterFitsTheDeadline(t *testing.T) {
	tests := []struct {
		name     string
		after    time.Duration
		deadline time.Duration
		policy   headgate.RetryPolicy
		retries  bool
		most     time.Duration // of waiting
	}{
		{name: "little more", after: time.Second, deadline: 1050 * time.Millisecond, retries: true, most: 1025 * time.Millisecond},
		{name: "hardly more", after: time.Second, deadline: 1010 * time.Millisecond, retries: true, most: time.Second},
		{name: "a nanosecond more", after: time.Second, deadline: time.Second + 1, retries: true, most: time.Second},
		{name: "as much", after: time.Second, deadline: time.Second},
		{name: "less", after: time.Second, deadline: time.Second - 1},
		{name: "much more", after: time.Second, deadline: time.Minute, retries: true, most: 1200 * time.Millisecond},
		{name: "double", after: time.Second, deadline: 1050 * time.Millisecond, policy: headgate.RetryPolicy{Jitter: 1}, retries: true, most: 1025 * time.Millisecond},
		{name: "endless", after: time.Second, deadline: 1050 * time.Millisecond, policy: headgate.RetryPolicy{Jitter: math.Inf(1)}, retries: true, most: 1025 * time.Millisecond},
		{name: "the longest wait", after: time.Second, deadline: time.Minute, policy: headgate.RetryPolicy{MaxWait: time.Second, Jitter: 1}, retries: true, most: 2 * time.Second},
		{name: "the longest wait, and little more", after: time.Second, deadline: 1050 * time.Millisecond, policy: headgate.RetryPolicy{MaxWait: time.Second}, retries: true, most: 1025 * time.Millisecond},
		{name: "longer than the longest wait", after: time.Second + 1, deadline: time.Minute, policy: headgate.RetryPolicy{MaxWait: time.Second}},
		{name: "less than the shortest wait", after: time.Microsecond, deadline: 500 * time.Microsecond, retries: true, most: 251 * time.Microsecond},
		{name: "less than the shortest wait, as much", after: time.Microsecond, deadline: time.Microsecond},
		{name: "the shortest wait, as much", after: time.Microsecond, deadline: time.Millisecond, retries: true, most: 501 * time.Microsecond},
		{name: "less than the shortest wait, much more", after: time.Microsecond, deadline: time.Minute, retries: true, most: 1200 * time.Microsecond},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			overScripts(t, []flowtest.Answer{rejected(tt.after)}, func(t *testing.T, agent *sides.Side) {
				policy := tt.policy
				policy.Attempts, policy.Budget = 2, -1
				client := headgate.Retrying(agent.Client, policy)
				for range race.Pick(10, 25) {
					before, began := agent.Asked(), time.Now()
					ctx, cancel := context.WithTimeout(t.Context(), tt.deadline)
					_, err := headgate.Guard(client, point, flowctl.Params{}, work, nil)(ctx)
					cancel()
					took, retries := time.Since(began), agent.Asked()-before == 2
					if retries != tt.retries || took > tt.most || tt.retries && took < tt.after || !errors.Is(err, flowctl.ErrRejected) {
						t.Fatalf("retried %v after %v, %v want %v after at most %v", retries, took, err, tt.retries, tt.most)
					}
				}
			})
		})
	}
}

// A limit that lets a call in after a second does so for a caller that has a little more, each time.
func TestRetryingMeetsTheDeadline(t *testing.T) {
	overLimits(t, func(t *testing.T, client *flowctl.Client) {
		call := headgate.Guard(headgate.Retrying(client, headgate.RetryPolicy{Budget: -1}), point, flowctl.Params{}, work, nil)
		if _, err := call(t.Context()); err != nil {
			t.Fatal(err)
		}
		for i := range 50 {
			ctx, cancel := context.WithTimeout(t.Context(), 1050*time.Millisecond)
			if _, err := call(ctx); err != nil {
				t.Fatalf("call %d: %v", i, err)
			}
			cancel()
		}
	})
}

// Whatever takes a Starter retries by one budget.
func TestRetryingIsForAll(t *testing.T) {
	overScripts(t, []flowtest.Answer{rejected(time.Second)}, func(t *testing.T, agent *sides.Side) {
		client := headgate.Retrying(agent.Client, headgate.RetryPolicy{Attempts: 2, Budget: math.SmallestNonzeroFloat64})
		guard := httpguard.Middleware(client, point)(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("served") }))
		unary := grpcguard.UnaryServerInterceptor(client, point)
		calls := map[string]func(){
			"Guard": func() { _, _ = headgate.Guard(client, point, flowctl.Params{}, work, nil)(t.Context()) },
			"GuardFunc": func() {
				_, _ = headgate.GuardFunc(client, point, nil, func(context.Context, int) (int, error) { return 0, nil }, nil)(t.Context(), 1)
			},
			"Do": func() {
				_ = headgate.Do(t.Context(), client, point, flowctl.Params{}, func(context.Context, *flowctl.Flow) error { return nil })
			},
			"Cached": func() {
				_, _ = headgate.Cached(client, point, flowctl.Params{}, work, nil, headgate.CachePolicy[int]{})(t.Context())
			},
			"CachedFunc": func() {
				_, _ = headgate.CachedFunc(client, point, byArg, func(context.Context, string) (int, error) { return 0, nil },
					nil, headgate.CachePolicy[int]{})(t.Context(), "key")
			},
			"httpguard": func() {
				guard.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", http.NoBody))
			},
			"grpcguard": func() {
				_, _ = unary(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: "/service/method"},
					func(context.Context, any) (any, error) { return nil, errors.New("served") })
			},
		}
		for name, call := range calls {
			before := agent.Asked()
			call()
			if got := agent.Asked() - before; got != 2 {
				t.Errorf("%s started %d flows want 2", name, got)
			}
		}
		for range 10 - len(calls) {
			calls["Guard"]()
		}
		before := agent.Asked()
		calls["Do"]()
		if got := agent.Asked() - before; got != 1 {
			t.Errorf("%d flows with a budget that all have spent want 1", got)
		}
	})
}

// Calls that a limit holds back do not run because the engine, or the client, is closed while they wait: they stay rejected,
// and their fallback is called. A call that begins later is Unreachable, and runs.
func TestRetryingWhenClosed(t *testing.T) {
	for _, closes := range []string{"engine", "client"} {
		for _, on := range []flowctl.UnreachablePolicy{flowctl.FailOpen, flowctl.FailClosed} {
			synctest.Test(t, func(t *testing.T) {
				limits, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{
					policy.RateLimiter{Selectors: policy.At(point), Capacity: 1, Fill: 1, Interval: time.Minute},
				}}})
				if err != nil {
					t.Fatal(err)
				}
				defer limits.Close()
				client, err := flowctl.New(limits)
				if err != nil {
					t.Fatal(err)
				}
				inner := headgate.Retrying(client, headgate.RetryPolicy{Attempts: 2})
				var ran, rejected, unreachable atomic.Int32
				call := headgate.Guard(headgate.Retrying(inner, headgate.RetryPolicy{}), point, flowctl.Params{OnUnreachable: on},
					func(context.Context) (int, error) { return int(ran.Add(1)), nil },
					func(_ context.Context, err error) (int, error) {
						if errors.Is(err, flowctl.ErrRejected) {
							rejected.Add(1)
						} else if errors.Is(err, flowctl.ErrClosed) {
							unreachable.Add(1)
						}
						return 0, err
					})
				began := time.Now()
				var calls sync.WaitGroup
				for range 5 {
					calls.Go(func() { _, _ = call(t.Context()) })
				}
				<-time.After(time.Second)
				if closes == "engine" {
					_ = limits.Close()
				} else {
					_ = client.Close(t.Context())
				}
				calls.Wait()
				if waited := time.Since(began); waited != time.Second {
					t.Errorf("%s closed after a second: calls returned after %s", closes, waited)
				}
				want := [3]int32{1, 4, 0}
				if got := [3]int32{ran.Load(), rejected.Load(), unreachable.Load()}; got != want {
					t.Errorf("%s closed, on unreachable %v: ran, rejected, unreachable = %v want %v", closes, on, got, want)
				}
				_, _ = call(t.Context())
				if ran := ran.Load(); (ran == 2) != (on == flowctl.FailOpen) {
					t.Errorf("%s closed, on unreachable %v: %d calls ran, the last one after that", closes, on, ran)
				}
			})
		}
	}
}
