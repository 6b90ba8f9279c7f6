package flowctl

import (
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

// shed returns the labels without the largest, so that the rest fits into the room, and how many it left out. Of labels
// of one size it leaves out those with the greatest keys. If all fit, it returns m itself.
func shed(m map[string]string, room int) (kept map[string]string, left int) {
	if labelsSize(m) <= room {
		return m, 0
	}
	// A peer may send a hundred thousand labels, so they are not sorted, and what is kept is a map without their room.
	count := make(map[int]int)
	for key, value := range m {
		count[labelSize(key, value)]++
	}
	n, limit, fit := 0, 0, 0 // how many are kept, the size of which some are, and how many of these
	for _, limit = range slices.Sorted(maps.Keys(count)) {
		fit = min(max(room, 0)/limit, count[limit])
		n += fit
		if fit < count[limit] {
			break
		}
		room -= fit * limit
	}
	kept = make(map[string]string, n)
	some := make([]string, 0, count[limit])
	for key, value := range m {
		switch size := labelSize(key, value); {
		case size < limit:
			kept[key] = value
		case size == limit:
			some = append(some, key)
		}
	}
	least(some, fit)
	for _, key := range some[:fit] {
		kept[key] = m[key]
	}
	return kept, len(m) - n
}

// least moves the n least keys to the front. The keys differ, and are in the order of a map, which no peer can choose.
func least(keys []string, n int) {
	for from, to := 0, len(keys); to-from > 1; {
		pivot := keys[from+(to-from)/2]
		i, j := from, to-1
		for i <= j {
			for keys[i] < pivot {
				i++
			}
			for keys[j] > pivot {
				j--
			}
			if i <= j {
				keys[i], keys[j] = keys[j], keys[i]
				i++
				j--
			}
		}
		switch {
		case n <= j:
			to = j + 1
		case n >= i:
			from = i
		default:
			return
		}
	}
}

// bySize returns the keys of labels, the largest label first.
func bySize(m map[string]string) []string {
	type sized struct {
		key  string
		size int
	}
	all := make([]sized, 0, len(m)) // because a peer may send a hundred thousand, and looking one up takes time
	for key, value := range m {
		all = append(all, sized{key, labelSize(key, value)})
	}
	slices.SortFunc(all, func(a, b sized) int {
		if a.size != b.size {
			return b.size - a.size
		}
		return strings.Compare(b.key, a.key)
	})
	keys := make([]string, len(all))
	for i, s := range all {
		keys[i] = s.key
	}
	return keys
}
