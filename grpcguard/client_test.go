package grpcguard_test

import (
	"context"
	"errors"
	"io"
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/grpcguard"
	"github.com/headgate-go/headgate/labels"
)

// guarding are the options of a client whose calls are guarded.
func guarding(s *side, opts ...grpcguard.Option) []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithChainUnaryInterceptor(grpcguard.UnaryClientInterceptor(s.starts, point, opts...)),
		grpc.WithChainStreamInterceptor(grpcguard.StreamClientInterceptor(s.starts, point, opts...)),
	}
}

func TestClient(t *testing.T) {
	tests := []struct {
		name string
		err  error // of the server
		want flowctl.Status
	}{
		{"ok", nil, flowctl.StatusOK},
		{"caller's fault", status.Error(codes.InvalidArgument, "no"), flowctl.StatusOK},
		{"server's fault", status.Error(codes.Unavailable, "overloaded"), flowctl.StatusError},
		{"canceled by the server", status.Error(codes.Canceled, "other"), flowctl.StatusOK},
	}
	everywhere(t, func(t *testing.T, start func(testing.TB, bool) *side, n network, m method) {
		for _, tt := range tests {
			t.Run(tt.name, func(t *testing.T) {
				s := start(t, false)
				svc := &service{do: func(context.Context) error {
					if got := s.held(); got != 1 {
						t.Errorf("%d slots are held while the server works", got)
					}
					return tt.err
				}}
				conn, _ := serve(t, n.listen, svc.register, nil, guarding(s)...)
				err := m.call(t.Context(), testgrpc.NewTestServiceClient(conn))
				wantCode(t, err, status.Code(tt.err))
				s.wantEnds(t, ended{point, tt.want})
				want := []set{{"rpc.service": "grpc.testing.TestService", "rpc.method": m.name}}
				if diff := cmp.Diff(want, s.labels()); diff != "" {
					t.Errorf("labels (-want +got):\n%s", diff)
				}
			})
		}
	})
}

func TestClientRejects(t *testing.T) {
	everywhere(t, func(t *testing.T, start func(testing.TB, bool) *side, n network, m method) {
		s := start(t, true)
		// What comes after the guard sends.
		sent := false
		dial := append(guarding(s),
			grpc.WithChainUnaryInterceptor(func(context.Context, string, any, any, *grpc.ClientConn, grpc.UnaryInvoker, ...grpc.CallOption) error {
				sent = true
				return nil
			}),
			grpc.WithChainStreamInterceptor(func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, grpc.Streamer, ...grpc.CallOption) (grpc.ClientStream, error) {
				sent = true
				return nil, errBroken
			}))
		conn, _ := serve(t, n.listen, new(service).register, nil, dial...)
		err := m.call(t.Context(), testgrpc.NewTestServiceClient(conn))
		wantRejected(t, err)
		if rejected, ok := errors.AsType[*flowctl.RejectedError](err); !ok || rejected.ControlPoint != point {
			t.Errorf("error = %v want a RejectedError", err)
		}
		if sent {
			t.Error("a rejected call was sent")
		}
		s.wantEnds(t, ended{point, flowctl.StatusError})
	})
}

func TestClientDecisions(t *testing.T) {
	tests := []struct {
		name   string
		params flowctl.Params
		cancel func(context.Context) (context.Context, context.CancelFunc)
		code   codes.Code
		err    error
	}{
		{
			name: "canceled", code: codes.Canceled, err: context.Canceled,
			cancel: func(ctx context.Context) (context.Context, context.CancelFunc) {
				ctx, cancel := context.WithCancel(ctx)
				cancel()
				return ctx, cancel
			},
		},
		{
			name: "deadline passed", code: codes.DeadlineExceeded, err: context.DeadlineExceeded,
			cancel: func(ctx context.Context) (context.Context, context.CancelFunc) { return context.WithTimeout(ctx, 0) },
		},
		{
			name: "deadline passes", code: codes.DeadlineExceeded, err: context.DeadlineExceeded,
			cancel: func(ctx context.Context) (context.Context, context.CancelFunc) {
				return context.WithTimeout(ctx, time.Second)
			},
		},
		{
			name: "fails closed", code: codes.Unavailable, err: flowctl.ErrUnreachable,
			params: flowctl.Params{OnUnreachable: flowctl.FailClosed, CheckTimeout: time.Second},
		},
		{name: "invalid", code: codes.Internal, err: flowctl.ErrInvalid, params: flowctl.Params{Labels: set{"": "x"}}},
	}
	for _, tt := range tests {
		for _, m := range testMethods {
			t.Run(tt.name+"/"+m.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					agent := flowtest.NewAgent(t)
					agent.Answer(flowtest.Answer{Hang: true})
					s := &side{starts: &starter{Client: agent.Client(patient()...)}}
					svc := new(service)
					conn, _ := serve(t, memory, svc.register, nil, guarding(s, grpcguard.WithParams(
						func(context.Context, grpcguard.Call) flowctl.Params { return tt.params }))...)
					ctx := t.Context()
					if tt.cancel != nil {
						var cancel context.CancelFunc
						ctx, cancel = tt.cancel(ctx)
						defer cancel()
					}
					err := m.call(ctx, testgrpc.NewTestServiceClient(conn))
					wantCode(t, err, tt.code)
					if !errors.Is(err, tt.err) {
						t.Errorf("error = %v want a match of %v", err, tt.err)
					}
					if got := svc.calls.Load(); got != 0 {
						t.Errorf("%d calls were served", got)
					}
					if _, err := s.starts.all()[0].End(t.Context()); !errors.Is(err, flowctl.ErrEnded) {
						t.Error("the flow was not ended")
					}
				})
			})
		}
	}
}

// A5: what the application sends along was wiped.
func TestA5OutgoingMetadata(t *testing.T) {
	for _, a := range agentSides {
		for _, m := range testMethods {
			t.Run(a.name+"/"+m.name, func(t *testing.T) {
				s := a.start(t, false)
				var got metadata.MD
				svc := &service{do: func(ctx context.Context) error {
					got, _ = metadata.FromIncomingContext(ctx)
					return nil
				}}
				conn, stop := serve(t, memory, svc.register, nil, guarding(s, grpcguard.WithMetadata("X-Tenant", "authorization"))...)
				ctx := metadata.NewOutgoingContext(t.Context(), metadata.Pairs("traceparent", "00-1", "authorization", "Bearer s"))
				ctx = metadata.AppendToOutgoingContext(ctx, "X-Tenant", "acme")
				wantCode(t, m.call(ctx, testgrpc.NewTestServiceClient(conn)), codes.OK)
				stop()
				want := metadata.MD{"traceparent": {"00-1"}, "authorization": {"Bearer s"}, "x-tenant": {"acme"}}
				maps.DeleteFunc(got, func(key string, _ []string) bool {
					return slices.Contains([]string{":authority", "content-type", "user-agent", "grpc-accept-encoding"}, key)
				})
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("metadata at the server (-want +got):\n%s", diff)
				}
				wantLabels := []set{{"rpc.service": "grpc.testing.TestService", "rpc.method": m.name, "x-tenant": "acme"}}
				if diff := cmp.Diff(wantLabels, s.labels()); diff != "" {
					t.Errorf("labels (-want +got):\n%s", diff)
				}
			})
		}
	}
}

// A call from within a handler has the labels of the method that it calls, and those of the handler's request.
func TestClientWithinServer(t *testing.T) {
	s := embeddedSide(t, false)
	next, _ := serve(t, memory, new(service).register, nil, guarding(s)...)
	svc := &service{do: func(ctx context.Context) error {
		return testMethods[3].call(ctx, testgrpc.NewTestServiceClient(next))
	}}
	conn, stop := serve(t, memory, svc.register, guarded(s, grpcguard.WithMetadata("tenant")))
	ctx := metadata.AppendToOutgoingContext(t.Context(), "tenant", "acme")
	wantCode(t, testMethods[0].call(ctx, testgrpc.NewTestServiceClient(conn)), codes.OK)
	stop()
	want := []set{
		{"rpc.service": "grpc.testing.TestService", "rpc.method": "UnaryCall", "tenant": "acme"},
		{"rpc.service": "grpc.testing.TestService", "rpc.method": "FullDuplexCall", "tenant": "acme"},
	}
	if diff := cmp.Diff(want, s.labels()); diff != "" {
		t.Errorf("labels (-want +got):\n%s", diff)
	}
	s.wantEnds(t, ended{point, flowctl.StatusOK}, ended{point, flowctl.StatusOK})
}

func TestClientSkips(t *testing.T) {
	s := embeddedSide(t, true)
	conn, _ := serve(t, memory, new(service).register, nil, guarding(s, grpcguard.WithSkipMethods("/grpc.testing.*"))...)
	for _, m := range testMethods {
		wantCode(t, m.call(t.Context(), testgrpc.NewTestServiceClient(conn)), codes.OK)
	}
	s.wantEnds(t)
}

// C1: panics in what comes after the interceptor.
func TestC1ClientPanics(t *testing.T) {
	for _, a := range agentSides {
		for _, m := range testMethods {
			t.Run(a.name+"/"+m.name, func(t *testing.T) {
				s := a.start(t, false)
				dial := append(guarding(s),
					grpc.WithChainUnaryInterceptor(func(context.Context, string, any, any, *grpc.ClientConn, grpc.UnaryInvoker, ...grpc.CallOption) error {
						panic(errBroken)
					}),
					grpc.WithChainStreamInterceptor(func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, grpc.Streamer, ...grpc.CallOption) (grpc.ClientStream, error) {
						panic(errBroken)
					}))
				conn, _ := serve(t, memory, new(service).register, nil, dial...)
				err := func() (err error) {
					defer recovered(&err)
					return m.call(t.Context(), testgrpc.NewTestServiceClient(conn))
				}()
				if !errors.Is(err, errRecovered) {
					t.Errorf("error = %v: the panic did not go on as it was", err)
				}
				s.wantEnds(t, ended{point, flowctl.StatusError})
			})
		}
	}
}

// duplex is a client's bidirectional stream.
type duplex = grpc.BidiStreamingClient[testgrpc.StreamingOutputCallRequest, testgrpc.StreamingOutputCallResponse]

// TestClientStreamEnds has all the ways in which a stream ends for its client, whether it goes on to read or not.
func TestClientStreamEnds(t *testing.T) {
	tests := []struct {
		name string
		// use uses the stream, and leaves it.
		use func(t *testing.T, conn *grpc.ClientConn, stream duplex, cancel context.CancelFunc)
		do  func(context.Context) error
		// want is how the flow ends, which is by the time that all is quiet.
		want flowctl.Status
		open bool // it does not
	}{
		{
			name: "in use", open: true,
			use: func(t *testing.T, _ *grpc.ClientConn, stream duplex, _ context.CancelFunc) {
				if _, err := stream.Header(); err != nil {
					t.Error(err)
				}
			},
		},
		{
			name: "nothing is sent any more", open: true,
			use: func(t *testing.T, _ *grpc.ClientConn, stream duplex, _ context.CancelFunc) { _ = stream.CloseSend() },
		},
		{
			name: "read to the end", want: flowctl.StatusOK,
			use: func(t *testing.T, _ *grpc.ClientConn, stream duplex, _ context.CancelFunc) {
				_ = stream.CloseSend()
				for range 2 { // the second does nothing
					if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
						t.Errorf("Recv() = %v want io.EOF", err)
					}
				}
			},
		},
		{
			name: "read to the end, then canceled", want: flowctl.StatusError,
			do: func(context.Context) error { return status.Error(codes.Internal, "broken") },
			use: func(t *testing.T, _ *grpc.ClientConn, stream duplex, cancel context.CancelFunc) {
				_ = stream.CloseSend()
				_, err := stream.Recv()
				wantCode(t, err, codes.Internal)
				cancel()
			},
		},
		{
			name: "canceled and left", want: flowctl.StatusOK,
			use: func(_ *testing.T, _ *grpc.ClientConn, _ duplex, cancel context.CancelFunc) { cancel() },
		},
		{
			name: "canceled while it waits", want: flowctl.StatusOK,
			use: func(t *testing.T, _ *grpc.ClientConn, stream duplex, cancel context.CancelFunc) {
				time.AfterFunc(time.Second, cancel)
				_, err := stream.Recv()
				wantCode(t, err, codes.Canceled)
			},
		},
		{
			name: "deadline passed, and left", want: flowctl.StatusError,
			use: func(*testing.T, *grpc.ClientConn, duplex, context.CancelFunc) { <-time.After(time.Hour) },
		},
		{
			name: "connection closed, and left", want: flowctl.StatusOK,
			use: func(_ *testing.T, conn *grpc.ClientConn, _ duplex, _ context.CancelFunc) { _ = conn.Close() },
		},
		{
			name: "message that cannot be sent", want: flowctl.StatusError,
			use: func(t *testing.T, _ *grpc.ClientConn, stream duplex, _ context.CancelFunc) {
				wantCode(t, stream.SendMsg("no message"), codes.Internal)
			},
		},
		{
			name: "server has gone, noticed by sending", open: true, // only RecvMsg returns why
			do: func(context.Context) error { return status.Error(codes.Unavailable, "gone") },
			use: func(t *testing.T, _ *grpc.ClientConn, stream duplex, _ context.CancelFunc) {
				_ = stream.CloseSend()
				synctest.Wait()
				if _, err := stream.Header(); err != nil {
					t.Error(err)
				}
			},
		},
	}
	for _, a := range agentSides {
		for _, tt := range tests {
			t.Run(a.name+"/"+tt.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := a.start(t, false)
					svc := &service{do: tt.do}
					conn, stop := serve(t, memory, svc.register, nil, guarding(s)...)
					ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
					defer cancel()
					stream, err := testgrpc.NewTestServiceClient(conn).FullDuplexCall(ctx)
					if err != nil {
						t.Fatal(err)
					}
					if err := stream.Send(&testgrpc.StreamingOutputCallRequest{Payload: payload}); err != nil {
						t.Fatal(err)
					}
					if _, err := stream.Recv(); err != nil {
						t.Fatal(err)
					}
					if flow, ok := flowctl.FromContext(stream.Context()); !ok || flow != s.starts.all()[0] {
						t.Errorf("the stream's context has %v", flow)
					}
					tt.use(t, conn, stream, cancel)
					synctest.Wait()
					if held := s.held(); held != 0 != tt.open {
						t.Errorf("%d slots are held", held)
					}
					if tt.open {
						_, err := s.starts.all()[0].End(ctx)
						if err != nil {
							t.Errorf("End() = %v want the first", err)
						}
						cancel() // which is not to end it again
						stop()
						return
					}
					stop()
					cancel()
					synctest.Wait()
					s.wantEnds(t, ended{point, tt.want})
				})
			})
		}
	}
}

// A stream that cannot begin ends its flow, too.
func TestClientStreamFails(t *testing.T) {
	for _, a := range agentSides {
		t.Run(a.name, func(t *testing.T) {
			s := a.start(t, false)
			conn, stop := serve(t, memory, new(service).register, nil, guarding(s)...)
			stop()
			_, err := testgrpc.NewTestServiceClient(conn).FullDuplexCall(t.Context())
			wantCode(t, err, codes.Canceled)
			s.wantEnds(t, ended{point, flowctl.StatusOK})
		})
	}
}

// An interceptor after the guard that tries again makes several streams of one, which stays one flow.
func TestClientStreamRetried(t *testing.T) {
	for _, a := range agentSides {
		t.Run(a.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := a.start(t, false)
				svc := &service{do: func(context.Context) error {
					return status.Error(codes.Unavailable, "come again")
				}}
				attempts := 0
				retry := func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
					for {
						attempts++
						stream, err := streamer(ctx, desc, cc, method, opts...)
						if err != nil || attempts == 3 {
							return stream, err
						}
						_ = stream.CloseSend()
						wantCode(t, stream.RecvMsg(new(testgrpc.StreamingOutputCallResponse)), codes.Unavailable)
						if got := s.held(); got != 1 {
							t.Errorf("%d slots are held between attempts", got)
						}
					}
				}
				conn, stop := serve(t, memory, svc.register, nil, append(guarding(s), grpc.WithChainStreamInterceptor(retry))...)
				stream, err := testgrpc.NewTestServiceClient(conn).FullDuplexCall(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				svc.do = nil
				_ = stream.CloseSend()
				_, err = stream.Recv()
				if !errors.Is(err, io.EOF) {
					t.Errorf("Recv() = %v want io.EOF", err)
				}
				stop()
				s.wantEnds(t, ended{point, flowctl.StatusOK})
			})
		})
	}
}

// fakeStream fails as real ones hardly do.
type fakeStream struct {
	grpc.ClientStream
	err error
}

func (s fakeStream) Header() (metadata.MD, error) { return nil, s.err }
func (s fakeStream) SendMsg(any) error            { return s.err }
func (s fakeStream) RecvMsg(any) error            { return s.err }

// A stream of an interceptor's own ends its flow as gRPC's would.
func TestClientStreamFake(t *testing.T) {
	tests := []struct {
		name string
		err  error
		desc grpc.StreamDesc
		use  func(grpc.ClientStream) error
		want []ended
	}{
		{"header fails", errBroken, grpc.StreamDesc{}, func(s grpc.ClientStream) error { _, err := s.Header(); return err }, []ended{{point, flowctl.StatusError}}},
		{"send fails", errBroken, grpc.StreamDesc{}, func(s grpc.ClientStream) error { return s.SendMsg(nil) }, []ended{{point, flowctl.StatusError}}},
		{"send finds the stream done", io.EOF, grpc.StreamDesc{}, func(s grpc.ClientStream) error { return s.SendMsg(nil) }, nil},
		{"single response", nil, grpc.StreamDesc{ClientStreams: true}, func(s grpc.ClientStream) error { return s.RecvMsg(nil) }, []ended{{point, flowctl.StatusOK}}},
		{"one response of many", nil, grpc.StreamDesc{ServerStreams: true}, func(s grpc.ClientStream) error { return s.RecvMsg(nil) }, nil},
		{"receive fails", errBroken, grpc.StreamDesc{ServerStreams: true}, func(s grpc.ClientStream) error { return s.RecvMsg(nil) }, []ended{{point, flowctl.StatusError}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := embeddedSide(t, false)
			stream, err := grpcguard.StreamClientInterceptor(s.starts, point)(t.Context(), &tt.desc, nil, "/s/m",
				func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
					return fakeStream{err: tt.err}, nil
				})
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := tt.use(stream); !errors.Is(err, tt.err) {
					t.Errorf("error = %v want %v, unchanged", err, tt.err)
				}
			}
			if got := s.ends(); !slices.Equal(got, tt.want) {
				t.Errorf("the agent saw the ends %v want %v", got, tt.want)
			}
		})
	}
}

// A7: options were appended to a slice of the caller's.
func TestA7CallOptions(t *testing.T) {
	s := embeddedSide(t, false)
	opts := make([]grpc.CallOption, 0, 8)
	_, err := grpcguard.StreamClientInterceptor(s.starts, point)(t.Context(), new(grpc.StreamDesc), nil, "/s/m",
		func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
			return nil, errBroken
		}, opts...)
	if !errors.Is(err, errBroken) {
		t.Error(err)
	}
	if opts[:1][0] != nil {
		t.Error("the interceptor wrote to the caller's options")
	}
	s.wantEnds(t, ended{point, flowctl.StatusError})
}

// Labels of the context go before what a client is about to send.
func TestClientParams(t *testing.T) {
	s := embeddedSide(t, false)
	req := &testgrpc.SimpleRequest{Payload: payload}
	intercept := grpcguard.UnaryClientInterceptor(s.starts, point, grpcguard.WithMetadata("tier", "user", "plan"),
		grpcguard.WithParams(func(_ context.Context, call grpcguard.Call) flowctl.Params {
			if call.Request != any(req) {
				t.Errorf("request = %v", call.Request)
			}
			return flowctl.Params{Labels: set{"tier": "free"}}
		}))
	ctx := metadata.AppendToOutgoingContext(labels.With(t.Context(), "user", "42"), "tier", "gold", "user", "1", "plan", "a")
	err := intercept(ctx, "/s/m", req, nil, nil,
		func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	want := []set{{"rpc.service": "s", "rpc.method": "m", "tier": "free", "user": "42", "plan": "a"}}
	if diff := cmp.Diff(want, s.labels()); diff != "" {
		t.Errorf("labels (-want +got):\n%s", diff)
	}
}
