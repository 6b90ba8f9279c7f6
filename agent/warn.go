package agent

import (
	"fmt"
	"slices"

	"github.com/headgate-go/headgate/internal/wire"
)

// Warnings lists what a restart has lost or would lose, see [WithState], and what the engine's policies ask for and a server cannot
// do, the most important first:
//
//   - control points where a flow may hold more slots than an answer can name: the flow is rejected then,
//   - selectors that name a service: they pick no flow of a client's, because the protocol has no place for the client's
//     service,
//   - control points with more components than an answer may have room for: it leaves out decisions that hold no slot.
//
// Whether an answer has room depends on the length of label values. The warnings assume 256 bytes. They matter more
// than the engine's own.
func (s *Service) Warnings() []string {
	var slots, decisions []string
	for at, components := range s.engine.Acting() {
		all, holding := wire.MostLoad(components)
		if answer := tooSmall(holding); answer != "" {
			slots = append(slots, fmt.Sprintf("control point %q: a flow that takes slots of all %d components is rejected if its "+
				"slots do not fit into %s", at, holding.Number, answer))
		}
		if answer := tooSmall(all); answer != "" {
			decisions = append(decisions, fmt.Sprintf("control point %q: the decisions of all %d components may not fit into %s: it "+
				"leaves out those that hold no slot", at, all.Number, answer))
		}
	}
	return slices.Concat(s.memory.warnings(), slots, s.engine.ServiceWarnings(), decisions)
}

// tooSmall names the answer that the load does not fit into; "" for none.
func tooSmall(l wire.Load) string {
	switch {
	case !l.Fits(wire.MaxDecisions):
		return "an answer"
	case !l.Fits(wire.MaxHTTPDecisions):
		return "an answer to CheckHTTP"
	default:
		return ""
	}
}
