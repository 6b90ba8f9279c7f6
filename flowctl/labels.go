package flowctl

import (
	"fmt"
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

var errPeerLabels = fmt.Errorf("the labels of peers take more than %d bytes", maxPeerLabels)

// fit returns an error if there are too many explicit labels, or if those of peers are too large. None of these is left
// out instead: a client does not know which of them policies limit by, so a stranger could choose what is left out. An
// agent knows, and reads all labels that policies name, see package wire.
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
	if labelsSize(l.Shared.Transport)+labelsSize(l.Shared.Baggage) > maxPeerLabels {
		return errPeerLabels
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
