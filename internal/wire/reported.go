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
const (
	maxReported      = 64      // labels, unless policies name more
	maxReportedKey   = 255     // bytes
	maxReportedValue = 4096    // bytes; of a longer value the beginning is reported
	maxReportedText  = 3 << 17 // bytes of keys and values in all, 384 KiB
	maxReportedPoint = 4096    // bytes of the control point
)

// Answer is [Response] for clients across the network. Of too many labels it reports those that policies name, then those
// that are no headers, and then those with the smallest keys. It reports no value of a header that carries credentials.
func Answer(req *agentapi.Request, v *agentapi.Verdict, named map[string]bool) *checkv1.CheckResponse {
	all := req.Labels.Merged()
	m := response(req, v, reported(all, named))
	for key := range m.GetTelemetryFlowLabels() {
		if credential.HeaderLabel(key) {
			delete(m.GetTelemetryFlowLabels(), key)
		}
	}
	m.ControlPoint = Cut(req.ControlPoint, maxReportedPoint)
	return m
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
		if key == "" || len(key) > maxReportedKey || len(rest) == maxReported && compare(key, rest[maxReported-1]) > 0 {
			continue
		}
		i, _ := slices.BinarySearchFunc(rest, key, compare)
		rest = slices.Insert(rest[:min(len(rest), maxReported-1)], min(i, maxReported-1), key)
	}
	slices.Sort(first)
	rest = rest[:min(len(rest), max(maxReported-len(first), 0))]
	kept := make(map[string]string, len(first)+len(rest))
	room := maxReportedText
	for _, key := range slices.Concat(first, rest) {
		value := Cut(all[key], maxReportedValue)
		if room -= len(key) + len(value); room < 0 {
			break
		}
		kept[key] = value
	}
	return kept
}

// compare has headers after all other labels: a peer says how many there are.
func compare(a, b string) int {
	if ha, hb := strings.HasPrefix(a, headerLabels), strings.HasPrefix(b, headerLabels); ha != hb {
		if ha {
			return 1
		}
		return -1
	}
	return strings.Compare(a, b)
}

// fits reports whether all labels can be reported.
func fits(all map[string]string) bool {
	if len(all) > maxReported {
		return false
	}
	for key, value := range all {
		if key == "" || len(key) > maxReportedKey || len(value) > maxReportedValue {
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
