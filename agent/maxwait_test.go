package agent_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/flowctl"
)

// A check of either kind waits no longer than its max_wait, although it has more time.
func TestMaxWaitOverTheWire(t *testing.T) {
	for _, tt := range []struct {
		name string
		max  *durationpb.Duration
		want time.Duration
	}{
		{"absent", nil, 59*time.Second + 990*time.Millisecond},
		{"a second", durationpb.New(time.Second), time.Second},
		{"longer than the deadline", durationpb.New(time.Hour), 59*time.Second + 990*time.Millisecond},
		{"a nanosecond", durationpb.New(1), 0},
		{"zero", durationpb.New(0), 0},
		{"negative", durationpb.New(-time.Hour), 0},
		{"out of range", &durationpb.Duration{Seconds: 1 << 62}, 59*time.Second + 990*time.Millisecond},
	} {
		for _, kind := range []string{"Check", "CheckHTTP"} {
			t.Run(tt.name+"/"+kind, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := serve(t, scheduler())
					holder := s.client(t).Start(t.Context(), "point", flowctl.Params{})
					defer func() { _, _ = holder.End(context.WithoutCancel(t.Context())) }()
					conn := s.conn(t)
					ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
					defer cancel()
					begin := time.Now()
					var m *checkv1.CheckResponse
					var err error
					if kind == "Check" {
						m, err = checkv1.NewFlowControlServiceClient(conn).Check(ctx, &checkv1.CheckRequest{ControlPoint: "point", MaxWait: tt.max})
					} else {
						var h *checkhttpv1.CheckHTTPResponse
						h, err = checkhttpv1.NewFlowControlServiceHTTPClient(conn).CheckHTTP(ctx,
							&checkhttpv1.CheckHTTPRequest{ControlPoint: "point", MaxWait: tt.max})
						m = h.GetCheckResponse()
					}
					if took := time.Since(begin); err != nil || m.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_REJECTED || took != tt.want {
						t.Errorf("%v, %v after %v want it rejected after %v", m.GetDecisionType(), err, took, tt.want)
					}
				})
			})
		}
	}
}
