package engine

import (
	"errors"
	"fmt"
	"log/slog"
	"unicode/utf8"

	"github.com/headgate-go/headgate/policy"
)

// An Option configures an engine. If an option is given twice, the last one counts; a signal replaces only one of the
// same name.
type Option interface {
	apply(*Engine) error
}

type option func(*Engine) error

func (o option) apply(e *Engine) error { return o(e) }

// Defaults of the options.
const (
	// DefaultKeyCap is how many values of its label a limiter keeps apart.
	DefaultKeyCap = 1 << 20
	// DefaultCacheEntries and DefaultCacheBytes bound the result cache and the global cache, each.
	DefaultCacheEntries = 10_000
	DefaultCacheBytes   = 64 << 20
)

// WithKeyCap bounds how many values of its label each limiter distinguishes. A bucket takes about 80 bytes and the value. If
// there are more values, the limiter forgets full buckets, which changes no decision. While no bucket is full, values that the
// limiter does not know yet share one bucket. That bucket has the component's own numbers, and no overrides. The default is
// [DefaultKeyCap].
func WithKeyCap(keys int) Option {
	return option(func(e *Engine) error {
		if keys < 1 {
			return fmt.Errorf("WithKeyCap(%d): not positive", keys)
		}
		e.keyCap = keys
		return nil
	})
}

// WithName names the engine in its metrics, by the attribute "engine". Engines that report to one meter provider need
// different names, or their numbers are mixed. A name is valid UTF-8. By default the engine has no name, and its
// metrics no such attribute.
func WithName(name string) Option {
	return option(func(e *Engine) error {
		if !utf8.ValidString(name) {
			return errors.New("WithName: the name is not valid UTF-8") // exporters drop all that comes with such a name
		}
		e.instruments.name = name
		return nil
	})
}

// WithCacheBounds bounds the result cache and the global cache: at most so many entries, and so many bytes of keys and
// values, in each of the two. The least useful entries make room for new ones. The defaults are [DefaultCacheEntries]
// and [DefaultCacheBytes].
func WithCacheBounds(entries int, bytes int64) Option {
	return option(func(e *Engine) error {
		if entries < 1 || bytes < int64(entries) {
			return fmt.Errorf("WithCacheBounds(%d, %d): entries must be positive and have a byte each", entries, bytes)
		}
		e.cacheEntries, e.cacheBytes = entries, bytes
		return nil
	})
}

// WithLogger makes the engine log what its operator should know, such as a limiter with too many keys. By default, and with nil,
// it logs nothing.
func WithLogger(logger *slog.Logger) Option {
	return option(func(e *Engine) error {
		if logger == nil {
			logger = slog.New(slog.DiscardHandler)
		}
		e.logger = logger
		return nil
	})
}

// WithOverrides sets the function f, which returns the numbers of a value of a component's label, such as those of a customer in
// a database. It returns false if the component's own numbers hold. The engine calls f when a flow or [Component.Peek] brings a
// value that the component does not know, and waits for the answer. Whenever [Engine.Apply] or a reload comes into force, the
// engine calls f for all values that it knows. It does not call f for values that the policy's own Overrides have. The argument
// component is the ID of the component: give components IDs of their own if f is to distinguish those of several policies. By
// default there is no such function.
//
// The engine calls f from the goroutines of flows, for several at once, and holds no lock meanwhile. It may call f twice for a
// new value. Flows and Apply wait for f, so f must be quick: it answers from memory, and does not ask the database. It must not
// call Apply or Close. A panic of f is not recovered; what the flow has taken goes back. If peers can make up values, the engine calls f for each of them.
// WithKeyCap bounds how many of them are remembered, and f is not called for values beyond that.
//
// If the component cannot have a number that f returns, the component's own numbers hold. ComponentStats.InvalidOverrides counts
// such results, and the engine logs them once a minute.
//
// For a value of more than 256 bytes, the engine calls f only when the value comes. It does not keep the value, so the value's
// numbers remain when policies are applied. The same is true for values of headers that carry credentials.
func WithOverrides(f func(component, value string) (policy.Override, bool)) Option {
	return option(func(e *Engine) error {
		e.overrides = f
		return nil
	})
}

// WithSignal provides a number that policies may name, as in policy.Named("cpu"), such as how loaded the service is. The engine
// calls f every 10 seconds for each component that names it. All calls come from one goroutine, so f must return at once. It
// returns NaN if the number is not known. Close waits for a call of f to return.
func WithSignal(name string, f func() float64) Option {
	return option(func(e *Engine) error {
		if name == "" || f == nil {
			return fmt.Errorf("WithSignal(%q): needs a name and a function", name)
		}
		e.signals[name] = f
		return nil
	})
}
