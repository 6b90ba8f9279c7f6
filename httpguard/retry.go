package httpguard

import (
	"context"
	"io"
	"math"
	"net/http"
	"time"

	"github.com/headgate-go/headgate/internal/adaptor"
	"github.com/headgate-go/headgate/internal/canceled"
	"github.com/headgate-go/headgate/internal/flowinfo"
	"github.com/headgate-go/headgate/internal/retries"
)

const (
	// defaultRetryWait bounds the waits before retries, because the upstream says how long they are.
	defaultRetryWait = time.Minute

	// What is read of a response before its request is sent again, so that the connection can be used again: so many
	// bytes, for so long.
	maxDrain     = 64 << 10
	maxDrainTime = time.Second
)

// left is how much longer a request may wait that has waited already. sent reports whether it was sent before.
func (g *guard) left(waited time.Duration, sent bool) time.Duration {
	switch {
	case g.maxWait < 0:
		return math.MaxInt64
	case g.maxWait > 0:
		return g.maxWait - waited
	case sent:
		return defaultRetryWait - waited
	default:
		return 0
	}
}

// A sending is a request on its way to the upstream. It is used by one goroutine.
type sending struct {
	transport    *Transport
	request      *http.Request // the one to send next, whose body is still there
	controlPoint string
	attempt      int // how often it was sent
	waited       time.Duration
}

// admit starts the flow of the request when no pause holds. If there is an error, no flow is left.
func (s *sending) admit() (started, error) {
	t, r := s.transport, s.request
	for {
		found, left := t.pauses.find(r, s.controlPoint)
		for ; left > 0; found, left = t.pauses.find(r, s.controlPoint) {
			if err := s.waitOut(found, left); err != nil {
				return started{}, err
			}
		}
		flow := t.guard.start(r.Context(), s.controlPoint, outgoing(r))
		if !flow.ShouldRun() {
			err := flow.Err()
			adaptor.End(r.Context(), flow.Flow)
			return started{}, err
		}
		if found, left = t.pauses.find(r, s.controlPoint); left <= 0 {
			return flow, nil
		}
		// The pause began while the flow waited. The flow cannot wait on, because it has what others need.
		adaptor.EndUnused(r.Context(), flow.Flow)
		if err := s.waitOut(found, left); err != nil {
			return started{}, err
		}
	}
}

// waitOut waits until a pause is over. It returns an error if that takes too long.
func (s *sending) waitOut(found pause, left time.Duration) error {
	ctx := s.request.Context()
	wait, ok := s.transport.rules.Wait(ctx, left, s.transport.guard.left(s.waited, s.attempt > 0))
	if !ok {
		return s.transport.pauses.refuse(s.request, s.controlPoint, found, left)
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	return s.await(ctx, timer, wait, found, left)
}

// await waits for the timer, which was set to the wait. After it a pause is over that has so much left. That the timer is late does not
// count as waited: otherwise several waits would not fit whose sum does.
func (s *sending) await(ctx context.Context, timer *time.Timer, wait time.Duration, during pause, left time.Duration) error {
	begin := time.Now()
	end := retries.Await(ctx, timer, during.client, during.agent)
	took := time.Since(begin)
	s.waited += min(took, wait)
	switch end {
	case retries.Canceled:
		return canceled.New("start", s.controlPoint, ctx.Err(), context.Cause(ctx))
	case retries.Closed: // a shutdown sends nothing
		return s.transport.pauses.refuse(s.request, s.controlPoint, during, max(left-took, 0))
	default:
		return nil
	}
}

// again waits until the request can be sent again, and reports whether to send it. If it returns false and no error, the
// response is the caller's.
func (s *sending) again(resp *http.Response, sent *trip) (bool, error) {
	decided := false
	defer func() {
		if !decided { // the body or GetBody panics, and nobody gets the response
			sent.fail()
		}
	}()
	retry, err := s.decide(resp, sent)
	decided = true
	return retry, err
}

// decide is again, without the end of the flow after a panic.
func (s *sending) decide(resp *http.Response, sent *trip) (bool, error) {
	rules, r := s.transport.rules, s.request
	if rules.Last(s.attempt) || resp.StatusCode != http.StatusTooManyRequests && resp.StatusCode != http.StatusServiceUnavailable {
		return false, nil
	}
	info, ok := flowinfo.From(sent.flow.Flow.Context())
	if !ok || info.DryRun() {
		return false, nil
	}
	after := retryAfter(resp.Header, time.Now())
	if after <= 0 {
		return false, nil
	}
	if _, left := s.transport.pauses.find(r, s.controlPoint); left > after { // another response asked for more
		after = left
	}
	wait, ok := rules.Wait(r.Context(), after, s.transport.guard.left(s.waited, true))
	if !ok || !rules.Budget.Withdraw() {
		return false, nil
	}
	next, ok := repeated(r)
	if !ok {
		rules.Budget.Return()
		return false, nil
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	begin := time.Now()
	sent.drop(resp.Body, wait)
	drained := time.Since(begin)
	drained = min(drained, wait)
	s.request, s.waited = next, s.waited+drained
	during := pause{status: resp.StatusCode, seen: info.Pauses()}
	during.client, during.agent = info.Closed()
	if err := s.await(r.Context(), timer, wait-drained, during, after-drained); err != nil {
		rules.Budget.Return()
		return false, err
	}
	return true, nil
}

// repeated returns the request with its body from the beginning; false if the body cannot be sent again.
func repeated(r *http.Request) (*http.Request, bool) {
	if r.Body == nil || r.Body == http.NoBody {
		return r, true
	}
	if r.GetBody == nil {
		return nil, false
	}
	body, err := r.GetBody()
	if err != nil || body == nil {
		return nil, false
	}
	next := r.WithContext(r.Context())
	next.Body = body
	return next, true
}

// drop ends the flow of a response that nobody reads. It reads the body to its end, if that is near, so that the
// connection can be used again.
func (t *trip) drop(body io.ReadCloser, most time.Duration) {
	if body == nil {
		return
	}
	late := time.AfterFunc(min(most, maxDrainTime), t.cancel)
	defer late.Stop()
	_, _ = io.CopyN(io.Discard, body, maxDrain)
	_ = body.Close()
}
