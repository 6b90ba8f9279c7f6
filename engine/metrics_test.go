package engine_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.opentelemetry.io/otel/metric"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/metertest"
	"github.com/headgate-go/headgate/policy"
)

// Two engines that report to one provider differ by their names in every metric.
func TestEnginesAreToldApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		provider := new(metertest.Provider)
		for _, name := range []string{"a", "b"} {
			e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{
				policy.QuotaScheduler{ID: "x", Selectors: policy.At("point"), Capacity: 1, Fill: 1, Interval: time.Second},
				policy.RateLimiter{ID: "y", Selectors: policy.At("point"), Capacity: 1, Fill: 1, Interval: time.Millisecond, LimitBy: "user"},
				policy.ConcurrencyLimiter{ID: "z", Selectors: policy.At("point"), Max: 1, MaxInflight: time.Minute},
				policy.Sampler{ID: "s", Selectors: policy.At("point"), AcceptPercentage: 100},
			}}}, engine.WithName(name))
			if err != nil {
				t.Fatal(err)
			}
			defer e.Close()
			if err := e.Instrument(provider); err != nil {
				t.Fatal(err)
			}
			client, err := flowctl.New(e, flowctl.WithCheckTimeout(time.Minute))
			if err != nil {
				t.Fatal(err)
			}
			for range 3 { // of which two wait
				end(client.Start(t.Context(), "point", flowctl.Params{}))
			}
		}
		<-time.After(time.Minute) // all buckets are full again
		shown := provider.Read(t.Context())
		waits := 0
		for key, n := range shown {
			name, ok := "a", strings.Contains(key, " engine=a")
			if !ok {
				name, ok = "b", strings.Contains(key, " engine=b")
			}
			other := strings.NewReplacer(" engine=a", " engine=b", " engine=b", " engine=a").Replace(key)
			if !ok || shown[other] != n {
				t.Errorf("%s = %v, of engine %q, and %v of the other one", key, n, name, shown[other])
			}
			if strings.HasPrefix(key, "request_in_queue_duration_ms") && n == 2 {
				waits++
			}
		}
		if len(shown) < 20 || waits != 2 {
			t.Errorf("%d numbers are shown, of %d histograms of waits want 2", len(shown), waits)
		}
	})
}

// A gauge is no total.
func TestGaugesAreNoTotals(t *testing.T) {
	e, err := engine.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	gauges := new(gauges)
	if err := e.Instrument(gauges); err != nil {
		t.Fatal(err)
	}
	if i := slices.IndexFunc(gauges.names, func(n string) bool { return strings.HasSuffix(n, "_total") }); i >= 0 || len(gauges.names) < 8 {
		t.Errorf("gauges = %q want none called a total", gauges.names)
	}
}

// gauges is a provider that notes the names of gauges.
type gauges struct {
	metertest.Provider
	names []string
}

func (g *gauges) Meter(name string, opts ...metric.MeterOption) metric.Meter {
	return gaugeMeter{g.Provider.Meter(name, opts...), g}
}

type gaugeMeter struct {
	metric.Meter
	of *gauges
}

func (m gaugeMeter) Int64ObservableGauge(name string, opts ...metric.Int64ObservableGaugeOption) (metric.Int64ObservableGauge, error) {
	m.of.names = append(m.of.names, name)
	return m.Meter.Int64ObservableGauge(name, opts...)
}

func (m gaugeMeter) Float64ObservableGauge(name string, opts ...metric.Float64ObservableGaugeOption) (metric.Float64ObservableGauge, error) {
	m.of.names = append(m.of.names, name)
	return m.Meter.Float64ObservableGauge(name, opts...)
}

// A circuit breaker has no tokens, so no gauge of tokens shows it.
func TestBreakersHaveNoTokens(t *testing.T) {
	provider := new(metertest.Provider)
	e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{
		circuitBreaker(nil), policy.RateLimiter{Selectors: policy.At("point"), Capacity: 1, Interval: time.Hour},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if err := e.Instrument(provider); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"token_bucket_capacity", "token_bucket_available_tokens"} {
		if got := fmt.Sprint(provider.Read(t.Context())); strings.Count(got, name) != 1 {
			t.Errorf("%s is shown %d times want once", name, strings.Count(got, name))
		}
	}
}
