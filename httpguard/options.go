package httpguard

import (
	"context"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/cleanpath"
)

// An Option configures a [Middleware] or a [Transport]. If an option is repeated, the last one counts, unless its
// comment says otherwise. Nil options do nothing.
type Option interface {
	MiddlewareOption
	TransportOption
}

// A MiddlewareOption configures a [Middleware].
type MiddlewareOption interface{ applyToMiddleware(*guard) }

// A TransportOption configures a [Transport].
type TransportOption interface{ applyToTransport(*guard) }

type option func(*guard)

func (o option) applyToMiddleware(g *guard) { o(g) }
func (o option) applyToTransport(g *guard)  { o(g) }

type middlewareOption func(*guard)

func (o middlewareOption) applyToMiddleware(g *guard) { o(g) }

type transportOption func(*guard)

func (o transportOption) applyToTransport(g *guard) { o(g) }

// WithControlPoint makes fn find the control point of each request. If fn returns "", the request has the fixed one.
// The pattern that a router matched is a good control point, if routing comes first:
//
//	httpguard.WithControlPoint(func(r *http.Request) string { return r.Pattern })
//
// By default all requests have the fixed one. fn must be safe for concurrent use; nil means the default.
func WithControlPoint(fn func(*http.Request) string) Option {
	return option(func(g *guard) {
		g.PointOf = nil
		if fn != nil {
			g.PointOf = func(_ context.Context, r *http.Request) string { return fn(r) }
		}
	})
}

// WithParams makes fn return the Params of each request's flow: labels that say whose it is, how long it may wait, and
// whether it runs if no agent answers. Its Labels override all labels of the request, and must not change until the
// flow has ended. A label value that is too long or not UTF-8 makes the flow Invalid, so repair values of the request
// by labels.Repair. If IsFailure is set, it decides what is a failure: it gets a [StatusError] for a status from 400
// on, the error of a hijack, or that of an outgoing request.
//
// By default flows have the zero Params. fn must be safe for concurrent use; nil means the default.
func WithParams(fn func(*http.Request) flowctl.Params) Option {
	return option(func(g *guard) {
		g.Params = nil
		if fn != nil {
			g.Params = func(_ context.Context, r *http.Request) flowctl.Params { return fn(r) }
		}
	})
}

// WithHeaders makes headers of the request labels, as labels.FromRequest does. By default none is. Repeated use adds
// more. Headers that carry credentials never become labels, and neither do Host, Transfer-Encoding and Trailer, which
// net/http keeps apart: the label http.host has the host.
func WithHeaders(names ...string) Option {
	names = slices.Clone(names)
	return option(func(g *guard) { g.headers = append(g.headers, names...) })
}

// WithSkip passes requests on without a flow if fn returns true. It adds to [WithSkipPaths] and [WithSkipPatterns]: one
// match is enough. Repeated use adds more. fn must be safe for concurrent use; nil skips nothing.
//
// Callers choose the path of a request. If fn looks at the path, the handler must read it in the same way. Prefer the
// other two options, which skip no path that can be read in two ways.
func WithSkip(fn func(*http.Request) bool) Option {
	return option(func(g *guard) {
		if fn != nil {
			g.AddSkip(func(_ context.Context, r *http.Request) bool { return fn(r) })
		}
	})
}

// WithSkipPaths is [WithSkip] for requests whose URL.Path is one of these.
//
// A path that could be read as another one is never skipped, whatever is listed: a backend may resolve /health/../orders. So
// a path is skipped only if it is clean. It begins with a slash, and has no empty segment but the last. No segment ends with
// a dot or a space. It has no backslash, semicolon, question mark, number sign or percent sign, no control character, nothing
// that Unicode compatibility turns into a dot, slash, backslash or semicolon, and is valid UTF-8. Dots and slashes in it were
// not sent as %2E and %2F.
func WithSkipPaths(paths ...string) Option {
	set := make(map[string]bool, len(paths))
	for _, path := range paths {
		set[path] = true
	}
	return WithSkip(func(r *http.Request) bool { return r.URL != nil && set[r.URL.Path] && clean(r.URL) })
}

// WithSkipPatterns is [WithSkip] for requests whose URL.Path one of the patterns matches, from its first byte to its
// last. A path that is not clean is never skipped, see [WithSkipPaths]. Nil patterns match nothing.
func WithSkipPatterns(patterns ...*regexp.Regexp) Option {
	var longest []*regexp.Regexp
	for _, pattern := range patterns {
		if pattern != nil {
			own := *pattern // to prefer the longest match: one of the whole path is found if there is one
			own.Longest()
			longest = append(longest, &own)
		}
	}
	return WithSkip(func(r *http.Request) bool {
		if r.URL == nil {
			return false
		}
		for _, pattern := range longest {
			if at := pattern.FindStringIndex(r.URL.Path); at != nil && at[0] == 0 && at[1] == len(r.URL.Path) {
				return clean(r.URL)
			}
		}
		return false
	})
}

// clean reports whether a URL's path can be read in one way only.
func clean(u *url.URL) bool {
	if u.Opaque != "" || !cleanpath.Is(u.Path) {
		return false
	}
	if u.RawPath == "" {
		return true
	}
	sent := strings.ToLower(u.RawPath)
	return u.EscapedPath() == u.RawPath && !strings.Contains(sent, "%2e") && !strings.Contains(sent, "%2f")
}

// WithOnReject makes fn answer the requests whose flow does not run, whatever the reason: [Problem], [PlainText] or
// your own function. By default, and if fn is nil, it is Problem, unless [WithCheckHTTP] brought an answer of the
// agent. When fn is called, the flow has ended, and is in the request's context. The header already has what
// [WithRateLimitHeaders] adds, what the agent of WithCheckHTTP wants, and a Retry-After if it is known when a retry can
// succeed. If fn writes nothing, the response is empty and has flow.HTTPStatus. fn must be safe for concurrent use.
func WithOnReject(fn func(w http.ResponseWriter, r *http.Request, flow *flowctl.Flow)) MiddlewareOption {
	return middlewareOption(func(g *guard) {
		if fn == nil {
			fn = refuse
		}
		g.onReject = fn
	})
}

// WithRateLimitHeaders adds to every response the RateLimit and RateLimit-Policy header fields of
// draft-ietf-httpapi-ratelimit-headers-11. They cover each rate or concurrency limiter, each calendar quota, and each quota or
// concurrency scheduler that the request met. For each, they say how many tokens or slots its bucket holds, how many are free, and
// when a rejected request can be sent again. The request's own slot counts as free. If a quota scheduler rejects,
// RateLimit-Policy leaves it out, because agents do not report its tokens then. Load schedulers are not covered,
// because what they admit changes with the load.
//
// Limits that are not in force have no fields. A dry run has no fields at all, and a limiter in dry run is left out if
// the agent is Headgate's.
//
// The names are those of the policies and their components, so clients see how the limits are made. In a name "%", and each byte
// that is no printable ASCII, is written as "%" and two hexadecimal digits. Clients do not see how
// long a limiter's window is, because agents do not report it.
//
// By default there are no such fields. They cost several times what the flow costs.
func WithRateLimitHeaders() MiddlewareOption {
	return middlewareOption(func(g *guard) { g.rateLimit = true })
}

// WithMaxPause sets the longest pause that a Retry-After of the upstream can cause. By default it is a minute: one bad replica
// of an upstream must not keep requests from all others for long. Zero or less turns pauses off. See [Transport].
func WithMaxPause(d time.Duration) TransportOption {
	return transportOption(func(g *guard) { g.maxPause = d })
}

// WithMaxWait lets a request wait while the upstream pauses, for at most d. The request is sent after the pause. It waits longer
// by a random part of the pause, so that not all requests come back at once. If the pause takes longer than d, or ends after the
// deadline of the request's context, the request fails at once with a [PausedError]. The same happens if the client or its engine
// is closed while the request waits. If the context ends, the error matches the context's error and its cause.
//
// All waits of a request count together: for pauses, and before the retries of [WithRetries]. Waits in queues do not count;
// Params.MaxWait bounds those. A redirect is a request of its own. While a request waits, it has no flow.
//
// By default, and if d is zero, requests do not wait for pauses. A negative d lets them wait until the deadline of their
// context, and without limit if there is none.
func WithMaxWait(d time.Duration) TransportOption {
	return transportOption(func(g *guard) { g.maxWait = d })
}

// WithRetries sends requests again that the upstream answers with 429 or 503 and a Retry-After of more than zero. It waits for as
// long as the Retry-After says, and longer by a random part of policy.Jitter. Other responses, and errors, are never
// retried. The method does not matter: such an upstream says that it has not done what was asked. Do not use WithRetries for an
// upstream that answers so after it has begun the work.
//
// The caller gets the response as it is, at once, if
//   - the request has a body and no GetBody, or GetBody fails;
//   - it was sent policy.Attempts times;
//   - the upstream asks for more than policy.MaxWait;
//   - the wait does not end before the deadline of the request's context, or takes longer than [WithMaxWait] allows.
//     Without WithMaxWait, the waits of a request take a minute at most;
//   - policy.Budget is used up, so that retries never become the load. All requests of the [Transport] share the budget.
//
// Each attempt is a flow of its own: a quota counts all attempts. The flow of an attempt ends before the wait, as Error, and
// holds no slot meanwhile. If the flow of a retry is rejected, its error is the request's. To wait for the limits as well,
// give [NewTransport] a headgate.Retrying. During the wait the upstream pauses for other requests too, see [Transport]. If it asks
// another request for more, the retry waits for that as well, or fails with a [PausedError]. It fails as with WithMaxWait if the
// context ends, or the client is closed.
//
// Of a response that is not returned, up to 64 KiB are read, for a second at most, so that its connection can be used again.
//
// By default requests are not retried. If the client is nil or in dry run, they are not retried either. policy.Jitter and
// policy.MaxWait hold for the waits of WithMaxWait too.
func WithRetries(policy headgate.RetryPolicy) TransportOption {
	return transportOption(func(g *guard) { g.retries, g.retryPolicy = true, policy })
}
