package fallback

import (
	"context"
	"sync"
	"time"
)

// A LastGood remembers the last good result of a function. Wrap the function with [LastGood.Watch] before you guard it,
// and use the method value of [LastGood.Func] as the fallback. Watch must not wrap the guarded function, because it
// would take the fallback's old result for a new one.
//
// A LastGood is for functions whose result is the same for all callers: a result that depends on the caller would go to
// other callers too. Results are shared, not copied, so nothing may change what they point to. Watch does not see
// results that a guard finds in a cache; use [Stale] for headgate.Cached.
//
// The zero value is ready to use and has no age limit. A LastGood is safe for concurrent use, and must not be copied
// after first use.
type LastGood[T any] struct {
	maxAge time.Duration

	mu    sync.Mutex
	value T
	from  time.Time // when the call that returned value began; zero: there is none
}

// NewLastGood returns a LastGood that gives a result while it is younger than maxAge; zero or less is no limit. Age
// counts from the beginning of the call that returned the result, because a slow call may have read its data then.
func NewLastGood[T any](maxAge time.Duration) *LastGood[T] {
	return &LastGood[T]{maxAge: maxAge}
}

// Watch returns a function that calls fn, remembers its result if the error is nil, and returns both as they are. If
// calls overlap, the result of the call that began last stays, so that a slow call never replaces newer results. Of
// calls that began at the same instant, the one that finished last counts.
func (l *LastGood[T]) Watch(fn func(context.Context) (T, error)) func(context.Context) (T, error) {
	return func(ctx context.Context) (T, error) {
		began := time.Now()
		v, err := fn(ctx)
		if err == nil {
			l.remember(v, began)
		}
		return v, err
	}
}

func (l *LastGood[T]) remember(v T, began time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !began.Before(l.from) {
		l.value, l.from = v, began
	}
}

// Func is a [Func]. It returns the result that is remembered. If there is none, or if it is too old, it returns the
// zero value and err.
func (l *LastGood[T]) Func(_ context.Context, err error) (T, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.from.IsZero() || l.maxAge > 0 && time.Since(l.from) >= l.maxAge {
		var zero T
		return zero, err
	}
	return l.value, nil
}
