package fallback

import (
	"context"
	"time"
)

// Stale returns a Func that gives the last result of a guard that keeps its results, such as headgate.Cached, while that
// has not expired, and for a grace period after it has: what HTTP knows as stale-if-error (RFC 5861). When there is none,
// or it is too old, it returns the zero value and the flow's error. A grace of zero or less gives only results that have
// not expired. Results are shared, not copied: nobody may change what they point to. T has to be written:
// Stale[string](time.Minute).
//
// The function of a guard that keeps nothing can be watched by a [LastGood] instead.
func Stale[T any](grace time.Duration) Func[T] {
	grace = max(grace, 0)
	return func(ctx context.Context, err error) (T, error) {
		last, ok := ctx.Value(lastKey[T]{}).(last[T])
		if !ok || time.Since(last.expires) >= grace { // as the zero time is, whatever the grace
			var zero T
			return zero, err
		}
		return last.value, nil
	}
}

// WithLast returns a context in which [Stale] finds v, a result that expires or has expired at the given time. A guard
// that keeps results calls its fallback with it. The zero time says that there is no result, not even one that a context
// further out has.
func WithLast[T any](ctx context.Context, v T, expires time.Time) context.Context {
	return context.WithValue(ctx, lastKey[T]{}, last[T]{v, expires})
}

type lastKey[T any] struct{}

type last[T any] struct {
	value   T
	expires time.Time
}
