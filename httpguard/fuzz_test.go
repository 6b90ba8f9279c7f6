package httpguard_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/labels"
)

// FuzzLabels checks that no request, whatever it is made of, makes a flow invalid, replaces a label of the application,
// or gets a credential to the agent.
func FuzzLabels(f *testing.F) {
	f.Add("GET", "/orders/7?token=secret", "shop.example", "X-User-Tier", "platinum", "user_tier=platinum,region=eu")
	f.Add("POST", "/%zz/\xff", "\xff", "Authorization", "Bearer secret", "authorization=secret,http.method=GET")
	f.Add("", "*", "", "x_api_key", "secret", "x-api-key=secret")
	f.Add(strings.Repeat("M", 5000), "/"+strings.Repeat("ü", 5000), "h", strings.Repeat("K", 300), strings.Repeat("v", 5000), strings.Repeat("k=v,", 100))
	f.Add("GET", "/", "h", "Baggage", "user_tier=platinum", "=,;=%,user_tier=platinum;p=1")

	client := newEngine(f)
	explicit := map[string]string{"user_tier": "free", "http.method": "FIXED", "http.request.header.x_user_tier": "free"}
	f.Fuzz(func(t *testing.T, method, target, host, header, value, bag string) {
		r := (&http.Request{
			Method:     method,
			RequestURI: target,
			Host:       host,
			Proto:      "HTTP/1.1",
			Header:     http.Header{"Baggage": {bag}},
		}).WithContext(labels.With(t.Context(), "region", "eu"))
		r.Header.Add(header, value)
		r.Header.Add(header, value)

		ran := false
		httpguard.Middleware(client, point,
			httpguard.WithHeaders(header, "X-User-Tier"),
			httpguard.WithParams(func(*http.Request) flowctl.Params { return flowctl.Params{Labels: explicit} }),
		)(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			ran = true
			sent := labelsOf(t, r)
			if err := labels.Check(sent); err != nil {
				t.Error(err)
			}
			for key, want := range explicit {
				if sent[key] != want {
					t.Errorf("%s = %q, want %q", key, sent[key], want)
				}
			}
			if sent["region"] != "eu" {
				t.Errorf("region = %q, want eu", sent["region"])
			}
			for key := range sent {
				name := strings.TrimPrefix(strings.ToLower(key), "http.request.header.")
				if slices.Contains([]string{"authorization", "cookie", "x-api-key"}, strings.ReplaceAll(name, "_", "-")) {
					t.Errorf("%q got to the agent", key)
				}
			}
		})).ServeHTTP(httptest.NewRecorder(), r)
		if !ran {
			t.Error("the request did not run")
		}
	})
}

// FuzzRetryAfter checks that no Retry-After, whatever it says, stops requests for longer than it may, or makes a request
// fail that was sent.
func FuzzRetryAfter(f *testing.F) {
	f.Add(429, "7", "")
	f.Add(503, "Sat, 01 Jan 2000 00:01:00 GMT", "Sat, 01 Jan 2000 00:00:00 GMT")
	f.Add(503, "Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 01 Jan 0001 00:00:00 GMT")
	f.Add(429, "9223372037", "")
	f.Add(429, "-1", "today")
	client := newEngine(f)
	f.Fuzz(func(t *testing.T, status int, after, date string) {
		rt := httpguard.NewTransport(client, point, responding(status, http.NoBody, "Retry-After", after, "Date", date))
		r := httptest.NewRequestWithContext(context.WithoutCancel(t.Context()), http.MethodGet, "/", nil)
		if _, err := rt.RoundTrip(r); err != nil {
			t.Fatal(err)
		}
		_, err := rt.RoundTrip(r)
		if err == nil {
			return
		}
		if wait := retryAfter(t, err); status != 429 && status != 503 || wait <= 0 || wait > time.Minute {
			t.Errorf("paused for %v after %d", wait, status)
		}
	})
}
