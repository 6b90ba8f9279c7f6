package flowctl

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
)

// A silent connection answers nothing.
type silent struct{ grpc.ClientConnInterface }

func (silent) Invoke(ctx context.Context, _ string, _, _ any, _ ...grpc.CallOption) error {
	<-ctx.Done()
	return ctx.Err()
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
