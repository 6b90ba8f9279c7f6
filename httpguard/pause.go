package httpguard

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/flowinfo"
)

const (
	defaultMaxPause = time.Minute
	maxPauses       = 1024
)

// A PausedError is the error of a request that a [Transport] did not send, because the upstream has asked for a pause.
// It matches flowctl.ErrRejected, and errors.AsType finds a *flowctl.RejectedError in it: its HTTPStatus is what the
// upstream answered, and its RetryAfter what is left of the pause. The methods may be called on a nil pointer.
type PausedError struct {
	flowctl.RejectedError

	host *string // behind a pointer, which fmt does not follow where it calls no methods
}

func newPausedError(controlPoint, host string, status int, left time.Duration) *PausedError {
	rejected := &flowctl.RejectedError{ControlPoint: controlPoint, HTTPStatus: status}
	made := &struct { // one allocation
		err  PausedError
		host string
	}{PausedError{RejectedError: *rejected.WithRetryAfter(left)}, host}
	made.err.host = &made.host
	return &made.err
}

// Host is the host and port of the upstream, as in the request's URL; "" for an error that a program has made. The error's text
// does not show it.
func (e *PausedError) Host() string {
	if e == nil || e.host == nil {
		return ""
	}
	return *e.host
}

// Error names the control point and what is left of the pause.
func (e *PausedError) Error() string {
	if e == nil {
		return "<nil>"
	}
	return fmt.Sprintf("headgate: start %q: paused by the upstream, retry after %s",
		e.ControlPoint, max(e.RetryAfter().Round(time.Millisecond), time.Millisecond))
}

// Format prints what Error returns, whatever the verb.
func (e *PausedError) Format(s fmt.State, verb rune) {
	_, _ = fmt.Fprintf(s, fmt.FormatString(s, verb), e.Error())
}

// GRPCStatus is that of the rejection, with the text of Error.
func (e *PausedError) GRPCStatus() *status.Status {
	p := e.rejected().GRPCStatus().Proto()
	p.Message = e.Error()
	return status.FromProto(p)
}

// LogValue is for the program's own logs: a group with the control point, the reason, the status and what is left of the
// pause. It does not have the host, which is the value of a label.
func (e *PausedError) LogValue() slog.Value {
	if e == nil {
		return slog.Value{}
	}
	return slog.GroupValue(
		slog.String("control_point", e.ControlPoint),
		slog.String("reason", "paused by the upstream"),
		slog.Int("status", e.HTTPStatus),
		slog.Duration("retry_after", e.RetryAfter()),
	)
}

// Unwrap returns the *flowctl.RejectedError; nil for a nil pointer.
func (e *PausedError) Unwrap() error {
	if e == nil {
		return nil
	}
	return &e.RejectedError
}

// rejected returns the rejection, whose methods may be called on a nil pointer. The methods that would be promoted may not.
func (e *PausedError) rejected() *flowctl.RejectedError {
	if e == nil {
		return nil
	}
	return &e.RejectedError
}

// Is makes errors.Is(err, flowctl.ErrRejected) true.
func (e *PausedError) Is(target error) bool { return e.rejected().Is(target) }

// Cause is flowctl.CauseNone: no agent rejected the request.
func (e *PausedError) Cause() flowctl.RejectCause { return e.rejected().Cause() }

// Policy is "": no policy rejected the request.
func (e *PausedError) Policy() string { return e.rejected().Policy() }

// Component is "": no component rejected the request.
func (e *PausedError) Component() string { return e.rejected().Component() }

// LabelKey is "": the request was not limited by a label.
func (e *PausedError) LabelKey() string { return e.rejected().LabelKey() }

// RetryAfter is what is left of the pause.
func (e *PausedError) RetryAfter() time.Duration { return e.rejected().RetryAfter() }

// WithRetryAfter returns a copy of the rejection whose RetryAfter is the given time.
func (e *PausedError) WithRetryAfter(after time.Duration) *flowctl.RejectedError {
	return e.rejected().WithRetryAfter(after)
}

// A place is what a pause holds for.
type place struct {
	controlPoint string
	upstream     upstream
}

func placeOf(controlPoint string, u *url.URL) place {
	return place{controlPoint, upstreamOf(u)}
}

// clone copies the text of the place, so that the place does not keep a request in memory.
func (p place) clone() place {
	return place{strings.Clone(p.controlPoint), upstream{strings.Clone(p.upstream.host), strings.Clone(p.upstream.port)}}
}

type pause struct {
	until  time.Time
	status int
	seen   flowinfo.Pauses // of the client whose flow met the pause; nil for none

	client, agent <-chan struct{} // are closed when that client or its engine is
}

// pauses are those that upstreams asked for. The zero value has none.
type pauses struct {
	mu sync.Mutex
	at map[place]pause
}

// refuse returns the error of a request that is not sent because of a pause.
func (p *pauses) refuse(r *http.Request, controlPoint string, during pause, left time.Duration) error {
	if during.seen != nil {
		during.seen.Refused(r.Context(), controlPoint, left)
	}
	host := ""
	if r.URL != nil {
		host = r.URL.Host
	}
	return newPausedError(controlPoint, host, during.status, left)
}

// find returns the pause that holds for a request, and what is left of it; zero or less if there is none.
func (p *pauses) find(r *http.Request, controlPoint string) (pause, time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.at) == 0 {
		return pause{}, 0
	}
	at := placeOf(controlPoint, r.URL)
	found, ok := p.at[at]
	if !ok {
		return pause{}, 0
	}
	left := time.Until(found.until)
	if left <= 0 {
		delete(p.at, at)
	}
	return found, left
}

// heed begins a pause, or makes one longer, if the response to a flow's request asks for it. It does nothing for a flow
// without limits in force.
func (p *pauses) heed(flow context.Context, r *http.Request, controlPoint string, resp *http.Response, longest time.Duration) {
	if resp.StatusCode != http.StatusTooManyRequests && resp.StatusCode != http.StatusServiceUnavailable {
		return
	}
	now := time.Now()
	wait := min(retryAfter(resp.Header, now), longest)
	if wait <= 0 {
		return
	}
	info, ok := flowinfo.From(flow)
	if ok && info.DryRun() {
		return
	}
	asked := pause{until: now.Add(wait), status: resp.StatusCode}
	if ok {
		asked.seen = info.Pauses()
		asked.client, asked.agent = info.Closed()
	}
	if p.begin(placeOf(controlPoint, r.URL), asked) && asked.seen != nil {
		asked.seen.Began(flow, controlPoint, asked.status, wait)
	}
}

// begin begins the pause, unless there is one that ends later. It reports whether it did.
func (p *pauses) begin(at place, asked pause) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if found, ok := p.at[at]; ok && found.until.After(asked.until) {
		return false
	} else if !ok {
		p.makeRoom()
		at = at.clone()
	}
	p.at[at] = asked
	return true
}

// makeRoom drops the pause that ends first, or has ended, if there is no room for another one.
func (p *pauses) makeRoom() {
	if p.at == nil {
		p.at = make(map[place]pause)
	}
	if len(p.at) < maxPauses {
		return
	}
	var first place
	var ends time.Time
	for at, found := range p.at {
		if ends.IsZero() || found.until.Before(ends) {
			first, ends = at, found.until
		}
	}
	delete(p.at, first)
}

// retryAfter is how long the header asks to wait; zero or less if it does not, or if its form is unknown.
func retryAfter(h http.Header, now time.Time) time.Duration {
	text := h.Get("Retry-After")
	const most = math.MaxInt64 / int64(time.Second)
	seconds, err := strconv.ParseUint(text, 10, 64)
	switch {
	case errors.Is(err, strconv.ErrRange), err == nil && seconds > uint64(most):
		return math.MaxInt64
	case err == nil:
		return time.Duration(seconds) * time.Second
	}
	then, err := http.ParseTime(text)
	if err != nil {
		return 0
	}
	if sent, err := http.ParseTime(h.Get("Date")); err == nil {
		now = sent // the clock that then was read from, which may differ from ours
	}
	return then.Sub(now)
}
