package httpguard

import (
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"sync"
	"time"

	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/flowctl"
)

const (
	defaultMaxPause = time.Hour
	maxPauses       = 1024
)

// A PausedError is the error of a request that a [Transport] did not send, because the upstream has asked for a pause.
// It matches flowctl.ErrRejected, and errors.AsType finds a *flowctl.RejectedError in it: its HTTPStatus is what the
// upstream answered, and its RetryAfter what is left of the pause.
type PausedError struct {
	flowctl.RejectedError

	// Host is the host and port of the upstream, as in the request's URL. The error's text does not show it.
	Host string
}

// Error names the control point and what is left of the pause.
func (e *PausedError) Error() string {
	return fmt.Sprintf("headgate: start %q: paused by the upstream, retry after %s",
		e.ControlPoint, max(e.RetryAfter().Round(time.Millisecond), time.Millisecond))
}

// Format prints what Error gives, whatever the verb.
func (e *PausedError) Format(s fmt.State, verb rune) {
	_, _ = fmt.Fprintf(s, fmt.FormatString(s, verb), e.Error())
}

// GRPCStatus is that of the rejection, with the text of Error.
func (e *PausedError) GRPCStatus() *status.Status {
	p := e.RejectedError.GRPCStatus().Proto()
	p.Message = e.Error()
	return status.FromProto(p)
}

// Unwrap gives the *flowctl.RejectedError.
func (e *PausedError) Unwrap() error { return &e.RejectedError }

// A place is what a pause holds for.
type place struct{ controlPoint, host string }

type pause struct {
	until  time.Time
	status int
}

// pauses are those that upstreams asked for. The zero value has none.
type pauses struct {
	mu sync.Mutex
	at map[place]pause
}

// check gives the error of a request during a pause.
func (p *pauses) check(at place) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	found, ok := p.at[at]
	if !ok {
		return nil
	}
	wait := time.Until(found.until)
	if wait <= 0 {
		delete(p.at, at)
		return nil
	}
	rejected := &flowctl.RejectedError{ControlPoint: at.controlPoint, HTTPStatus: found.status}
	return &PausedError{RejectedError: *rejected.WithRetryAfter(wait), Host: at.host}
}

// heed begins a pause, or makes one longer, where the response asks for it.
func (p *pauses) heed(at place, resp *http.Response, longest time.Duration) {
	if resp.StatusCode != http.StatusTooManyRequests && resp.StatusCode != http.StatusServiceUnavailable {
		return
	}
	now := time.Now()
	wait := min(retryAfter(resp.Header, now), longest)
	if wait <= 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	asked := pause{now.Add(wait), resp.StatusCode}
	if found, ok := p.at[at]; ok && found.until.After(asked.until) {
		return
	} else if !ok {
		p.makeRoom()
	}
	p.at[at] = asked
}

// makeRoom lets the pause go that ends first, or has ended, where there are too many for another one.
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

// retryAfter is how long the header asks to wait; zero or less where it does not, or not in a way that is known.
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
		now = sent // clocks differ, and this is the one that then was read from
	}
	return then.Sub(now)
}
