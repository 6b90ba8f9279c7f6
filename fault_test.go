package headgate_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/testing/sides"
)

// again runs one flow after the other, over each kind of agent and in each form that suits, and checks that each ended
// once: the agents have room for one flow at a time, and tell of each end. check looks at how a flow came out.
func again(t *testing.T, s situation, suits func(form) bool, params flowctl.Params,
	fn func(context.Context) (int, error), onReject fallback.Func[int],
	check func(t *testing.T, form form, flow *flowctl.Flow, got result) (want flowctl.Status),
) {
	const flows = 10
	for _, kind := range sides.AllAndStored {
		for _, form := range forms {
			if !suits(form) {
				continue
			}
			t.Run(string(kind)+"/"+form.name, func(t *testing.T) {
				side := newSide(t, kind, s)
				starts := &starter{client: side.Client}
				var want []sides.End
				for i := range flows {
					var got result
					done := make(chan struct{})
					go func() {
						defer close(done)
						observe(&got, func() (int, error) { return form.call(t.Context(), starts, point, params, fn, onReject) })
					}()
					<-done
					flow := starts.flows[i]
					if flow.Decision() != s.decision {
						t.Fatalf("flow %d: %v, %v want %v", i, flow, flow.Err(), s.decision)
					}
					if st := check(t, form, flow, got); flow.Success() {
						want = append(want, sides.End{ControlPoint: point, Status: st})
					}
					if _, err := flow.End(t.Context()); !errors.Is(err, flowctl.ErrEnded) {
						t.Fatalf("flow %d was not ended", i)
					}
				}
				if got := side.Ends(); !slices.Equal(got, want) {
					t.Errorf("the agent saw the ends %v want %v", got, want)
				}
			})
		}
	}
}

func anyForm(form) bool { return true }

// A fallback that panics does so when its flow has ended.
func TestPanickingFallback(t *testing.T) {
	withFallback := func(f form) bool { return !f.noFallback }
	fn := func(context.Context) (int, error) { return 0, errors.New("ran") }
	onReject := func(context.Context, error) (int, error) { panic(errWork) }
	for _, s := range []situation{
		{name: "rejected", rejects: true, decision: flowctl.Rejected},
		{name: "unreachable", silent: true, decision: flowctl.Unreachable, params: flowctl.Params{OnUnreachable: flowctl.FailClosed}},
	} {
		t.Run(s.name, func(t *testing.T) {
			again(t, s, withFallback, s.params, fn, onReject, func(t *testing.T, _ form, _ *flowctl.Flow, got result) flowctl.Status {
				if got.recovered != any(errWork) {
					t.Errorf("got %+v want the fallback's panic", got)
				}
				return flowctl.StatusError
			})
		})
	}
}

// An IsFailure that panics fails its flow, and ends it.
func TestPanickingIsFailure(t *testing.T) {
	params := flowctl.Params{IsFailure: func(error) bool { panic(errGone) }}
	fn := func(context.Context) (int, error) { return 0, errWork }
	for _, s := range []situation{
		{name: "accepted", decision: flowctl.Accepted},
		{name: "unreachable", silent: true, decision: flowctl.Unreachable},
	} {
		t.Run(s.name, func(t *testing.T) {
			again(t, s, anyForm, params, fn, nil, func(t *testing.T, _ form, _ *flowctl.Flow, got result) flowctl.Status {
				if got.recovered != any(errGone) {
					t.Errorf("got %+v want the panic of IsFailure", got)
				}
				return flowctl.StatusError
			})
		})
	}
}

// C1, F1: the slot of a function that panicked was lost, and with it the capacity.
func TestC1F1PanicsFreeTheirSlots(t *testing.T) {
	fn := func(context.Context) (int, error) { panic(errWork) }
	again(t, situation{decision: flowctl.Accepted}, anyForm, flowctl.Params{}, fn, nil,
		func(t *testing.T, _ form, _ *flowctl.Flow, got result) flowctl.Status {
			if got.recovered != any(errWork) {
				t.Errorf("got %+v want fn's panic", got)
			}
			return flowctl.StatusError
		})
}

// G1: the slot of a function that called runtime.Goexit was lost.
func TestG1GoexitFreesItsSlot(t *testing.T) {
	fn := func(context.Context) (int, error) { runtime.Goexit(); return 0, nil }
	again(t, situation{decision: flowctl.Accepted}, anyForm, flowctl.Params{}, fn, nil,
		func(t *testing.T, form form, _ *flowctl.Flow, got result) flowctl.Status {
			if !got.exited {
				t.Errorf("got %+v want a Goexit", got)
			}
			if form.blind {
				return flowctl.StatusOK
			}
			return flowctl.StatusError
		})
}

// A17: whatever became of the work, its flow was reported as one that went well.
func TestA17FailuresAreReported(t *testing.T) {
	tests := []struct {
		name   string
		params flowctl.Params
		fn     func(context.Context) (int, error)
		want   flowctl.Status
	}{
		{name: "error", fn: func(context.Context) (int, error) { return 0, errWork }, want: flowctl.StatusError},
		{name: "panic", fn: func(context.Context) (int, error) { panic(errWork) }, want: flowctl.StatusError},
		{
			name: "no failure", params: flowctl.Params{IsFailure: func(error) bool { return false }},
			fn: func(context.Context) (int, error) { return 0, errWork }, want: flowctl.StatusOK,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			again(t, situation{decision: flowctl.Accepted}, anyForm, tt.params, tt.fn, nil,
				func(*testing.T, form, *flowctl.Flow, result) flowctl.Status { return tt.want })
		})
	}
}

// A29: each flow wrote a line to the log.
func TestA29NoLogPerFlow(t *testing.T) {
	for name, answer := range map[string]flowtest.Answer{"accepted": accepted, "rejected": rejected(0)} {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			logger := slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
			overScripts(t, []flowtest.Answer{answer}, func(t *testing.T, agent *sides.Side) {
				for _, form := range forms {
					for _, failure := range []error{nil, errWork} {
						_, _ = form.call(t.Context(), agent.Client, point, flowctl.Params{}, func(context.Context) (int, error) { return 0, failure }, nil)
						synctest.Wait() // until what is to be cached is
					}
				}
				if ends := agent.Ends(); len(ends) != 2*len(forms) {
					t.Errorf("%d flows want two of each form", len(ends))
				}
			}, flowctl.WithLogger(logger))
			if log.Len() > 0 {
				t.Errorf("logged:\n%s", &log)
			}
		})
	}
}

// S2: what was said of a flow that had ended changed another, which had got its place in memory.
func TestS2LateCallsReachNoOtherFlow(t *testing.T) {
	var before []*flowctl.Flow
	fn := func(ctx context.Context) (int, error) {
		for _, late := range before {
			late.SetStatus(flowctl.StatusError)
			late.SetError(errWork)
			if _, err := late.End(ctx); !errors.Is(err, flowctl.ErrEnded) {
				t.Errorf("late End() = %v want ErrEnded", err)
			}
		}
		return 42, nil
	}
	again(t, situation{decision: flowctl.Accepted}, anyForm, flowctl.Params{IsFailure: func(err error) bool { return err != nil }}, fn, nil,
		func(t *testing.T, _ form, flow *flowctl.Flow, got result) flowctl.Status {
			before = append(before, flow)
			if got.err != nil {
				t.Errorf("got %+v", got)
			}
			return flowctl.StatusOK
		})
}

// S3: no error was a nil of a type of its own, and so no nil.
func TestS3NoErrorIsNil(t *testing.T) {
	again(t, situation{decision: flowctl.Accepted}, anyForm, flowctl.Params{}, func(context.Context) (int, error) { return 42, nil }, nil,
		func(t *testing.T, _ form, flow *flowctl.Flow, got result) flowctl.Status {
			if got.err != nil || flow.Err() != nil {
				t.Errorf("errors = %#v, %#v want nil", got.err, flow.Err())
			}
			return flowctl.StatusOK
		})
	for _, kind := range sides.AllAndStored {
		t.Run(string(kind), func(t *testing.T) {
			client := newSide(t, kind, situation{}).Client
			flow := client.Start(t.Context(), point, flowctl.Params{ResultCacheKey: "k", GlobalCacheKeys: []string{"g"}})
			_, _, errResult := flow.ResultCache()
			_, _, errGlobal := flow.GlobalCache("g")
			errStores := []error{
				flow.SetResultCache(t.Context(), nil, 0), flow.SetGlobalCache(t.Context(), "g", nil, 0),
				flow.DeleteResultCache(t.Context()), flow.DeleteGlobalCache(t.Context(), "g"),
			}
			_, errEnd := flow.End(t.Context())
			for i, err := range append(errStores, errResult, errGlobal, errEnd, client.Ready(t.Context()), client.Close(t.Context())) {
				if err != nil {
					t.Errorf("error %d = %#v want nil", i, err)
				}
			}
		})
	}
}

// C4: who ended twice freed two slots, so that a limit of one admitted two.
func TestC4EndingTwiceFreesOneSlot(t *testing.T) {
	for _, kind := range sides.EnginesAndStored { // the scripted agent has no limit
		t.Run(string(kind), func(t *testing.T) {
			client := newSide(t, kind, situation{}).Client
			first := client.Start(t.Context(), point, flowctl.Params{})
			if got, err := first.End(t.Context()); err != nil || got != (flowctl.EndResponse{Held: 1, Returned: 1}) {
				t.Errorf("End() = %+v, %v", got, err)
			}
			if got, err := first.End(t.Context()); !errors.Is(err, flowctl.ErrEnded) || got != (flowctl.EndResponse{}) {
				t.Errorf("second End() = %+v, %v want ErrEnded", got, err)
			}
			second, third := client.Start(t.Context(), point, flowctl.Params{}), client.Start(t.Context(), point, flowctl.Params{})
			if !second.ShouldRun() || third.ShouldRun() {
				t.Errorf("%v, %v want one flow at a time", second, third)
			}
			for _, flow := range []*flowctl.Flow{first, second, third} {
				_, _ = flow.End(t.Context())
			}
		})
	}
}
