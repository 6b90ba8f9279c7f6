// Package fallback provides what a guard returns if a flow may not run.
//
// A [Func] is what a guard takes as its onReject. [Value], [Error] and [Call] are the simple ones. [First] tries
// several. A [LastGood] remembers the last good result of the guarded function. [Stale] returns the last result that a
// guard with a cache has kept. [For] adapts any of them to a guard whose function takes an argument.
//
// [Rescue] is for functions that are not guarded themselves, but call guarded ones.
//
// A guard calls its fallback only for flows that were rejected or whose agent was unreachable. It does not call it for
// errors and panics of the guarded function itself. Nothing here recovers panics.
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
// and is never nil. A nil Func stands for one that returns the zero value and err.
//
// The Funcs of this package are safe for concurrent use if the functions that they call are.
type Func[T any] func(ctx context.Context, err error) (T, error)

// Value returns a Func that succeeds with v, which all callers share.
func Value[T any](v T) Func[T] {
	return func(context.Context, error) (T, error) { return v, nil }
}

// Error returns a Func that fails with an error that has the text of err. The error matches both err and the flow's
// error by [errors.Is] and [errors.As]. So callers need not know about flow control, and [RetryAfter] and the flow's
// gRPC status are still found. A nil err leaves the flow's error as it is. T must be written: Error[string](ErrBusy).
func Error[T any](err error) Func[T] {
	return func(_ context.Context, flowErr error) (T, error) {
		var zero T
		if err == nil {
			return zero, flowErr
		}
		return zero, &failure{&failures{[]error{err, flowErr}}}
	}
}

// Call returns a Func that calls fn, an alternative to the guarded function, and returns what it returns.
func Call[T any](fn func(context.Context) (T, error)) Func[T] {
	return func(ctx context.Context, _ error) (T, error) { return fn(ctx) }
}

// First returns a Func that calls fns in turn, each with the flow's error, until one succeeds. After the context has ended, it
// calls no more of them, and the end of the context counts as a failure, too. Nil ones are skipped.
//
// If none succeeds, it returns the zero value and an error with the text of the last failure. The error matches every
// failure and the flow's error by [errors.Is] and [errors.As], the latest first. Without a Func to call, it returns the
// flow's error.
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
		return zero, &failure{&failures{errs}}
	}
}

// For adapts a fallback to a guard whose function takes an argument of type A. The fallback does not get the argument.
// A must be written, T follows from f: For[string](fallback.Value(1)). A nil f returns the zero value and the flow's
// error.
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
// RetryAfter() time.Duration. It reports false if there is none, or if that method returns zero or less.
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

// failure has the text of the first of its errors and matches all of them. So a user sees only the text of the
// fallback, which may be chosen for users.
type failure struct{ *failures }

// failures are behind a pointer, because a verb that fits no pointer, such as %s, prints the fields of an error in an unexported
// field of a struct, and calls none of its methods.
type failures struct{ errs []error }

func (f *failure) Error() string   { return f.errs[0].Error() }
func (f *failure) Unwrap() []error { return f.errs }

// Timeout and Temporary make it a net.Error, also where the first of its errors is none.
func (f *failure) Timeout() bool   { return slices.ContainsFunc(f.errs, deadline.In) }
func (f *failure) Temporary() bool { return f.Timeout() }

// Format keeps the words of the other errors out of what is printed, whatever the verb.
func (f *failure) Format(s fmt.State, verb rune) {
	_, _ = fmt.Fprintf(s, fmt.FormatString(s, verb), f.Error())
}
