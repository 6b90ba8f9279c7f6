package flowctl

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/labels"
)

// maxPeerLabels bounds the bytes of labels from peers in a flow, with labelOverhead for each label. It leaves room in
// the 4 MiB that an agent reads of a check. Their number has no bound, so that a stranger who sends many labels cannot
// push out a label that a limiter needs.
const (
	maxPeerLabels = 1 << 20
	labelOverhead = 32
)

// fit returns an error if there are too many explicit labels, and bounds those of peers. The largest of these are left
// out, those of baggage first. Agents have another rule for labels beyond what they report, see package wire: an agent
// knows which labels policies name, and not where a label came from.
func (c *Client) fit(l *agentapi.Labels) error {
	if len(l.Params)+len(l.Context) > labels.MaxLabels {
		n := len(l.Params)
		for key := range l.Context {
			if _, both := l.Params[key]; !both {
				n++
			}
		}
		if n > labels.MaxLabels {
			return tooManyLabels(n)
		}
	}
	// This many are never too large.
	const few = maxPeerLabels / (labels.MaxKeyLen + labels.MaxValueLen + labelOverhead)
	if l.Shared == nil || len(l.Shared.Baggage)+len(l.Shared.Transport) <= few {
		return nil
	}
	room := maxPeerLabels - labelsSize(l.Shared.Transport)
	var left, more int
	l.Shared.Baggage, left = shed(l.Shared.Baggage, room)
	l.Shared.Transport, more = shed(l.Shared.Transport, maxPeerLabels)
	if left += more; left > 0 {
		c.labelLog.warn(c.logger, "headgate: labels were left out of a flow", "left_out", left)
	}
	return nil
}

func labelSize(key, value string) int { return len(key) + len(value) + labelOverhead }

func labelsSize(m map[string]string) int {
	size := 0
	for key, value := range m {
		size += labelSize(key, value)
	}
	return size
}

// shed returns the labels without the largest, so that the rest fits into the room, and how many it left out. If all
// fit, it returns m itself.
func shed(m map[string]string, room int) (kept map[string]string, left int) {
	size := labelsSize(m)
	if size <= room {
		return m, 0
	}
	kept = maps.Clone(m)
	for _, key := range bySize(m) {
		if size <= room {
			break
		}
		size -= labelSize(key, m[key])
		delete(kept, key)
		left++
	}
	return kept, left
}

// bySize returns the keys of labels, the largest label first.
func bySize(m map[string]string) []string {
	return slices.SortedFunc(maps.Keys(m), func(a, b string) int {
		return cmp.Or(labelSize(b, m[b])-labelSize(a, m[a]), strings.Compare(b, a))
	})
}
