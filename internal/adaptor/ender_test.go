package adaptor_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/adaptor"
	"github.com/headgate-go/headgate/internal/testing/sides"
)

var errBroken = errors.New("broken")

// The first reason ends a flow, and no later one does. An Ender that waits for a context is one of the reasons.
func TestEnder(t *testing.T) {
	tests := []struct {
		name string
		use  func(e *adaptor.Ender, cancel context.CancelFunc)
		want flowctl.Status // StatusUnset: the flow has not ended
	}{
		{"nothing", func(*adaptor.Ender, context.CancelFunc) {}, flowctl.StatusUnset},
		{"no error", func(e *adaptor.Ender, _ context.CancelFunc) { e.End(nil) }, flowctl.StatusOK},
		{"error", func(e *adaptor.Ender, _ context.CancelFunc) { e.End(errBroken) }, flowctl.StatusError},
		{"io.EOF of a call", func(e *adaptor.Ender, _ context.CancelFunc) { e.End(io.EOF) }, flowctl.StatusError},
		{"io.EOF of a stream", func(e *adaptor.Ender, _ context.CancelFunc) { e.EndStream(io.EOF) }, flowctl.StatusOK},
		{"wrapped io.EOF of a stream", func(e *adaptor.Ender, _ context.CancelFunc) { e.EndStream(fmt.Errorf("receive: %w", io.EOF)) }, flowctl.StatusOK},
		{"error of a stream", func(e *adaptor.Ender, _ context.CancelFunc) { e.EndStream(io.ErrUnexpectedEOF) }, flowctl.StatusError},
		{"panic", func(e *adaptor.Ender, _ context.CancelFunc) { e.Fail() }, flowctl.StatusError},
		{"error, then none", func(e *adaptor.Ender, _ context.CancelFunc) { e.End(errBroken); e.End(nil) }, flowctl.StatusError},
		{"none, then error", func(e *adaptor.Ender, _ context.CancelFunc) { e.End(nil); e.EndStream(errBroken) }, flowctl.StatusOK},
		{"none, then panic", func(e *adaptor.Ender, _ context.CancelFunc) { e.End(nil); e.Fail() }, flowctl.StatusOK},
		{"context", func(_ *adaptor.Ender, cancel context.CancelFunc) { cancel() }, flowctl.StatusError},
		{"context, then none", func(e *adaptor.Ender, cancel context.CancelFunc) { cancel(); synctest.Wait(); e.End(nil) }, flowctl.StatusError},
		{"none, then context", func(e *adaptor.Ender, cancel context.CancelFunc) { e.End(nil); cancel() }, flowctl.StatusOK},
		{"as it is", func(e *adaptor.Ender, _ context.CancelFunc) { e.EndAsIs() }, flowctl.StatusOK},
		{"an error, then as it is", func(e *adaptor.Ender, _ context.CancelFunc) { e.Flow.SetError(errBroken); e.EndAsIs(); e.End(nil) }, flowctl.StatusError},
		{"as it is, then context", func(e *adaptor.Ender, cancel context.CancelFunc) { e.EndAsIs(); cancel() }, flowctl.StatusOK},
		{"all at once", func(e *adaptor.Ender, cancel context.CancelFunc) {
			var wg sync.WaitGroup
			wg.Go(cancel)
			for range 4 {
				wg.Go(func() { e.End(errBroken) })
				wg.Go(func() { e.EndStream(errBroken) })
				wg.Go(e.Fail)
			}
			wg.Wait()
		}, flowctl.StatusError},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sides.Setup{}.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) {
				flow := side.Client.Start(t.Context(), "point", flowctl.Params{IsFailure: func(err error) bool { return err != nil }})
				ctx, cancel := context.WithCancel(flow.Context())
				defer cancel()
				e := adaptor.NewEnder(ctx, flow)
				e.EndAfter(ctx, func(err error) error { return fmt.Errorf("context: %w", err) })
				tt.use(&e, cancel)
				synctest.Wait()
				_, err := flow.End(t.Context())
				if open := err == nil; open != (tt.want == flowctl.StatusUnset) {
					t.Errorf("End() of the flow = %v", err)
				}
				want := []sides.End{{ControlPoint: "point", Status: tt.want}}
				if tt.want == flowctl.StatusUnset {
					want[0].Status = flowctl.StatusOK // by the test's own end
				}
				if got := side.Ends(); !slices.Equal(got, want) {
					t.Errorf("the agent saw the ends %v want %v", got, want)
				}
			})
		})
	}
}

// The application decides by the error that the adaptor makes of the context's, and its panic leaves no flow behind.
func TestEnderAsksTheApplication(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		side := sides.Setup{}.New(t, sides.Embedded)
		asked := make(chan error, 1)
		flow := side.Client.Start(t.Context(), "judged", flowctl.Params{IsFailure: func(err error) bool { asked <- err; return false }})
		ctx, cancel := context.WithTimeout(flow.Context(), time.Second)
		defer cancel()
		e := adaptor.NewEnder(ctx, flow)
		e.EndAfter(ctx, func(err error) error { return fmt.Errorf("%w by %w", errBroken, err) })
		if err := <-asked; !errors.Is(err, errBroken) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("IsFailure(%v) want the adaptor's error", err)
		}
		synctest.Wait()

		var again adaptor.Ender
		flow = side.Client.Start(t.Context(), "ends again", flowctl.Params{IsFailure: func(error) bool { again.End(nil); return true }})
		again = adaptor.NewEnder(t.Context(), flow)
		again.End(errBroken)

		flow = side.Client.Start(t.Context(), "panics", flowctl.Params{IsFailure: func(error) bool { panic(errBroken) }})
		panics := adaptor.NewEnder(t.Context(), flow)
		func() {
			defer func() {
				if p := recover(); p != any(errBroken) {
					t.Errorf("panicked with %v want %v", p, errBroken)
				}
			}()
			panics.End(errBroken)
		}()
		want := []sides.End{
			{ControlPoint: "judged", Status: flowctl.StatusOK},
			{ControlPoint: "ends again", Status: flowctl.StatusError},
			{ControlPoint: "panics", Status: flowctl.StatusError},
		}
		if got := side.Ends(); !slices.Equal(got, want) {
			t.Errorf("the agent saw the ends %v want %v", got, want)
		}
	})
}
