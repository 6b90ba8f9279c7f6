package fallback_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

func TestRescue(t *testing.T) {
	failed := errors.New("failed")
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tt := range []struct {
		name    string
		ctx     context.Context
		err     error
		rescues bool
	}{
		{"no error", t.Context(), nil, false},
		{"the work's own error", t.Context(), failed, false},
		{"rejected", t.Context(), flowctl.ErrRejected, true},
		{"rejected, wrapped", t.Context(), fmt.Errorf("quote: %w", flowctl.ErrRejected), true},
		{"rejected, joined", t.Context(), errors.Join(failed, flowctl.ErrRejected), true},
		{"unreachable", t.Context(), flowctl.ErrUnreachable, true},
		{"canceled", t.Context(), context.Canceled, false},
		{"invalid", t.Context(), flowctl.ErrInvalid, false},
		{"rejected, and the caller has gone", ended, flowctl.ErrRejected, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var told error
			rescued := fallback.Rescue(func(context.Context) (string, error) { return "work", tt.err },
				func(_ context.Context, err error) (string, error) {
					told = err
					return "rescued", nil
				})
			got, err := rescued(tt.ctx)
			want, wantErr := "work", tt.err
			if tt.rescues {
				want, wantErr = "rescued", nil
			}
			if got != want || err != wantErr { //nolint:errorlint // it is the same error
				t.Errorf("= %q, %v want %q, %v", got, err, want, wantErr)
			}
			if tt.rescues && told != tt.err { //nolint:errorlint // the same
				t.Errorf("the fallback got %v want %v", told, tt.err)
			}
		})
	}
}

func TestRescueWithoutFallback(t *testing.T) {
	rescued := fallback.Rescue(func(context.Context) (int, error) { return 1, flowctl.ErrRejected }, nil)
	if v, err := rescued(t.Context()); v != 1 || !errors.Is(err, flowctl.ErrRejected) {
		t.Errorf("= %v, %v want 1 and the error", v, err)
	}
}

// The errors of guards within a function are those that Rescue matches, whatever the agent is.
func TestRescueFromGuards(t *testing.T) {
	sides.Setup{Policies: sides.Policies(policy.Sampler{Selectors: policy.At("none")})}.InBubbles(t, sides.Engines,
		func(t *testing.T, side *sides.Side) {
			quote := headgate.Guard(side.Client, "none", flowctl.Params{},
				func(context.Context) (int, error) { return 1, nil }, nil)
			twice := fallback.Rescue(func(ctx context.Context) (int, error) {
				v, err := quote(ctx)
				if err != nil {
					return 0, fmt.Errorf("quote: %w", err)
				}
				return 2 * v, nil
			}, fallback.Value(7))
			if v, err := twice(t.Context()); v != 7 || err != nil {
				t.Errorf("= %v, %v want 7, nil", v, err)
			}
		})
}
