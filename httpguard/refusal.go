package httpguard

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/canceled"
	"github.com/headgate-go/headgate/internal/flowinfo"
	"github.com/headgate-go/headgate/internal/wire"
)

// Answer answers a request with err, if err is the error of a flow that did not run, as a [Middleware] does by default: with
// the status, a Retry-After if it is known when a retry can succeed, and problem details. It reports whether it did. If not,
// it wrote nothing, and err is another error or nil. Call it before anything is written:
//
//	rates, err := guardedRates(r.Context())
//	if httpguard.Answer(w, r, err) {
//		return
//	}
//
// It finds the errors of functions that package headgate guards, of flows, and of a [Transport], also where they are wrapped:
//
//   - a *flowctl.RejectedError has its HTTPStatus, and so has a [PausedError];
//   - a *flowctl.UnreachableError has 503;
//   - an error that matches flowctl.ErrInvalid has 500;
//   - the error of a flow whose context ended has 408 if the request's context was canceled because the client disconnected,
//     and 503 otherwise.
//
// The response names no policy, label or host. Header fields that are there stay, such as those that a Middleware has set by
// [WithRateLimitHeaders]; only a Content-Length goes.
func Answer(w http.ResponseWriter, r *http.Request, err error) bool {
	said, ok := refusalOf(r.Context(), err)
	if !ok {
		return false
	}
	setRetryAfter(w.Header(), said.retryAfter)
	said.write(w)
	return true
}

// Problem answers a request whose flow does not run with flow.HTTPStatus and problem details, RFC 9457:
//
//	{"title":"Too Many Requests","status":429,"detail":"rate limited"}
//
// The detail is the kind of reason, and names neither the policy nor a label. A [Middleware] answers so by default.
func Problem(w http.ResponseWriter, _ *http.Request, flow *flowctl.Flow) {
	said, _ := refusalOf(flow.Context(), flow.Err())
	said.status = flow.HTTPStatus()
	said.write(w)
}

// PlainText answers a request whose flow does not run with flow.HTTPStatus and its text, for [WithOnReject].
func PlainText(w http.ResponseWriter, _ *http.Request, flow *flowctl.Flow) {
	http.Error(w, title(flow.HTTPStatus()), flow.HTTPStatus())
}

func title(status int) string { return cmp.Or(http.StatusText(status), "Rejected") }

// A refusal is what the peer may know of a flow that did not run.
type refusal struct {
	status     int
	detail     string // "" for the service's own mistake
	retryAfter time.Duration
}

// refusalOf returns what an error of a flow means for a request with the context ctx. ok is false for other errors.
func refusalOf(ctx context.Context, err error) (said refusal, ok bool) {
	if err == nil {
		return refusal{}, false
	}
	if errors.Is(err, flowctl.ErrRejected) {
		return rejection(err), true
	}
	if _, ok := errors.AsType[*flowctl.UnreachableError](err); ok {
		return refusal{status: http.StatusServiceUnavailable, detail: "nobody can say whether the request may run"}, true
	}
	if errors.Is(err, flowctl.ErrInvalid) {
		return refusal{status: http.StatusInternalServerError}, true
	}
	if _, ok := errors.AsType[*canceled.Error](err); !ok {
		return refusal{}, false
	}
	if errors.Is(ctx.Err(), context.Canceled) && context.Cause(ctx) == context.Canceled { //nolint:errorlint // as for flow.HTTPStatus
		return refusal{status: http.StatusRequestTimeout, detail: "the request was canceled"}, true
	}
	return refusal{status: http.StatusServiceUnavailable, detail: "the service ran out of time"}, true
}

// rejection is what an error says that matches flowctl.ErrRejected. A program can have made it, without a status.
func rejection(err error) refusal {
	rejected, ok := errors.AsType[*flowctl.RejectedError](err)
	if !ok || rejected == nil {
		rejected = new(flowctl.RejectedError)
	}
	said := refusal{status: rejected.HTTPStatus, detail: rejected.Reason.String(), retryAfter: rejected.RetryAfter()}
	if said.status < 400 || said.status > 599 {
		said.status = http.StatusServiceUnavailable
	}
	if _, ok := errors.AsType[*PausedError](err); ok {
		said.detail = "an upstream asks for a pause"
	}
	return said
}

// write answers with problem details.
func (r refusal) write(w http.ResponseWriter) {
	body, err := json.Marshal(struct {
		Title  string `json:"title"`
		Status int    `json:"status"`
		Detail string `json:"detail,omitempty"`
	}{title(r.status), r.status, r.detail})
	if err != nil { // strings and a number cannot fail
		body = []byte("{}")
	}
	h := w.Header()
	h.Del("Content-Length")
	h.Set("Content-Type", "application/problem+json")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(r.status)
	_, _ = w.Write(append(body, '\n')) // a caller that has left does not get it
}

func setRetryAfter(h http.Header, wait time.Duration) {
	if wait > 0 {
		h.Set("Retry-After", strconv.FormatInt(wholeSeconds(wait), 10))
	}
}

// wholeSeconds rounds up, because a request that comes back too early is rejected again.
func wholeSeconds(d time.Duration) int64 {
	seconds := int64(d / time.Second)
	if d%time.Second > 0 {
		seconds++
	}
	return seconds
}

// setRateLimit sets the fields for the limits in force that the flow met. Agents do not report how long their windows
// are.
func setRateLimit(h http.Header, flow *flowctl.Flow) {
	if info, ok := flowinfo.From(flow.Context()); ok && info.DryRun() {
		return
	}
	var limits, policies []string
	for _, d := range flow.CheckResponse().GetLimiterDecisions() {
		tokens, slots := counted(d)
		name := quoted(d.GetPolicyName() + "/" + d.GetComponentId())
		met := tokens != nil && d.GetReason() == 0 // else the flow has no label to limit it by
		if !met || d.GetDryRun() {
			continue
		}
		left := tokens.GetRemaining()
		if !slots && !d.GetDropped() && flow.Decision() == flowctl.Rejected { // by another limiter, so this one got its tokens back
			left += tokens.GetConsumed()
		}
		limit := name + ";r=" + integer(left)
		if wait := wire.Wait(d.GetWaitTime()); d.GetDropped() && wait > 0 {
			limit += ";t=" + strconv.FormatInt(wholeSeconds(wait), 10)
		}
		limits = append(limits, limit)
		capacity := capacityOf(tokens)
		leftOut := capacity == 0 && d.GetDropped() && d.GetQuotaSchedulerInfo() != nil // as agents do
		switch {
		case slots:
			policies = append(policies, name+";q="+integer(capacity)+`;qu="concurrent-requests"`)
		case !leftOut:
			policies = append(policies, name+";q="+integer(capacity))
		}
	}
	if len(limits) > 0 {
		h.Set("RateLimit", strings.Join(limits, ", "))
	}
	if len(policies) > 0 {
		h.Set("RateLimit-Policy", strings.Join(policies, ", "))
	}
}

// counted returns the tokens of a limiter or scheduler whose capacity callers can plan by, and whether they are slots.
// They are nil for a sampler, for a load scheduler, whose capacity changes with the load, for a circuit breaker, which has none,
// and for a limit that was not asked.
func counted(d *checkv1.LimiterDecision) (tokens *checkv1.LimiterDecision_TokensInfo, slots bool) {
	switch info := d.GetDetails().(type) {
	case *checkv1.LimiterDecision_RateLimiterInfo_:
		return info.RateLimiterInfo.GetTokensInfo(), false
	case *checkv1.LimiterDecision_QuotaSchedulerInfo_:
		return info.QuotaSchedulerInfo.GetTokensInfo(), false
	case *checkv1.LimiterDecision_ConcurrencyLimiterInfo_:
		return info.ConcurrencyLimiterInfo.GetTokensInfo(), true
	case *checkv1.LimiterDecision_ConcurrencySchedulerInfo_:
		return info.ConcurrencySchedulerInfo.GetTokensInfo(), true
	default:
		return nil, false
	}
}

// capacityOf returns the capacity of a limit. Agents report what is left of it, which may be a debt, and the difference to the
// capacity. So the sum is rounded twice. If no more than that is between it and a whole number, it is the whole number.
func capacityOf(tokens *checkv1.LimiterDecision_TokensInfo) float64 {
	const rounded = 0x1p-51 // twice, as a share of the larger number
	left, used := tokens.GetRemaining(), tokens.GetCurrent()
	capacity := left + used
	if whole := math.Round(capacity); math.Abs(capacity-whole) <= rounded*max(math.Abs(left), math.Abs(used)) {
		return whole
	}
	return capacity
}

// quoted is a string of structured fields, RFC 9651. Such a string holds printable ASCII only. Other bytes, and "%", become "%"
// and two digits, as in the RFC's Display Strings, which the draft has no place for.
func quoted(s string) string {
	text := []byte{'"'}
	for i := range len(s) {
		switch c := s[i]; {
		case c < ' ' || c > '~' || c == '%':
			text = fmt.Appendf(text, "%%%02x", c)
		case c == '"' || c == '\\':
			text = append(text, '\\', c)
		default:
			text = append(text, c)
		}
	}
	return string(append(text, '"'))
}

// integer is a count in structured fields: whole, not negative, of 15 digits at most.
func integer(f float64) string {
	const most = 999_999_999_999_999
	switch f = math.Floor(f); {
	case f >= most:
		return strconv.FormatInt(most, 10)
	case f > 0:
		return strconv.FormatInt(int64(f), 10)
	default: // also what is not a number
		return "0"
	}
}
