package wire

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
)

// The bounds of an answer, besides what it repeats of the question. Package flowctl accepts no more, and package agent
// sends no more: the flow would be Unreachable, and run. The bounds of one side derive from those of the other.
const (
	MaxAnswer   = 256 << 10 // bytes
	MaxElements = 4096      // messages, entries and elements of lists

	// MaxDecisions is the most bytes of decisions in the answer to Check. The rest of an answer is for texts of its own.
	MaxDecisions = MaxAnswer * 3 / 4

	// MaxHTTPDecisions is the same for the answer to CheckHTTP, which repeats its check response in base64.
	MaxHTTPDecisions = MaxDecisions * 3 / 7

	// MostDecisions is the most decisions in an answer. 512 elements are left for labels and cache keys.
	MostDecisions    = (MaxElements - 512) / decisionElements
	decisionElements = 4 // of a decision: itself, its wait, its details, and tokens in them

	// MaxEnd is the most bytes of the FlowEnd that a client sends. A reference to a slot is smaller than the decision that
	// has the slot. So one FlowEnd is enough for almost all answers.
	MaxEnd = MaxDecisions

	// mostEnded is the most slots of a FlowEnd that a client sends. The response has two elements for each, and repeats
	// the slot beside an error.
	mostEnded = 1024
)

// A Load is how much of an answer decisions take.
type Load struct {
	Number, Bytes int
}

// Fits reports whether the decisions fit into an answer with room for so many bytes of decisions.
func (l Load) Fits(room int) bool { return l.Number <= MostDecisions && l.Bytes <= room }

func (l Load) and(d *checkv1.LimiterDecision) Load { return Load{l.Number + 1, l.Bytes + sizeIn(d)} }

// sizeIn is the bytes of a message in a list of another one, where the list's field has a number below 16.
func sizeIn(m proto.Message) int { return 1 + protowire.SizeBytes(proto.Size(m)) }

// The ranks of decisions. Those of the first rank go into an answer first.
const (
	rankDecides = iota // it is why the flow is rejected
	rankHolds          // it names a slot, which comes back by that name
	rankTells          // it drops the flow, or the component goes by how the flow ends
	rankTries          // it names a slot of a component in dry run, which rejects no flow, not by its name's size either
	rankPasses
	ranks
)

func rankOf(v *agentapi.Verdict, d *agentapi.LimiterDecision) int {
	switch {
	case d.Dropped && d.Component == v.Rejection().By:
		return rankDecides
	case holds(d) && !d.Component.DryRun:
		return rankHolds
	case d.Dropped, d.Component.Outcomes:
		return rankTells
	case holds(d):
		return rankTries
	default:
		return rankPasses
	}
}

func holds(d *agentapi.LimiterDecision) bool { return d.Component.Slots && d.Slot() != 0 }

// fit returns the decisions that fit into room bytes, in order. If not all fit, they go in by rank, so that of 40,000
// only the first ones are built. It returns those that are left out although they hold slots, which are of components in dry
// run, and reports whether all other slots are among those that fit.
func fit(req *agentapi.Request, v *agentapi.Verdict, room int) (kept []*checkv1.LimiterDecision, unnamed []*agentapi.LimiterDecision, ok bool) {
	if v.Len() == 0 {
		return nil, nil, true
	}
	kept = make([]*checkv1.LimiterDecision, v.Len())
	var load Load
	take := func(i int) bool {
		m := decision(req, v.At(i))
		next := load.and(m)
		if !next.Fits(room) {
			return false
		}
		kept[i], load = m, next
		return true
	}
	all := v.Len() <= MostDecisions
	for i := 0; all && i < v.Len(); i++ {
		all = take(i)
	}
	if all {
		return kept, nil, true
	}
	clear(kept)
	load = Load{}
ranks:
	for rank := range ranks {
		for i := range v.Len() {
			if rankOf(v, v.At(i)) != rank || take(i) {
				continue
			}
			switch rank {
			case rankHolds:
				return nil, nil, false
			case rankTells, rankTries, rankPasses:
				break ranks
			}
		}
	}
	for i, m := range kept {
		if d := v.At(i); m == nil && holds(d) {
			unnamed = append(unnamed, d)
		}
	}
	return slices.DeleteFunc(kept, func(m *checkv1.LimiterDecision) bool { return m == nil }), unnamed, true
}

// maxBucketName is the longest value in the name of a bucket, in bytes.
const maxBucketName = 256

// MostLoad returns the most that the decisions of the components take of an answer, and the same for those that hold
// slots and are not in dry run.
func MostLoad(components []*agentapi.Component) (all, holding Load) {
	req := new(agentapi.Request)
	for _, c := range components {
		d := agentapi.LimiterDecision{Component: c, Remaining: 0.1, Consumed: 0.1, Scope: agentapi.ScopeDefault}
		if c.LabelKey != "" {
			d.Scope, d.Label = agentapi.ScopeLabel, strings.Repeat("x", maxBucketName)
		}
		d.Hold(1<<64 - 1)
		m := decision(req, &d)
		all = all.and(m)
		if c.Slots && !c.DryRun {
			holding = holding.and(m)
		}
	}
	return all, holding
}

// Ended returns how many of the slots a client names in one FlowEnd: as many as fit, and at least one.
func Ended(controlPoint string, refs []*checkv1.InflightRequestRef) int {
	refs = refs[:min(len(refs), mostEnded)]
	size := 1 + protowire.SizeBytes(len(controlPoint))
	for i, ref := range refs {
		if size += sizeIn(ref); size > MaxEnd && i > 0 {
			return i
		}
	}
	return len(refs)
}
