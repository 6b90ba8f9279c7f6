// Package flowinfo has what the other packages of Headgate need of a flow, and its users do not. The flow's context
// carries it.
package flowinfo

import (
	"context"
	"time"
)

// Info is what a flow's context tells of the flow. It is safe for concurrent use.
type Info interface {
	// DryRun reports whether no limit is in force for the flow: its client is nil or in dry run.
	DryRun() bool

	// ShortOfTime reports whether the flow was rejected because its caller had too little time, so that another caller,
	// which has more, could be let in.
	ShortOfTime() bool

	// LongestWait is the longest that a flow of the same client with the MaxWait and the CheckTimeout of its Params waits in
	// queues, if its context has no deadline. Without limit it is the longest duration.
	LongestWait(maxWait, checkTimeout time.Duration) time.Duration

	// Pauses shows the pauses of the flow's client; nil for a nil client.
	Pauses() Pauses

	// Closed gives channels that are closed when the flow's client is, and when its agent in this process is; nil for what
	// is never closed.
	Closed() (client, agent <-chan struct{})

	// ClosedError is the error of a flow at the same control point that waited when its client or engine was closed.
	ClosedError() error

	// LateRejection is the rejection of a Canceled flow whose answer came when its caller's context had ended; nil if
	// there was no such answer, or if it was no rejection.
	LateRejection() error

	// EndUnused ends a flow that was let in and did not run after all, as an error. It gives back what the flow was given,
	// tokens too, as far as the agent can be told.
	EndUnused(ctx context.Context)
}

// Pauses shows, for a client, the pauses of package httpguard's Transports. It is safe for concurrent use.
type Pauses interface {
	// Began notes that an upstream asked for a pause of the given length, at a control point and with an HTTP status.
	Began(ctx context.Context, controlPoint string, status int, pause time.Duration)

	// Refused notes that a request was not sent because of a pause, which has the given time left.
	Refused(ctx context.Context, controlPoint string, left time.Duration)
}

// Key is for the [Info] of a flow, in the flow's context.
type Key struct{}

// From finds the information about the innermost flow that ctx comes from.
func From(ctx context.Context) (info Info, ok bool) {
	info, ok = ctx.Value(Key{}).(Info)
	return info, ok
}
