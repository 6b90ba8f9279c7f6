package wire

import (
	"slices"
	"strings"
	"unicode/utf8"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/credential"
)

// The bounds of a flow's labels in an answer. SDKs refuse answers of more than 4 MiB, and then run the flow. So an
// answer is bounded, whatever its request holds. A flow may have more labels and longer values: the engine sees them
// whole.
//
// Of labels that no policy names, package agent decodes only those that would be reported, and picks them by
// [CompareReported] too. Package flowctl has another rule for a flow with too many labels. It decides which labels the
// flow has at all, before it is known what policies name. So it goes by where a label comes from.
const (
	MaxReported      = 64   // labels, unless policies name more
	MaxReportedKey   = 255  // bytes
	MaxReportedValue = 4096 // bytes; of a longer value the beginning is reported

	maxReportedText  = 3 << 17 // bytes of keys and values in all, 384 KiB
	maxReportedPoint = 4096    // bytes of the control point
)

// Answer is [Response] for clients across the network. If there are too many labels, those that policies name go first,
// then those that are no headers, then those with the smallest keys. It reports no label that carries
// credentials. If the decisions do not fit into room bytes, the one that rejects the flow goes first, then those that
// hold slots, then those that drop the flow. If not all slots fit, ok is false and there is no answer: the flow must
// hold no slot. Slots of components in dry run need not fit: the flow must give back those that are unnamed.
func Answer(req *agentapi.Request, v *agentapi.Verdict, named map[string]bool, room int) (m *checkv1.CheckResponse, unnamed []*agentapi.LimiterDecision, ok bool) {
	decisions, unnamed, ok := fit(req, v, room)
	if !ok {
		return nil, nil, false
	}
	all := req.Labels.Merged()
	m = response(req, v, reported(all, named), decisions)
	for key := range m.GetTelemetryFlowLabels() {
		if credential.Named(key) {
			delete(m.GetTelemetryFlowLabels(), key)
		}
	}
	m.ControlPoint = Cut(req.ControlPoint, maxReportedPoint)
	return m, unnamed, true
}

// reported returns the labels that an answer reports. The map may be all itself.
func reported(all map[string]string, named map[string]bool) map[string]string {
	if fits(all) {
		return all
	}
	var first, rest []string // of the rest those with the smallest keys, in order
	for key := range all {
		if _, ok := named[key]; ok {
			first = append(first, key)
			continue
		}
		if key == "" || len(key) > MaxReportedKey || len(rest) == MaxReported && compare(key, rest[MaxReported-1]) > 0 {
			continue
		}
		i, _ := slices.BinarySearchFunc(rest, key, compare)
		rest = slices.Insert(rest[:min(len(rest), MaxReported-1)], min(i, MaxReported-1), key)
	}
	slices.Sort(first)
	rest = rest[:min(len(rest), max(MaxReported-len(first), 0))]
	kept := make(map[string]string, len(first)+len(rest))
	room := maxReportedText
	for _, key := range slices.Concat(first, rest) {
		value := Cut(all[key], MaxReportedValue)
		if room -= len(key) + len(value); room < 0 {
			break
		}
		kept[key] = value
	}
	return kept
}

func compare(a, b string) int {
	return CompareReported(strings.HasPrefix(a, HeaderLabel), strings.HasPrefix(b, HeaderLabel), strings.Compare(a, b))
}

// CompareReported orders labels as answers report them: it is negative if a goes first. Labels of headers go last,
// because a peer controls how many there are. Otherwise the result is byKey, the comparison of the keys.
func CompareReported(aIsHeader, bIsHeader bool, byKey int) int {
	switch {
	case aIsHeader == bIsHeader:
		return byKey
	case aIsHeader:
		return 1
	default:
		return -1
	}
}

// fits reports whether all labels can be reported.
func fits(all map[string]string) bool {
	if len(all) > MaxReported {
		return false
	}
	for key, value := range all {
		if key == "" || len(key) > MaxReportedKey || len(value) > MaxReportedValue {
			return false
		}
	}
	return true
}

// Cut returns the longest prefix of s that has at most n bytes and splits no rune.
func Cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}
