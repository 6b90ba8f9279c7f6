package fallback

import (
	"context"
	"fmt"
	"reflect"
	"time"
)

// Stale returns a Func that gives the last result of a guard that keeps its results, such as headgate.Cached, until a
// grace period after the result has expired. HTTP calls this stale-if-error (RFC 5861). If there is no result, or if it
// is too old, the Func returns the zero value and the flow's error. A grace of zero or less gives only results that
// have not expired. Results are shared, not copied, so no caller may change what they point to.
//
// T must be written, and must be exactly the type of the guard's results: Stale[string](time.Minute). If the guard
// keeps results of another type, the error says so, and matches the flow's error.
//
// For a guard that keeps no results, use a [LastGood].
func Stale[T any](grace time.Duration) Func[T] {
	grace = max(grace, 0)
	return func(ctx context.Context, err error) (T, error) {
		kept, ok := ctx.Value(lastKey[T]{}).(last[T])
		if ok && time.Since(kept.expires) < grace { // which the zero time never is
			return kept.value, nil
		}
		var zero T
		if other, mismatch := ctx.Value(lastType{}).(reflect.Type); !ok && mismatch {
			return zero, &failure{&failures{[]error{
				fmt.Errorf("fallback: Stale[%s] finds no result: the guard keeps results of type %s", reflect.TypeFor[T](), other), err,
			}}}
		}
		return zero, err
	}
}

// WithLast returns a context in which [Stale] finds v, a result that expires or has expired at the given time. A guard
// that keeps results calls its fallback with it. T is the type of the guard's results. It must be written if v is an
// untyped constant: WithLast[int64](ctx, 42, expires). The zero time means that there is no result, and hides one of an
// outer context.
func WithLast[T any](ctx context.Context, v T, expires time.Time) context.Context {
	return &lastContext[T]{ctx, &last[T]{v, expires}}
}

// lastContext is a context with a result, and its type for a Stale of another.
type lastContext[T any] struct {
	context.Context
	last *last[T] // a pointer, which package fmt does not show what is behind
}

func (c *lastContext[T]) Value(key any) any {
	switch key.(type) {
	case lastKey[T]:
		return *c.last
	case lastType:
		return reflect.TypeFor[T]()
	default:
		return c.Context.Value(key)
	}
}

// String names the context without the result, for code that prints contexts.
func (c *lastContext[T]) String() string {
	return fmt.Sprintf("fallback.WithLast[%s]", reflect.TypeFor[T]())
}

type (
	lastKey[T any] struct{}
	lastType       struct{}
)

type last[T any] struct {
	value   T
	expires time.Time
}
