package engine

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/internal/agentapi"
)

// A read that does not end holds up neither the end of the context nor Close.
func TestHungReads(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(cancel context.CancelFunc, e *Engine)
		want error
	}{
		{"the context ends", func(cancel context.CancelFunc, _ *Engine) { cancel() }, context.Canceled},
		{"the engine is closed", func(_ context.CancelFunc, e *Engine) { _ = e.Close() }, agentapi.ErrClosed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, err := New(nil)
				if err != nil {
					t.Fatal(err)
				}
				defer e.Close()
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				hung := make(chan struct{})
				defer close(hung)
				e.running.Go(func() { // as a watch is
					if _, err := whileOpen(ctx, e, func() int { <-hung; return 1 }); !errors.Is(err, errEnded) || !errors.Is(err, tt.want) {
						t.Errorf("whileOpen() = %v want %v", err, tt.want)
					}
				})
				<-time.After(time.Second)
				tt.end(cancel, e)
				e.running.Wait()
			})
		})
	}
}
