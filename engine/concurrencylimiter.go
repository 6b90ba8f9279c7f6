package engine

import (
	"github.com/headgate-go/headgate/engine/internal/slots"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

func newConcurrencyLimiter(e *Engine, in *installed, p policy.ConcurrencyLimiter, c agentapi.Component) (component, error) {
	in.selectors = p.Selectors
	c.LabelKey, c.DeniedStatus, c.Capacity, c.DryRun = p.LimitBy, p.DeniedStatus, p.Max, p.DryRun
	l := newLimiter(e, c, p.MaxIdle, &slots.Rule{Limit: p.Max, MaxInflight: min(int64(p.MaxInflight), source.Century), Leases: &e.leases})
	l.tokensLabel, l.passThrough = p.TokensLabel, p.PassThrough
	return l, nil
}
