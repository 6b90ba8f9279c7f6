package headgate_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/token"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/grpcguard"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/labels"
	"github.com/headgate-go/headgate/policy"
)

// Names of policies, components and label keys, agents' words, addresses and causes have "sesame" in them: logs may show
// them, and the text of errors may not. Labels' values, cache keys and payloads have "tahini": nothing may show them.
const (
	sesame = "sesame"
	tahini = "tahini"
)

var errSesame = errors.New(sesame + ": 10.0.0.1:8080")

// A failure makes an error that a package of ours returns.
type failure struct {
	name     string
	make     func(t *testing.T) error
	deadline bool     // one that passed is in it
	logs     []string // what the program's own log shows
}

// limitedSide is a side whose agent rejects flows with sesameParams at point. It caches no value.
func limitedSide(t *testing.T, kind sides.Kind) *sides.Side {
	side := sides.Setup{
		Policies: []policy.Policy{{Name: sesame + "-policy", Components: []policy.Component{
			policy.RateLimiter{ID: sesame + "-component", Selectors: policy.At(point), Interval: time.Hour, LimitBy: sesame + "_key"},
		}}},
		EngineOptions: []engine.Option{engine.WithCacheBounds(10, 100)},
	}.New(t, kind)
	if side.Script == nil {
		return side
	}
	side.Script.AnswerAt(point, flowtest.Answer{Response: &checkv1.CheckResponse{
		DecisionType: checkv1.CheckResponse_DECISION_TYPE_REJECTED,
		RejectReason: checkv1.CheckResponse_REJECT_REASON_RATE_LIMITED,
		LimiterDecisions: []*checkv1.LimiterDecision{{
			PolicyName: sesame + "-policy", ComponentId: sesame + "-component", Dropped: true,
			Details: &checkv1.LimiterDecision_RateLimiterInfo_{RateLimiterInfo: &checkv1.LimiterDecision_RateLimiterInfo{
				Label: sesame + "_key:" + tahini,
			}},
		}},
	}})
	return side
}

func limitedClient(t *testing.T, kind sides.Kind) *flowctl.Client { return limitedSide(t, kind).Client }

var sesameParams = flowctl.Params{Labels: map[string]string{sesame + "_key": tahini}, OnUnreachable: flowctl.FailClosed}

func sesameFlow(ctx context.Context, client *flowctl.Client, params flowctl.Params) error {
	flow := client.Start(ctx, point, params)
	defer func() { _, _ = flow.End(ctx) }()
	return flow.Err()
}

// scriptedAgent is a client of an agent that answers checks like this.
func scriptedAgent(t *testing.T, answer flowtest.Answer, opts ...flowctl.Option) (*flowtest.Agent, *flowctl.Client) {
	agent := flowtest.NewAgent(t)
	agent.Answer(answer)
	return agent, agent.Client(opts...)
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, errSesame)
	t.Cleanup(cancel)
	return ctx
}

func canceledBySesame(t *testing.T) context.Context {
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errSesame)
	return ctx
}

// failures are the errors of every package, over every agent that makes a difference to them.
func failures() []failure {
	var all []failure
	for _, kind := range sides.All {
		name, client := string(kind), func(t *testing.T) *flowctl.Client { return limitedClient(t, kind) }
		rejection := []string{"control_point=checkout", "reason=rate limited", "policy=sesame-policy", "component=sesame-component", "label_key=sesame_key", "status=429"}
		all = append(all,
			failure{"rejected, " + name, func(t *testing.T) error { return sesameFlow(t.Context(), client(t), sesameParams) }, false, rejection},
			failure{
				"canceled, " + name, func(t *testing.T) error { return sesameFlow(canceledBySesame(t), client(t), sesameParams) }, false,
				[]string{"op=start", "control_point=checkout", "ended=context canceled", "cause=" + errSesame.Error()},
			},
			failure{
				"expired, " + name, func(t *testing.T) error { return sesameFlow(within(t, -1), client(t), sesameParams) }, true,
				[]string{"op=start", "ended=context deadline exceeded", "cause=" + errSesame.Error()},
			},
			failure{"closed, " + name, func(t *testing.T) error {
				c := client(t)
				_ = c.Close(t.Context())
				return sesameFlow(t.Context(), c, sesameParams)
			}, false, []string{"control_point=checkout", "cause=closed"}},
			failure{"invalid label, " + name, func(t *testing.T) error {
				return sesameFlow(t.Context(), client(t), flowctl.Params{Labels: map[string]string{sesame: tahini + "\xff"}})
			}, false, []string{"control_point=checkout", "problem=label: value is not valid UTF-8", "label_key=sesame"}},
			failure{"invalid cache key, " + name, func(t *testing.T) error {
				return sesameFlow(t.Context(), client(t), flowctl.Params{ResultCacheKey: strings.Repeat(tahini, 100)})
			}, false, nil},
			failure{"Guard, " + name, func(t *testing.T) error {
				_, err := headgate.Guard(client(t), point, sesameParams, work, nil)(t.Context())
				return err
			}, false, rejection},
			failure{"Retrying, " + name, func(t *testing.T) error {
				_, err := headgate.Guard(headgate.Retrying(client(t), headgate.RetryPolicy{}), point, sesameParams, work, nil)(t.Context())
				return err
			}, false, rejection},
			failure{"fallback.Error, " + name, func(t *testing.T) error {
				_, err := headgate.Guard(client(t), point, sesameParams, work, fallback.Error[int](errors.New("busy")))(t.Context())
				return err
			}, false, nil},
			failure{"Transport, " + name, func(t *testing.T) error {
				return roundTrip(t.Context(), httpguard.NewTransport(client(t), point, answering(http.StatusOK), httpguard.WithParams(
					func(*http.Request) flowctl.Params { return sesameParams })))
			}, false, rejection},
			failure{"Transport expired, " + name, func(t *testing.T) error {
				return roundTrip(within(t, -1), httpguard.NewTransport(limitedClient(t, kind), point, answering(http.StatusOK)))
			}, true, nil},
			failure{"client interceptor, " + name, func(t *testing.T) error {
				return interceptor(t, client(t))(t.Context(), "/s/m", nil, nil, nil, nil)
			}, false, rejection},
			failure{"cache without a key, " + name, func(t *testing.T) error {
				return client(t).Start(t.Context(), "other", flowctl.Params{}).SetResultCache(t.Context(), []byte(tahini), 0)
			}, false, nil},
			failure{"Cached gives up, " + name, func(t *testing.T) error {
				_, err := headgate.Cached(client(t), "other", flowctl.Params{}, func(ctx context.Context) (int, error) {
					<-ctx.Done()
					return 0, ctx.Err()
				}, nil, headgate.CachePolicy[int]{})(within(t, time.Second))
				return err
			}, true, []string{"op=cached", "control_point=other", "cause=" + errSesame.Error()}},
		)
	}
	store := func(ctx context.Context, client *flowctl.Client) error {
		return client.Start(context.WithoutCancel(ctx), "other", flowctl.Params{}).SetGlobalCache(ctx, tahini, []byte(strings.Repeat(tahini, 100)), 0)
	}
	failed := flowtest.Answer{Fail: status.Error(codes.ResourceExhausted, errSesame.Error())}
	return append(
		all,
		failure{"unreachable by the agent's words", func(t *testing.T) error {
			_, client := scriptedAgent(t, failed)
			return sesameFlow(t.Context(), client, sesameParams)
		}, false, []string{"control_point=checkout", "cause=rpc error", errSesame.Error()}},
		failure{
			"unreachable by an address", func(t *testing.T) error { return sesameFlow(t.Context(), noAgent(t), sesameParams) },
			false,
			[]string{errSesame.Error()},
		},
		failure{"unreachable in time", func(t *testing.T) error {
			_, client := scriptedAgent(t, flowtest.Answer{Hang: true})
			return sesameFlow(t.Context(), client, sesameParams)
		}, true, []string{"DeadlineExceeded"}},
		failure{"canceled while it waits", func(t *testing.T) error {
			_, client := scriptedAgent(t, flowtest.Answer{Hang: true})
			return sesameFlow(within(t, time.Millisecond), client, sesameParams)
		}, true, nil},
		failure{"End refused", func(t *testing.T) error {
			agent, client := scriptedAgent(t, flowtest.Answer{Slots: 1})
			agent.AnswerEnds(failed)
			_, err := client.Start(t.Context(), point, sesameParams).End(t.Context())
			return err
		}, false, []string{"op=end", "control_point=checkout", errSesame.Error()}},
		failure{"End in time", func(t *testing.T) error {
			agent, client := scriptedAgent(t, flowtest.Answer{Slots: 1})
			agent.AnswerEnds(flowtest.Answer{Hang: true})
			_, err := client.Start(t.Context(), point, sesameParams).End(t.Context())
			return err
		}, true, nil},
		failure{"cache lookup", func(t *testing.T) error {
			_, client := scriptedAgent(t, flowtest.Answer{Response: &checkv1.CheckResponse{CacheLookupResponse: &checkv1.CacheLookupResponse{
				ResultCacheResponse: &checkv1.KeyLookupResponse{OperationStatus: checkv1.CacheOperationStatus_ERROR, Error: errSesame.Error()},
			}}})
			_, _, err := client.Start(t.Context(), point, flowctl.Params{ResultCacheKey: tahini}).ResultCache()
			return err
		}, false, []string{"op=cache lookup", errSesame.Error()}},
		failure{"cache store, embedded", func(t *testing.T) error { return store(t.Context(), limitedClient(t, sides.Embedded)) }, false, []string{"op=cache store"}},
		failure{"cache store, served", func(t *testing.T) error { return store(t.Context(), limitedClient(t, sides.Served)) }, false, []string{"op=cache store"}},
		failure{"cache store, nobody", func(t *testing.T) error { return store(t.Context(), noAgent(t)) }, false, []string{errSesame.Error()}},
		failure{"cache store, expired", func(t *testing.T) error { return store(within(t, -1), noAgent(t)) }, true, nil},
		failure{"Ready, nobody", func(t *testing.T) error { return noAgent(t).Ready(within(t, time.Minute)) }, true, []string{"op=agent not ready", errSesame.Error()}},
		failure{"Ready, closed", func(t *testing.T) error {
			client := noAgent(t)
			_ = client.Close(t.Context())
			return client.Ready(t.Context())
		}, false, nil},
		failure{"Close", func(t *testing.T) error {
			agent, client := scriptedAgent(t, flowtest.Answer{})
			agent.AnswerSpans(failed)
			_ = sesameFlow(t.Context(), client, sesameParams)
			return client.Close(t.Context())
		}, false, []string{"op=close client", errSesame.Error()}},
		failure{"Close in time", func(t *testing.T) error {
			agent, client := scriptedAgent(t, flowtest.Answer{})
			agent.AnswerSpans(flowtest.Answer{Hang: true})
			_ = sesameFlow(t.Context(), client, sesameParams)
			return client.Close(within(t, time.Second))
		}, true, nil},
		failure{"fallback.First, expired", func(t *testing.T) error {
			late := func(context.Context, error) (int, error) {
				return 0, fmt.Errorf("replica: %w", context.DeadlineExceeded)
			}
			_, err := headgate.Guard(limitedClient(t, sides.Embedded), point, sesameParams, work, fallback.First(late))(t.Context())
			return err
		}, true, nil},
		failure{"fallback.First, canceled", func(t *testing.T) error {
			ctx, cancel := context.WithCancelCause(t.Context())
			gone := func(context.Context, error) (int, error) {
				cancel(status.Error(codes.Internal, errSesame.Error()))
				return 0, errors.New("replica down")
			}
			_, err := headgate.Guard(limitedClient(t, sides.Embedded), point, sesameParams, work, fallback.First(gone, gone))(ctx)
			return err
		}, false, nil},
		failure{"paused", func(t *testing.T) error {
			transport := httpguard.NewTransport(limitedClient(t, sides.Embedded), "other", answering(http.StatusTooManyRequests))
			_ = roundTrip(t.Context(), transport)
			return roundTrip(t.Context(), transport)
		}, false, []string{"control_point=other", "reason=paused by the upstream", "status=429", "retry_after=10s"}},
		failure{"labels.Check", func(*testing.T) error { return labels.Check(map[string]string{sesame: tahini + "\xff"}) }, false, []string{"label_key=sesame"}},
	)
}

// noAgent is a client whose connection fails at an address.
func noAgent(t *testing.T) *flowctl.Client {
	client, err := flowctl.Dial("passthrough:///localhost", flowctl.WithInsecure(), flowctl.WithoutTelemetry(), flowctl.WithDialOptions(
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return nil, errSesame })))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close(context.WithoutCancel(t.Context())) })
	return client
}

type answering int

func (a answering) RoundTrip(r *http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: int(a), Header: http.Header{"Retry-After": {"10"}}, Body: http.NoBody, Request: r}, nil
}

// roundTrip gives the transport's own error, which http.Client would put into an *url.Error.
func roundTrip(ctx context.Context, transport http.RoundTripper) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://upstream.example/", nil)
	if err != nil {
		return err
	}
	resp, err := transport.RoundTrip(r)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

func interceptor(t *testing.T, client *flowctl.Client) grpc.UnaryClientInterceptor {
	t.Helper()
	return grpcguard.UnaryClientInterceptor(client, point, grpcguard.WithParams(
		func(context.Context, grpcguard.Call) flowctl.Params { return sesameParams }))
}

// health is a service that returns the error.
type health struct {
	healthpb.UnimplementedHealthServer
	err error
}

func (h health) Check(context.Context, *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	return nil, h.err
}

// told is what a peer across the network learns of the error of a handler.
func told(t *testing.T, err error) *status.Status {
	t.Helper()
	server := grpc.NewServer()
	healthpb.RegisterHealthServer(server, health{err: err})
	conn, dialErr := grpc.NewClient("passthrough:///localhost", grpc.WithTransportCredentials(insecure.NewCredentials()), sides.Serve(t, server))
	if dialErr != nil {
		t.Fatal(dialErr)
	}
	defer func() { _ = conn.Close() }()
	_, got := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
	return status.Convert(got)
}

func overFailures(t *testing.T, f func(t *testing.T, of failure, err error)) {
	for _, of := range failures() {
		t.Run(of.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				err := of.make(t)
				if err == nil {
					t.Fatal("there is no error")
				}
				f(t, of, err)
			})
		})
	}
}

// However an error is printed, encoded or returned from a gRPC handler, its text tells a stranger nothing, and a wrapped
// error has the code of the bare one.
func TestErrorsTellStrangersNothing(t *testing.T) {
	overFailures(t, func(t *testing.T, _ failure, err error) {
		var texts []string
		wrapped := fmt.Errorf("charge the card: %w", err)
		type result struct{ err error } // package fmt calls no methods of what is in it
		for _, e := range []error{err, wrapped, errors.Join(wrapped, errors.New("other"))} {
			for _, verb := range []string{"%v", "%s", "%q", "%+v", "%#v", "%d", "%t"} {
				texts = append(texts, fmt.Sprintf(verb, e), fmt.Sprintf(verb, []*result{{e}}), fmt.Sprintf(verb, result{e}))
			}
			// By value, an error of a type that a program can name has no methods.
			if v := reflect.ValueOf(e); v.Kind() == reflect.Pointer && token.IsExported(v.Elem().Type().Name()) && !strings.Contains(v.Elem().Type().PkgPath(), "/internal/") {
				for _, verb := range []string{"%v", "%s", "%q", "%+v", "%#v", "%d", "%t"} {
					texts = append(texts, fmt.Sprintf(verb, v.Elem()), fmt.Sprintf(verb, []any{v.Elem().Interface()}))
				}
			}
			encoded, jsonErr := json.Marshal(e)
			if jsonErr != nil {
				t.Fatal(jsonErr)
			}
			peer := told(t, e)
			texts = append(texts, string(encoded), peer.Proto().String(), status.Convert(e).Proto().String())
			if bare := told(t, err); peer.Code() != bare.Code() || len(peer.Details()) != len(bare.Details()) {
				t.Errorf("a peer is told %v of %q, and %v of the bare error", peer, e, bare)
			}
		}
		if bare := told(t, err).Message(); bare != err.Error() {
			t.Errorf("a peer is told %q of the bare error, whose text is %q", bare, err)
		}
		for _, text := range texts {
			if strings.Contains(text, sesame) || strings.Contains(text, tahini) {
				t.Errorf("%s", text)
			}
		}
	})
}

// The error of a flow has one place for its code and its time to retry, from which an adaptor for any protocol answers: its
// gRPC status.
func TestErrorsOfFlowsHaveAStatus(t *testing.T) {
	type row struct {
		name string
		make func(t *testing.T) error
		code codes.Code
		wait bool // the time to retry is known
	}
	rows := []row{
		{"paused", func(t *testing.T) error {
			transport := httpguard.NewTransport(limitedClient(t, sides.Embedded), "other", answering(http.StatusTooManyRequests))
			_ = roundTrip(t.Context(), transport)
			return roundTrip(t.Context(), transport)
		}, codes.ResourceExhausted, true},
		{"unreachable", func(t *testing.T) error { return sesameFlow(t.Context(), noAgent(t), sesameParams) }, codes.Unavailable, false},
	}
	for _, kind := range sides.All {
		of := func(start func(t *testing.T, client *flowctl.Client) error) func(t *testing.T) error {
			return func(t *testing.T) error { return start(t, limitedClient(t, kind)) }
		}
		name := ", " + string(kind)
		rows = append(
			rows,
			row{"rejected, for good" + name, of(func(t *testing.T, client *flowctl.Client) error {
				return sesameFlow(t.Context(), client, sesameParams)
			}), codes.ResourceExhausted, false},
			row{"rejected, for a while" + name, func(t *testing.T) error {
				side := sides.Setup{Answers: []flowtest.Answer{{Reason: flowctl.ReasonNoTokens, RetryAfter: 1500 * time.Millisecond}}}.New(t, kind)
				return sesameFlow(t.Context(), side.Client, sesameParams)
			}, codes.Unavailable, true},
			row{"canceled" + name, of(func(t *testing.T, client *flowctl.Client) error {
				return sesameFlow(canceledBySesame(t), client, sesameParams)
			}), codes.Canceled, false},
			row{"expired" + name, of(func(t *testing.T, client *flowctl.Client) error {
				return sesameFlow(within(t, -1), client, sesameParams)
			}), codes.DeadlineExceeded, false},
			row{"invalid" + name, of(func(t *testing.T, client *flowctl.Client) error {
				return sesameFlow(t.Context(), client, flowctl.Params{Labels: map[string]string{"": ""}})
			}), codes.Internal, false},
		)
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				err := r.make(t)
				_, answered := fallback.Error[int](errors.New("busy"))(t.Context(), err)
				for _, e := range []error{err, fmt.Errorf("charge the card: %w", err), errors.Join(errors.New("other"), err), answered} {
					s, ok := status.FromError(e)
					var wait time.Duration
					for _, d := range s.Details() {
						if retry, ok := d.(*errdetails.RetryInfo); ok {
							wait = retry.GetRetryDelay().AsDuration()
						}
					}
					if !ok || s.Code() != r.code || wait > 0 != r.wait {
						t.Errorf("the status of %q is %v, retry after %s; want %v, and a time: %t", e, s, wait, r.code, r.wait)
					}
					if known, _ := fallback.RetryAfter(e); known != wait {
						t.Errorf("RetryAfter(%q) = %s, and its status has %s", e, known, wait)
					}
				}
			})
		})
	}
}

// Errors with a deadline in them are timeouts to net and net/http, and others are not.
func TestErrorsOfDeadlinesAreTimeouts(t *testing.T) {
	overFailures(t, func(t *testing.T, of failure, err error) {
		for _, e := range []error{err, fmt.Errorf("wrapped: %w", err)} {
			asked, ok := errors.AsType[net.Error](e)
			if got := ok && asked.Timeout(); got != of.deadline {
				t.Errorf("net.Error.Timeout() of %q = %v want %v", e, got, of.deadline)
			}
		}
		if got := (&url.Error{Op: "Get", URL: "/", Err: err}).Timeout(); got != of.deadline {
			t.Errorf("url.Error.Timeout() of %q = %v want %v", err, got, of.deadline)
		}
		if errors.Is(err, context.DeadlineExceeded) && !of.deadline {
			t.Errorf("%q matches a deadline", err)
		}
	})
}

// The program's own log shows what the text leaves out, and never a label's value.
func TestErrorsInLogs(t *testing.T) {
	overFailures(t, func(t *testing.T, of failure, err error) {
		logged := slog.AnyValue(err).Resolve().String()
		for _, want := range of.logs {
			if !strings.Contains(logged, want) {
				t.Errorf("logged as %q want %q in it", logged, want)
			}
		}
		var out bytes.Buffer
		slog.New(slog.NewTextHandler(&out, nil)).Error("failed", "error", err)
		slog.New(slog.NewJSONHandler(&out, nil)).Error("failed", "error", err)
		if strings.Contains(out.String(), tahini) {
			t.Errorf("the log has %q", out.String())
		}
	})
}

// http.Client asks the transport's error itself.
func TestTransportDeadlineIsATimeout(t *testing.T) {
	for _, kind := range sides.All {
		t.Run(string(kind), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, err := http.NewRequestWithContext(within(t, -1), http.MethodGet, "https://upstream.example/", nil)
				if err != nil {
					t.Fatal(err)
				}
				resp, err := (&http.Client{Transport: httpguard.NewTransport(limitedClient(t, kind), point, answering(http.StatusOK))}).Do(r)
				if err == nil {
					_ = resp.Body.Close()
				}
				byURL, ok := errors.AsType[*url.Error](err)
				if !ok || !byURL.Timeout() {
					t.Errorf("%v is no timeout", err)
				}
			})
		})
	}
}

// fallbacks are all of package fallback, by the names of the functions that make them. They are for a call that has failed with the error.
func fallbacks(err error) map[string]fallback.Func[int] {
	work := func(context.Context) (int, error) { return 0, err }
	return map[string]fallback.Func[int]{
		"Value":       fallback.Value(1),
		"Error":       fallback.Error[int](err),
		"Call":        fallback.Call(work),
		"First":       fallback.First(fallback.Error[int](err), fallback.Error[int](nil)),
		"NewLastGood": fallback.NewLastGood[int](time.Minute).Func,
		"Stale":       fallback.Stale[int](time.Minute),
		"For": func(ctx context.Context, err error) (int, error) {
			return fallback.For[string](fallback.Error[int](err))(ctx, "argument", err)
		},
		"Rescue": func(ctx context.Context, _ error) (int, error) { return fallback.Rescue(work, fallback.Value(1))(ctx) },
	}
}

// Every exported function of package fallback is among the fallbacks, or is none.
func TestFallbacksAreAll(t *testing.T) {
	none := []string{"RetryAfter", "WithLast"} // TestNilErrors calls the first; the second takes no error
	listed := fallbacks(nil)
	for _, file := range sources(t, "fallback") {
		for _, decl := range parse(t, file).Decls {
			f, ok := decl.(*ast.FuncDecl)
			if !ok || f.Recv != nil || !f.Name.IsExported() || slices.Contains(none, f.Name.Name) {
				continue
			}
			if listed[f.Name.Name] == nil {
				t.Errorf("fallbacks in errors_test.go does not have %s: add it, or say why it is none", f.Name.Name)
			}
		}
	}
}

// A nil pointer to an error is a mistake of the program that returns it, and no reason to panic: not for the methods of our errors, nor
// for our functions that take an error.
func TestNilErrors(t *testing.T) {
	for _, err := range []error{
		(*flowctl.RejectedError)(nil), (*flowctl.UnreachableError)(nil), (*httpguard.PausedError)(nil), (*httpguard.StatusError)(nil), (*policy.Error)(nil),
	} {
		t.Run(fmt.Sprintf("%T", err), func(t *testing.T) {
			try := func(name string, f func()) {
				t.Helper()
				defer func() {
					if p := recover(); p != nil {
						t.Errorf("%s panics: %v", name, p)
					}
				}()
				f()
			}
			v := reflect.ValueOf(err)
			for i := range v.NumMethod() {
				name, takes := v.Type().Method(i).Name, v.Method(i).Type()
				if name == "Format" { // package fmt calls it, see below
					continue
				}
				var args []reflect.Value
				for in := range takes.Ins() {
					args = append(args, reflect.Zero(in))
				}
				try(name, func() { v.Method(i).Call(args) })
			}
			if reflect.TypeOf(err) == reflect.TypeFor[*httpguard.PausedError]() && !errors.Is(err, flowctl.ErrRejected) {
				t.Error("it does not match ErrRejected")
			}
			work := func(context.Context) (int, error) { return 0, err }
			for _, e := range []error{err, fmt.Errorf("wrapped: %w", err), errors.Join(errors.New("other"), err)} {
				for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
					if text := fmt.Sprintf(verb, e); strings.Contains(text, "PANIC") {
						t.Errorf("%s prints %s", verb, text)
					}
				}
				try("log/slog", func() {
					var log bytes.Buffer
					slog.New(slog.NewJSONHandler(&log, nil)).Info("failed", "error", e)
					if strings.Contains(log.String(), "PANIC") || strings.Contains(log.String(), "panicked") {
						t.Errorf("log/slog writes %s", log.String())
					}
				})
				try("errors.Is and As", func() {
					for _, target := range []error{flowctl.ErrRejected, flowctl.ErrUnreachable, flowctl.ErrClosed, flowctl.ErrInvalid, context.Canceled} {
						_ = errors.Is(e, target)
					}
					_, _ = errors.AsType[*flowctl.RejectedError](e)
				})
				try("status.FromError", func() {
					if s, _ := status.FromError(e); s.Code() == codes.OK {
						t.Error("its status is OK")
					}
				})
				try("Answer", func() {
					httpguard.Answer(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/", http.NoBody), e)
				})
				try("IsFailure", func() { grpcguard.IsFailure(e) })
				try("RetryAfter", func() {
					if after, ok := fallback.RetryAfter(e); ok || after != 0 {
						t.Errorf("RetryAfter = %v", after)
					}
				})
				for name, f := range fallbacks(e) {
					try("fallback."+name, func() {
						if _, err := f(t.Context(), e); err != nil {
							_ = err.Error()
							_ = status.Code(err)
						}
					})
				}
				side := sides.Setup{}.New(t, sides.Embedded)
				try("Guard", func() { _, _ = headgate.Guard(side.Client, point, flowctl.Params{}, work, nil)(t.Context()) })
				try("Retrying", func() {
					_, _ = headgate.Guard(headgate.Retrying(side.Client, headgate.RetryPolicy{}), point, flowctl.Params{}, work, nil)(t.Context())
				})
				try("Cached", func() {
					params := flowctl.Params{ResultCacheKey: "key"}
					_, _ = headgate.Cached(side.Client, point, params, work, nil, headgate.CachePolicy[int]{TTL: time.Hour})(t.Context())
				})
				try("SetError", func() {
					flow := side.Client.Start(t.Context(), point, flowctl.Params{})
					flow.SetError(e)
					_, _ = flow.End(t.Context())
				})
				try("Transport", func() {
					transport := httpguard.NewTransport(side.Client, point, roundTrips(func(*http.Request) (*http.Response, error) { return nil, e }))
					_ = roundTrip(t.Context(), transport)
				})
				try("UnaryServerInterceptor", func() {
					_, _ = grpcguard.UnaryServerInterceptor(side.Client, point)(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: "/shop/Get"},
						func(context.Context, any) (any, error) { return nil, e })
				})
			}
		})
	}
}
