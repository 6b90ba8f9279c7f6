package fallback

import (
	"context"
	"sync"
	"time"
)

// A LastGood remembers the last good result of the function that it watches: [LastGood.Watch] goes around the function
// before it is guarded, and the method value of [LastGood.Func] is the fallback. Around the guard, Watch would take the
// fallback's old result for a new one. Results are shared, not copied: nobody may change what they point to. It is for
// functions whose result is the same for all callers; a result that depends on who asks would be given to somebody else.
// Results that a guard finds in a cache pass Watch by: for headgate.Cached there is [Stale].
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
// counts from the beginning of the call that returned the result, so that the limit holds for what a slow call read
// first, too.
func NewLastGood[T any](maxAge time.Duration) *LastGood[T] {
	return &LastGood[T]{maxAge: maxAge}
}

// Watch returns a function that calls fn, remembers its result if the error is nil, and returns both as they are. Of
// calls that overlap, the result of the one that began last stays, so that a slow call never replaces newer results.
// Of those that began at the same instant of the clock it is the one that finished last.
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

// Func is a [Func]: it returns the result that is remembered, or the zero value and err when there is none or it is too
// old.
func (l *LastGood[T]) Func(_ context.Context, err error) (T, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.from.IsZero() || l.maxAge > 0 && time.Since(l.from) >= l.maxAge {
		var zero T
		return zero, err
	}
	return l.value, nil
}
