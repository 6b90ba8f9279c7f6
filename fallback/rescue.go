package fallback

import (
	"context"
	"errors"

	"github.com/headgate-go/headgate/internal/sentinel"
)

// Rescue returns a function that calls fn, and then f if fn failed because a flow within it did not run. That is so if fn's error
// matches flowctl.ErrRejected or flowctl.ErrUnreachable, also if it wraps one of them. Then f gets fn's error, and the function
// returns the result of f. Other results of fn come back as they are: those without an error, errors of flows that were Canceled
// or Invalid, and errors of the work itself. If ctx has ended, f is not called either. With a nil f, Rescue returns fn.
//
// Rescue does not undo what fn did before its flow was rejected. So it is for functions that begin with the guarded call, or that
// can be given up halfway.
//
// The returned function is safe for concurrent use if fn and f are.
func Rescue[T any](fn func(context.Context) (T, error), f Func[T]) func(context.Context) (T, error) {
	if f == nil {
		return fn
	}
	return func(ctx context.Context) (T, error) {
		v, err := fn(ctx)
		if err == nil || ctx.Err() != nil || !errors.Is(err, sentinel.ErrRejected) && !errors.Is(err, sentinel.ErrUnreachable) {
			return v, err
		}
		return f(ctx, err)
	}
}
