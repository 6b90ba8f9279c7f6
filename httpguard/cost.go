package httpguard

import (
	"math"
	"net/http"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/decimal"
)

// WithCostHeader settles the flow of each request for the tokens that a header of the response says, or a trailer, as
// flowctl's Flow.Settle does. The label is the TokensLabel of limiters and schedulers.
//
// A [Transport] reads the header when the response begins, and the trailer when the body has been read to its end. If there are
// both, the trailer counts. If the body is closed before, or breaks off, there is no trailer. A [Middleware] reads the header and
// the trailers that the handler has set when the handler returns, not when it panics. They are sent as always: let the handler
// call Settle for what callers must not see.
//
// If the response has neither, the flow keeps its charge. The same holds if the value is no decimal number from 0 up, or if there
// are several values: the client logs this once a minute. The sender of the response decides what the flow costs. By default no
// header is read. Repeated use adds more labels.
func WithCostHeader(label, header string) Option {
	c := costHeader{label, http.CanonicalHeaderKey(header)}
	return option(func(g *guard) { g.costs = append(g.costs, c) })
}

// A costHeader is the header that says what a flow costs by a label.
type costHeader struct{ label, name string }

type costHeaders []costHeader

// settle settles the flow for what the headers say.
func (all costHeaders) settle(flow *flowctl.Flow, h http.Header) {
	for _, c := range all {
		c.settle(flow, h[c.name])
	}
}

// settleWritten is settle for the headers that a handler has set, and its trailers.
func (all costHeaders) settleWritten(flow *flowctl.Flow, h http.Header) {
	for _, c := range all {
		c.settle(flow, h[c.name])
		c.settle(flow, h[http.TrailerPrefix+c.name])
	}
}

func (c costHeader) settle(flow *flowctl.Flow, values []string) {
	if len(values) == 0 {
		return
	}
	tokens, ok := decimal.Parse(values[0])
	if !ok || len(values) > 1 {
		tokens = math.NaN() // which Settle ignores, and logs
	}
	flow.Settle(c.label, tokens)
}
