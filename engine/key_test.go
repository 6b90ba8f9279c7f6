package engine_test

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/heap"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/policy"
)

// Long values of a limiter's label are kept apart by all of their bytes, and Peek, Reset and End find them by the value.
func TestLongKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{
			policy.RateLimiter{ID: "rate", Selectors: policy.At("point"), Capacity: 1, Interval: time.Hour, LimitBy: "user"},
			policy.ConcurrencyLimiter{ID: "slots", Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour, LimitBy: "user"},
		}}})
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		client, err := flowctl.New(e)
		if err != nil {
			t.Fatal(err)
		}
		long := strings.Repeat("x", 4000)
		for _, value := range []string{long + "a", long + "b", long, long[:255], long[:256], long[:257]} {
			params := flowctl.Params{Labels: map[string]string{"user": value}}
			flow := client.Start(t.Context(), "point", params)
			if !flow.ShouldRun() {
				t.Errorf("a value of %d bytes: %v want a bucket of its own", len(value), flow.Err())
			}
			for component, remaining := range map[string]float64{"rate": 0, "slots": 0} {
				if u, err := peekAt(e, "p", component, value); err != nil || u.Remaining != remaining {
					t.Errorf("a value of %d bytes: Peek(%s) = %+v, %v", len(value), component, u, err)
				}
			}
			if r := end(flow); r.Returned != 1 {
				t.Errorf("a value of %d bytes: end = %+v want the slot back", len(value), r)
			}
			if again := client.Start(t.Context(), "point", params); again.ShouldRun() {
				t.Errorf("a value of %d bytes has a second token", len(value))
			}
			if err := resetAt(e, "p", "rate", value); err != nil {
				t.Error(err)
			}
			again := client.Start(t.Context(), "point", params)
			if !again.ShouldRun() {
				t.Errorf("a value of %d bytes has no token after a reset", len(value))
			}
			end(again)
		}
	})
}

// A flood of long values takes at the most 512 bytes each, which is 512 MiB at the default cap.
func TestLongKeysAreBounded(t *testing.T) {
	const each = 512
	keys := race.Pick(1<<13, 1<<14)
	e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{
		policy.RateLimiter{Selectors: policy.At("point"), Capacity: 1, Interval: time.Hour, LimitBy: "user"},
	}}}, engine.WithKeyCap(keys))
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	client, err := flowctl.New(e)
	if err != nil {
		t.Fatal(err)
	}
	before, long := heap.Live(), strings.Repeat("x", 4000)
	for i := range keys {
		end(client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": fmt.Sprint(long, i)}}))
	}
	got := (heap.Live() - before) / int64(keys)
	t.Logf("%d bytes a key", got)
	if n := e.Stats().Components[0].Keys; n != keys || got > each || got < 100 {
		t.Errorf("%d keys take %d bytes each want %d, up to %d", n, got, keys, each)
	}
	runtime.KeepAlive(e)
}

// A key is forgotten when it has been idle for a while and its bucket is full again.
func TestIdleKeysAreForgotten(t *testing.T) {
	for _, tt := range []struct {
		name    string
		maxIdle time.Duration
		after   time.Duration
		kept    int64
	}{
		{"by default not before 2 h", 0, 119 * time.Minute, 20},
		{"by default after 2 h", 0, 122 * time.Minute, 10},
		{"after a while", 5 * time.Minute, 7 * time.Minute, 10},
		{"never", policy.KeepIdle, 4 * time.Hour, 20},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{policy.RateLimiter{
					Selectors: policy.At("point"), Capacity: 1000, Fill: 1, Interval: time.Minute, LimitBy: "user", TokensLabel: "cost", MaxIdle: tt.maxIdle,
				}}}})
				if err != nil {
					t.Fatal(err)
				}
				defer e.Close()
				client, err := flowctl.New(e)
				if err != nil {
					t.Fatal(err)
				}
				for i := range 20 {
					cost := "1"
					if i%2 == 0 {
						cost = "1000" // takes hours to fill again: a debt, which is not forgotten
					}
					flow := client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": fmt.Sprint(i), "cost": cost}})
					if flow.Decision() != flowctl.Accepted {
						t.Fatal(flow, flow.Err())
					}
					end(flow)
				}
				<-time.After(tt.after)
				synctest.Wait()
				if got := e.Stats().Components[0].Keys; int64(got) != tt.kept {
					t.Errorf("%d keys are kept want %d", got, tt.kept)
				}
			})
		})
	}
}
