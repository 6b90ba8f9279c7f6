package adaptor

import (
	"context"
	"errors"
	"io"
	"sync/atomic"

	"github.com/headgate-go/headgate/flowctl"
)

// An Ender ends a flow whose call can be over for several reasons, which several goroutines may see. The first reason
// counts. Later calls do nothing, and do not wait for the first. [NewEnder] makes one. It must not be copied, and is safe
// for concurrent use.
type Ender struct {
	Flow *flowctl.Flow // which may be settled; it does not change

	ctx    context.Context // that the flow ends with
	forget func() bool     // stops the wait for a context; nil without one
	ended  atomic.Bool
}

// NewEnder makes an Ender of a flow that runs. The flow ends with ctx, see [flowctl.Flow.End].
func NewEnder(ctx context.Context, flow *flowctl.Flow) Ender { return Ender{Flow: flow, ctx: ctx} }

// End ends the flow, with the status that it derives from err. It also ends the flow if Params.IsFailure panics.
func (e *Ender) End(err error) {
	if e.forget != nil {
		e.forget()
	}
	e.end(err)
}

// EndAsIs ends the flow with the status that it has.
func (e *Ender) EndAsIs() {
	if e.forget != nil {
		e.forget()
	}
	if !e.ended.Swap(true) {
		End(e.ctx, e.Flow)
	}
}

// EndStream is End for the error of a stream of messages, where io.EOF says that all have been received.
func (e *Ender) EndStream(err error) {
	if errors.Is(err, io.EOF) {
		err = nil
	}
	e.End(err)
}

// Fail ends the flow as Error, as after a panic.
func (e *Ender) Fail() {
	e.Flow.SetStatus(flowctl.StatusError)
	e.End(nil)
}

// EndAfter also ends the flow when ctx ends, with what errOf makes of the context's error. It is called before all other
// methods, and once.
func (e *Ender) EndAfter(ctx context.Context, errOf func(error) error) {
	e.forget = context.AfterFunc(ctx, func() { e.end(errOf(ctx.Err())) }) // not by End: forget may not be set yet
}

func (e *Ender) end(err error) {
	if e.ended.Swap(true) {
		return
	}
	defer End(e.ctx, e.Flow) // also when IsFailure panics
	e.Flow.SetError(err)
}
