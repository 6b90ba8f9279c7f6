package engine

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/internal/agentapi"
)

// A TopValue is a value of a component's label whose flows the component rejects often.
type TopValue struct {
	// Value is the label's. It is the name of a value that is too long, or that carries credentials: see docs/operating.md.
	Value string

	// Rejected is the approximate number of flows with the value that were rejected, or would have been without a dry run.
	Rejected uint64

	// Excess is the part of Rejected that may be rejections of other values.
	Excess uint64

	// Last is when a flow with the value was rejected last.
	Last time.Time
}

// mostTop is how many values a component keeps.
const mostTop = 64

// A top has the values that were rejected most often, by the algorithm Space-Saving (Metwally, Agrawal and El Abbadi:
// Efficient Computation of Frequent and Top-k Elements in Data Streams, ICDT 2005): a value that is not there replaces
// the one with the smallest count, and inherits its count as an error bound. So each value with more than a 64th of all
// rejections is there. The zero value is ready. It takes no memory before the first rejection.
type top struct {
	mu   sync.Mutex
	rows []topRow
}

type topRow struct {
	key           string
	count, excess uint64
	last          int64
	hash          uint32
}

// add counts a rejection, unless another goroutine has the lock.
func (t *top) add(key string, hash uint32, now int64) {
	if !t.mu.TryLock() {
		return
	}
	defer t.mu.Unlock()
	least := 0
	for i := range t.rows {
		r := &t.rows[i]
		if r.hash == hash && r.key == key {
			r.count++
			r.last = now
			return
		}
		if r.count < t.rows[least].count {
			least = i
		}
	}
	if len(t.rows) < mostTop {
		t.rows = append(t.rows, topRow{key: key, hash: hash, count: 1, last: now})
		return
	}
	n := t.rows[least].count
	t.rows[least] = topRow{key: key, hash: hash, count: n + 1, excess: n, last: now}
}

// values returns the rows, the largest count first.
func (t *top) values(epoch time.Time) []TopValue {
	t.mu.Lock()
	rows := slices.Clone(t.rows)
	t.mu.Unlock()
	slices.SortFunc(rows, func(a, b topRow) int { return cmp.Or(cmp.Compare(b.count, a.count), cmp.Compare(a.key, b.key)) })
	all := make([]TopValue, len(rows))
	for i, r := range rows {
		all[i] = TopValue{Value: r.key, Rejected: r.count, Excess: r.excess, Last: epoch.Add(time.Duration(r.last)).Round(0)}
	}
	return all
}

// rejecting is a component that knows whose flows it rejects.
type rejecting interface {
	top(epoch time.Time) []TopValue
}

func (k *keyed[S, R]) top(epoch time.Time) []TopValue {
	if k.tops == nil {
		return nil
	}
	return k.tops.values(epoch)
}

// rejected counts a flow that the entry dropped, by the key that the table holds. The values that share the spill are not
// known.
func (k *keyed[S, R]) rejected(e *keys.Entry[S], d *agentapi.LimiterDecision, now int64) {
	if k.table != nil && !d.Spilled {
		key, hash := e.Key()
		k.tops.add(key, hash, now)
	}
}
