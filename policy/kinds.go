package policy

import (
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/headgate-go/headgate/internal/components"
)

// An index is the place of a kind of component in the table of kinds.
type index int

const (
	rateLimiter index = iota
	concurrencyLimiter
	quotaScheduler
	concurrencyScheduler
	loadScheduler
	aimdLoadScheduler
	sampler
	loadRamp
	calendarQuota
	circuitBreaker
	count
)

// Kinds is how many kinds of components there are. Package engine has a row for each, or does not compile.
const Kinds = int(count)

// kinds has a row for each kind of component, in the order of the indices.
var kinds = [...]kindOf{ //nolint:gochecknoglobals // a table, never written to
	{"rate_limiter", RateLimiter{}, valueOf[RateLimiter], shares, []form{{
		"rate_limiter", "selectors parameters request_parameters headgate", "bucket_capacity fill_amount", "pass_through", (*decoder).rateLimiter,
	}}},
	{"concurrency_limiter", ConcurrencyLimiter{}, valueOf[ConcurrencyLimiter], shares, []form{{
		"concurrency_limiter", "selectors parameters request_parameters headgate", "max_concurrency", "pass_through", (*decoder).concurrencyLimiter,
	}}},
	{"quota_scheduler", QuotaScheduler{}, valueOf[QuotaScheduler], shares, []form{{
		"quota_scheduler", "selectors rate_limiter scheduler headgate", "bucket_capacity fill_amount", "pass_through", (*decoder).quotaScheduler,
	}}},
	{"concurrency_scheduler", ConcurrencyScheduler{}, valueOf[ConcurrencyScheduler], shares, []form{{
		"concurrency_scheduler", "selectors concurrency_limiter scheduler headgate", "max_concurrency", "pass_through", (*decoder).concurrencyScheduler,
	}}},
	{"load_scheduler", LoadScheduler{}, valueOf[LoadScheduler], measures, []form{{
		"load_scheduler", "parameters dry_run_config_key", "", "load_multiplier", (*decoder).loadScheduler,
	}}},
	{"aimd_load_scheduler", AIMDLoadScheduler{}, valueOf[AIMDLoadScheduler], measures, []form{{
		"aimd_load_scheduler", "parameters dry_run_config_key", "", aimdPorts, (*decoder).aimdLoadScheduler,
	}, {
		"adaptive_load_scheduler", "parameters dry_run_config_key", "", aimdPorts, (*decoder).adaptiveLoadScheduler,
	}}},
	{"sampler", Sampler{}, valueOf[Sampler], keepsNothing, []form{{
		"sampler", samplerKeys, "", "accept_percentage", (*decoder).sampler,
	}}},
	{"load_ramp", LoadRamp{}, valueOf[LoadRamp], shares, []form{{
		"load_ramp", samplerKeys + " headgate", "", "forward backward reset", (*decoder).loadRamp,
	}}},
	{"calendar_quota", CalendarQuota{}, valueOf[CalendarQuota], shares, []form{{
		"calendar_quota", "selectors parameters request_parameters headgate", "", "pass_through", (*decoder).calendarQuota,
	}}},
	{"circuit_breaker", CircuitBreaker{}, valueOf[CircuitBreaker], measures, []form{{
		"circuit_breaker", "selectors parameters request_parameters", "", "pass_through", (*decoder).circuitBreaker,
	}}},
}

// A component's method kind returns its index. This does not compile while an index has no row: the table would be
// shorter than Kinds.
var _ [Kinds]kindOf = kinds

// A kindOf is a row of the table of kinds.
type kindOf struct {
	name  string                              // in the engine's Stats, and in the IDs of components that have none of their own
	zero  Component                           // a value of the kind
	value func(c Component) (Component, bool) // the component as a value; false if it is of another kind
	store storing                             // whether its components share something by a store
	forms []form                              // how files say it
}

// A storing is what the components of a kind share by a store, or why they share nothing.
type storing int

const (
	shares       storing = iota // they have a field Local
	measures                    // nothing, because they measure their own process
	keepsNothing                // nothing, because they keep nothing
)

// A form is a key of flow_control in files, under which a component of the kind stands.
type form struct {
	key     string
	keys    string // the keys below it, except in_ports, out_ports and dry_run
	ports   string // the keys of in_ports that blueprint values have too, as numbers
	options string // the other keys of in_ports
	read    func(d *decoder, c component) Component
}

// formOf finds the form that has the key.
func formOf(key string) (form, bool) {
	for i := range kinds {
		for _, f := range kinds[i].forms {
			if f.key == key {
				return f, true
			}
		}
	}
	return form{}, false
}

// laterKinds are the flow_control components that cannot run.
const laterKinds = "aiad_load_scheduler private range_driven_load_scheduler"

// deciderKeys returns the keys of flow_control.
func deciderKeys() string {
	var keys []string
	for i := range kinds {
		for _, f := range kinds[i].forms {
			keys = append(keys, f.key)
		}
	}
	slices.Sort(keys)
	return strings.Join(keys, " ") + " " + laterKinds
}

// valueOf is the value function of a kind. Most components are values already, and not copied.
func valueOf[P Component](c Component) (Component, bool) {
	if _, ok := c.(P); ok {
		return c, true
	}
	if p, ok := components.Value[P](c); ok {
		return p, true
	}
	return nil, false
}

// asValue returns the component, or what it points to, as a value. If it cannot, wrong is what is wrong with the
// component.
func asValue(c Component) (value Component, wrong string) {
	for i := range kinds {
		if value, ok := kinds[i].value(c); ok {
			return value, ""
		}
	}
	switch v := reflect.ValueOf(c); {
	case !v.IsValid():
		return nil, "is nil"
	case v.Kind() == reflect.Pointer && v.IsNil():
		return nil, fmt.Sprintf("is a nil %T", c)
	default: // a struct that embeds a component has its methods
		return nil, fmt.Sprintf("is a %T; want one of this package's components, or a pointer to one", c)
	}
}

// An identifier gives the components of one policy their IDs, in their order.
type identifier struct{ seen [Kinds]int }

// id returns the component's own ID, or its kind and its index within the kind.
func (i *identifier) id(c Component) string {
	k := c.kind()
	n := i.seen[k]
	i.seen[k]++
	if id := c.id(); id != "" {
		return id
	}
	return fmt.Sprintf("%s.%d", kinds[k].name, n)
}

// Describe describes the policy's components, which must be valid. Package engine calls it.
func (p Policy) Describe() []components.Description {
	described := make([]components.Description, len(p.Components))
	var ids identifier
	for i, c := range p.Components {
		c, _ := asValue(c)
		names := c.reads
		c = reading(c, p.Labels)
		described[i] = components.Description{
			Kind: int(c.kind()), Name: kinds[c.kind()].name, ID: ids.id(c), Component: c, Reads: c.reads, Names: names,
		}
		if l, ok := c.(limited); ok {
			described[i].With = withOf(l)
		}
	}
	return described
}
