// Package canceled has the error of a call whose caller's context ended first.
package canceled

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/internal/deadline"
)

// An Error matches the error of the context that ended, and its cause. It does not show the cause: a program writes
// causes for its logs, and the text of a returned error reaches the peers of a gRPC server.
type Error struct{ *details }

// details are behind a pointer, because a verb that fits no pointer, such as %s, prints the fields of an error in an unexported
// field of a struct, and calls none of its methods.
type details struct {
	op, controlPoint string
	err, cause       error
}

// New makes the error of a call of the kind op at the control point, from a context's error and its cause.
func New(op, controlPoint string, err, cause error) *Error {
	made := &struct { // one allocation
		err     Error
		details details
	}{details: details{op, controlPoint, err, cause}}
	made.err.details = &made.details
	return &made.err
}

// Text is the text of a context's error. A context of the program's own may have others than those of package context,
// and their text is not shown either.
func Text(err error) string {
	if errors.Is(err, context.DeadlineExceeded) {
		return context.DeadlineExceeded.Error()
	}
	return context.Canceled.Error()
}

// Error names the control point, and how the context ended.
func (e *Error) Error() string {
	return fmt.Sprintf("headgate: %s %q: %s", e.op, e.controlPoint, Text(e.err))
}

// Format prints what Error gives, whatever the verb.
func (e *Error) Format(s fmt.State, verb rune) {
	_, _ = fmt.Fprintf(s, fmt.FormatString(s, verb), e.Error())
}

// LogValue is for the program's own logs: a group with the operation, the control point and how the context ended, and with
// the cause if the context was given one.
func (e *Error) LogValue() slog.Value {
	attrs := []slog.Attr{
		slog.String("op", e.op), slog.String("control_point", e.controlPoint), slog.String("ended", Text(e.err)),
	}
	if e.cause != nil && e.cause.Error() != e.err.Error() {
		attrs = append(attrs, slog.Any("cause", e.cause))
	}
	return slog.GroupValue(attrs...)
}

// Unwrap gives the context's error and the cause.
func (e *Error) Unwrap() []error { return []error{e.err, e.cause} }

// Timeout reports whether a deadline ended the context.
func (e *Error) Timeout() bool { return deadline.In(e.err) || deadline.In(e.cause) }

// Temporary is Timeout. It makes the error a net.Error.
func (e *Error) Temporary() bool { return e.Timeout() }

// GRPCStatus is DeadlineExceeded or Canceled, by how the context ended, with the text of Error. errors.As finds it
// before the status that the cause may have.
func (e *Error) GRPCStatus() *status.Status {
	code := codes.Canceled
	if errors.Is(e.err, context.DeadlineExceeded) {
		code = codes.DeadlineExceeded
	}
	return status.New(code, e.Error())
}
