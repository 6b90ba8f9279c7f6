package engine_test

import (
	"errors"
	"testing"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/internal/testing/sharedtest"
	"github.com/headgate-go/headgate/internal/testing/sides"
)

// What one engine has cached another one finds, by one call for all that a flow looks up. What the store does not answer is a miss, and a
// value that it does not take is an error.
func TestSharedCaches(t *testing.T) {
	server := sharedtest.New()
	for _, kind := range sides.Engines {
		for _, other := range sides.Engines {
			t.Run(string(kind)+", "+string(other), func(t *testing.T) {
				store := server.Instance()
				setup := func(s *sharedtest.Store, kind sides.Kind) *sides.Side {
					return sides.Setup{EngineOptions: []engine.Option{engine.WithStore(s)}}.New(t, kind)
				}
				a, b := setup(server.Instance(), kind), setup(store, other)
				asked := flowctl.Params{ResultCacheKey: "result", GlobalCacheKeys: []string{"global", "none"}}
				flow := a.Client.Start(t.Context(), "point", asked)
				if err := errors.Join(flow.SetResultCache(t.Context(), []byte("r"), time.Hour), flow.SetGlobalCache(t.Context(), "global", nil, time.Hour)); err != nil {
					t.Fatal(err)
				}
				end(flow)

				found := func(result, global bool) {
					t.Helper()
					flow := b.Client.Start(t.Context(), "point", asked)
					defer end(flow)
					if value, ok, err := flow.ResultCache(); ok != result || err != nil || ok && string(value) != "r" {
						t.Errorf("result = %q, %v, %v want a hit: %v", value, ok, err, result)
					}
					if _, ok, err := flow.GlobalCache("global"); ok != global || err != nil {
						t.Errorf("global = %v, %v want a hit: %v", ok, err, global)
					}
					if _, ok, err := flow.GlobalCache("none"); ok || err != nil {
						t.Errorf("none = %v, %v want a miss", ok, err)
					}
				}
				found(true, true)
				if got := store.Counted().Get; got != 1 {
					t.Errorf("%d calls want one", got)
				}
				store.Behave(sharedtest.Behavior{Err: shared.ErrDown})
				found(false, false)
				flow = b.Client.Start(t.Context(), "point", asked)
				if err := flow.SetResultCache(t.Context(), []byte("x"), time.Hour); err == nil {
					t.Error("a value was stored that the store did not take")
				}
				end(flow)
				store.Behave(sharedtest.Behavior{})
				flow = b.Client.Start(t.Context(), "point", asked)
				if err := flow.DeleteGlobalCache(t.Context(), "global"); err != nil {
					t.Error(err)
				}
				end(flow)
				found(true, false)
				if s := b.Engine.Stats(); s.ResultCache.Hits != 3 || s.ResultCache.Misses != 2 || s.ResultCache.Refused != 1 || s.GlobalCache.Deletes != 1 {
					t.Errorf("stats = %+v, %+v", s.ResultCache, s.GlobalCache)
				}
			})
		}
	}
}
