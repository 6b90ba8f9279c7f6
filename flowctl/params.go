package flowctl

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"time"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/bounds"
	"github.com/headgate-go/headgate/labels"
)

// Params says how one flow is started. The zero value is right for most.
type Params struct {
	// Labels describe the flow to the policies. They override all other labels of the flow. A label beyond the limits
	// of package labels makes the flow Invalid: use labels.Repair for values that a peer sent. The map must not change
	// until the flow has ended.
	Labels map[string]string

	// CheckTimeout is how long the agent may take to answer. Without MaxWait it is also the longest that the flow waits
	// in a queue. Zero means the client's. A negative value sets no limit except the context's; a client's dry run
	// still has one. CheckTimeout should be well below the deadlines of callers: if a caller's deadline passes first, the flow is
	// Canceled, and does not fail open. Across the network it should be well above 10 ms: with less time left, an agent
	// rejects a flow that a limiter or scheduler acts on.
	CheckTimeout time.Duration

	// MaxWait is the longest that the flow waits in queues, apart from CheckTimeout. Zero means that CheckTimeout bounds
	// the whole check. A negative value lets the flow wait until the context's deadline. [NoWait] has the agent decide at
	// once. A policy's queue timeout can end the wait earlier. A client's dry run ignores MaxWait: no flow of it waits.
	//
	// With MaxWait, CheckTimeout is how long a remote agent may be silent while the flow waits; an engine in this
	// process ignores it. If the check takes longer than CheckTimeout, or than 1 s, the client asks the agent once a
	// second for a sign of life. If none comes for CheckTimeout, and for at least 1 s, the flow is Unreachable. So an
	// agent that hangs is found within CheckTimeout and 2 s, however long flows wait. On a connection to several agents,
	// another agent may give the sign.
	//
	// An agent of Headgate ends the wait after MaxWait. Other agents do not know MaxWait: the deadline of the check,
	// which is MaxWait and CheckTimeout from now, ends the wait there. If CheckTimeout is negative, the deadline has
	// 200 ms in its place. So such an agent may hold a flow with NoWait for the check timeout. The client does not use
	// a shorter deadline: a flow whose answer is late is Unreachable, and may run.
	MaxWait time.Duration

	// RampMode is for new code: the flow runs only if a ramp of the policies accepts it. If no usable answer comes, it
	// does not run.
	RampMode bool

	// OnUnreachable decides whether the flow runs if no usable answer comes. Zero is FailOpen: it runs.
	OnUnreachable UnreachablePolicy

	// ResultCacheKey names an entry of the control point's result cache. It is looked up with the check; see
	// [Flow.ResultCache]. On a hit the flow skips quota and load schedulers. Empty means none.
	ResultCacheKey string

	// GlobalCacheKeys name entries of the cache that all control points share; see [Flow.GlobalCache]. There are at
	// most 64 keys of up to 255 bytes. Their values must come to less than 16 MiB: a remote agent's answer cannot hold
	// more, and makes the flow Unreachable.
	GlobalCacheKeys []string

	// HTTP describes the HTTP request that the flow is about, for agents whose policies classify requests. A remote
	// agent is then asked by CheckHTTP instead of Check. It makes labels of the request, in place of those of the
	// transport layer. The flow's other labels override these. They also travel in a header of at most 8192 bytes: see
	// [HTTPRequest] for what becomes of a flow whose labels do not fit. [Flow.HTTPAnswer] has what the agent wants done
	// with the request. CheckHTTP cannot look up caches, so with a cache key the flow is Invalid. An engine ignores HTTP.
	// Nil means no request.
	HTTP *HTTPRequest

	// IsFailure reports whether an error of the function makes the flow's status Error. Nil means that every error
	// does, except one that comes from the caller's own cancellation. An expired deadline is a failure. IsFailure is
	// called before the flow ends and must not block.
	IsFailure func(error) bool

	// inOrder is the map of labels that Clone made and found valid.
	inOrder map[string]string
}

// NoWait is for Params.MaxWait: the agent decides at once, and rejects a flow that would have to wait in a queue.
const NoWait = agentapi.NoWait

// Clone copies p with its maps and slices. It is for flows that start with the same parameters again and again: Clone
// checks the labels, and the flows need not. The labels in the copy's map must not change, but Labels may be replaced.
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

// Equal reports whether p and q start flows alike. Of functions it only sees whether they are nil. It is for tests, and
// package go-cmp finds it.
func (p Params) Equal(q Params) bool {
	return maps.Equal(p.Labels, q.Labels) && p.CheckTimeout == q.CheckTimeout && p.MaxWait == q.MaxWait && p.RampMode == q.RampMode &&
		p.OnUnreachable == q.OnUnreachable && p.ResultCacheKey == q.ResultCacheKey &&
		slices.Equal(p.GlobalCacheKeys, q.GlobalCacheKeys) && p.HTTP.equal(q.HTTP) && (p.IsFailure == nil) == (q.IsFailure == nil)
}

// checkLabels returns what is wrong with the flow's own labels, unless Clone has checked them.
func (p *Params) checkLabels() error {
	if p.Labels == nil || reflect.ValueOf(p.Labels).UnsafePointer() == reflect.ValueOf(p.inOrder).UnsafePointer() {
		return nil
	}
	return labels.Check(p.Labels)
}

// UnreachablePolicy says what happens to a flow that no agent decides about.
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
