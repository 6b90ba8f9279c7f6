package wire

import (
	"slices"
	"strings"
	"unicode/utf8"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/credential"
)

// What an answer tells of a flow's labels. SDKs refuse answers of more than 4 MiB, and run the flow then. So an answer is
// bounded whatever its request holds. A flow may have more labels and longer values than this: the engine sees them whole.
//
// Package agent decodes no more of the labels that no policy names, and picks them by [CompareReported] too: what it
// leaves out would not be reported. The rule of package flowctl for a flow with too many labels is another one. It says
// which labels a flow has at all, when nobody knows yet what policies name, and goes by where a label comes from.
const (
	MaxReported      = 64   // labels, unless policies name more
	MaxReportedKey   = 255  // bytes
	MaxReportedValue = 4096 // bytes; of a longer value the beginning is reported

	maxReportedText  = 3 << 17 // bytes of keys and values in all, 384 KiB
	maxReportedPoint = 4096    // bytes of the control point
)

// Answer is [Response] for clients across the network. Of too many labels it reports those that policies name, then those
// that are no headers, and then those with the smallest keys. It reports no value of a header that carries credentials.
// Of more decisions than fit into so many bytes it has the one that rejects the flow, then those that hold slots, then
// those that drop the flow. If not all slots fit, there is no answer and ok is false: the flow must hold none.
func Answer(req *agentapi.Request, v *agentapi.Verdict, named map[string]bool, room int) (m *checkv1.CheckResponse, ok bool) {
	decisions, ok := fit(req, v, room)
	if !ok {
		return nil, false
	}
	all := req.Labels.Merged()
	m = response(req, v, reported(all, named), decisions)
	for key := range m.GetTelemetryFlowLabels() {
		if credential.HeaderLabel(key) {
			delete(m.GetTelemetryFlowLabels(), key)
		}
	}
	m.ControlPoint = Cut(req.ControlPoint, maxReportedPoint)
	return m, true
}

// reported is what an answer tells of the labels, which may be the map itself.
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

// CompareReported says which of two labels is reported first: negative for a. A label of a header comes after all that are
// none, because a peer says how many headers there are; else the keys decide, which compare as byKey says.
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
