package httpguard_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/w3cbaggage"
	"github.com/headgate-go/headgate/labels"
)

// No verb shows labels and results that the context of a request carries, although net/http keeps it in an unexported field.
func TestPrintedRequestsTellNoSecrets(t *testing.T) {
	const secret = "sesame"
	client := newEngine(t)
	request := func(ctx context.Context) *http.Request {
		return httptest.NewRequestWithContext(ctx, http.MethodGet, "/", nil)
	}
	handled := func(r *http.Request) (got *http.Request) {
		httpguard.Middleware(client, point, httpguard.WithParams(func(*http.Request) flowctl.Params {
			return flowctl.Params{Labels: map[string]string{"user": secret}}
		}))(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got = r })).ServeHTTP(httptest.NewRecorder(), r)
		return got
	}
	for name, r := range map[string]*http.Request{
		"labels.With":             request(labels.With(t.Context(), "user", secret)),
		"labels.WithTransport":    request(labels.WithTransport(t.Context(), map[string]string{"user": secret})),
		"fallback.WithLast":       request(fallback.WithLast(t.Context(), secret, time.Time{})),
		"a baggage header":        request(w3cbaggage.With(t.Context(), "user="+secret)),
		"a handler's":             handled(request(t.Context())),
		"a handler's with labels": handled(request(labels.With(t.Context(), "user", secret))),
		"a child's":               request(labels.With(handled(request(t.Context())).Context(), "a", secret)),
	} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			for _, value := range []any{r, *r, struct{ r *http.Request }{r}} {
				if text := fmt.Sprintf(verb, value); strings.Contains(text, secret) {
					t.Errorf("%s: %s of a %T shows the value: %s", name, verb, value, text)
				}
			}
		}
	}
}
