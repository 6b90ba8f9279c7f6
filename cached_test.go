package headgate_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// overAll runs f in a bubble with a client of each kind of agent, none of which rejects anything.
func overAll(t *testing.T, f func(t *testing.T, client *flowctl.Client)) {
	t.Helper()
	sides.Setup{}.InBubbles(t, sides.AllAndStored, func(t *testing.T, side *sides.Side) { f(t, side.Client) })
}

type report struct{ Title string }

func TestCached(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		runs := 0
		cached := headgate.Cached(client, "report", flowctl.Params{ResultCacheKey: "may"},
			func(context.Context) (report, error) {
				runs++
				return report{fmt.Sprint("May, run ", runs)}, nil
			}, nil, headgate.CachePolicy[report]{TTL: time.Minute})
		for range 3 {
			if got, err := cached(t.Context()); err != nil || got.Title != "May, run 1" {
				t.Errorf("cached() = %v, %v want the first run's", got, err)
			}
			synctest.Wait() // until it is stored
		}
		if runs != 1 {
			t.Errorf("%d runs want 1", runs)
		}
	})
}

func TestCachedTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // the scripted agent's entries never expire
		client := engineClient(t)
		runs := 0
		cached := headgate.Cached(client, "report", flowctl.Params{}, func(context.Context) (int, error) {
			runs++
			return runs, nil
		}, nil, headgate.CachePolicy[int]{TTL: time.Minute})
		for _, want := range []int{1, 1, 2, 2} {
			if got, err := cached(t.Context()); got != want || err != nil {
				t.Errorf("cached() = %d, %v want %d", got, err, want)
			}
			<-time.After(31 * time.Second)
		}
	})
}

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

// A thousand callers at once: one run, which is one flow.
func TestCachedStampede(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		var runs atomic.Int64
		starts := &starter{client: client}
		cached := headgate.Cached(starts, "report", flowctl.Params{CheckTimeout: -1},
			func(context.Context) (string, error) {
				runs.Add(1)
				<-time.After(time.Second)
				return "report", nil
			}, nil, headgate.CachePolicy[string]{TTL: time.Minute})
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() {
				if got, err := cached(t.Context()); got != "report" || err != nil {
					t.Errorf("cached() = %q, %v", got, err)
				}
			})
		}
		wg.Wait()
		if runs.Load() != 1 || len(starts.flows) != 1 {
			t.Errorf("%d runs, %d flows want 1, 1", runs.Load(), len(starts.flows))
		}
		for _, f := range starts.flows {
			if _, err := f.End(t.Context()); !errors.Is(err, flowctl.ErrEnded) {
				t.Fatal("a flow was not ended")
			}
		}
	})
}

// Calls share a run by what they look for, with one client: a function may be made for each call.
func TestCachedSharesByKey(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		var runs atomic.Int64
		run := func(context.Context) (int64, error) {
			<-time.After(time.Second)
			return runs.Add(1), nil
		}
		other := flowtest.NewAgent(t).Client()
		elsewhere := headgate.Cached(other, "report", flowctl.Params{}, run, nil, headgate.CachePolicy[int64]{TTL: time.Minute})
		text := func(ctx context.Context) (string, error) {
			n, err := run(ctx)
			return strconv.FormatInt(n, 10), err
		}
		var wg sync.WaitGroup
		call := func(f func() error) {
			wg.Go(func() {
				if err := f(); err != nil {
					t.Errorf("cached() = %v", err)
				}
			})
		}
		for range 10 {
			for _, params := range []flowctl.Params{{}, {ResultCacheKey: "april"}} { // two runs
				call(func() error {
					_, err := headgate.Cached(client, "report", params, run, nil, headgate.CachePolicy[int64]{TTL: time.Minute})(t.Context())
					return err
				})
			}
			call(func() error { // one, of another type
				_, err := headgate.Cached(client, "report", flowctl.Params{}, text, nil, headgate.CachePolicy[string]{TTL: time.Minute})(t.Context())
				return err
			})
			call(func() error { // one, with another client
				_, err := elsewhere(t.Context())
				return err
			})
		}
		wg.Wait()
		if runs.Load() != 4 {
			t.Errorf("%d runs want 4", runs.Load())
		}
		synctest.Wait() // until it is stored
		april := headgate.Cached(client, "report", flowctl.Params{ResultCacheKey: "april"}, run, nil, headgate.CachePolicy[int64]{TTL: time.Minute})
		if _, err := april(t.Context()); err != nil || runs.Load() != 4 {
			t.Errorf("%d runs, error %v want what was stored", runs.Load(), err)
		}
	})
}

// Without a client there is nothing to share by but the function.
func TestCachedSharesWithoutAClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var runs atomic.Int64
		var none *flowctl.Client
		var wg sync.WaitGroup
		for range 2 {
			cached := headgate.Cached(none, "report", flowctl.Params{}, func(context.Context) (int64, error) {
				<-time.After(time.Second)
				return runs.Add(1), nil
			}, nil, headgate.CachePolicy[int64]{TTL: time.Minute})
			for range 5 {
				wg.Go(func() { _, _ = cached(t.Context()) })
			}
		}
		wg.Wait()
		if runs.Load() != 2 {
			t.Errorf("%d runs want one of each function", runs.Load())
		}
	})
}

// A run that asks for its own result does not wait for itself, however deep within.
func TestCachedWithinItself(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		cached := func(key string, fn func(context.Context) (string, error)) func(context.Context) (string, error) {
			return headgate.Cached(client, "report", flowctl.Params{ResultCacheKey: key}, fn, nil, headgate.CachePolicy[string]{TTL: time.Minute})
		}
		inner := cached("a", func(context.Context) (string, error) { return "inner", nil })
		middle := cached("b", inner)
		outer := cached("a", middle)
		if got, err := outer(t.Context()); err != nil || got != "inner" {
			t.Errorf("cached() = %q, %v want what the inner function returns", got, err)
		}
	})
}

// Runs that ask for each other's results do not wait for each other, whosever they are, and are not in the way of those
// who come later.
func TestCachedThatAskForEachOther(t *testing.T) {
	type depth struct{}
	ask := func(t *testing.T, clients map[string]*flowctl.Client) {
		other := map[string]string{"user": "org", "org": "user"}
		found := make(map[string]func(ctx context.Context) (string, error))
		for key := range other {
			found[key] = headgate.Cached(clients[key], "directory", flowctl.Params{ResultCacheKey: key},
				func(ctx context.Context) (string, error) {
					<-time.After(time.Second) // in which the other begins too
					if ctx.Value(depth{}) != nil {
						return key, nil
					}
					of, err := found[other[key]](context.WithValue(ctx, depth{}, true))
					return key + " of " + of, err
				}, nil, headgate.CachePolicy[string]{TTL: time.Minute})
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var wg sync.WaitGroup
		for key, of := range other {
			wg.Go(func() {
				if got, err := found[key](ctx); err != nil || !strings.HasPrefix(got, key+" of "+of) {
					t.Errorf("%s = %q, %v want it of the other", key, got, err)
				}
			})
		}
		wg.Wait()
		if got, err := found["user"](ctx); err != nil || !strings.HasPrefix(got, "user") {
			t.Errorf("user = %q, %v want it once more", got, err)
		}
	}
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		ask(t, map[string]*flowctl.Client{"user": client, "org": client})
	})
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		ask(t, map[string]*flowctl.Client{"user": client, "org": flowtest.NewAgent(t).Client()})
	})
	t.Run("without a client", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) { ask(t, nil) })
	})
}

// Calls from within a run share what one of them begins, with another client too and without one.
func TestCachedFansOut(t *testing.T) {
	fanOut := func(t *testing.T, outer, inner *flowctl.Client) {
		var runs atomic.Int64
		one := headgate.Cached(inner, "part", flowctl.Params{}, func(context.Context) (int64, error) {
			<-time.After(time.Second)
			return runs.Add(1), nil
		}, nil, headgate.CachePolicy[int64]{TTL: time.Minute})
		all := headgate.Cached(outer, "report", flowctl.Params{}, func(ctx context.Context) (int64, error) {
			var wg sync.WaitGroup
			for range 10 {
				wg.Go(func() { _, _ = one(ctx) })
			}
			wg.Wait()
			return runs.Load(), nil
		}, nil, headgate.CachePolicy[int64]{TTL: time.Minute})
		if got, err := all(t.Context()); err != nil || got != 1 {
			t.Errorf("%d runs, error %v want one of ten calls at the same time", got, err)
		}
	}
	overAll(t, func(t *testing.T, client *flowctl.Client) { fanOut(t, client, client) })
	overAll(t, func(t *testing.T, client *flowctl.Client) { fanOut(t, client, flowtest.NewAgent(t).Client()) })
	t.Run("without a client", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) { fanOut(t, nil, nil) })
	})
}

// forgetReport deletes what cached functions without a key have stored at the control point.
func forgetReport(t *testing.T, client *flowctl.Client) {
	t.Helper()
	if err := headgate.Do(t.Context(), client, "report", flowctl.Params{ResultCacheKey: "report"},
		func(ctx context.Context, flow *flowctl.Flow) error { return flow.DeleteResultCache(ctx) }); err != nil {
		t.Fatal(err)
	}
}

// A cache in front of a cache: what the inner one has under the same key is another client's, shared and stored there.
func TestCachedInTwoTiers(t *testing.T) {
	overAll(t, func(t *testing.T, far *flowctl.Client) {
		near := flowtest.NewAgent(t).Client()
		var runs atomic.Int64
		inner := headgate.Cached(far, "report", flowctl.Params{}, func(context.Context) (int64, error) {
			return runs.Add(1), nil
		}, nil, headgate.CachePolicy[int64]{TTL: time.Hour})
		outer := headgate.Cached(near, "report", flowctl.Params{}, inner, nil, headgate.CachePolicy[int64]{TTL: time.Minute})
		for range 2 {
			if got, err := outer(t.Context()); err != nil || got != 1 {
				t.Errorf("cached() = %v, %v want the first run's", got, err)
			}
			synctest.Wait() // until it is stored
			forgetReport(t, near)
		}
	})
}

// What a run leaves behind is not in it any more: it shares and stores as anybody does.
func TestCachedAfterItsRun(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		var runs atomic.Int64
		var left context.Context
		cached := headgate.Cached(client, "report", flowctl.Params{}, func(ctx context.Context) (int64, error) {
			<-time.After(time.Second)
			if runs.Add(1) == 1 {
				left = context.WithoutCancel(ctx)
			}
			return runs.Load(), nil
		}, nil, headgate.CachePolicy[int64]{TTL: time.Minute})
		_, _ = cached(t.Context())
		synctest.Wait() // until it is stored
		forgetReport(t, client)
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() { _, _ = cached(left) })
		}
		wg.Wait()
		synctest.Wait()
		if got, err := cached(t.Context()); err != nil || got != 2 {
			t.Errorf("cached() = %v, %v want what ten calls in the context of the first run have shared and stored", got, err)
		}
	})
}

// A call that begins when a run has ended of which nothing is stored begins another: it gets no result of before, nor an
// error, nor one for a panic of its own.
func TestCachedEndedRunsAreNotJoined(t *testing.T) {
	client := engineClient(t)
	for _, tt := range []struct {
		name   string
		client *flowctl.Client
		ttl    time.Duration
		end    func() error
	}{
		{"an error", client, time.Minute, func() error { return errors.New("failed") }},
		{"a panic", client, time.Minute, func() error { panic("in vain") }},
		{"a negative time to live", client, -1, func() error { return nil }},
		{"no client", nil, time.Minute, func() error { return nil }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			runs := 0
			cached := headgate.Cached(tt.client, "report", flowctl.Params{}, func(context.Context) (int, error) {
				runs++
				return runs, tt.end()
			}, nil, headgate.CachePolicy[int]{TTL: tt.ttl})
			for i := range 1000 {
				func() {
					defer func() {
						if p := recover(); p != nil && p != "in vain" {
							panic(p)
						}
					}()
					_, _ = cached(t.Context())
				}()
				if runs != i+1 {
					t.Fatalf("%d runs of %d calls, one after the other", runs, i+1)
				}
			}
		})
	}
}

// What is known of a result that was stored says nothing of one that another function made, and did not store.
func TestCachedForgetsExpiryOfBefore(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		closed := flowctl.Params{OnUnreachable: flowctl.FailClosed}
		run := func(context.Context) (string, error) {
			<-time.After(time.Second)
			return "made", nil
		}
		stale := headgate.Cached(client, "report", closed, run, fallback.Stale[string](time.Minute), headgate.CachePolicy[string]{TTL: 10 * time.Hour})
		if _, err := stale(t.Context()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // until it is stored, for ten hours
		forgetReport(t, client)
		unstored := headgate.Cached(client, "report", closed, run, nil, headgate.CachePolicy[string]{TTL: -1})
		go func() { _, _ = unstored(t.Context()) }()
		synctest.Wait()
		if _, err := stale(t.Context()); err != nil { // which waits for the other's run
			t.Fatal(err)
		}
		synctest.Wait()
		_ = client.Close(t.Context())
		if got, err := stale(t.Context()); err != nil || got != "made" {
			t.Errorf("cached() = %q, %v want the last result", got, err)
		}
		<-time.After(time.Hour)
		if got, err := stale(t.Context()); err == nil {
			t.Errorf("cached() = %q an hour later want an error: its grace is a minute", got)
		}
	})
}

// Whoever waited for another function's run has its result for the fallback as well.
func TestCachedKeepsWhatOthersMade(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		const ttl = time.Minute
		begun, ended := make(chan struct{}), make(chan struct{})
		first := headgate.Cached(client, "report", flowctl.Params{}, func(context.Context) (string, error) {
			close(begun)
			<-time.After(time.Second)
			return "made", nil
		}, nil, headgate.CachePolicy[string]{TTL: ttl})
		closed := flowctl.Params{OnUnreachable: flowctl.FailClosed}
		second := headgate.Cached(client, "report", closed, func(context.Context) (string, error) {
			return "", errors.New("not this one")
		}, fallback.Stale[string](time.Hour), headgate.CachePolicy[string]{TTL: ttl})
		go func() {
			defer close(ended)
			_, _ = first(t.Context())
		}()
		<-begun
		if got, err := second(t.Context()); err != nil || got != "made" {
			t.Fatalf("cached() = %q, %v want the other's", got, err)
		}
		<-ended
		synctest.Wait() // until it is stored
		_ = client.Close(t.Context())
		<-time.After(ttl + time.Hour - time.Second)
		if got, err := second(t.Context()); err != nil || got != "made" {
			t.Errorf("cached() = %q, %v want the last result, to the end of its grace", got, err)
		}
		<-time.After(2 * time.Second)
		if got, err := second(t.Context()); err == nil {
			t.Errorf("cached() = %q want an error: its grace is over", got)
		}
	})
}

// The call that began the run may give up. The run goes on for the calls that still wait.
func TestCachedLeaderGivesUp(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		gone := errors.New("gone")
		cached := headgate.Cached(client, "report", flowctl.Params{}, func(ctx context.Context) (string, error) {
			select {
			case <-ctx.Done():
				return "", ctx.Err()
			case <-time.After(time.Second):
				return "report", nil
			}
		}, nil, headgate.CachePolicy[string]{TTL: time.Minute})
		ctx, cancel := context.WithCancelCause(t.Context())
		led := make(chan error)
		go func() {
			_, err := cached(ctx)
			led <- err
		}()
		synctest.Wait()
		followed := make(chan string)
		go func() {
			v, err := cached(t.Context())
			followed <- fmt.Sprint(v, err)
		}()
		synctest.Wait()
		cancel(gone)
		if err := <-led; !errors.Is(err, gone) || !errors.Is(err, context.Canceled) {
			t.Errorf("the caller who gave up got %v", err)
		}
		if got := <-followed; got != "report<nil>" {
			t.Errorf("the caller who waited got %s", got)
		}
	})
}

// Nobody waits any more: the run is canceled, and the next call begins another.
func TestCachedAllGiveUp(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		var runs, canceled atomic.Int64
		cached := headgate.Cached(client, "report", flowctl.Params{}, func(ctx context.Context) (string, error) {
			if runs.Add(1) > 1 {
				return "report", nil
			}
			<-ctx.Done()
			canceled.Add(1)
			return "", ctx.Err()
		}, nil, headgate.CachePolicy[string]{TTL: time.Minute})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if _, err := cached(ctx); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("cached() = %v", err)
				}
			})
		}
		wg.Wait()
		synctest.Wait()
		if runs.Load() != 1 || canceled.Load() != 1 {
			t.Errorf("%d runs, %d canceled want 1, 1", runs.Load(), canceled.Load())
		}
		if got, err := cached(t.Context()); got != "report" || err != nil {
			t.Errorf("the next call = %q, %v", got, err)
		}
	})
}

// A panic reaches one caller, who may deal with it; the others get an error, and nobody hangs.
func TestCachedPanic(t *testing.T) {
	for name, end := range map[string]func(){"panic": func() { panic(errWork) }, "Goexit": runtime.Goexit} {
		for _, leaves := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, leader leaves %v", name, leaves), func(t *testing.T) {
				overAll(t, func(t *testing.T, client *flowctl.Client) {
					cached := headgate.Cached(client, "report", flowctl.Params{}, func(context.Context) (int, error) {
						<-time.After(time.Second)
						end()
						return 0, nil
					}, nil, headgate.CachePolicy[int]{TTL: time.Minute})
					const callers = 5
					results := make([]result, callers)
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					var wg sync.WaitGroup
					for i := range callers {
						wg.Go(func() {
							done := make(chan struct{})
							go func() {
								defer close(done)
								callCtx := t.Context()
								if i == 0 {
									callCtx = ctx
								}
								observe(&results[i], func() (int, error) { return cached(callCtx) })
							}()
							<-done
						})
						synctest.Wait() // the first begins the run
					}
					if leaves {
						cancel()
					}
					wg.Wait()
					told := 0
					for i, r := range results {
						switch {
						case r.panicked && name == "panic" && r.recovered == any(errWork), r.exited && name == "Goexit":
							told++
							if !leaves && i != 0 {
								t.Errorf("it reached caller %d want the first", i)
							}
						case leaves && i == 0:
							if !errors.Is(r.err, context.Canceled) {
								t.Errorf("the caller who gave up got %+v", r)
							}
						case r.err == nil || !strings.Contains(r.err.Error(), "did not return"):
							t.Errorf("caller %d got %+v", i, r)
						}
					}
					if told != 1 {
						t.Errorf("%s reached %d callers want one", name, told)
					}
				})
			})
		}
	}
}

// The call that began the run gives up just as the run panics: one of the two gets the panic.
func TestCachedPanicAsLeaderGivesUp(t *testing.T) {
	for range 10 {
		overAll(t, func(t *testing.T, client *flowctl.Client) {
			ctx, cancel := context.WithCancel(t.Context())
			cached := headgate.Cached(client, "report", flowctl.Params{}, func(context.Context) (int, error) {
				<-time.After(time.Second)
				cancel()
				panic(errWork)
			}, nil, headgate.CachePolicy[int]{TTL: time.Minute})
			var leader, follower result
			var wg sync.WaitGroup
			wg.Go(func() { observe(&leader, func() (int, error) { return cached(ctx) }) })
			synctest.Wait() // it has begun the run
			wg.Go(func() { observe(&follower, func() (int, error) { return cached(t.Context()) }) })
			wg.Wait()
			if leader.panicked == follower.panicked {
				t.Errorf("the first call got %+v, the second %+v want the panic in one of them", leader, follower)
			}
			for _, r := range []result{leader, follower} {
				if r.panicked && r.recovered != any(errWork) {
					t.Errorf("recovered %v want fn's panic", r.recovered)
				}
			}
		})
	}
}

// All have given up: a Goexit reaches nobody, and the next call begins another run.
func TestCachedGoexitAfterAllGaveUp(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		runs := 0
		cached := headgate.Cached(client, "report", flowctl.Params{}, func(ctx context.Context) (int, error) {
			if runs++; runs == 1 {
				<-ctx.Done()
				runtime.Goexit()
			}
			return runs, nil
		}, nil, headgate.CachePolicy[int]{TTL: time.Minute})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if got, err := cached(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("cached() = %d, %v want the context's error", got, err)
		}
		synctest.Wait()
		if got, err := cached(t.Context()); got != 2 || err != nil {
			t.Errorf("the next call = %d, %v want a run of its own", got, err)
		}
	})
}

// A panic that nobody recovers ends the program, which prints where fn panicked, and so does one that no call waits for.
func TestProcessCachedPanic(t *testing.T) {
	const variable = "HEADGATE_TEST_PANIC" // what is this test in the program that ends
	tests := map[string]func(ctx context.Context, fail func()){
		"unrecovered": func(ctx context.Context, fail func()) {
			_, _ = headgate.Cached(nil, "report", flowctl.Params{}, func(context.Context) (int, error) {
				fail()
				return 0, nil
			}, nil, headgate.CachePolicy[int]{TTL: time.Minute})(ctx)
		},
		"all have given up": func(ctx context.Context, fail func()) {
			ctx, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			_, err := headgate.Cached(nil, "report", flowctl.Params{}, func(ctx context.Context) (int, error) {
				<-ctx.Done()
				<-time.After(time.Second)
				fail()
				return 0, nil
			}, nil, headgate.CachePolicy[int]{TTL: time.Minute})(ctx)
			fmt.Println("gave up:", err)
			<-time.After(time.Hour)
		},
	}
	if run, ok := tests[os.Getenv(variable)]; ok {
		synctest.Test(t, func(t *testing.T) { run(t.Context(), failHere) })
		return
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name := range tests {
		t.Run(name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), program, "-test.run=^TestProcessCachedPanic$")
			cmd.Env = append(os.Environ(), variable+"="+name)
			out, err := cmd.CombinedOutput()
			if _, ok := errors.AsType[*exec.ExitError](err); !ok {
				t.Fatalf("the program ended with %v want a panic:\n%s", err, out)
			}
			for _, want := range []string{errWork.Error(), "headgate_test.failHere"} {
				if !strings.Contains(string(out), want) {
					t.Errorf("the program did not print %q:\n%s", want, out)
				}
			}
			if gaveUp := strings.Contains(string(out), `gave up: headgate: cached "report": context deadline exceeded`); gaveUp != (name == "all have given up") {
				t.Errorf("the caller gave up: %v\n%s", gaveUp, out)
			}
		})
	}
}

// failHere is what the stack of a panic is looked through for.
func failHere() { panic(errWork) }

func TestCachedErrorsAreNotStored(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		runs := 0
		cached := headgate.Cached(client, "report", flowctl.Params{}, func(context.Context) (int, error) {
			runs++
			return runs, errWork
		}, nil, headgate.CachePolicy[int]{TTL: time.Minute})
		for want := 1; want <= 2; want++ {
			if got, err := cached(t.Context()); got != want || err != errWork { //nolint:errorlint // it must come back unchanged
				t.Errorf("cached() = %d, %v want %d and the run's error", got, err, want)
			}
			synctest.Wait()
		}
	})
}

// What the cache holds may be another version's; then it is as if it held nothing.
func TestCachedUndecodable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.SetResult("report", "report", []byte("not JSON"))
		cached := headgate.Cached(agent.Client(), "report", flowctl.Params{},
			func(context.Context) (int, error) { return 42, nil }, nil, headgate.CachePolicy[int]{TTL: time.Minute})
		if got, err := cached(t.Context()); got != 42 || err != nil {
			t.Errorf("cached() = %d, %v want 42", got, err)
		}
		synctest.Wait()
		if got, _ := agent.Result("report", "report"); string(got) != "42" {
			t.Errorf("the cache holds %q want the new value", got)
		}
	})
}

// hex is a codec that cannot do some numbers.
type hex struct{}

func (hex) Encode(n int) ([]byte, error) {
	switch n {
	case 0:
		return nil, errors.New("no zero")
	case 13:
		panic(errWork)
	}
	return fmt.Appendf(nil, "%x", n), nil
}

func (hex) Decode(data []byte) (n int, err error) {
	_, err = fmt.Sscanf(string(data), "%x", &n)
	return n, err
}

func TestCachedCodec(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		client := agent.Client()
		call := func(key string, n int) (got result) {
			observe(&got, func() (int, error) {
				return headgate.Cached(client, "report", flowctl.Params{ResultCacheKey: key},
					func(context.Context) (int, error) { return n, nil }, nil, headgate.CachePolicy[int]{TTL: time.Minute, Codec: hex{}})(t.Context())
			})
			synctest.Wait()
			return got
		}
		if got := call("good", 255); got.value != 255 || got.err != nil {
			t.Errorf("cached() = %+v", got)
		}
		if data, _ := agent.Result("report", "good"); string(data) != "ff" {
			t.Errorf("the cache holds %q want ff", data)
		}
		if got := call("good", 1); got.value != 255 {
			t.Errorf("cached() = %+v want what the cache holds", got)
		}
		if got := call("not encodable", 0); got.value != 0 || got.err != nil {
			t.Errorf("cached() = %+v want the value all the same", got)
		}
		if _, ok := agent.Result("report", "not encodable"); ok {
			t.Error("what cannot be encoded was stored")
		}
		if got := call("broken codec", 13); got.recovered != any(errWork) {
			t.Errorf("cached() = %+v want the codec's panic", got)
		}
	})
}

// Without a cache, and without an agent, the function runs as it would.
func TestCachedAgentDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{Fail: status.Error(codes.Unavailable, "gone")})
		runs := 0
		fn := func(context.Context) (int, error) {
			runs++
			return runs, nil
		}
		open := headgate.Cached(agent.Client(), "report", flowctl.Params{}, fn, nil, headgate.CachePolicy[int]{TTL: time.Minute})
		for want := 1; want <= 2; want++ {
			if got, err := open(t.Context()); got != want || err != nil {
				t.Errorf("cached() = %d, %v want %d", got, err, want)
			}
		}
		var off *flowctl.Client
		if got, err := headgate.Cached(off, "report", flowctl.Params{}, fn, nil, headgate.CachePolicy[int]{TTL: time.Minute})(t.Context()); got != 3 || err != nil {
			t.Errorf("cached() without a client = %d, %v", got, err)
		}
		shut := headgate.Cached(agent.Client(), "report", flowctl.Params{OnUnreachable: flowctl.FailClosed}, fn, fallback.Value(-1), headgate.CachePolicy[int]{TTL: time.Minute})
		if got, err := shut(t.Context()); got != -1 || err != nil {
			t.Errorf("cached() closed = %d, %v want the fallback", got, err)
		}
	})
}

// A brokenCache is an engine whose cache fails: lookups, or what changes it.
type brokenCache struct {
	agentapi.Local
	lookup, store error
}

func (b brokenCache) Agent() agentapi.Local { return b }

func (b brokenCache) Check(ctx context.Context, req *agentapi.Request, v *agentapi.Verdict) error {
	err := b.Local.Check(ctx, req, v)
	if b.lookup != nil {
		v.More().Result = agentapi.CacheAnswer{Err: b.lookup}
	}
	return err
}

func (b brokenCache) Store(ctx context.Context, key agentapi.CacheKey, value []byte, ttl time.Duration) error {
	if b.store != nil {
		return b.store
	}
	return b.Local.Store(ctx, key, value, ttl)
}

// What goes wrong with the cache is never the call's error: it is a miss, or nothing is stored.
func TestCachedBrokenCache(t *testing.T) {
	errDisk := errors.New("the disk is full")
	failing := &checkv1.CacheLookupResponse{ResultCacheResponse: &checkv1.KeyLookupResponse{
		LookupStatus: checkv1.CacheLookupStatus_MISS, OperationStatus: checkv1.CacheOperationStatus_ERROR, Error: errDisk.Error(),
	}}
	tests := []struct {
		name   string
		answer flowtest.Answer
		upsert func(reply *checkv1.CacheUpsertResponse) error // makes of a reply what the client gets
		broken brokenCache                                    // the same in the process
	}{
		{
			name:   "lookup",
			answer: flowtest.Answer{Response: &checkv1.CheckResponse{ControlPoint: "report", CacheLookupResponse: failing}},
			broken: brokenCache{lookup: errDisk},
		},
		{
			name:   "store",
			upsert: func(*checkv1.CacheUpsertResponse) error { return status.Error(codes.Internal, errDisk.Error()) },
			broken: brokenCache{store: errDisk},
		},
		{
			name: "store of the key",
			upsert: func(reply *checkv1.CacheUpsertResponse) error {
				reply.ResultCacheResponse = &checkv1.KeyUpsertResponse{OperationStatus: checkv1.CacheOperationStatus_ERROR, Error: errDisk.Error()}
				return nil
			},
			broken: brokenCache{store: errDisk},
		},
	}
	for _, tt := range tests {
		check := func(t *testing.T, client *flowctl.Client) {
			runs := 0
			cached := headgate.Cached(client, "report", flowctl.Params{}, func(ctx context.Context) (string, error) {
				runs++
				flow, _ := flowctl.FromContext(ctx)
				if _, hit, err := flow.ResultCache(); hit || (err != nil) != (tt.name == "lookup") {
					t.Errorf("ResultCache() = %v, %v", hit, err)
				}
				return fmt.Sprint("run ", runs), nil
			}, fallback.Value("fallback"), headgate.CachePolicy[string]{TTL: ttl})
			for _, want := range []string{"run 1", "run 2"} {
				if got, err := cached(t.Context()); got != want || err != nil {
					t.Errorf("cached() = %q, %v want %q", got, err, want)
				}
				synctest.Wait() // until it would be stored
			}
		}
		t.Run(tt.name+"/remote", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				agent.Answer(tt.answer)
				upserts := 0
				check(t, agent.Client(flowctl.WithDialOptions(grpc.WithChainUnaryInterceptor(
					func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
						if method != checkv1.FlowControlService_CacheUpsert_FullMethodName {
							return invoke(ctx, method, req, reply, cc, opts...)
						}
						if upserts++; tt.upsert == nil {
							return invoke(ctx, method, req, reply, cc, opts...)
						}
						return tt.upsert(reply.(*checkv1.CacheUpsertResponse))
					}))))
				if upserts != 2 {
					t.Errorf("%d values were to be stored want 2", upserts)
				}
			})
		})
		t.Run(tt.name+"/embedded", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, err := engine.New(nil)
				if err != nil {
					t.Fatal(err)
				}
				defer e.Close()
				tt.broken.Local = e.Agent()
				client, err := flowctl.New(tt.broken)
				if err != nil {
					t.Fatal(err)
				}
				check(t, client)
			})
		})
	}
}

// A store that hangs holds up nobody.
func TestCachedStoreHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		client := agent.Client()
		cached := headgate.Cached(client, "report", flowctl.Params{}, func(context.Context) (int, error) {
			agent.Freeze() // after the check
			return 42, nil
		}, nil, headgate.CachePolicy[int]{TTL: time.Minute})
		begin := time.Now()
		if got, err := cached(t.Context()); got != 42 || err != nil {
			t.Errorf("cached() = %d, %v", got, err)
		}
		if took := time.Since(begin); took != 0 {
			t.Errorf("cached() took %v", took)
		}
		<-time.After(2 * time.Second) // for the store to give up
	})
}

const ttl = time.Minute

// A step is something that happens in a test of stale results, and then a call.
type step struct {
	after  time.Duration // the step before
	forget bool          // what was cached has expired
	found  string        // another process has stored this
	answer flowtest.Answer
	run    string // what fn returns; "" is an error
	want   string // "" is an error
}

func TestCachedStale(t *testing.T) {
	const grace = 10 * time.Second
	no := rejected(0)
	tests := []struct {
		name   string
		closed bool // flows fail closed
		steps  []step
	}{
		{name: "nothing yet", steps: []step{
			{answer: no},
		}},
		{name: "not expired", steps: []step{
			{run: "old", want: "old"},
			{after: ttl - 1, answer: no, want: "old"},
		}},
		{name: "within the grace period", steps: []step{
			{run: "old", want: "old"},
			{after: ttl + grace - 1, forget: true, answer: no, want: "old"},
		}},
		{name: "after it", steps: []step{
			{run: "old", want: "old"},
			{after: ttl + grace, forget: true, answer: no},
		}},
		{name: "what is stale stays so", steps: []step{
			{run: "old", want: "old"},
			{after: ttl + grace/2, forget: true, answer: no, want: "old"},
			{after: grace/2 - 1, answer: no, want: "old"},
			{after: 1, answer: no},
		}},
		{name: "unreachable, and closed", closed: true, steps: []step{
			{run: "old", want: "old"},
			{after: ttl + grace - 1, forget: true, answer: silent, want: "old"},
			{after: 1, answer: silent},
		}},
		{name: "unreachable, and open", steps: []step{
			{run: "old", want: "old"},
			{after: ttl, forget: true, answer: silent, run: "new", want: "new"},
		}},
		{name: "an error is no result", steps: []step{
			{run: "old", want: "old"},
			{after: ttl, forget: true, run: "", want: ""},
			{after: grace - 1, answer: no, want: "old"},
			{after: 1, answer: no},
		}},
		{name: "a run refreshes", steps: []step{
			{run: "old", want: "old"},
			{after: ttl, forget: true, run: "new", want: "new"},
			{after: ttl + grace - 1, forget: true, answer: no, want: "new"},
			{after: 1, answer: no},
		}},
		{name: "a hit of one's own does not make it younger", steps: []step{
			{run: "old", want: "old"},
			{after: ttl - 1, want: "old"},
			{after: grace, forget: true, answer: no, want: "old"},
			{after: 1, answer: no},
		}},
		{name: "a hit of another's", steps: []step{
			{found: `"theirs"`, want: "theirs"},
			{after: grace - 1, answer: no, want: "theirs"},
			{after: 1, answer: no},
		}},
		{name: "a hit refreshes", steps: []step{
			{found: `"theirs"`, want: "theirs"},
			{after: ttl - 1, want: "theirs"},
			{after: grace - 1, forget: true, answer: no, want: "theirs"},
			{after: 1, answer: no},
		}},
		{name: "a hit of another's takes the place of one's own", steps: []step{
			{run: "old", want: "old"},
			{after: ttl / 2, found: `"theirs"`, want: "theirs"},
			{answer: no, want: "theirs"},
			{after: ttl/2 + grace - 1, answer: no, want: "theirs"},
			{after: 1, answer: no},
		}},
		{name: "a hit that cannot be decoded is none", steps: []step{
			{run: "old", want: "old"},
			{after: ttl / 2, found: "not JSON", run: "new", want: "new"},
			{answer: no, want: "new"},
		}},
		{name: "what was not stored is known to be good now", steps: []step{
			{answer: silent, run: "old", want: "old"},
			{after: grace - 1, answer: no, want: "old"},
			{after: 1, answer: no},
		}},
		{name: "what was not stored does not last as long as what was stored before", steps: []step{
			{run: "old", want: "old"},
			{after: ttl / 2, forget: true, answer: silent, run: "new", want: "new"},
			{after: grace - 1, answer: no, want: "new"},
			{after: 1, answer: no},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sides.Setup{}.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) {
				var now step
				params := flowctl.Params{}
				if tt.closed {
					params.OnUnreachable = flowctl.FailClosed
				}
				cached := headgate.Cached(side.Client, "report", params, func(context.Context) (string, error) {
					if now.run == "" {
						return "", errWork
					}
					return now.run, nil
				}, fallback.Stale[string](grace), headgate.CachePolicy[string]{TTL: ttl})
				for i, step := range tt.steps {
					<-time.After(step.after)
					if step.forget {
						side.ForgetResult("report", "report")
					}
					if step.found != "" {
						side.StoreResult("report", "report", []byte(step.found), ttl)
					}
					side.Answer(step.answer)
					now = step
					got, err := cached(t.Context())
					if got != step.want || (err == nil) != (step.want != "") {
						t.Errorf("step %d: cached() = %q, %v want %q", i, got, err, step.want)
					}
					if err != nil && step.answer != accepted && !errors.Is(err, flowctl.ErrRejected) && !errors.Is(err, flowctl.ErrUnreachable) {
						t.Errorf("step %d: cached() = %v want the flow's error", i, err)
					}
					synctest.Wait() // until it is stored
				}
			})
		})
	}
}

// What a cached function keeps is for its own fallback, and is not what another one keeps.
func TestCachedStaleNested(t *testing.T) {
	sides.Setup{}.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) {
		stale := fallback.Stale[string](time.Hour)
		inner := headgate.Cached(side.Client, "inner", flowctl.Params{}, func(context.Context) (string, error) { return "inner", nil }, stale, headgate.CachePolicy[string]{TTL: ttl})
		outer := headgate.Cached(side.Client, "report", flowctl.Params{}, func(context.Context) (string, error) { return "outer", nil }, fallback.First(fallback.Call(inner), stale), headgate.CachePolicy[string]{TTL: ttl})
		if got, err := outer(t.Context()); got != "outer" || err != nil {
			t.Errorf("outer() = %q, %v", got, err)
		}
		synctest.Wait()
		side.Answer(rejected(0))
		if got, err := outer(t.Context()); got != "outer" || err != nil {
			t.Errorf("outer() = %q, %v want what it kept, and not what was kept for inner", got, err)
		}
		if got, err := inner(t.Context()); got != "" || !errors.Is(err, flowctl.ErrRejected) {
			t.Errorf("inner() = %q, %v want the rejection: it has kept nothing", got, err)
		}
	})
}

// A ttl of 0 is the agent's seven days. The engine's cache would look for what has expired each second of them.
func TestCachedStaleDefaultTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		cached := headgate.Cached(agent.Client(), "report", flowctl.Params{}, func(context.Context) (string, error) { return "report", nil }, fallback.Stale[string](time.Second), headgate.CachePolicy[string]{})
		_, _ = cached(t.Context())
		synctest.Wait()
		agent.Answer(rejected(0))
		<-time.After(7*24*time.Hour + time.Second - 1)
		if got, err := cached(t.Context()); got != "report" || err != nil {
			t.Errorf("cached() = %q, %v want the stale report", got, err)
		}
		<-time.After(1)
		if got, err := cached(t.Context()); !errors.Is(err, flowctl.ErrRejected) {
			t.Errorf("cached() = %q, %v want the rejection", got, err)
		}
	})
}

// A slow hit does not bring back what a newer run has replaced. That run is one from within another run, because any
// other call would wait for the hit.
func TestCachedStaleSlowDecode(t *testing.T) {
	sides.Setup{}.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) {
		cached := headgate.Cached(side.Client, "report", flowctl.Params{},
			func(context.Context) (string, error) { return "new", nil },
			fallback.Stale[string](time.Second), headgate.CachePolicy[string]{TTL: ttl, Codec: slow{}, Exact: true})
		within := headgate.Cached(side.Client, "outer", flowctl.Params{}, cached, nil, headgate.CachePolicy[string]{TTL: -1})
		side.StoreResult("report", "report", []byte("old"), ttl)
		var wg sync.WaitGroup
		wg.Go(func() {
			if got, err := cached(t.Context()); got != "old" || err != nil {
				t.Errorf("cached() = %q, %v want the hit", got, err)
			}
		})
		synctest.Wait() // it is being decoded
		side.ForgetResult("report", "report")
		<-time.After(time.Millisecond)
		if got, err := within(t.Context()); got != "new" || err != nil {
			t.Errorf("cached() = %q, %v want the run's", got, err)
		}
		wg.Wait()
		side.Answer(rejected(0))
		if got, err := cached(t.Context()); got != "new" || err != nil {
			t.Errorf("cached() = %q, %v want what was found last", got, err)
		}
	})
}

// slow is a codec that takes a second to decode.
type slow struct{}

func (slow) Encode(text string) ([]byte, error) { return []byte(text), nil }

func (slow) Decode(data []byte) (string, error) {
	<-time.After(time.Second)
	return string(data), nil
}

// Hits, runs and rejections at the same time.
func TestCachedStaleConcurrently(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New([]policy.Policy{{Name: "half", Components: []policy.Component{policy.RateLimiter{
			Selectors: policy.At("report"), Capacity: 100, Fill: 100, Interval: time.Second,
		}}}})
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		client, err := flowctl.New(e)
		if err != nil {
			t.Fatal(err)
		}
		cached := headgate.Cached(client, "report", flowctl.Params{},
			func(context.Context) (string, error) { return "report", nil }, fallback.Stale[string](time.Second), headgate.CachePolicy[string]{TTL: 10 * time.Millisecond})
		if _, err := cached(t.Context()); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				for range 20 {
					if got, err := cached(t.Context()); got != "report" || err != nil {
						t.Errorf("cached() = %q, %v", got, err)
					}
					<-time.After(20 * time.Millisecond)
				}
			})
		}
		wg.Wait()
	})
}
