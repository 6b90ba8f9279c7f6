package httpguard_test

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// A peer does not slip a limit by a header whose end is cut off.
func TestLongHeadersSlipNoLimit(t *testing.T) {
	sides.Setup{Policies: sides.Policies(policy.RateLimiter{Selectors: []policy.Selector{{ControlPoint: "point", Labels: policy.LabelMatcher{
		Expression: policy.LabelMatches{Label: "http.request.header.user_agent", Regex: "(?i)bot"},
	}}}, Interval: 1})}.Over(t, sides.Engines, func(t *testing.T, side *sides.Side) {
		for _, tt := range []struct {
			name, agent string
			want        int
		}{
			{"another agent", "browser", http.StatusOK},
			{"another agent, long", strings.Repeat("a", 4092), http.StatusOK},
			{"short", "a bot", http.StatusTooManyRequests},
			{"long", strings.Repeat("a", 4000) + " bot", http.StatusTooManyRequests},
			{"cut", strings.Repeat("a", 5000) + " bot", http.StatusTooManyRequests},
			{"cut before a character", strings.Repeat("a", 4093) + "\U0001F916 bot", http.StatusTooManyRequests},
			{"repaired and cut", strings.Repeat("\xff", 2000) + " bot", http.StatusTooManyRequests},
		} {
			t.Run(tt.name, func(t *testing.T) {
				guarded := httpguard.Middleware(side.Client, "point", httpguard.WithHeaders("User-Agent"))(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
				w, r := httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/", nil)
				r.Header.Set("User-Agent", tt.agent)
				if guarded.ServeHTTP(w, r); w.Code != tt.want {
					t.Errorf("%d want %d", w.Code, tt.want)
				}
			})
		}
	})
}
