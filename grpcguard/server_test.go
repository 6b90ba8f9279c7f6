package grpcguard_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/baggage"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	reflectiongrpc "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/grpcguard"
	"github.com/headgate-go/headgate/labels"
)

var errRecovered = status.Error(codes.Internal, "recovered")

// guarded are the options of a server that is guarded, within interceptors that recover.
func guarded(s *side, opts ...grpcguard.Option) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (_ any, err error) {
			defer recovered(&err)
			return handler(ctx, req)
		}, grpcguard.UnaryServerInterceptor(s.starts, point, opts...)),
		grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
			defer recovered(&err)
			return handler(srv, stream)
		}, grpcguard.StreamServerInterceptor(s.starts, point, opts...)),
	}
}

func recovered(err *error) {
	if recover() == errBroken { //nolint:errorlint // the value that it was
		*err = errRecovered
	}
}

var errBroken = errors.New("broken")

// everywhere runs a test for all methods of the service, over both kinds of agents and networks.
func everywhere(t *testing.T, f func(t *testing.T, start func(testing.TB, bool) *side, n network, m method)) {
	for _, a := range agentSides {
		for _, n := range networks {
			for _, m := range testMethods {
				t.Run(a.name+"/"+n.name+"/"+m.name, func(t *testing.T) { f(t, a.start, n, m) })
			}
		}
	}
}

func TestServer(t *testing.T) {
	ok := []ended{{point, flowctl.StatusOK}}
	failed := []ended{{point, flowctl.StatusError}}
	tests := []struct {
		name string
		do   func(context.Context) error
		code codes.Code
		ends []ended
	}{
		{"ok", func(context.Context) error { return nil }, codes.OK, ok},
		{"caller's fault", func(context.Context) error { return status.Error(codes.NotFound, "no such order") }, codes.NotFound, ok},
		{"own fault", func(context.Context) error { return status.Error(codes.Internal, "disk full") }, codes.Internal, failed},
		{"plain error", func(context.Context) error { return errors.New("disk full") }, codes.Unknown, failed},
		{"io.EOF", func(context.Context) error { return io.EOF }, codes.Unknown, failed},
		{"context canceled", func(context.Context) error { return fmt.Errorf("query: %w", context.Canceled) }, codes.Canceled, ok},
		{"deadline exceeded", func(context.Context) error { return context.DeadlineExceeded }, codes.DeadlineExceeded, failed},
		{"status of its own", func(ctx context.Context) error {
			flow, _ := flowctl.FromContext(ctx)
			flow.SetStatus(flowctl.StatusError)
			return nil
		}, codes.OK, failed},
	}
	everywhere(t, func(t *testing.T, start func(testing.TB, bool) *side, n network, m method) {
		for _, tt := range tests {
			t.Run(tt.name, func(t *testing.T) {
				s := start(t, false)
				svc := &service{do: func(ctx context.Context) error {
					flow, ok := flowctl.FromContext(ctx)
					if all := s.starts.all(); !ok || len(all) != 1 || flow != all[0] {
						t.Errorf("the handler's context has %v", flow)
					}
					if got := s.held(); got != 1 {
						t.Errorf("%d slots are held while the handler runs", got)
					}
					return tt.do(ctx)
				}}
				conn, stop := serve(t, n.listen, svc.register, guarded(s))
				wantCode(t, m.call(t.Context(), testgrpc.NewTestServiceClient(conn)), tt.code)
				stop()
				if got := svc.calls.Load(); got != 1 {
					t.Errorf("%d calls were served", got)
				}
				s.wantEnds(t, tt.ends...)
				want := []set{{"rpc.service": "grpc.testing.TestService", "rpc.method": m.name}}
				if diff := cmp.Diff(want, s.labels()); diff != "" {
					t.Errorf("labels (-want +got):\n%s", diff)
				}
			})
		}
	})
}

func TestServerRejects(t *testing.T) {
	everywhere(t, func(t *testing.T, start func(testing.TB, bool) *side, n network, m method) {
		s, svc := start(t, true), new(service)
		conn, stop := serve(t, n.listen, svc.register, guarded(s))
		err := m.call(t.Context(), testgrpc.NewTestServiceClient(conn))
		wantRejected(t, err)
		stop()
		if got := svc.calls.Load(); got != 0 {
			t.Errorf("%d calls were served", got)
		}
		s.wantEnds(t, ended{point, flowctl.StatusError})
	})
}

// wantRejected checks the status of a call that an agentSide rejected.
func wantRejected(t *testing.T, err error) {
	t.Helper()
	st, ok := status.FromError(err)
	if !ok || st.Code() != codes.ResourceExhausted || len(st.Details()) != 1 {
		t.Fatalf("error = %v, details %v want ResourceExhausted with a RetryInfo", err, st.Details())
	}
	info, ok := st.Details()[0].(*errdetails.RetryInfo)
	if wait := info.GetRetryDelay().AsDuration(); !ok || wait <= 0 || wait > time.Minute {
		t.Errorf("details = %v want a RetryInfo of up to a minute", st.Details())
	}
}

// C1: a panic of the handler kept what the flow held.
func TestC1ServerPanics(t *testing.T) {
	everywhere(t, func(t *testing.T, start func(testing.TB, bool) *side, n network, m method) {
		s := start(t, false)
		svc := &service{do: func(context.Context) error { panic(errBroken) }}
		conn, stop := serve(t, n.listen, svc.register, guarded(s))
		if err := m.call(t.Context(), testgrpc.NewTestServiceClient(conn)); !errors.Is(err, errRecovered) {
			t.Errorf("error = %v: the panic did not go on as it was", err)
		}
		stop()
		s.wantEnds(t, ended{point, flowctl.StatusError})
	})
}

// A19: rejections came back as success, or as Unknown. Whatever status a policy names, the reply is a failure.
func TestA19RejectionIsNeverOK(t *testing.T) {
	agent := flowtest.NewAgent(t)
	client := agent.Client(patient()...)
	intercept := grpcguard.UnaryServerInterceptor(client, point)
	handler := func(context.Context, any) (any, error) {
		t.Error("the handler was called")
		return "reply", nil
	}
	want := map[int]codes.Code{
		403: codes.PermissionDenied, 429: codes.ResourceExhausted, 503: codes.Unavailable, 504: codes.DeadlineExceeded,
	}
	for code := range 1000 {
		agent.Answer(flowtest.Answer{Reason: flowctl.ReasonNoTokens, HTTPStatus: code, RetryAfter: time.Second})
		resp, err := intercept(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: "/shop.v1.Orders/Get"}, handler)
		st, ok := status.FromError(err)
		switch {
		case err == nil || resp != nil || !ok:
			t.Fatalf("status %d: the reply is %v, %v", code, resp, err)
		case st.Code() == codes.OK || st.Code() == codes.Unknown:
			t.Errorf("status %d became %v", code, st.Code())
		case want[code] != codes.OK && st.Code() != want[code]:
			t.Errorf("status %d became %v want %v", code, st.Code(), want[code])
		case (code < 400 || code > 599) && st.Code() != codes.Unavailable:
			t.Errorf("status %d became %v want Unavailable, by the reason", code, st.Code())
		case len(st.Details()) != 1:
			t.Errorf("status %d: details %v want a RetryInfo", code, st.Details())
		}
		if rejected, ok := errors.AsType[*flowctl.RejectedError](err); !ok || rejected.ControlPoint != point {
			t.Errorf("status %d: error = %v want a RejectedError", code, err)
		}
	}
}

// A18: what a client sent replaced what the application said, and went to the agent unasked.
func TestA18MetadataReplacesNothing(t *testing.T) {
	for _, a := range agentSides {
		t.Run(a.name, func(t *testing.T) {
			s := a.start(t, false)
			opts := guarded(s, grpcguard.WithMetadata("Tier", "tenant"), grpcguard.WithMetadata("rpc.method", "authorization", "trace-bin", "user", "absent"),
				grpcguard.WithParams(func(ctx context.Context, call grpcguard.Call) flowctl.Params {
					if _, transport, _ := labels.FromContext(ctx); transport["tenant"] != "acme,other" {
						t.Errorf("the context of %s lacks the labels of the call: %v", call.FullMethod, transport)
					}
					return flowctl.Params{Labels: set{"tier": "free"}}
				}))
			opts = append([]grpc.ServerOption{grpc.ChainUnaryInterceptor(
				func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
					return handler(labels.With(ctx, "user", "42"), req)
				})}, opts...)
			conn, stop := serve(t, memory, new(service).register, opts)
			ctx := metadata.AppendToOutgoingContext(t.Context(), "tier", "platinum", "tenant", "acme", "user", "1", "secret", "s",
				"rpc.method", "Other", "authorization", "Bearer s", "trace-bin", "s", "tenant", "other")
			wantCode(t, testMethods[0].call(ctx, testgrpc.NewTestServiceClient(conn)), codes.OK)
			stop()
			want := []set{{
				"rpc.service": "grpc.testing.TestService", "rpc.method": "UnaryCall",
				"tier": "free", "user": "42", "tenant": "acme,other",
			}}
			if diff := cmp.Diff(want, s.labels()); diff != "" {
				t.Errorf("labels (-want +got):\n%s", diff)
			}
		})
	}
}

func TestServerBaggage(t *testing.T) {
	own, err := baggage.Parse("tier=own")
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		sent []string
		own  bool
		tier string // as a label; "": none
		ctx  string // what the handler's context has
	}{
		{name: "none"},
		{name: "sent", sent: []string{"tier=gold,region=eu%25"}, tier: "gold", ctx: "eu%"},
		{name: "sent in two", sent: []string{"tier=gold", "region=eu"}, tier: "gold", ctx: "eu"},
		{name: "half of it bad", sent: []string{"tier=gold,=;"}, tier: "gold"},
		{name: "all of it bad", sent: []string{"=;"}},
		{name: "the application has some", sent: []string{"tier=gold,region=eu"}, own: true, tier: "own"},
	}
	for _, a := range agentSides {
		for _, tt := range tests {
			t.Run(a.name+"/"+tt.name, func(t *testing.T) {
				s := a.start(t, false)
				ctx := metadata.NewIncomingContext(t.Context(), metadata.MD{"baggage": tt.sent})
				if tt.own {
					ctx = baggage.ContextWithBaggage(ctx, own)
				}
				intercept := grpcguard.UnaryServerInterceptor(s.starts, point)
				_, err := intercept(ctx, nil, &grpc.UnaryServerInfo{FullMethod: "/s/m"}, func(ctx context.Context, _ any) (any, error) {
					if got := baggage.FromContext(ctx).Member("region").Value(); got != tt.ctx {
						t.Errorf("baggage in the handler's context: region = %q want %q", got, tt.ctx)
					}
					return nil, nil
				})
				if err != nil {
					t.Error(err)
				}
				// The client takes tier alone.
				want := set{"rpc.service": "s", "rpc.method": "m"}
				if tt.tier != "" {
					want["tier"] = tt.tier
				}
				if diff := cmp.Diff([]set{want}, s.labels()); diff != "" {
					t.Errorf("labels (-want +got):\n%s", diff)
				}
			})
		}
	}
}

func TestServerSkips(t *testing.T) {
	tests := []struct {
		name                string
		opts                []grpcguard.Option
		health, echo, watch bool // which are flows
	}{
		{name: "default", echo: true, watch: true},
		{name: "nothing", opts: []grpcguard.Option{grpcguard.WithoutDefaultSkips(), nil, grpcguard.WithSkip(nil), grpcguard.WithSkipMethods()}, health: true, echo: true, watch: true},
		{name: "method", opts: []grpcguard.Option{grpcguard.WithSkipMethods("/grpc.testing.TestService/UnaryCall")}, watch: true},
		{name: "without the slash", opts: []grpcguard.Option{grpcguard.WithSkipMethods("grpc.testing.TestService/UnaryCall")}, watch: true},
		{name: "service", opts: []grpcguard.Option{grpcguard.WithSkipMethods("/grpc.testing.TestService/*")}},
		{name: "part of a method", opts: []grpcguard.Option{grpcguard.WithSkipMethods("/grpc.testing.TestService/Unary", "UnaryCall", "testing.*", "/grpc.testing.TestService/unarycall")}, echo: true, watch: true},
		{name: "repeated", opts: []grpcguard.Option{grpcguard.WithSkipMethods("/grpc.testing.TestService/F*"), grpcguard.WithSkipMethods("/grpc.testing.TestService/U*")}},
		{
			name: "predicate",
			opts: []grpcguard.Option{grpcguard.WithSkip(func(ctx context.Context, call grpcguard.Call) bool {
				_, hasMetadata := metadata.FromIncomingContext(ctx)
				return hasMetadata && call.Request == nil
			})},
			echo: true,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := embeddedSide(t, false)
			conn, stop := serve(t, memory, func(server *grpc.Server) {
				new(service).register(server)
				healthgrpc.RegisterHealthServer(server, health.NewServer())
				reflection.Register(server)
			}, guarded(s, append(tt.opts, grpcguard.WithControlPoint(fullMethod))...))

			var want []string
			add := func(is bool, method string) {
				if is {
					want = append(want, method)
				}
			}
			if _, err := healthgrpc.NewHealthClient(conn).Check(t.Context(), new(healthgrpc.HealthCheckRequest)); err != nil {
				t.Error(err)
			}
			add(tt.health, "/grpc.health.v1.Health/Check")
			stream, err := reflectiongrpc.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			_ = stream.CloseSend()
			if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
				t.Error(err)
			}
			add(tt.health, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
			for _, m := range testMethods {
				wantCode(t, m.call(t.Context(), testgrpc.NewTestServiceClient(conn)), codes.OK)
				switch m.name {
				case "UnaryCall":
					add(tt.echo, "/grpc.testing.TestService/UnaryCall")
				case "FullDuplexCall":
					add(tt.watch, "/grpc.testing.TestService/FullDuplexCall")
				}
			}
			stop()

			var got []string
			for _, flow := range s.starts.all() {
				if cp := flow.ControlPoint(); !strings.Contains(cp, "/Streaming") { // two more of which nothing is said
					got = append(got, cp)
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("flows of %q want %q", got, want)
			}
		})
	}
}

func fullMethod(_ context.Context, call grpcguard.Call) string { return call.FullMethod }

func TestControlPoint(t *testing.T) {
	tests := []struct {
		name string
		opts []grpcguard.Option
		want string
	}{
		{"fixed", nil, point},
		{"nil function", []grpcguard.Option{grpcguard.WithControlPoint(fullMethod), grpcguard.WithControlPoint(nil)}, point},
		{"full method", []grpcguard.Option{grpcguard.WithControlPoint(fullMethod)}, "/shop.v1.Orders/Get"},
		{"none found", []grpcguard.Option{grpcguard.WithControlPoint(func(context.Context, grpcguard.Call) string { return "" })}, point},
		{"by request", []grpcguard.Option{grpcguard.WithControlPoint(func(_ context.Context, call grpcguard.Call) string {
			return call.Request.(string)
		})}, "request"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := embeddedSide(t, false)
			_, err := grpcguard.UnaryServerInterceptor(s.starts, point, tt.opts...)(t.Context(), "request",
				&grpc.UnaryServerInfo{FullMethod: "/shop.v1.Orders/Get"}, func(context.Context, any) (any, error) { return nil, nil })
			if err != nil {
				t.Fatal(err)
			}
			if got := s.starts.all()[0].ControlPoint(); got != tt.want {
				t.Errorf("control point %q want %q", got, tt.want)
			}
		})
	}
}

// What is replaceable about failures is Params.IsFailure.
func TestServerIsFailure(t *testing.T) {
	gone := status.Error(codes.NotFound, "gone")
	for _, m := range testMethods {
		t.Run(m.name, func(t *testing.T) {
			s := embeddedSide(t, false)
			svc := &service{do: func(context.Context) error { return gone }}
			conn, stop := serve(t, memory, svc.register, guarded(s, grpcguard.WithParams(
				func(context.Context, grpcguard.Call) flowctl.Params {
					return flowctl.Params{IsFailure: func(err error) bool {
						if !errors.Is(err, gone) {
							t.Errorf("IsFailure(%v) want the handler's error", err)
						}
						return true
					}}
				})))
			wantCode(t, m.call(t.Context(), testgrpc.NewTestServiceClient(conn)), codes.NotFound)
			stop()
			s.wantEnds(t, ended{point, flowctl.StatusError})
		})
	}
}

func TestIsFailure(t *testing.T) {
	failures := []codes.Code{
		codes.Unknown, codes.DeadlineExceeded, codes.Unimplemented, codes.Internal, codes.Unavailable, codes.DataLoss, 17, 99,
	}
	for code := range codes.Code(100) {
		err := status.Error(code, "status")
		want := slices.Contains(failures, code) || code > 16
		if got := grpcguard.IsFailure(err); got != want {
			t.Errorf("IsFailure(%v) = %v want %v", code, got, want)
		}
		if got := grpcguard.IsFailure(fmt.Errorf("wrapped: %w", err)); code != codes.OK && got != want {
			t.Errorf("IsFailure(%v, wrapped) = %v want %v", code, got, want)
		}
	}
	plain := map[error]bool{
		nil: false, errBroken: true, context.Canceled: false, context.DeadlineExceeded: true,
		&flowctl.RejectedError{HTTPStatus: 429}: false, &flowctl.RejectedError{HTTPStatus: 503}: true,
	}
	for err, want := range plain {
		if got := grpcguard.IsFailure(err); got != want {
			t.Errorf("IsFailure(%v) = %v want %v", err, got, want)
		}
	}
}

// TestServerDecisions has the flows that an engine has no say in.
func TestServerDecisions(t *testing.T) {
	params := func(p flowctl.Params) grpcguard.Option {
		return grpcguard.WithParams(func(context.Context, grpcguard.Call) flowctl.Params { return p })
	}
	silent := flowtest.Answer{Fail: status.Error(codes.Unauthenticated, "bad key")}
	tests := []struct {
		name   string
		answer flowtest.Answer
		opts   []grpcguard.Option
		client []flowctl.Option
		cancel time.Duration
		code   codes.Code
		runs   bool
	}{
		{name: "unreachable, fails open", answer: silent, code: codes.OK, runs: true},
		{name: "unreachable, fails closed", answer: silent, opts: []grpcguard.Option{params(flowctl.Params{OnUnreachable: flowctl.FailClosed})}, code: codes.Unavailable},
		{name: "invalid", opts: []grpcguard.Option{params(flowctl.Params{Labels: set{"": "x"}})}, code: codes.Internal},
		{name: "client leaves while the agent thinks", answer: flowtest.Answer{Delay: 10 * time.Second}, cancel: time.Second, code: codes.Canceled},
		{name: "no matching ramp", answer: flowtest.Answer{Reason: flowctl.ReasonNoMatchingRamp}, code: codes.PermissionDenied},
		{name: "no tokens", answer: flowtest.Answer{Reason: flowctl.ReasonNoTokens}, code: codes.Unavailable},
		{name: "dry run", answer: flowtest.Answer{Reason: flowctl.ReasonRateLimited}, client: []flowctl.Option{flowctl.WithDryRun()}, code: codes.OK, runs: true},
	}
	for _, tt := range tests {
		for _, m := range testMethods {
			t.Run(tt.name+"/"+m.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					agent := flowtest.NewAgent(t)
					agent.Answer(tt.answer)
					s := &side{starts: &starter{Client: agent.Client(append(patient(), tt.client...)...)}}
					svc := new(service)
					conn, stop := serve(t, memory, svc.register, guarded(s, tt.opts...))
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					if tt.cancel > 0 {
						defer time.AfterFunc(tt.cancel, cancel).Stop()
					}
					wantCode(t, m.call(ctx, testgrpc.NewTestServiceClient(conn)), tt.code)
					stop()
					if ran := svc.calls.Load() == 1; ran != tt.runs {
						t.Errorf("the handler ran: %v want %v", ran, tt.runs)
					}
					if _, err := s.starts.all()[0].End(t.Context()); !errors.Is(err, flowctl.ErrEnded) {
						t.Error("the flow was not ended")
					}
				})
			})
		}
	}
}

// A client that leaves is no failure, and slow work is one.
func TestServerClientLeaves(t *testing.T) {
	tests := []struct {
		name  string
		leave func(context.Context) (context.Context, context.CancelFunc)
		code  codes.Code
		want  flowctl.Status
	}{
		{"canceled", func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(ctx)
			time.AfterFunc(time.Second, cancel)
			return ctx, cancel
		}, codes.Canceled, flowctl.StatusOK},
		{"deadline", func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, time.Second)
		}, codes.DeadlineExceeded, flowctl.StatusError},
	}
	for _, a := range agentSides {
		for _, tt := range tests {
			for _, m := range testMethods {
				t.Run(a.name+"/"+tt.name+"/"+m.name, func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						s := a.start(t, false)
						svc := &service{do: func(ctx context.Context) error {
							<-ctx.Done()
							if by, ok := ctx.Deadline(); ok && !time.Now().Before(by) {
								return context.DeadlineExceeded // and not what the client's reset says, which may be first
							}
							return ctx.Err()
						}}
						conn, stop := serve(t, memory, svc.register, guarded(s))
						ctx, cancel := tt.leave(t.Context())
						defer cancel()
						wantCode(t, m.call(ctx, testgrpc.NewTestServiceClient(conn)), tt.code)
						stop()
						s.wantEnds(t, ended{point, tt.want})
					})
				})
			}
		}
	}
}

// A stream is one flow, however much it carries and however long it takes.
func TestServerStreamIsOneFlow(t *testing.T) {
	for _, a := range agentSides {
		t.Run(a.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := a.start(t, false)
				conn, stop := serve(t, memory, new(service).register, guarded(s))
				stream, err := testgrpc.NewTestServiceClient(conn).FullDuplexCall(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				for range 100 {
					if err := stream.Send(&testgrpc.StreamingOutputCallRequest{Payload: payload}); err != nil {
						t.Fatal(err)
					}
					if _, err := stream.Recv(); err != nil {
						t.Fatal(err)
					}
					<-time.After(time.Second)
					if held, flows := s.held(), len(s.starts.all()); held != 1 || flows != 1 {
						t.Fatalf("%d flows hold %d slots want 1, 1", flows, held)
					}
				}
				_ = stream.CloseSend()
				if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
					t.Errorf("the stream ended with %v", err)
				}
				stop()
				s.wantEnds(t, ended{point, flowctl.StatusOK})
			})
		})
	}
}

func TestNilClient(t *testing.T) {
	tests := []struct {
		name   string
		server grpc.UnaryServerInterceptor
		stream grpc.StreamClientInterceptor
	}{
		{"nil", grpcguard.UnaryServerInterceptor(nil, point), grpcguard.StreamClientInterceptor(nil, point)},
		{
			"nil *Client", grpcguard.UnaryServerInterceptor((*flowctl.Client)(nil), point),
			grpcguard.StreamClientInterceptor((*flowctl.Client)(nil), point),
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			conn, _ := serve(t, memory, new(service).register, []grpc.ServerOption{grpc.UnaryInterceptor(tt.server)},
				grpc.WithStreamInterceptor(tt.stream))
			for _, m := range testMethods {
				wantCode(t, m.call(t.Context(), testgrpc.NewTestServiceClient(conn)), codes.OK)
			}
		})
	}
}
