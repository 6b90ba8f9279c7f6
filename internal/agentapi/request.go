package agentapi

import (
	"maps"
	"net/netip"
	"time"
)

// A Request is what a flow asks.
type Request struct {
	ControlPoint string
	Labels       Labels

	// Timeout is the longest that the answer may take, waits in queues included; 0 is no limit of its own. The
	// agent applies it, because a call within the process needs no timer.
	Timeout time.Duration
}

// NoWait is the shortest MaxWait: the flow does not wait.
const NoWait time.Duration = 1

// MaxWait is the longest that the flow may wait in queues, besides Timeout; 0 is no limit of its own.
func (r *Request) MaxWait() time.Duration {
	if r.Labels.Shared == nil || r.Labels.Shared.Waiting == nil {
		return 0
	}
	return r.Labels.Shared.Waiting.MaxWait
}

// Silence is how long a remote agent may bring no sign of life while the flow waits; 0 is no limit but Timeout.
func (r *Request) Silence() time.Duration {
	if r.Labels.Shared == nil || r.Labels.Shared.Waiting == nil {
		return 0
	}
	return r.Labels.Shared.Waiting.Silence
}

// Lookup names the cache entries to look up with the check; nil looks up none.
func (r *Request) Lookup() *Lookup {
	if r.Labels.Shared == nil {
		return nil
	}
	return r.Labels.Shared.Lookup
}

// RampMode reports whether the flow needs a ramp that lets it in.
func (r *Request) RampMode() bool { return r.Labels.Shared != nil && r.Labels.Shared.RampMode }

// Late reports that the client will not see the answer in time. Limiters reject such flows, because nothing would return
// what they granted.
func (r *Request) Late() bool { return r.Labels.Shared != nil && r.Labels.Shared.Late }

// DryRun reports whether the flow runs whatever the answer. No component makes it wait, and it keeps what components
// give it even if others drop it.
func (r *Request) DryRun() bool { return r.Labels.Shared != nil && r.Labels.Shared.DryRun }

// Crowded is closed when the flow should end its waits a twentieth of its time early; nil for never.
func (r *Request) Crowded() <-chan struct{} {
	if r.Labels.Shared == nil {
		return nil
	}
	return r.Labels.Shared.Crowded
}

// Session is the session that what the flow holds runs out with; zero for none.
func (r *Request) Session() [16]byte {
	if r.Labels.Shared == nil {
		return [16]byte{}
	}
	return r.Labels.Shared.Session
}

// Closing is closed when flows may not wait any longer, because their agent is about to stop; nil for never.
func (r *Request) Closing() <-chan struct{} {
	if r.Labels.Shared == nil {
		return nil
	}
	return r.Labels.Shared.Closing
}

// Labels are a flow's labels, in layers. Only Merged merges the layers: the embedded engine looks up one or two keys,
// and a merged map would be the most expensive part of a check. The maps do not change.
type Labels struct {
	Params  map[string]string
	Context map[string]string
	Shared  *Shared // nil: the layers below are empty, and the options are their zero values
}

// Shared is the part of a request that flows may share. Flows of a client that do not differ in it have the same one,
// which does not change. It is one object with two parts, because a flow has room for one pointer.
type Shared struct {
	Layers
	Options
}

// Layers are the layers of labels below those that the application sets for the flow.
type Layers struct {
	Baggage   map[string]string
	Transport map[string]string
	Defaults  map[string]string
}

// Options say what is asked of the agent besides its decision, and how. The zero value asks for nothing.
type Options struct {
	// Lookup names the cache entries to look up with the check; nil looks up none.
	Lookup *Lookup

	// HTTP is the request that the flow is about, for an agent that makes labels of it itself. It takes the place of
	// the transport's layer. Nil means that there are only labels.
	HTTP *HTTPRequest

	// Waiting says how long the flow may wait, apart from how long the agent may take. Nil means that Timeout bounds both.
	Waiting *Waiting

	// Service names the client's service, for selectors.
	Service string

	// Crowded is closed when so many checks are under way that the flow is to end its waits earlier. Nil means never.
	Crowded <-chan struct{}

	// Closing is closed when the agent is about to stop. Then the flow's waits end, and it is rejected. Nil means never.
	Closing <-chan struct{}

	// Session is the client's session, which lives at the agent. Slots that the flow takes run out with it. Zero means that
	// there is none.
	Session [16]byte

	RampMode bool // a ramp must let the flow in
	DryRun   bool // the flow runs whatever the answer
	Late     bool // the client will not see the answer in time
}

// Waiting is how long a flow may wait. See Request for its fields.
type Waiting struct {
	MaxWait time.Duration
	Silence time.Duration
}

// Lookup finds a label; the layer with the highest precedence wins.
func (l *Labels) Lookup(key string) (string, bool) {
	if v, ok := l.Params[key]; ok {
		return v, true
	}
	if v, ok := l.Context[key]; ok {
		return v, true
	}
	if l.Shared == nil {
		return "", false
	}
	if v, ok := l.Shared.Baggage[key]; ok {
		return v, true
	}
	if v, ok := l.Shared.Transport[key]; ok {
		return v, true
	}
	v, ok := l.Shared.Defaults[key]
	return v, ok
}

// Service names the client's service; "" when it has none.
func (l *Labels) Service() string {
	if l.Shared == nil {
		return ""
	}
	return l.Shared.Service
}

// HTTP is the request that the agent makes labels of; nil if there is none.
func (l *Labels) HTTP() *HTTPRequest {
	if l.Shared == nil {
		return nil
	}
	return l.Shared.HTTP
}

// Merged returns all labels as one map, which the caller must not change. It is one of the layers if the others are
// empty.
func (l *Labels) Merged() map[string]string {
	var layers [5]map[string]string
	n, size := 0, 0
	add := func(m map[string]string) {
		if len(m) > 0 {
			layers[n] = m
			n++
			size += len(m)
		}
	}
	if l.Shared != nil {
		add(l.Shared.Defaults)
		add(l.Shared.Transport)
		add(l.Shared.Baggage)
	}
	add(l.Context)
	add(l.Params)
	if n <= 1 {
		return layers[0]
	}
	merged := make(map[string]string, size)
	for _, m := range layers[:n] {
		maps.Copy(merged, m)
	}
	return merged
}

// HTTPRequest describes an HTTP request to an agent: all text is valid UTF-8, and within the bounds of labels.
type HTTPRequest struct {
	Method, Path, Host, Scheme, Protocol string

	Size                int64             // of the body in bytes; negative when unknown
	Headers             map[string]string // by names in lower case, without those that carry credentials
	Source, Destination netip.AddrPort    // zero when unknown

	// Own is the baggage header that the request came with. The one in Headers carries the flow's labels.
	Own string
}

// Lookup is the cache entries that a check looks up.
type Lookup struct {
	Result string   // "" looks up none
	Global []string // empty ones are skipped

	// Room takes room for a value of so many bytes in the answer, and reports whether there was room. The result's
	// value goes first. A value that does not fit is a miss. Values that fit are the cache's own, and must not be
	// changed. If Room is nil, all values fit and are copies.
	Room func(size int) bool
}
