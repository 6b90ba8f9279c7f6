package flowctl_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/baggage"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/labels"
	"github.com/headgate-go/headgate/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func noPoliciesEngine(t *testing.T) *engine.Engine {
	t.Helper()
	e, err := engine.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	return e
}

// noPolicies is a client of an engine that accepts every flow.
func noPolicies(t *testing.T, opts ...flowctl.Option) *flowctl.Client {
	t.Helper()
	client, err := flowctl.New(noPoliciesEngine(t), opts...)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// overAll runs f in a bubble with a client of each kind of agent, none of which rejects anything.
func overAll(t *testing.T, f func(t *testing.T, client *flowctl.Client)) {
	t.Helper()
	sides.Setup{}.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) { f(t, side.Client) })
}

// TestShouldRun is the truth table: every decision with every setting that bears on it.
func TestShouldRun(t *testing.T) {
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	decisions := map[flowctl.Decision]struct {
		ctx    context.Context
		point  string
		answer flowtest.Answer
	}{
		flowctl.Accepted:    {t.Context(), "point", flowtest.Answer{}},
		flowctl.Rejected:    {t.Context(), "point", flowtest.Answer{Reason: flowctl.ReasonNoTokens}},
		flowctl.Unreachable: {t.Context(), "point", flowtest.Answer{Fail: status.Error(codes.Unavailable, "gone")}},
		flowctl.Canceled:    {canceled, "point", flowtest.Answer{}},
		flowctl.Invalid:     {t.Context(), "", flowtest.Answer{}},
	}
	for d := flowctl.Accepted; d <= flowctl.Invalid; d++ {
		for _, ramp := range []bool{false, true} {
			for _, policy := range []flowctl.UnreachablePolicy{flowctl.FailOpen, flowctl.FailClosed} {
				for _, dry := range []bool{false, true} {
					t.Run(fmt.Sprintf("%v, ramp %v, %v, dry run %v", d, ramp, policy, dry), func(t *testing.T) {
						agent := flowtest.NewAgent(t)
						row := decisions[d]
						agent.Answer(row.answer)
						opts := []flowctl.Option{flowctl.WithCheckTimeout(10 * time.Second)}
						if dry {
							opts = append(opts, flowctl.WithDryRun())
						}
						flow := agent.Client(opts...).Start(row.ctx, row.point, flowctl.Params{RampMode: ramp, OnUnreachable: policy})
						want := dry
						switch d {
						case flowctl.Accepted:
							want = true
						case flowctl.Unreachable:
							want = want || !ramp && policy == flowctl.FailOpen
						default:
						}
						if flow.Decision() != d || flow.ShouldRun() != want {
							t.Errorf("%v, ShouldRun() = %v want %v, %v", flow.Decision(), flow.ShouldRun(), d, want)
						}
						if got, want := flow.Success(), d == flowctl.Accepted || d == flowctl.Rejected; got != want {
							t.Errorf("Success() = %v want %v", got, want)
						}
						if (flow.Err() == nil) != (d == flowctl.Accepted) {
							t.Errorf("Err() = %v", flow.Err())
						}
						if got := flow.HTTPStatus(); flow.ShouldRun() && got != http.StatusOK || !flow.ShouldRun() && (got < 400 || got > 599) {
							t.Errorf("HTTPStatus() = %d", got)
						}
						if got := flow.CheckResponse(); (got != nil) != flow.Success() {
							t.Errorf("CheckResponse() = %v", got)
						}
					})
				}
			}
		}
	}
}

func TestNilClient(t *testing.T) {
	var client *flowctl.Client
	if err := client.Ready(t.Context()); err != nil {
		t.Errorf("Ready() = %v", err)
	}
	flow := client.Start(t.Context(), "", flowctl.Params{RampMode: true, ResultCacheKey: "k"})
	if flow.Decision() != flowctl.Accepted || !flow.ShouldRun() || flow.Err() != nil || flow.CheckResponse() != nil {
		t.Errorf("%v, %v", flow, flow.Err())
	}
	if got, ok := flowctl.FromContext(flow.Context()); !ok || got != flow {
		t.Error("the context lacks the flow")
	}
	if _, ok, err := flow.ResultCache(); ok || err != nil {
		t.Errorf("ResultCache() = %v, %v want a miss", ok, err)
	}
	if err := flow.SetResultCache(t.Context(), []byte("v"), 0); err != nil {
		t.Errorf("SetResultCache() = %v", err)
	}
	if err := flow.DeleteGlobalCache(t.Context(), "k"); err != nil {
		t.Errorf("DeleteGlobalCache() = %v", err)
	}
	if _, err := flow.End(t.Context()); err != nil {
		t.Errorf("End() = %v", err)
	}
	if _, err := flow.End(t.Context()); !errors.Is(err, flowctl.ErrEnded) {
		t.Errorf("End() = %v want ErrEnded", err)
	}
	if err := client.Close(t.Context()); err != nil {
		t.Errorf("Close() = %v", err)
	}
}

// A lookup that was never asked for is a miss, although hit is the wire's zero.
func TestCacheNotAskedForIsAMiss(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		flow := client.Start(t.Context(), "point", flowctl.Params{GlobalCacheKeys: []string{"g"}})
		defer flow.EndWith(nil)
		if v, ok, err := flow.ResultCache(); v != nil || ok || err != nil {
			t.Errorf("ResultCache() = %q, %v, %v want a miss", v, ok, err)
		}
		if v, ok, err := flow.GlobalCache("other"); v != nil || ok || err != nil {
			t.Errorf("GlobalCache(other) = %q, %v, %v want a miss", v, ok, err)
		}
		plain := client.Start(t.Context(), "point", flowctl.Params{})
		defer plain.EndWith(nil)
		if _, ok, err := plain.GlobalCache("g"); ok || err != nil {
			t.Errorf("GlobalCache(g) = %v, %v want a miss", ok, err)
		}
		if err := plain.SetResultCache(t.Context(), []byte("v"), 0); !errors.Is(err, flowctl.ErrInvalid) {
			t.Errorf("SetResultCache() without a key = %v want ErrInvalid", err)
		}
		if err := flow.SetGlobalCache(t.Context(), strings.Repeat("k", 256), nil, 0); !errors.Is(err, flowctl.ErrInvalid) {
			t.Errorf("SetGlobalCache() with a long key = %v want ErrInvalid", err)
		}
		if err := flow.SetGlobalCache(t.Context(), "g", nil, -1); !errors.Is(err, flowctl.ErrInvalid) {
			t.Errorf("SetGlobalCache() with a negative time to live = %v want ErrInvalid", err)
		}
	})
}

func TestCache(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		ctx := t.Context()
		params := flowctl.Params{ResultCacheKey: "r", GlobalCacheKeys: []string{"g", ""}}
		look := func(point string, wantResult, wantGlobal string) *flowctl.Flow {
			t.Helper()
			flow := client.Start(ctx, point, params)
			result, hit, err := flow.ResultCache()
			if string(result) != wantResult || hit != (wantResult != "") || err != nil {
				t.Errorf("ResultCache() = %q, %v, %v want %q", result, hit, err, wantResult)
			}
			global, hit, err := flow.GlobalCache("g")
			if string(global) != wantGlobal || hit != (wantGlobal != "") || err != nil {
				t.Errorf("GlobalCache(g) = %q, %v, %v want %q", global, hit, err, wantGlobal)
			}
			_, _ = flow.End(ctx)
			return flow
		}
		flow := look("point", "", "")
		value := []byte("one")
		if err := errors.Join(flow.SetResultCache(ctx, value, 0), flow.SetGlobalCache(ctx, "g", []byte("two"), time.Minute)); err != nil {
			t.Fatal(err)
		}
		copy(value, "xxx") // the cache keeps what it was given
		flow = look("point", "one", "two")
		look("other", "", "two")
		if v, _, _ := flow.ResultCache(); len(v) > 0 {
			v[0] = 'x' // the cache gives what it keeps
		}
		look("point", "one", "two")
		if err := errors.Join(flow.DeleteResultCache(ctx), flow.DeleteGlobalCache(ctx, "g"), flow.DeleteGlobalCache(ctx, "none")); err != nil {
			t.Fatal(err)
		}
		look("point", "", "")
	})
}

func TestCacheCallErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		client := agent.Client()
		flow := client.Start(t.Context(), "point", flowctl.Params{ResultCacheKey: "k"})
		agent.Freeze()
		canceled, cancel := context.WithCancel(t.Context())
		cancel()
		if err := flow.SetResultCache(canceled, nil, 0); !errors.Is(err, context.Canceled) {
			t.Errorf("SetResultCache() of a caller who has gone = %v", err)
		}
		if err := flow.SetResultCache(t.Context(), nil, 0); !errors.Is(err, flowctl.ErrUnreachable) || status.Code(err) != codes.Unknown {
			t.Errorf("SetResultCache() of a frozen agent = %v want ErrUnreachable, and not the agent's status", err)
		}
		agent.Thaw()
		_ = client.Close(t.Context())
		if err := flow.DeleteResultCache(t.Context()); !errors.Is(err, flowctl.ErrClosed) {
			t.Errorf("DeleteResultCache() of a closed client = %v", err)
		}
	})
}

func TestCacheErrorsAreNotMisses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		failed := &checkv1.KeyLookupResponse{
			LookupStatus:    checkv1.CacheLookupStatus_MISS,
			OperationStatus: checkv1.CacheOperationStatus_ERROR,
			Error:           "cache is not ready",
		}
		agent.Answer(flowtest.Answer{Response: &checkv1.CheckResponse{CacheLookupResponse: &checkv1.CacheLookupResponse{
			ResultCacheResponse:  failed,
			GlobalCacheResponses: map[string]*checkv1.KeyLookupResponse{"g": failed},
		}}}, flowtest.Answer{Response: &checkv1.CheckResponse{}}, flowtest.Answer{Reason: flowctl.ReasonNotSampled})
		client := agent.Client()
		params := flowctl.Params{ResultCacheKey: "r", GlobalCacheKeys: []string{"g"}}

		flow := client.Start(t.Context(), "point", params)
		if _, ok, err := flow.ResultCache(); ok || !strings.Contains(fmt.Sprint(causeOf(err)), "cache is not ready") {
			t.Errorf("ResultCache() = %v, %v want the agent's error", ok, err)
		}
		if _, ok, err := flow.GlobalCache("g"); ok || err == nil {
			t.Errorf("GlobalCache() = %v, %v want the agent's error", ok, err)
		}
		silent := client.Start(t.Context(), "point", params)
		if _, ok, err := silent.ResultCache(); ok || err != nil {
			t.Errorf("ResultCache() of an answer without one = %v, %v want a miss", ok, err)
		}
		rejected := client.Start(t.Context(), "point", params)
		if _, ok, err := rejected.ResultCache(); ok || !errors.Is(err, flowctl.ErrRejected) {
			t.Errorf("ResultCache() of a rejected flow = %v, %v want ErrRejected", ok, err)
		}
	})
}

// held is a decision of a concurrency limiter.
func held(component, id string, dropped bool) *checkv1.LimiterDecision {
	return &checkv1.LimiterDecision{
		PolicyName: "p", PolicyHash: "h", ComponentId: component, Dropped: dropped,
		Details: &checkv1.LimiterDecision_ConcurrencyLimiterInfo_{ConcurrencyLimiterInfo: &checkv1.LimiterDecision_ConcurrencyLimiterInfo{
			Label: "user:u", RequestId: id, TokensInfo: &checkv1.LimiterDecision_TokensInfo{Consumed: 2.5},
		}},
	}
}

// scheduled is a decision of a concurrency scheduler.
func scheduled(component, id string) *checkv1.LimiterDecision {
	return &checkv1.LimiterDecision{
		PolicyName: "p", PolicyHash: "h", ComponentId: component,
		Details: &checkv1.LimiterDecision_ConcurrencySchedulerInfo_{ConcurrencySchedulerInfo: &checkv1.LimiterDecision_ConcurrencySchedulerInfo{
			Label: "default", RequestId: id, TokensInfo: &checkv1.LimiterDecision_TokensInfo{Consumed: 1},
		}},
	}
}

func TestFlowEndRequest(t *testing.T) {
	rateLimited := &checkv1.LimiterDecision{
		PolicyName: "p", ComponentId: "root.9",
		Details: &checkv1.LimiterDecision_RateLimiterInfo_{RateLimiterInfo: &checkv1.LimiterDecision_RateLimiterInfo{Label: "user:u"}},
	}
	ref := func(component, label, id string, tokens float64) *checkv1.InflightRequestRef {
		return &checkv1.InflightRequestRef{PolicyName: "p", PolicyHash: "h", ComponentId: component, Label: label, RequestId: id, Tokens: tokens}
	}
	for _, tt := range []struct {
		name      string
		decisions []*checkv1.LimiterDecision
		rejected  bool
		want      []*checkv1.InflightRequestRef
	}{
		{name: "nothing"},
		{
			name:      "all slots in one call",
			decisions: []*checkv1.LimiterDecision{held("root.0", "a", false), rateLimited, scheduled("root.1", "b")},
			want:      []*checkv1.InflightRequestRef{ref("root.0", "user:u", "a", 2.5), ref("root.1", "default", "b", 1)},
		},
		{
			name:      "rejected by a later stage",
			decisions: []*checkv1.LimiterDecision{held("root.0", "a", false), held("root.1", "b", true)},
			rejected:  true,
			want:      []*checkv1.InflightRequestRef{ref("root.0", "user:u", "a", 2.5)},
		},
		{name: "dropped, with an id", decisions: []*checkv1.LimiterDecision{held("root.0", "a", true)}, rejected: true},
		{name: "no id", decisions: []*checkv1.LimiterDecision{held("root.0", "", false)}},
		{name: "nil parts", decisions: []*checkv1.LimiterDecision{{Details: &checkv1.LimiterDecision_ConcurrencyLimiterInfo_{}}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				m := &checkv1.CheckResponse{LimiterDecisions: tt.decisions}
				if tt.rejected {
					m.DecisionType = checkv1.CheckResponse_DECISION_TYPE_REJECTED
				}
				agent.Answer(flowtest.Answer{Response: m})
				flow := agent.Client().Start(t.Context(), "point", flowctl.Params{})
				got, err := flow.End(t.Context())
				if err != nil || got.Held != len(tt.want) {
					t.Errorf("End() = %+v, %v want %d held", got, err, len(tt.want))
				}
				if _, err := flow.End(t.Context()); !errors.Is(err, flowctl.ErrEnded) {
					t.Errorf("second End() = %v want ErrEnded", err)
				}
				var refs []*checkv1.InflightRequestRef
				for _, end := range agent.Ends() {
					if end.GetControlPoint() != "point" {
						t.Errorf("control point = %q", end.GetControlPoint())
					}
					refs = append(refs, end.GetInflightRequests()...)
				}
				if diff := cmp.Diff(tt.want, refs, protocmp.Transform()); diff != "" {
					t.Errorf("references (-want +got):\n%s", diff)
				}
				if len(agent.Ends()) > 1 {
					t.Errorf("%d calls want one", len(agent.Ends()))
				}
			})
		})
	}
}

func TestEndResponse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{Slots: 2})
		client := agent.Client()
		flow := client.Start(t.Context(), "point", flowctl.Params{})
		if got, err := flow.End(t.Context()); got != (flowctl.EndResponse{Held: 2, Returned: 2}) || err != nil {
			t.Errorf("End() = %+v, %v want both returned", got, err)
		}
		agent.AnswerEnds(flowtest.Answer{Fail: status.Error(codes.Internal, "broken")})
		flow = client.Start(t.Context(), "point", flowctl.Params{})
		got, err := flow.End(t.Context())
		if got != (flowctl.EndResponse{Held: 2}) || err == nil || status.Code(err) == codes.Internal {
			t.Errorf("End() = %+v, %v want an error, and not the agent's status", got, err)
		}
	})
}

func TestEndWith(t *testing.T) {
	work := errors.New("work")
	for _, tt := range []struct {
		name   string
		f      func(flow *flowctl.Flow) (err error)
		want   flowctl.Status
		err    error
		panics any
	}{
		{name: "ok", want: flowctl.StatusOK, f: func(flow *flowctl.Flow) (err error) {
			defer flow.EndWith(&err)
			return nil
		}},
		{name: "error", want: flowctl.StatusError, err: work, f: func(flow *flowctl.Flow) (err error) {
			defer flow.EndWith(&err)
			return work
		}},
		{name: "no error to point to", want: flowctl.StatusOK, f: func(flow *flowctl.Flow) error {
			defer flow.EndWith(nil)
			return nil
		}},
		{name: "panic", want: flowctl.StatusError, panics: work, f: func(flow *flowctl.Flow) (err error) {
			defer flow.EndWith(&err)
			flow.SetStatus(flowctl.StatusOK) // a panic goes before it
			panic(work)
		}},
		{name: "status set", want: flowctl.StatusOK, err: work, f: func(flow *flowctl.Flow) (err error) {
			defer flow.EndWith(&err)
			flow.SetStatus(flowctl.StatusOK)
			return work
		}},
		{name: "ended before", want: flowctl.StatusOK, err: work, f: func(flow *flowctl.Flow) (err error) {
			defer flow.EndWith(&err)
			_, _ = flow.End(flow.Context())
			return work
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				client := agent.Client()
				flow := client.Start(t.Context(), "point", flowctl.Params{})
				func() {
					defer func() {
						if p := recover(); p != tt.panics {
							t.Errorf("recovered %v want %v", p, tt.panics)
						}
					}()
					if err := tt.f(flow); err != tt.err { //nolint:errorlint // EndWith must not touch it
						t.Errorf("error = %v want %v", err, tt.err)
					}
				}()
				_ = client.Close(t.Context())
				if spans := agent.Spans(); len(spans) != 1 || spans[0].Status != tt.want {
					t.Errorf("spans = %v want one with %v", spans, tt.want)
				}
			})
		})
	}
}

// What the function's error means is not asked where the function did not run, or the flow has ended.
func TestEndWithAsksNoMoreThanItMust(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{}, flowtest.Answer{Reason: flowctl.ReasonRateLimited})
		client := agent.Client()
		params := flowctl.Params{IsFailure: func(err error) bool {
			t.Errorf("IsFailure(%v) was called", err)
			return true
		}}
		for range 2 {
			_ = func() (err error) {
				flow := client.Start(t.Context(), "point", params)
				defer flow.EndWith(&err)
				if flow.ShouldRun() {
					_, _ = flow.End(t.Context())
				}
				return errors.New("some")
			}()
		}
	})
}

func TestIsFailure(t *testing.T) {
	notFound := errors.New("not found")
	for _, tt := range []struct {
		name   string
		params flowctl.Params
		err    func(ctx context.Context) error
		cancel bool
		expire bool
		want   flowctl.Status
	}{
		{name: "nil", err: func(context.Context) error { return nil }, want: flowctl.StatusOK},
		{name: "any error", err: func(context.Context) error { return notFound }, want: flowctl.StatusError},
		{
			name: "the caller canceled", cancel: true, want: flowctl.StatusOK,
			err: func(ctx context.Context) error { return fmt.Errorf("query: %w", ctx.Err()) },
		},
		{
			name: "the caller canceled with a cause", cancel: true, want: flowctl.StatusOK,
			err: context.Cause,
		},
		{
			name: "the caller canceled a gRPC call", cancel: true, want: flowctl.StatusOK,
			err: func(context.Context) error { return status.Error(codes.Canceled, "context canceled") },
		},
		{
			name: "the caller's time is up", expire: true, want: flowctl.StatusError,
			err: func(ctx context.Context) error { return ctx.Err() },
		},
		{name: "somebody else was canceled", err: func(context.Context) error { return context.Canceled }, want: flowctl.StatusError},
		{
			name: "another error after the caller canceled", cancel: true, want: flowctl.StatusError,
			err: func(context.Context) error { return notFound },
		},
		{
			name: "by the parameters", want: flowctl.StatusOK,
			params: flowctl.Params{IsFailure: func(err error) bool { return !errors.Is(err, notFound) }},
			err:    func(context.Context) error { return notFound },
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				client := agent.Client()
				timed, stop := context.WithTimeout(t.Context(), time.Minute)
				defer stop()
				ctx, cancel := context.WithCancelCause(timed)
				defer cancel(nil)
				flow := client.Start(ctx, "point", tt.params)
				if tt.cancel {
					cancel(errors.New("gone"))
				}
				if tt.expire {
					<-ctx.Done()
				}
				flow.SetError(tt.err(ctx))
				_, _ = flow.End(ctx)
				_ = client.Close(t.Context())
				if spans := agent.Spans(); len(spans) != 1 || spans[0].Status != tt.want {
					t.Errorf("spans = %v want one with %v", spans, tt.want)
				}
			})
		})
	}
}

func TestContext(t *testing.T) {
	type key struct{}
	ctx, cancel := context.WithTimeout(context.WithValue(t.Context(), key{}, "value"), time.Hour)
	defer cancel()
	ctx = labels.With(ctx, "secret", "sesame")
	client := noPolicies(t)
	outer := client.Start(ctx, "outer", flowctl.Params{Labels: map[string]string{"secret": "sesame"}})
	inner := client.Start(outer.Context(), "inner", flowctl.Params{})
	got := inner.Context()
	if f, ok := flowctl.FromContext(got); !ok || f != inner {
		t.Errorf("FromContext() = %v, %v want the inner flow", f, ok)
	}
	if _, ok := flowctl.FromContext(ctx); ok {
		t.Error("the caller's context has a flow")
	}
	if got.Value(key{}) != "value" {
		t.Error("the caller's value is lost")
	}
	if d, ok := got.Deadline(); !ok || time.Until(d) <= 0 {
		t.Error("the caller's deadline is lost")
	}
	child, cancelChild := context.WithCancel(got)
	defer cancelChild()
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		for _, what := range []any{got, child, inner, outer} {
			if text := fmt.Sprintf(verb, what); strings.Contains(text, "sesame") {
				t.Errorf("%s: %q shows a label", verb, text)
			}
		}
	}
	cancel()
	if !errors.Is(got.Err(), context.Canceled) || !errors.Is(child.Err(), context.Canceled) {
		t.Errorf("Err() = %v, %v want Canceled", got.Err(), child.Err())
	}
}

// The order of labels, and what an agent is sent.
func TestLabelPrecedence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		client := agent.Client(
			flowctl.WithLabels(map[string]string{"a": "default", "b": "default", "c": "default", "d": "default"}),
			flowctl.WithLabels(map[string]string{"e": "default"}),
			flowctl.WithBaggage(),
		)
		bag, err := baggage.Parse("a=baggage,b=baggage,c=baggage")
		if err != nil {
			t.Fatal(err)
		}
		ctx := baggage.ContextWithBaggage(t.Context(), bag)
		ctx = labels.WithTransport(ctx, map[string]string{"a": "transport", "b": "transport", "c": "transport", "d": "transport"})
		ctx = labels.With(ctx, "a", "context", "b", "context")
		client.Start(ctx, "point", flowctl.Params{Labels: map[string]string{"a": "params"}})
		want := map[string]string{"a": "params", "b": "context", "c": "baggage", "d": "transport", "e": "default"}
		if diff := cmp.Diff(want, agent.Checks()[0].Request.GetLabels()); diff != "" {
			t.Errorf("labels (-want +got):\n%s", diff)
		}
		plain := agent.Client()
		plain.Start(ctx, "point", flowctl.Params{})
		want = map[string]string{"a": "context", "b": "context", "c": "transport", "d": "transport"}
		if diff := cmp.Diff(want, agent.Checks()[1].Request.GetLabels()); diff != "" {
			t.Errorf("labels without baggage (-want +got):\n%s", diff)
		}
	})
}

func many(prefix string, n int) map[string]string {
	m := make(map[string]string, n)
	for i := range n {
		m[fmt.Sprintf("%s%02d", prefix, i)] = prefix
	}
	return m
}

// asked is a flow that can be asked about, or not.
type asked struct {
	name   string
	ctx    func(context.Context) context.Context
	point  string
	params flowctl.Params
	ok     bool
}

// sesame is in whatever errors must not show.
const sesame = "sesame"

func (a asked) run(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		ctx := t.Context()
		if a.ctx != nil {
			ctx = a.ctx(ctx)
		}
		flow := client.Start(ctx, a.point, a.params)
		defer flow.EndWith(nil)
		if a.ok {
			if flow.Decision() != flowctl.Accepted {
				t.Errorf("%v: %v", flow.Decision(), flow.Err())
			}
			return
		}
		err := flow.Err()
		if flow.Decision() != flowctl.Invalid || flow.ShouldRun() || !errors.Is(err, flowctl.ErrInvalid) {
			t.Fatalf("%v, %v want invalid", flow.Decision(), err)
		}
		if strings.Contains(err.Error(), sesame) || len(err.Error()) > 400 {
			t.Errorf("error %q says too much", err)
		}
	})
}

// secret is a text of n bytes that no error may show.
func secret(n int) string { return sesame + strings.Repeat("v", n-len(sesame)) }

// What a flow may have just so, and what is one too much.
func TestLimits(t *testing.T) {
	keys := func(n int) []string {
		keys := make([]string, n)
		for i := range keys {
			keys[i] = fmt.Sprint(i)
		}
		return keys
	}
	fromContext := func(n int) func(context.Context) context.Context {
		return func(ctx context.Context) context.Context {
			for key := range many("x", n) {
				ctx = labels.With(ctx, key, sesame)
			}
			return ctx
		}
	}
	label := func(key, value string) flowctl.Params { return flowctl.Params{Labels: map[string]string{key: value}} }
	for _, tt := range []asked{
		{name: "control point of 255 bytes", point: strings.Repeat("p", 255), ok: true},
		{name: "control point of 256 bytes", point: strings.Repeat("p", 256)},
		{name: "control point of none"},
		{name: "64 labels", point: "p", params: flowctl.Params{Labels: many("k", 64)}, ok: true},
		{name: "65 labels", point: "p", params: flowctl.Params{Labels: many("k", 65)}},
		{name: "64 labels from the context", point: "p", ctx: fromContext(64), ok: true},
		{name: "65 labels from the context", point: "p", ctx: fromContext(65)},
		{name: "64 labels from two sources", point: "p", params: flowctl.Params{Labels: many("k", 60)}, ctx: fromContext(4), ok: true},
		{name: "65 labels from two sources", point: "p", params: flowctl.Params{Labels: many("k", 60)}, ctx: fromContext(5)},
		{
			name: "64 labels, two of them twice", point: "p", params: flowctl.Params{Labels: many("k", 64)}, ok: true,
			ctx: func(ctx context.Context) context.Context { return labels.With(ctx, "k01", "", "k02", "") },
		},
		{name: "key of 255 bytes", point: "p", params: label(strings.Repeat("k", 255), sesame), ok: true},
		{name: "key of 256 bytes", point: "p", params: label(strings.Repeat("k", 256), sesame)},
		{name: "key of none", point: "p", params: label("", sesame)},
		{name: "value of 4096 bytes", point: "p", params: label("k", secret(4096)), ok: true},
		{name: "value of 4097 bytes", point: "p", params: label("k", secret(4097))},
		{name: "value of none", point: "p", params: label("k", ""), ok: true},
		{name: "result cache key of 255 bytes", point: "p", params: flowctl.Params{ResultCacheKey: secret(255)}, ok: true},
		{name: "result cache key of 256 bytes", point: "p", params: flowctl.Params{ResultCacheKey: secret(256)}},
		{name: "64 global cache keys of 255 bytes", point: "p", params: flowctl.Params{GlobalCacheKeys: append(keys(63), secret(255))}, ok: true},
		{name: "65 global cache keys", point: "p", params: flowctl.Params{GlobalCacheKeys: keys(65)}},
		{name: "global cache key of 256 bytes", point: "p", params: flowctl.Params{GlobalCacheKeys: []string{secret(256)}}},
	} {
		t.Run(tt.name, tt.run)
	}
}

func TestInvalid(t *testing.T) {
	for _, tt := range []asked{
		{name: "control point not UTF-8", point: "\xff"},
		{name: "value not UTF-8", point: "p", params: flowctl.Params{Labels: map[string]string{"k": sesame + "\xff"}}},
		{name: "result cache key not UTF-8", point: "p", params: flowctl.Params{ResultCacheKey: sesame + "\xff"}},
		{name: "global cache key not UTF-8", point: "p", params: flowctl.Params{GlobalCacheKeys: []string{"k", sesame + "\xff"}}},
		{
			name: "a label without a value", point: "p",
			ctx: func(ctx context.Context) context.Context { return labels.With(ctx, "a", sesame, "b") },
		},
		{
			name: "labels of peers never are an error", point: "p", ok: true, params: flowctl.Params{Labels: many("k", 60)},
			ctx: func(ctx context.Context) context.Context {
				return labels.WithTransport(ctx, map[string]string{"": "x", "y": strings.Repeat("v", 5000), "z": "\xff", "q": "", "r": "", "s": "", "t": ""})
			},
		},
	} {
		t.Run(tt.name, tt.run)
	}
}

// causeOf is what an error's method Cause gives; nil when it has none.
func causeOf(err error) error {
	if e, ok := errors.AsType[interface {
		error
		Cause() error
	}](err); ok {
		return e.Cause()
	}
	return nil
}

func TestRejectedError(t *testing.T) {
	for _, tt := range []struct {
		name   string
		answer flowtest.Answer
		status int
		code   codes.Code
	}{
		{"rate limited", flowtest.Answer{Reason: flowctl.ReasonRateLimited}, 429, codes.ResourceExhausted},
		{"no tokens", flowtest.Answer{Reason: flowctl.ReasonNoTokens}, 503, codes.Unavailable},
		{"not sampled", flowtest.Answer{Reason: flowctl.ReasonNotSampled}, 403, codes.PermissionDenied},
		{"no ramp", flowtest.Answer{Reason: flowctl.ReasonNoMatchingRamp}, 403, codes.PermissionDenied},
		{"the policy's status", flowtest.Answer{Reason: flowctl.ReasonRateLimited, HTTPStatus: 503}, 503, codes.Unavailable},
		{"no status of an error", flowtest.Answer{Reason: flowctl.ReasonNoTokens, HTTPStatus: 200}, 503, codes.Unavailable},
		{"retry after", flowtest.Answer{Reason: flowctl.ReasonRateLimited, RetryAfter: 1500 * time.Millisecond}, 429, codes.ResourceExhausted},
		{"negative retry after", flowtest.Answer{Reason: flowctl.ReasonRateLimited, RetryAfter: -time.Second}, 429, codes.ResourceExhausted},
		{"unknown reason", flowtest.Answer{Reason: 99}, 403, codes.PermissionDenied},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				agent.Answer(tt.answer)
				flow := agent.Client().Start(t.Context(), "point", flowctl.Params{})
				err := fmt.Errorf("wrapped: %w", flow.Err())
				var rejected *flowctl.RejectedError
				if !errors.As(err, &rejected) || !errors.Is(err, flowctl.ErrRejected) || errors.Is(err, flowctl.ErrUnreachable) {
					t.Fatalf("Err() = %v", err)
				}
				if rejected.HTTPStatus != tt.status || flow.HTTPStatus() != tt.status {
					t.Errorf("HTTP status = %d, %d want %d", rejected.HTTPStatus, flow.HTTPStatus(), tt.status)
				}
				if rejected.ControlPoint != "point" || rejected.Policy() != "flowtest" || rejected.Component() != "root.1" {
					t.Errorf("%v by %s/%s", rejected, rejected.Policy(), rejected.Component())
				}
				wait := max(tt.answer.RetryAfter, 0)
				if rejected.RetryAfter() != wait || flow.RetryAfter() != wait {
					t.Errorf("RetryAfter() = %v, %v want %v", rejected.RetryAfter(), flow.RetryAfter(), wait)
				}
				s := status.Convert(err)
				if s.Code() != tt.code {
					t.Errorf("code = %v want %v", s.Code(), tt.code)
				}
				if infos := s.Details(); wait > 0 != (len(infos) == 1) {
					t.Errorf("details = %v", infos)
				} else if wait > 0 {
					if info, ok := infos[0].(*errdetails.RetryInfo); !ok || info.GetRetryDelay().AsDuration() != wait {
						t.Errorf("details = %v want a RetryInfo of %v", infos, wait)
					}
				}
			})
		})
	}
}

// A rejection must not look like a reply, whatever its status: A19.
func TestA19RejectionIsNeverOK(t *testing.T) {
	for code := -1; code < 1000; code++ {
		err := &flowctl.RejectedError{HTTPStatus: code}
		if got := err.GRPCStatus().Code(); got == codes.OK || got == codes.Unknown {
			t.Errorf("HTTP status %d became %v", code, got)
		}
	}
}

func TestUnreachableError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{Fail: status.Error(codes.PermissionDenied, "agent's own words")})
		flow := agent.Client().Start(t.Context(), "point", flowctl.Params{})
		err := flow.Err()
		var unreachable *flowctl.UnreachableError
		if !errors.As(err, &unreachable) || !errors.Is(err, flowctl.ErrUnreachable) || errors.Is(err, flowctl.ErrClosed) {
			t.Fatalf("Err() = %v", err)
		}
		if got := status.Code(unreachable.Cause()); got != codes.PermissionDenied {
			t.Errorf("code of Cause() = %v want PermissionDenied", got)
		}
		// What a gRPC handler returns must not be the agent's status.
		if s := status.Convert(err); s.Code() != codes.Unavailable || strings.Contains(s.Message(), "own words") {
			t.Errorf("status = %v want Unavailable without the cause", s)
		}
		if errors.Unwrap(err) != nil {
			t.Errorf("Unwrap() = %v want nothing", errors.Unwrap(err))
		}
	})
}

func TestCanceled(t *testing.T) {
	errGone := errors.New("gone")
	for _, tt := range []struct {
		name string
		ctx  func(context.Context) (context.Context, context.CancelFunc)
		want []error
		code codes.Code
	}{
		{
			name: "canceled while waiting", want: []error{context.Canceled, errGone}, code: codes.Canceled,
			ctx: func(ctx context.Context) (context.Context, context.CancelFunc) {
				ctx, cancel := context.WithCancelCause(ctx)
				timer := time.AfterFunc(50*time.Millisecond, func() { cancel(errGone) })
				return ctx, func() { timer.Stop() }
			},
		},
		{
			name: "deadline while waiting", want: []error{context.DeadlineExceeded}, code: codes.DeadlineExceeded,
			ctx: func(ctx context.Context) (context.Context, context.CancelFunc) {
				return context.WithTimeout(ctx, 50*time.Millisecond)
			},
		},
		{
			name: "deadline with a cause", want: []error{context.DeadlineExceeded, errGone}, code: codes.DeadlineExceeded,
			ctx: func(ctx context.Context) (context.Context, context.CancelFunc) {
				return context.WithTimeoutCause(ctx, 50*time.Millisecond, errGone)
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				agent.Answer(flowtest.Answer{Hang: true})
				ctx, cancel := tt.ctx(t.Context())
				defer cancel()
				flow := agent.Client(flowctl.WithCheckTimeout(time.Second)).Start(ctx, "point", flowctl.Params{})
				if flow.Decision() != flowctl.Canceled || flow.ShouldRun() {
					t.Fatalf("%v, %v", flow.Decision(), flow.Err())
				}
				for _, want := range tt.want {
					if !errors.Is(flow.Err(), want) {
						t.Errorf("Err() = %v does not match %v", flow.Err(), want)
					}
				}
				if errors.Is(flow.Err(), flowctl.ErrUnreachable) {
					t.Error("a cancellation is not an unreachable agent")
				}
				if got := status.Code(flow.Err()); got != tt.code {
					t.Errorf("code = %v want %v", got, tt.code)
				}
			})
		})
	}
}

func TestEnumsHaveNames(t *testing.T) {
	for d := flowctl.Accepted; d <= flowctl.Invalid; d++ {
		if strings.Contains(d.String(), "(") {
			t.Errorf("Decision %d has no name", d)
		}
	}
	for s := flowctl.StatusUnset; s <= flowctl.StatusError; s++ {
		if strings.Contains(s.String(), "(") {
			t.Errorf("Status %d has no name", s)
		}
	}
	for r := flowctl.ReasonNone; r <= flowctl.ReasonNoMatchingRamp; r++ {
		if strings.HasPrefix(r.String(), "reason ") {
			t.Errorf("RejectReason %d has no name", r)
		}
	}
	for p := flowctl.FailOpen; p <= flowctl.FailClosed; p++ {
		if strings.Contains(p.String(), "(") {
			t.Errorf("UnreachablePolicy %d has no name", p)
		}
	}
	for _, unknown := range []fmt.Stringer{flowctl.Decision(0), flowctl.Decision(99), flowctl.Status(99), flowctl.RejectReason(99), flowctl.UnreachablePolicy(99)} {
		if !strings.Contains(unknown.String(), "99") && unknown != flowctl.Decision(0) {
			t.Errorf("%#v = %q does not say its number", unknown, unknown)
		}
	}
}

// One allocation is the flow itself; that is the budget of an accepted flow on the engine.
func TestAllocations(t *testing.T) {
	e, err := engine.New([]policy.Policy{{Name: "per-user", Components: []policy.Component{policy.RateLimiter{
		Selectors: policy.At("point"), Capacity: 1e9, Fill: 1e9, Interval: time.Second, LimitBy: "user_id",
	}}}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = e.Close() }()
	client, err := flowctl.New(e, flowctl.WithLabels(map[string]string{"region": "eu"}))
	if err != nil {
		t.Fatal(err)
	}
	params := flowctl.Params{Labels: map[string]string{"user_id": "u"}}
	ctx := labels.With(t.Context(), "tier", "gold")
	if got := testing.AllocsPerRun(1000, func() {
		flow := client.Start(ctx, "point", params)
		if !flow.ShouldRun() {
			t.Error("rejected")
		}
		_, _ = flow.End(ctx)
	}); got != 1 {
		t.Errorf("%v allocations a flow want 1", got)
	}
}

// What is done to the protobuf view of a flow does not reach the flow.
func TestCheckResponseIsACopy(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		params := flowctl.Params{ResultCacheKey: "key", GlobalCacheKeys: []string{"key"}}
		first := client.Start(t.Context(), "point", params)
		if err := errors.Join(first.SetResultCache(t.Context(), []byte("value"), 0), first.SetGlobalCache(t.Context(), "key", []byte("value"), 0)); err != nil {
			t.Fatal(err)
		}
		flow := client.Start(t.Context(), "point", params)
		found := flow.CheckResponse().GetCacheLookupResponse()
		for _, value := range [][]byte{found.GetResultCacheResponse().GetValue(), found.GetGlobalCacheResponses()["key"].GetValue()} {
			if string(value) != "value" {
				t.Fatalf("found %q", value)
			}
			value[0] = 'V'
		}
		result, _, _ := flow.ResultCache()
		global, _, _ := flow.GlobalCache("key")
		if string(result) != "value" || string(global) != "value" {
			t.Errorf("the flow has %q and %q", result, global)
		}
	})
}

// A dry run runs flows that nobody could be asked about. They know what they would have looked up: they have found
// nothing for a reason, and store what they make.
func TestInvalidFlowKeepsItsCacheKeys(t *testing.T) {
	client := noPolicies(t, flowctl.WithDryRun())
	for name, params := range map[string]flowctl.Params{
		"a key that is too long": {Labels: map[string]string{strings.Repeat("k", 256): "v"}},
		"too many labels":        {Labels: many("k", 65)},
	} {
		params.ResultCacheKey, params.GlobalCacheKeys = "result", []string{"global"}
		flow := client.Start(t.Context(), "point", params)
		if _, _, err := flow.ResultCache(); !errors.Is(err, flowctl.ErrInvalid) {
			t.Errorf("%s: ResultCache() = %v want ErrInvalid", name, err)
		}
		if _, _, err := flow.GlobalCache("global"); !errors.Is(err, flowctl.ErrInvalid) {
			t.Errorf("%s: GlobalCache() = %v want ErrInvalid", name, err)
		}
		if err := flow.SetResultCache(t.Context(), []byte("made"), 0); err != nil {
			t.Errorf("%s: SetResultCache() = %v", name, err)
		}
		_, _ = flow.End(t.Context())
	}
}
