package flowctl

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"time"

	"github.com/headgate-go/headgate/internal/bounds"
	"github.com/headgate-go/headgate/labels"
)

// Params says how one flow is started. The zero value is right for most.
type Params struct {
	// Labels describe the flow to the policies. They override all other labels of the flow; see package labels for the
	// order and the limits, beyond which the flow is Invalid: have values that a peer sent repaired by labels.Repair.
	// The map must not change until the flow has ended.
	Labels map[string]string

	// CheckTimeout is how long the agent may take to answer, and so also the longest that the flow waits in a queue.
	// Zero means the client's; a negative one sets no limit but the context's, except in a client's dry run. It should
	// be well below the deadlines of callers: a flow whose caller's time is up first is Canceled, and does not fail
	// open. Across the network it should be well above 10 ms, with less of which left an agent rejects what limiters
	// have a say in.
	CheckTimeout time.Duration

	// RampMode asks for flows that are new to the system to run only when a ramp of the policies lets them: a
	// flow that no ramp accepts, or that gets no answer, does not run.
	RampMode bool

	// OnUnreachable decides whether the flow runs when nobody answers. Zero is FailOpen: it runs.
	OnUnreachable UnreachablePolicy

	// ResultCacheKey names an entry of the control point's result cache. It is looked up with the check; see
	// [Flow.ResultCache]. On a hit the agent spares the flow its quota and load schedulers. Empty: none.
	ResultCacheKey string

	// GlobalCacheKeys name entries of the cache that all control points share; see [Flow.GlobalCache]. There are at
	// most 64, a key has up to 255 bytes, and their values must come to less than 16 MiB: a remote agent's answer
	// cannot hold more, and makes the flow Unreachable.
	GlobalCacheKeys []string

	// HTTP describes the HTTP request that the flow is about, for agents whose policies classify requests: a remote
	// agent is then asked by CheckHTTP instead of Check, and makes labels of the request, in place of those of the
	// transport layer. The flow's other labels override these; they travel in a header of at most 8192 bytes, from
	// which labels of baggage are left out if all do not fit, the largest first, and then defaults. What the agent wants done with the request is in
	// [Flow.HTTPAnswer]. CheckHTTP cannot look up caches: with a cache key the flow is Invalid. An engine ignores HTTP.
	// Nil: the flow is about no request.
	HTTP *HTTPRequest

	// IsFailure reports whether an error of the function makes the flow's status Error. Nil: every error does, unless
	// it comes from the caller's own cancellation, which is nobody's failure; an expired deadline is one. It is
	// called before the flow ends and must not block.
	IsFailure func(error) bool

	// inOrder is the Labels that Clone made and found in order.
	inOrder map[string]string
}

// Clone copies p with its maps and slices, for flows that start with the same parameters time and again: what is wrong
// with the labels is found out here, not by each flow. The copy's labels must not be changed, but Labels may be replaced.
func (p Params) Clone() Params {
	p.Labels = maps.Clone(p.Labels)
	p.GlobalCacheKeys = slices.Clone(p.GlobalCacheKeys)
	if p.HTTP != nil {
		r := *p.HTTP
		r.Headers = maps.Clone(r.Headers)
		p.HTTP = &r
	}
	p.inOrder = nil
	if labels.Check(p.Labels) == nil {
		p.inOrder = p.Labels
	}
	return p
}

// Equal reports whether p and q start flows alike, as far as can be seen: of functions it only sees if there is one. It
// is for tests, and package go-cmp finds it.
func (p Params) Equal(q Params) bool {
	return maps.Equal(p.Labels, q.Labels) && p.CheckTimeout == q.CheckTimeout && p.RampMode == q.RampMode &&
		p.OnUnreachable == q.OnUnreachable && p.ResultCacheKey == q.ResultCacheKey &&
		slices.Equal(p.GlobalCacheKeys, q.GlobalCacheKeys) && p.HTTP.equal(q.HTTP) && (p.IsFailure == nil) == (q.IsFailure == nil)
}

// checkLabels says what is wrong with the flow's own labels, unless Clone has looked.
func (p *Params) checkLabels() error {
	if p.Labels == nil || reflect.ValueOf(p.Labels).UnsafePointer() == reflect.ValueOf(p.inOrder).UnsafePointer() {
		return nil
	}
	return labels.Check(p.Labels)
}

// UnreachablePolicy is what becomes of a flow that nobody decides about.
type UnreachablePolicy uint8

// The policies.
const (
	FailOpen   UnreachablePolicy = iota // it runs
	FailClosed                          // it does not
)

// String gives the policy's name.
func (p UnreachablePolicy) String() string {
	switch p {
	case FailOpen:
		return "fail open"
	case FailClosed:
		return "fail closed"
	default:
		return fmt.Sprintf("UnreachablePolicy(%d)", uint8(p))
	}
}

// looksUp reports whether the flow looks up cache entries.
func (p *Params) looksUp() (bool, error) {
	switch {
	case p.ResultCacheKey == "" && len(p.GlobalCacheKeys) == 0:
		return false, nil
	case p.HTTP != nil:
		return false, errHTTPCache
	default:
		return true, bounds.CheckCacheKeys(p.ResultCacheKey, p.GlobalCacheKeys...)
	}
}

// tooManyLabels is the error for explicit labels that do not fit into a flow.
func tooManyLabels(n int) error {
	return fmt.Errorf("%d labels are more than %d", n, labels.MaxLabels)
}
