package headgate_test

import (
	"context"
	"errors"
	"testing"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/sides"
)

// Where the context has ended before a call, Cached does what Guard does: it runs in a dry run and without a client.
func TestCachedWithAnEndedContext(t *testing.T) {
	for _, tt := range []struct {
		name string
		opts []flowctl.Option
		off  bool
		runs bool
	}{
		{"client", nil, false, false},
		{"dry run", []flowctl.Option{flowctl.WithDryRun()}, false, true},
		{"no client", nil, true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sides.Setup{Options: tt.opts}.Over(t, sides.All, func(t *testing.T, side *sides.Side) {
				client := side.Client
				if tt.off {
					client = nil
				}
				ctx, cancel := context.WithCancel(t.Context())
				cancel()
				fn := func(context.Context) (string, error) { return "ran", nil }
				for name, call := range map[string]func(context.Context) (string, error){
					"Guard":  headgate.Guard(client, point, flowctl.Params{}, fn, nil),
					"Cached": headgate.Cached(client, point, flowctl.Params{}, fn, nil, headgate.CachePolicy[string]{}),
				} {
					got, err := call(ctx)
					if ran := got == "ran" && err == nil; ran != tt.runs || !ran && !errors.Is(err, context.Canceled) {
						t.Errorf("%s() = %q, %v want a run: %v", name, got, err, tt.runs)
					}
				}
			})
		})
	}
}
