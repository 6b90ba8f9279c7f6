// Package metertest is an OpenTelemetry meter provider that keeps what it is shown, for tests.
package metertest

import (
	"context"
	"maps"
	"strings"
	"sync"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
)

// A Provider keeps what is counted and recorded, and asks what is observed when it is read. The zero value is ready.
type Provider struct {
	noop.MeterProvider

	// Err is what making an instrument fails with.
	Err error

	mu        sync.Mutex
	sums      map[string]float64
	callbacks map[*registration]metric.Callback
}

// Read returns the values, by "name key=value …" with the keys in order. Of a histogram it is how often something was
// recorded.
func (p *Provider) Read(ctx context.Context) map[string]float64 {
	p.mu.Lock()
	o := &observer{seen: make(map[string]float64)}
	maps.Copy(o.seen, p.sums)
	var callbacks []metric.Callback
	for _, f := range p.callbacks {
		callbacks = append(callbacks, f)
	}
	p.mu.Unlock()
	for _, f := range callbacks {
		if err := f(ctx, o); err != nil {
			o.seen[err.Error()] = 1 // which no test expects
		}
	}
	return o.seen
}

func (p *Provider) add(name string, set attribute.Set, n float64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sums == nil {
		p.sums = make(map[string]float64)
	}
	p.sums[key(name, set)] += n
}

// key is what Read shows a value by.
func key(name string, set attribute.Set) string {
	parts := []string{name}
	for _, a := range set.ToSlice() {
		parts = append(parts, string(a.Key)+"="+a.Value.String())
	}
	return strings.Join(parts, " ")
}

// Meter makes instruments of the provider.
func (p *Provider) Meter(string, ...metric.MeterOption) metric.Meter { return meter{p: p} }

type meter struct {
	noop.Meter
	p *Provider
}

func (m meter) Int64Counter(name string, _ ...metric.Int64CounterOption) (metric.Int64Counter, error) {
	return counter{p: m.p, name: name}, m.p.Err
}

func (m meter) Float64Histogram(name string, _ ...metric.Float64HistogramOption) (metric.Float64Histogram, error) {
	return histogram{p: m.p, name: name}, m.p.Err
}

func (m meter) Int64ObservableCounter(name string, _ ...metric.Int64ObservableCounterOption) (metric.Int64ObservableCounter, error) {
	return observableCounter{name: name}, m.p.Err
}

func (m meter) Int64ObservableGauge(name string, _ ...metric.Int64ObservableGaugeOption) (metric.Int64ObservableGauge, error) {
	return observableGauge{name: name}, m.p.Err
}

func (m meter) Float64ObservableCounter(name string, _ ...metric.Float64ObservableCounterOption) (metric.Float64ObservableCounter, error) {
	return observableFloatCounter{name: name}, m.p.Err
}

func (m meter) Float64ObservableGauge(name string, _ ...metric.Float64ObservableGaugeOption) (metric.Float64ObservableGauge, error) {
	return observableFloatGauge{name: name}, m.p.Err
}

func (m meter) RegisterCallback(f metric.Callback, _ ...metric.Observable) (metric.Registration, error) {
	m.p.mu.Lock()
	defer m.p.mu.Unlock()
	if m.p.callbacks == nil {
		m.p.callbacks = make(map[*registration]metric.Callback)
	}
	r := &registration{p: m.p}
	m.p.callbacks[r] = f
	return r, m.p.Err
}

type registration struct {
	noop.Registration
	p *Provider
}

func (r *registration) Unregister() error {
	r.p.mu.Lock()
	defer r.p.mu.Unlock()
	delete(r.p.callbacks, r)
	return nil
}

type counter struct {
	noop.Int64Counter
	p    *Provider
	name string
}

func (c counter) Add(_ context.Context, n int64, opts ...metric.AddOption) {
	c.p.add(c.name, metric.NewAddConfig(opts).Attributes(), float64(n))
}

type histogram struct {
	noop.Float64Histogram
	p    *Provider
	name string
}

func (h histogram) Record(_ context.Context, _ float64, opts ...metric.RecordOption) {
	h.p.add(h.name, metric.NewRecordConfig(opts).Attributes(), 1)
}

type (
	observableCounter struct {
		noop.Int64ObservableCounter
		name string
	}
	observableGauge struct {
		noop.Int64ObservableGauge
		name string
	}
	observableFloatCounter struct {
		noop.Float64ObservableCounter
		name string
	}
	observableFloatGauge struct {
		noop.Float64ObservableGauge
		name string
	}
)

func (o observableCounter) String() string      { return o.name }
func (o observableGauge) String() string        { return o.name }
func (o observableFloatCounter) String() string { return o.name }
func (o observableFloatGauge) String() string   { return o.name }

// observer keeps what callbacks observe. If they observe something twice, it is the sum, as in OpenTelemetry's SDK.
type observer struct {
	noop.Observer
	seen map[string]float64
}

func (o *observer) ObserveInt64(of metric.Int64Observable, n int64, opts ...metric.ObserveOption) {
	o.observe(of, float64(n), opts)
}

func (o *observer) ObserveFloat64(of metric.Float64Observable, n float64, opts ...metric.ObserveOption) {
	o.observe(of, n, opts)
}

func (o *observer) observe(of any, n float64, opts []metric.ObserveOption) {
	named, ok := of.(interface{ String() string })
	if !ok {
		return
	}
	o.seen[key(named.String(), metric.NewObserveConfig(opts).Attributes())] += n
}
