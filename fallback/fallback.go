// Package fallback says what a guard returns instead when a flow may not run.
//
// A [Func] goes where a guard takes its onReject. [Value], [Error] and [Call] are the plain ones, [First] tries
// several, and a [LastGood] remembers what the guarded function returned when it last could. [Stale] gives what a guard
// with a cache has kept. [For] fits any of them to a guard whose function takes an argument.
//
// A guard calls its fallback only for flows that were rejected or whose agent was unreachable: errors and panics of the
// guarded function itself never reach one. Nothing here recovers panics.
package fallback

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/headgate-go/headgate/internal/deadline"
)

// A Func gives the result of a flow that may not run. The context is the caller's; err says why the flow may not run
// and is never nil. A guard takes a nil Func for one that returns the zero value and err.
//
// The Funcs of this package are safe for concurrent use if the functions that they call are.
type Func[T any] func(ctx context.Context, err error) (T, error)

// Value returns a Func that succeeds with v, which all callers share.
func Value[T any](v T) Func[T] {
	return func(context.Context, error) (T, error) { return v, nil }
}

// Error returns a Func that fails with an error in the words of err, which matches both err and the flow's error by
// [errors.Is] and [errors.As]: callers need not know about flow control, and [RetryAfter] and the flow's gRPC status
// stay within reach. A nil err leaves the flow's error as it is. T has to be written: Error[string](ErrBusy).
func Error[T any](err error) Func[T] {
	return func(_ context.Context, flowErr error) (T, error) {
		var zero T
		if err == nil {
			return zero, flowErr
		}
		return zero, &failure{errs: []error{err, flowErr}}
	}
}

// Call returns a Func that calls fn, an alternative to the guarded function, and returns what it returns.
func Call[T any](fn func(context.Context) (T, error)) Func[T] {
	return func(ctx context.Context, _ error) (T, error) { return fn(ctx) }
}

// First returns a Func that calls fns in turn, each with the flow's error, until one succeeds. It begins none once the
// context is done, which counts as a failure of its own. Nil ones are skipped.
//
// When none succeeds, it returns the zero value and an error in the words of the last failure, which matches every
// failure and the flow's error by [errors.Is] and [errors.As], the latest first. Without a Func to call, it returns
// the flow's error.
func First[T any](fns ...Func[T]) Func[T] {
	fns = slices.Clone(fns)
	return func(ctx context.Context, err error) (T, error) {
		var zero T
		errs := []error{err}
		for _, fn := range fns {
			if fn == nil {
				continue
			}
			if ctx.Err() != nil {
				// The cause comes last: a gRPC status in it is not that of this error.
				errs = append(slices.Insert(errs, 0, context.Cause(ctx)), ctx.Err())
				break
			}
			v, fnErr := fn(ctx, err)
			if fnErr == nil {
				return v, nil
			}
			errs = append(errs, fnErr)
		}
		if len(errs) == 1 {
			return zero, err
		}
		slices.Reverse(errs)
		return zero, &failure{errs: errs}
	}
}

// For fits a fallback to a guard whose function takes an argument of type A, which the fallback does not see. A has to
// be written, T follows from f: For[string](fallback.Value(1)). A nil f returns the zero value and the flow's error.
func For[A, T any](f Func[T]) func(context.Context, A, error) (T, error) {
	return func(ctx context.Context, _ A, err error) (T, error) {
		if f == nil {
			var zero T
			return zero, err
		}
		return f(ctx, err)
	}
}

// RetryAfter returns how long to wait until a retry can succeed, from the first error in err's tree that has a method
// RetryAfter() time.Duration. It is false when there is none, or when that error does not know (zero or less).
func RetryAfter(err error) (time.Duration, bool) {
	e, ok := errors.AsType[interface {
		error
		RetryAfter() time.Duration
	}](err)
	if !ok {
		return 0, false
	}
	after := e.RetryAfter()
	return max(after, 0), after > 0
}

// failure reads as the first of its errors and matches all of them: what a user sees are the words of the fallback
// alone, which may be chosen for them.
type failure struct {
	errs []error
}

func (f *failure) Error() string   { return f.errs[0].Error() }
func (f *failure) Unwrap() []error { return f.errs }

// Timeout and Temporary make it a net.Error, also where the first of its errors is none.
func (f *failure) Timeout() bool   { return slices.ContainsFunc(f.errs, deadline.In) }
func (f *failure) Temporary() bool { return f.Timeout() }

// Format keeps the words of the other errors out of what is printed, whatever the verb.
func (f *failure) Format(s fmt.State, verb rune) {
	_, _ = fmt.Fprintf(s, fmt.FormatString(s, verb), f.Error())
}
