package engine

import (
	"math"
	"math/rand/v2"
	"slices"

	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

// A sampler accepts a share of the flows. It has nothing that it could give, and so nothing to take back.
type sampler struct {
	component  agentapi.Component
	percentage func(now int64) float64
	pass       []string // values of the label that are always accepted
	counts     *counts
	namer      keys.Namer

	engine *Engine
	ramp   *ramp // that the percentage moves along; nil where it does not move
}

func newSampler(e *Engine, p policy.Sampler, c agentapi.Component) *sampler {
	c.Kind = agentapi.KindSampler
	if p.RampMode {
		c.Kind = agentapi.KindRampSampler
	}
	c.LabelKey, c.DeniedStatus, c.DryRun = p.SessionLabel, p.DeniedStatus, p.DryRun
	s := &sampler{
		component:  c,
		percentage: func(int64) float64 { return p.AcceptPercentage },
		pass:       slices.Clone(p.PassThroughValues),
		counts:     new(counts),
		namer:      keys.NewNamer(p.SessionLabel, e.secret[:]),
		engine:     e,
	}
	s.component.Limiter = s
	return s
}

func newLoadRamp(e *Engine, p policy.LoadRamp, c agentapi.Component) *sampler {
	s := newSampler(e, policy.Sampler{
		SessionLabel:      p.SessionLabel,
		PassThroughValues: p.PassThroughValues,
		RampMode:          true,
		DeniedStatus:      p.DeniedStatus,
		DryRun:            p.DryRun,
	}, c)
	s.ramp = newRamp(p, e.now())
	s.percentage = s.ramp.percentage
	return s
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

// refuse decides about a flow that comes too late as about any: a sampler gives it nothing.
func (s *sampler) refuse(req *agentapi.Request, d *agentapi.LimiterDecision, cause agentapi.Cause) {
	if cause == agentapi.CauseLate {
		s.decide(req, s.engine.now(), d)
		return
	}
	d.Scope, d.Dropped, d.Cause = agentapi.ScopeDefault, true, cause
	s.counts.decision(d)
}

func (s *sampler) giveBack(int64, *agentapi.LimiterDecision, bool) bool { return false }
func (s *sampler) sweep(int64, bool)                                    {}
func (s *sampler) vacant(int64) bool                                    { return true }
func (s *sampler) retire()                                              {}
func (s *sampler) overflow() uint64                                     { return 0 }
func (s *sampler) identity() *agentapi.Component                        { return &s.component }

// sampled reports whether the value is among the share of all values, in percent: by its FNV-1a hash (Fowler, Noll and Vo;
// RFC 9923), as Aperture agents have it, so that a value which is in at some percentage is in at every larger one, and
// everywhere alike.
func sampled(value string, percentage float64) bool {
	hash := uint32(2166136261)
	for i := range len(value) {
		hash = (hash ^ uint32(value[i])) * 16777619
	}
	return percentage > 0 && float64(hash)/math.MaxUint32 <= percentage/100
}

// drawn reports whether a flow without a value to go by is among the share.
func drawn(percentage float64) bool { return 100*rand.Float64() < percentage }
