package httpguard

import (
	"cmp"
	"encoding/json"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/headgate-go/headgate/flowctl"
)

// Problem answers a request whose flow does not run with flow.HTTPStatus and problem details, RFC 9457:
//
//	{"title":"Too Many Requests","status":429,"detail":"rate limited"}
//
// It tells the kind of reason, and neither the policy nor a label. It is what a [Middleware] does by default.
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
	_, _ = w.Write(append(body, '\n')) // who does not wait for the answer does not get it
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

// wholeSeconds rounds up: who comes back too early is rejected again.
func wholeSeconds(d time.Duration) int64 {
	seconds := int64(d / time.Second)
	if d%time.Second > 0 {
		seconds++
	}
	return seconds
}

// setRateLimit tells of the limiters that the flow met. An agent does not say how long their windows are.
func setRateLimit(h http.Header, flow *flowctl.Flow) {
	var limits, policies []string
	for _, d := range flow.CheckResponse().GetLimiterDecisions() {
		tokens, unit := d.GetRateLimiterInfo().GetTokensInfo(), ""
		if tokens == nil {
			tokens, unit = d.GetConcurrencyLimiterInfo().GetTokensInfo(), `;qu="concurrent-requests"`
		}
		name, ok := quoted(d.GetPolicyName() + "/" + d.GetComponentId())
		met := tokens != nil && d.GetReason() == 0 // else the flow has no label to limit it by
		if !ok || !met {
			continue
		}
		left := tokens.GetRemaining()
		if unit == "" && !d.GetDropped() && flow.Decision() == flowctl.Rejected { // by another, and so it gave back what it took
			left += tokens.GetConsumed()
		}
		limit := name + ";r=" + integer(left)
		if wait := d.GetWaitTime().AsDuration(); d.GetDropped() && wait > 0 {
			limit += ";t=" + strconv.FormatInt(wholeSeconds(wait), 10)
		}
		limits = append(limits, limit)
		policies = append(policies, name+";q="+integer(tokens.GetRemaining()+tokens.GetCurrent())+unit)
	}
	if len(limits) > 0 {
		h.Set("RateLimit", strings.Join(limits, ", "))
		h.Set("RateLimit-Policy", strings.Join(policies, ", "))
	}
}

// quoted is a string of structured fields, RFC 9651; ok is false where there is none.
func quoted(s string) (text string, ok bool) {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return "", false
		}
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`, true
}

// integer is a count in structured fields: whole, not negative, of 15 digits at most.
func integer(f float64) string {
	const most = 999_999_999_999_999
	switch f = math.Floor(f); {
	case f >= most:
		return strconv.Itoa(most)
	case f > 0:
		return strconv.FormatInt(int64(f), 10)
	default: // also what is not a number
		return "0"
	}
}
