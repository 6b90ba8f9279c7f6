package flowctl

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/telemetry"
)

// A silent connection answers nothing.
type silent struct{ grpc.ClientConnInterface }

func (silent) Invoke(ctx context.Context, _ string, _, _ any, _ ...grpc.CallOption) error {
	<-ctx.Done()
	return ctx.Err()
}

// Once the context has ended, flush neither encodes nor sends what waits. All of it counts as lost.
func TestFlushEndsWithItsContext(t *testing.T) {
	for _, tt := range []struct {
		name   string
		before bool // the context ends before, not with the first batch
		sent   int
		want   string
	}{
		{"before", true, 0, "telemetry of 3 flows was not sent: context canceled"},
		{"with the first batch", false, 1, "telemetry of 2 flows was not sent: context canceled"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			sent := 0
			x := newExporter(func(context.Context, string, any, any, ...grpc.CallOption) error {
				sent++
				cancel()
				return nil
			}, slog.New(slog.DiscardHandler), func() {})
			defer func() { _ = x.close(ctx) }()
			for range 3 {
				x.waiting = append(x.waiting, telemetry.Record{Check: make([]byte, batchBytes*2/3)}) // one is a batch
			}
			if tt.before {
				cancel()
			}
			if err := x.flush(ctx); err == nil || err.Error() != tt.want || !errors.Is(err, context.Canceled) {
				t.Errorf("flush() = %v want %v", err, tt.want)
			}
			if sent != tt.sent {
				t.Errorf("%d batches are sent want %d", sent, tt.sent)
			}
		})
	}
}

// However many flows end while the agent takes no telemetry: what waits to be sent is bounded, in records and in bytes.
func TestRecordsAreBounded(t *testing.T) {
	for _, tt := range []struct {
		name  string
		flows int
		bytes int // of the answer
	}{
		{"small ones", 3 * maxRecords, 0},
		{"large ones", 40, 1 << 20},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := newExporter(silent{}.Invoke, slog.New(slog.DiscardHandler), func() {})
				defer func() {
					ctx, cancel := context.WithCancel(t.Context())
					cancel()
					_ = x.close(ctx)
				}()
				c := &check{remote: new(remote), raw: make([]byte, tt.bytes), response: checkv1.CheckResponse{}}
				for range tt.flows {
					x.record(c, agentapi.EndedOK, false)
				}
				x.mu.Lock()
				defer x.mu.Unlock()
				if len(x.waiting) > maxRecords || x.bytes > maxBytes || x.dropped == 0 {
					t.Errorf("%d records of %d bytes wait, and %d were dropped; want at most %d of %d bytes",
						len(x.waiting), x.bytes, x.dropped, maxRecords, maxBytes)
				}
			})
		})
	}
}
