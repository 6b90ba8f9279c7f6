// Package deadline finds deadlines in errors, and makes errors that answer for those that they wrap.
package deadline

import (
	"context"
	"errors"
	"fmt"
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

// Errorf is [fmt.Errorf]. If there is a deadline in what the error wraps, it is a net.Error that reports a timeout: net, net/http and os
// ask only the error itself, and none that it wraps. Use it wherever an error of ours wraps that of a call with a context.
func Errorf(format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	if !In(err) {
		return err
	}
	return passed{err}
}

// passed is an error with a deadline in it.
type passed struct{ error }

func (p passed) Unwrap() error { return p.error }

// Timeout and Temporary make it a net.Error.
func (passed) Timeout() bool   { return true }
func (passed) Temporary() bool { return true }
