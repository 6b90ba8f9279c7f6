package flowctl

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/labels"
)

// maxPeerLabels is how many bytes of labels that peers control a flow carries, with labelOverhead for each. It leaves room in
// the 4 MiB that an agent reads of a check. There is no bound on their number: a label that a limiter goes by must not give
// way because a stranger sends many.
const (
	maxPeerLabels = 1 << 20
	labelOverhead = 32
)

// fit says what is wrong with the number of explicit labels, and bounds those of peers. Of these the largest give way, those
// of baggage first. An agent's rule for labels beyond what it reports is another one, see package wire: it knows what
// policies name, and not where a label came from.
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
	// As many as this are never too large.
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

// shed is the labels without the largest that do not fit into the room, and how many these are. It is m itself where all fit.
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

// bySize is the keys of labels, the largest label first.
func bySize(m map[string]string) []string {
	return slices.SortedFunc(maps.Keys(m), func(a, b string) int {
		return cmp.Or(labelSize(b, m[b])-labelSize(a, m[a]), strings.Compare(b, a))
	})
}
