package httpguard

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/flowinfo"
	"github.com/headgate-go/headgate/internal/wire"
)

// Problem answers a request whose flow does not run with flow.HTTPStatus and problem details, RFC 9457:
//
//	{"title":"Too Many Requests","status":429,"detail":"rate limited"}
//
// The detail is the kind of reason, and names neither the policy nor a label. A [Middleware] answers so by default.
func Problem(w http.ResponseWriter, _ *http.Request, flow *flowctl.Flow) {
	body, err := json.Marshal(struct {
		Title  string `json:"title"`
		Status int    `json:"status"`
		Detail string `json:"detail,omitempty"`
	}{title(flow.HTTPStatus()), flow.HTTPStatus(), detail(flow)})
	if err != nil { // strings and a number cannot fail
		body = []byte("{}")
	}
	h := w.Header()
	h.Del("Content-Length")
	h.Set("Content-Type", "application/problem+json")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(flow.HTTPStatus())
	_, _ = w.Write(append(body, '\n')) // a caller that has left does not get it
}

// PlainText answers a request whose flow does not run with flow.HTTPStatus and its text, for [WithOnReject].
func PlainText(w http.ResponseWriter, _ *http.Request, flow *flowctl.Flow) {
	http.Error(w, title(flow.HTTPStatus()), flow.HTTPStatus())
}

func title(status int) string { return cmp.Or(http.StatusText(status), "Rejected") }

// detail is what the peer may know of the reason.
func detail(flow *flowctl.Flow) string {
	switch flow.Decision() {
	case flowctl.Rejected:
		return flow.RejectReason().String()
	case flowctl.Unreachable:
		return "nobody can say whether the request may run"
	case flowctl.Canceled:
		if flow.HTTPStatus() == http.StatusServiceUnavailable {
			return "the service ran out of time"
		}
		return "the request was canceled"
	default: // the service's own mistake
		return ""
	}
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
		capacity := tokens.GetRemaining() + tokens.GetCurrent()
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
