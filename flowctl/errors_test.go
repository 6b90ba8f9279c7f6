package flowctl_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/policy"
)

// A flow has one error, whichever goroutine asks for it and how often.
func TestErrIsOneValue(t *testing.T) {
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	remote := func(answer flowtest.Answer, opts ...flowctl.Option) func(t *testing.T) *flowctl.Client {
		return func(t *testing.T) *flowctl.Client {
			agent := flowtest.NewAgent(t)
			agent.Answer(answer)
			return agent.Client(opts...)
		}
	}
	embedded := func(t *testing.T) *flowctl.Client {
		limits, err := engine.New([]policy.Policy{{Name: "none", Components: []policy.Component{
			policy.RateLimiter{Selectors: policy.At("point"), Interval: time.Hour},
		}}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = limits.Close() })
		client, err := flowctl.New(limits)
		if err != nil {
			t.Fatal(err)
		}
		return client
	}
	rejects := flowtest.Answer{Reason: flowctl.ReasonRateLimited}
	for _, tt := range []struct {
		name   string
		client func(t *testing.T) *flowctl.Client
		ctx    context.Context
		point  string
		want   flowctl.Decision
	}{
		{"accepted", remote(flowtest.Answer{}), t.Context(), "point", flowctl.Accepted},
		{"accepted by an engine", embedded, t.Context(), "other", flowctl.Accepted},
		{"rejected", remote(rejects), t.Context(), "point", flowctl.Rejected},
		{"rejected by an engine", embedded, t.Context(), "point", flowctl.Rejected},
		{"rejected in a dry run", remote(rejects, flowctl.WithDryRun()), t.Context(), "point", flowctl.Rejected},
		{"unreachable", remote(flowtest.Answer{Fail: status.Error(codes.Unavailable, "gone")}), t.Context(), "point", flowctl.Unreachable},
		{"canceled", embedded, gone, "point", flowctl.Canceled},
		{"invalid", embedded, t.Context(), "", flowctl.Invalid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			flow := tt.client(t).Start(tt.ctx, tt.point, flowctl.Params{})
			defer func() { _, _ = flow.End(t.Context()) }()
			if flow.Decision() != tt.want {
				t.Fatalf("%v, %v want %v", flow.Decision(), flow.Err(), tt.want)
			}
			var errs [8]error
			var wg sync.WaitGroup
			for i := range errs {
				wg.Go(func() { errs[i] = flow.Err() })
			}
			wg.Wait()
			for _, err := range errs {
				if err != errs[0] || (err == nil) != (tt.want == flowctl.Accepted) { //nolint:errorlint // it is the very same
					t.Errorf("Err() = %p, %v and %p, %v", errs[0], errs[0], err, err)
				}
			}
		})
	}
}

// What a rejection was caused by is what the agent says, where it says what is known.
func TestRejectCause(t *testing.T) {
	for _, tt := range []struct {
		name string
		sent flowctl.RejectCause
		want flowctl.RejectCause
	}{
		{"none", flowctl.CauseNone, flowctl.CauseNone},
		{"late", flowctl.CauseLate, flowctl.CauseLate},
		{"queue full", flowctl.CauseQueueFull, flowctl.CauseQueueFull},
		{"queue too long", flowctl.CauseQueueTooLong, flowctl.CauseQueueTooLong},
		{"timeout", flowctl.CauseTimeout, flowctl.CauseTimeout},
		{"closed", flowctl.CauseClosed, flowctl.CauseClosed},
		{"label too long", flowctl.CauseLabelTooLong, flowctl.CauseLabelTooLong},
		{"circuit open", flowctl.CauseCircuitOpen, flowctl.CauseCircuitOpen},
		{"no store", flowctl.CauseNoStore, flowctl.CauseNoStore},
		{"the first unknown one", flowctl.CauseNoStore + 1, flowctl.CauseNone},
		{"another unknown one", 200, flowctl.CauseNone},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				agent.Answer(flowtest.Answer{Reason: flowctl.ReasonNoTokens, Cause: tt.sent})
				err := agent.Client().Start(t.Context(), "point", flowctl.Params{}).Err()
				rejected, ok := errors.AsType[*flowctl.RejectedError](err)
				if !ok || rejected.Cause() != tt.want {
					t.Fatalf("%v, %v want %v", err, rejected.Cause(), tt.want)
				}
				if text := rejected.Cause().String(); text == "" || tt.want != flowctl.CauseNone && strings.Contains(err.Error(), text) {
					t.Errorf("the cause %q is nothing, or in %q", text, err)
				}
			})
		})
	}
	if got := flowctl.RejectCause(99).String(); got != "cause 99" {
		t.Errorf("String() = %q", got)
	}
}

func TestWithRetryAfter(t *testing.T) {
	made := &flowctl.RejectedError{ControlPoint: "point", Reason: flowctl.ReasonRateLimited, HTTPStatus: 429}
	later := made.WithRetryAfter(time.Second)
	if made.RetryAfter() != 0 || later.RetryAfter() != time.Second || later.ControlPoint != "point" || later.HTTPStatus != 429 {
		t.Errorf("%v, %v want a copy with a second", made, later)
	}
	if got := made.WithRetryAfter(-time.Second).RetryAfter(); got != 0 {
		t.Errorf("RetryAfter() = %v want 0", got)
	}
}

// A control point that is too long may come from a peer. No error of its flow repeats all of it.
func TestErrorsOfLongControlPoints(t *testing.T) {
	flow := flowtest.NewAgent(t).Client().Start(t.Context(), strings.Repeat("p", 1<<20), flowctl.Params{})
	_, ended := flow.End(t.Context())
	_, _, found := flow.ResultCache()
	for what, err := range map[string]error{
		"Start":  flow.Err(),
		"End":    ended,
		"find":   found,
		"store":  flow.SetGlobalCache(t.Context(), "", nil, 0),
		"delete": flow.DeleteResultCache(t.Context()),
	} {
		if text := fmt.Sprint(err, slog.AnyValue(err).Resolve()); len(text) > 1024 {
			t.Errorf("%s: %d bytes, %.60s…", what, len(text), text)
		}
	}
}

// An error that is a nil pointer is logged and printed in a few words, as package fmt does for other pointers.
func TestNilErrors(t *testing.T) {
	for name, err := range map[string]error{
		"RejectedError":    (*flowctl.RejectedError)(nil),
		"UnreachableError": (*flowctl.UnreachableError)(nil),
	} {
		var log strings.Builder
		slog.New(slog.NewTextHandler(&log, nil)).Info("m", "error", err)
		if got := fmt.Sprintf("%v %s %s", err, err.Error(), log.String()[max(0, strings.Index(log.String(), "msg=")):]); got != "<nil> <nil> msg=m error=<nil>\n" {
			t.Errorf("%s: %s", name, got)
		}
	}
}

// Errors that programs make have no details.
func TestErrorsOfPrograms(t *testing.T) {
	rejected, unreachable := &flowctl.RejectedError{ControlPoint: "point"}, &flowctl.UnreachableError{ControlPoint: "point"}
	if rejected.Cause() != flowctl.CauseNone || rejected.Policy() != "" || rejected.Component() != "" || rejected.LabelKey() != "" {
		t.Errorf("%v has details", slog.AnyValue(rejected).Resolve())
	}
	if unreachable.Cause() != nil || unreachable.Timeout() || errors.Is(unreachable, flowctl.ErrClosed) || !errors.Is(unreachable, flowctl.ErrUnreachable) {
		t.Errorf("%v has a cause", slog.AnyValue(unreachable).Resolve())
	}
}
