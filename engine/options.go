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

// WithKeyCap bounds how many values of its label each limiter keeps apart: a bucket takes some 80 bytes and the value.
// When there are more, full buckets are forgotten, which changes no decision. While no bucket is full, the values that
// the limiter does not know yet share one bucket, which has the component's own numbers whatever overrides they have. The default is [DefaultKeyCap].
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

// WithLogger has the engine log what its operator should know, such as a limiter with too many keys. By default, and
// with nil, it logs nothing.
func WithLogger(logger *slog.Logger) Option {
	return option(func(e *Engine) error {
		if logger == nil {
			logger = slog.New(slog.DiscardHandler)
		}
		e.logger = logger
		return nil
	})
}

// WithOverrides has f say which numbers a value of a component's label has, such as those of a customer that live in a database. It
// returns false for those of the component. It is asked about a value that the component does not know, before the flow is decided
// about, by [Component.Peek], and about all values that it knows whenever [Engine.Apply] or a reload comes into force. It is not asked where the policy's
// own Overrides have the value. Component is the ID of the component: give components IDs of their own if f is to tell apart those of
// several policies. By default there is no such function.
//
// The engine calls f from the goroutines of flows, for several at once, and holds no lock meanwhile. A value that has just come to be
// known may be asked about twice. A flow waits for f, and so does Apply, so f must be quick: it answers from memory, and
// does not ask the database. It must not
// call Apply or Close. A panic of f is not recovered. Whoever can make up values has f called for each of them; WithKeyCap
// bounds how many of them are remembered, and for those beyond f is not called.
//
// Numbers that the component cannot have are not used: those of the component hold. They are counted in
// ComponentStats.InvalidOverrides, and logged once a minute.
//
// A value that is longer than 256 bytes is only asked about when it comes: the engine does not keep it, and its numbers remain when a
// policy is applied. The same is true for values of headers that carry credentials.
func WithOverrides(f func(component, value string) (policy.Override, bool)) Option {
	return option(func(e *Engine) error {
		e.overrides = f
		return nil
	})
}

// WithSignal provides a number that policies may name, as in policy.Named("cpu"): how loaded the service is, say. If a
// policy names it, the engine calls f every 10 seconds for each component that does, one after the other from one
// goroutine, so f must return at once. It returns NaN for a number that is not known. Close waits for a call that is
// under way.
func WithSignal(name string, f func() float64) Option {
	return option(func(e *Engine) error {
		if name == "" || f == nil {
			return fmt.Errorf("WithSignal(%q): needs a name and a function", name)
		}
		e.signals[name] = f
		return nil
	})
}
