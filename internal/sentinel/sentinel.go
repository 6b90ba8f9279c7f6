// Package sentinel has the errors of flows that packages match which do not import flowctl. Package flowctl exports them.
package sentinel

import "errors"

var (
	// ErrRejected is flowctl.ErrRejected.
	ErrRejected = errors.New("headgate: flow rejected")

	// ErrUnreachable is flowctl.ErrUnreachable.
	ErrUnreachable = errors.New("headgate: agent unreachable")
)
