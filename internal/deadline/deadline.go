// Package deadline finds deadlines in errors.
package deadline

import (
	"context"
	"errors"
	"os"
	"slices"
)

// In reports whether there is a deadline that passed anywhere in err's tree. Errors that wrap others answer by it in
// their method Timeout, which is what net and net/http ask.
func In(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) || timeoutIn(err)
}

// timeoutIn asks each error of the tree, where errors.As would take the answer of the first one.
func timeoutIn(err error) bool {
	if t, ok := err.(interface{ Timeout() bool }); ok && t.Timeout() {
		return true
	}
	switch w := err.(type) { //nolint:errorlint // this is the walk that errors.As does
	case interface{ Unwrap() error }:
		return timeoutIn(w.Unwrap())
	case interface{ Unwrap() []error }:
		return slices.ContainsFunc(w.Unwrap(), timeoutIn)
	default:
		return false
	}
}
