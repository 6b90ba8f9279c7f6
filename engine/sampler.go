package engine

import (
	"context"
	"math"
	"math/rand/v2"
	"slices"

	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

// A sampler accepts a share of the flows. It gives them nothing, so there is nothing to give back.
type sampler struct {
	component  agentapi.Component
	percentage func(now int64) float64
	pass       []string // values of the label that are always accepted
	counts     *counts
	namer      keys.Namer

	engine *Engine
}

func newSampler(e *Engine, in *installed, p policy.Sampler, c agentapi.Component) (component, error) {
	if p.RampMode {
		in.stage = stageRamp
	}
	return samplerOf(e, in, p, c), nil
}

func samplerOf(e *Engine, in *installed, p policy.Sampler, c agentapi.Component) *sampler {
	in.selectors = p.Selectors
	c.LabelKey, c.DeniedStatus, c.DryRun = p.SessionLabel, p.DeniedStatus, p.DryRun
	s := &sampler{
		component:  c,
		percentage: func(int64) float64 { return p.AcceptPercentage },
		pass:       slices.Clone(p.PassThroughValues),
		counts:     new(counts),
		namer:      keys.NewNamer(p.SessionLabel, &e.secret),
		engine:     e,
	}
	s.component.Settler = s
	return s
}

func (s *sampler) ask(_ context.Context, req *agentapi.Request, a asking, d *agentapi.LimiterDecision) (int64, error) { //nolint:unparam // it is a decider
	s.decide(req, a.now, d)
	return a.now, nil
}

func (s *sampler) decide(req *agentapi.Request, now int64, d *agentapi.LimiterDecision) {
	d.Scope = agentapi.ScopeDefault
	if key := s.component.LabelKey; key != "" {
		d.Scope = agentapi.ScopeLabel
		d.Label, _ = req.Labels.Lookup(key)
	}
	if len(d.Label) > keys.MaxValue {
		d.Label = ""
		s.refuse(req, d, agentapi.CauseLongLabel)
		return
	}
	in := slices.Contains(s.pass, d.Label)
	switch percentage := s.percentage(now); {
	case in:
	case d.Label == "":
		in = drawn(percentage)
	default:
		in = sampled(d.Label, percentage)
	}
	d.Dropped = !in
	if d.Label != "" {
		d.Label = s.namer.Name(d.Label)
	}
	s.counts.decision(d)
}

// refuse decides about a late flow as about any other: a sampler gives it nothing.
func (s *sampler) refuse(req *agentapi.Request, d *agentapi.LimiterDecision, cause agentapi.Cause) {
	if cause == agentapi.CauseLate {
		s.decide(req, s.engine.now(), d)
		return
	}
	d.Scope, d.Dropped, d.Cause = agentapi.ScopeDefault, true, cause
	s.counts.decision(d)
}

// Settle reports false: a sampler gives flows nothing.
func (s *sampler) Settle(context.Context, *agentapi.LimiterDecision, agentapi.Outcome) bool {
	return false
}

func (s *sampler) identity() *agentapi.Component { return &s.component }

func (s *sampler) stats(now int64) ComponentStats {
	all := statsOf(&s.component, s.counts)
	all.AcceptPercentage = s.percentage(now)
	return all
}

// sampled reports whether the value is among the share of all values, in percent. It goes by the value's FNV-1a hash
// (Fowler, Noll and Vo; RFC 9923), as Aperture agents do: a value that is in at some percentage is in at every larger
// one, and in every process.
func sampled(value string, percentage float64) bool {
	hash := uint32(2166136261)
	for i := range len(value) {
		hash = (hash ^ uint32(value[i])) * 16777619
	}
	return percentage > 0 && float64(hash)/math.MaxUint32 <= percentage/100
}

// drawn reports whether a flow without a value to go by is among the share.
func drawn(percentage float64) bool { return 100*rand.Float64() < percentage }
