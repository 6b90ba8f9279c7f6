package headgate_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
)

// overBoth runs f in a bubble, with clients of both kinds of agents.
func overBoth(t *testing.T, f func(t *testing.T, client *flowctl.Client)) {
	t.Run("remote", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) { f(t, flowtest.NewAgent(t).Client()) })
	})
	t.Run("embedded", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			e, err := engine.New(nil)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = e.Close() })
			client, err := flowctl.New(e)
			if err != nil {
				t.Fatal(err)
			}
			f(t, client)
		})
	})
}

type report struct{ Title string }

func TestCached(t *testing.T) {
	overBoth(t, func(t *testing.T, client *flowctl.Client) {
		runs := 0
		cached := headgate.Cached(client, "report", flowctl.Params{ResultCacheKey: "may"}, time.Minute,
			func(context.Context) (report, error) {
				runs++
				return report{fmt.Sprint("May, run ", runs)}, nil
			}, nil, nil)
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
		e, err := engine.New(nil)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		client, err := flowctl.New(e)
		if err != nil {
			t.Fatal(err)
		}
		runs := 0
		cached := headgate.Cached(client, "report", flowctl.Params{}, time.Minute, func(context.Context) (int, error) {
			runs++
			return runs, nil
		}, nil, nil)
		for _, want := range []int{1, 1, 2, 2} {
			if got, err := cached(t.Context()); got != want || err != nil {
				t.Errorf("cached() = %d, %v want %d", got, err, want)
			}
			<-time.After(31 * time.Second)
		}
	})
}

// A thousand callers at once: one run, a thousand flows.
func TestCachedStampede(t *testing.T) {
	overBoth(t, func(t *testing.T, client *flowctl.Client) {
		var runs atomic.Int64
		starts := &starter{client: client}
		cached := headgate.Cached(starts, "report", flowctl.Params{CheckTimeout: -1}, time.Minute,
			func(context.Context) (string, error) {
				runs.Add(1)
				<-time.After(time.Second)
				return "report", nil
			}, nil, nil)
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() {
				if got, err := cached(t.Context()); got != "report" || err != nil {
					t.Errorf("cached() = %q, %v", got, err)
				}
			})
		}
		wg.Wait()
		if runs.Load() != 1 || len(starts.flows) != 1000 {
			t.Errorf("%d runs, %d flows want 1, 1000", runs.Load(), len(starts.flows))
		}
		for _, f := range starts.flows {
			if _, err := f.End(t.Context()); !errors.Is(err, flowctl.ErrEnded) {
				t.Fatal("a flow was not ended")
			}
		}
	})
}

// Who began the run may go: it is for those who still wait.
func TestCachedLeaderGivesUp(t *testing.T) {
	overBoth(t, func(t *testing.T, client *flowctl.Client) {
		gone := errors.New("gone")
		cached := headgate.Cached(client, "report", flowctl.Params{}, time.Minute, func(ctx context.Context) (string, error) {
			select {
			case <-ctx.Done():
				return "", ctx.Err()
			case <-time.After(time.Second):
				return "report", nil
			}
		}, nil, nil)
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
	overBoth(t, func(t *testing.T, client *flowctl.Client) {
		var runs, canceled atomic.Int64
		cached := headgate.Cached(client, "report", flowctl.Params{}, time.Minute, func(ctx context.Context) (string, error) {
			if runs.Add(1) > 1 {
				return "report", nil
			}
			<-ctx.Done()
			canceled.Add(1)
			return "", ctx.Err()
		}, nil, nil)
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
				overBoth(t, func(t *testing.T, client *flowctl.Client) {
					cached := headgate.Cached(client, "report", flowctl.Params{}, time.Minute, func(context.Context) (int, error) {
						<-time.After(time.Second)
						end()
						return 0, nil
					}, nil, nil)
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
						case r.err == nil || !strings.Contains(r.err.Error(), "panicked in another call"):
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

func TestCachedErrorsAreNotStored(t *testing.T) {
	overBoth(t, func(t *testing.T, client *flowctl.Client) {
		runs := 0
		cached := headgate.Cached(client, "report", flowctl.Params{}, time.Minute, func(context.Context) (int, error) {
			runs++
			return runs, errWork
		}, nil, nil)
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
		cached := headgate.Cached(agent.Client(), "report", flowctl.Params{}, time.Minute,
			func(context.Context) (int, error) { return 42, nil }, nil, nil)
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
				return headgate.Cached(client, "report", flowctl.Params{ResultCacheKey: key}, time.Minute,
					func(context.Context) (int, error) { return n, nil }, nil, hex{})(t.Context())
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
		open := headgate.Cached(agent.Client(), "report", flowctl.Params{}, time.Minute, fn, nil, nil)
		for want := 1; want <= 2; want++ {
			if got, err := open(t.Context()); got != want || err != nil {
				t.Errorf("cached() = %d, %v want %d", got, err, want)
			}
		}
		var off *flowctl.Client
		if got, err := headgate.Cached(off, "report", flowctl.Params{}, time.Minute, fn, nil, nil)(t.Context()); got != 3 || err != nil {
			t.Errorf("cached() without a client = %d, %v", got, err)
		}
		shut := headgate.Cached(agent.Client(), "report", flowctl.Params{OnUnreachable: flowctl.FailClosed}, time.Minute, fn, fallback.Value(-1), nil)
		if got, err := shut(t.Context()); got != -1 || err != nil {
			t.Errorf("cached() closed = %d, %v want the fallback", got, err)
		}
	})
}

// A store that hangs holds up nobody.
func TestCachedStoreHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		client := agent.Client()
		cached := headgate.Cached(client, "report", flowctl.Params{}, time.Minute, func(context.Context) (int, error) {
			agent.Freeze() // after the check
			return 42, nil
		}, nil, nil)
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
