package engine

import (
	"cmp"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/engine/internal/wfq"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/decimal"
	"github.com/headgate-go/headgate/policy"
)

// workloads find the workload of a flow, and what it means for the flow.
type workloads struct {
	list   []workload
	others workload // of flows that none of the list matches

	tokensLabel, priorityLabel, workloadLabel, fairnessLabel string
}

type workload struct {
	index            int // among all workloads; others has the last one
	match            []condition
	label            string
	priority, tokens float64
	timeout          time.Duration // in the queue; 0: the flow's own; below 0: the flow does not wait
	ratio            *ratio        // of what its flows cost in the end

	counts *counts
	drops  *[agentapi.Causes]atomic.Uint64 // by the cause
	waits  *waits

	cuts *cuts
}

// cuts are the shortest times by which flows that had to wait cut the workload's timeout short: by MaxWait, and by a check timeout of
// their own. They are in nanoseconds, and 0 while there is none.
type cuts struct{ maxWait, check atomic.Int64 }

// cut notes a time of a flow if what it lets the flow wait is less than the workload's timeout or, without one, if the flow cannot wait.
func (w *workload) cut(shortest *atomic.Int64, most, wait time.Duration) {
	for wait < max(w.timeout, 1) {
		old := shortest.Load()
		if old > 0 && old <= int64(most) || shortest.CompareAndSwap(old, int64(most)) {
			return
		}
	}
}

func compileWorkloads(p *policy.Scheduler) (*workloads, error) {
	w := &workloads{
		others:        newWorkload("default", p.Default),
		tokensLabel:   p.TokensLabel,
		priorityLabel: p.PriorityLabel,
		workloadLabel: p.WorkloadLabel,
		fairnessLabel: p.FairnessLabel,
	}
	for i, class := range p.Workloads {
		c := newWorkload(cmp.Or(class.Name, strconv.Itoa(i)), class.WorkloadParameters)
		var err error
		if c.match, err = compileMatcher(class.Labels); err != nil {
			return nil, fmt.Errorf("workloads[%d]: %w", i, err)
		}
		c.index = i
		w.list = append(w.list, c)
	}
	w.others.index = len(w.list)
	return w, nil
}

func newWorkload(label string, p policy.WorkloadParameters) workload {
	return workload{
		label:    label,
		priority: cmp.Or(p.Priority, 1),
		tokens:   max(cmp.Or(p.Tokens, 1), 0),
		timeout:  p.QueueTimeout,
		ratio:    new(ratio),
		counts:   new(counts),
		drops:    new([agentapi.Causes]atomic.Uint64),
		waits:    new(waits),
		cuts:     new(cuts),
	}
}

// follow has workloads with names of before go on counting.
func (w *workloads) follow(before *workloads) {
	named := make(map[string]*workload)
	for of := range before.all {
		named[of.label] = of
	}
	for of := range w.all {
		b := named[of.label]
		if b == nil {
			continue
		}
		of.ratio, of.counts, of.drops, of.waits = b.ratio, b.counts, b.drops, b.waits
		if of.timeout == b.timeout {
			of.cuts = b.cuts
		}
	}
}

// of returns the first workload that matches. Known is false if a value is too long to match, and no workload before
// matches. The flow must not be admitted by the default workload then, because a caller could choose it by a long
// value.
func (w *workloads) of(labels *agentapi.Labels) (of *workload, known bool) {
	for i := range w.list {
		switch holdAll(w.list[i].match, labels) {
		case yes:
			return &w.list[i], true
		case unknown:
			return &w.others, false
		case no:
		}
	}
	return &w.others, true
}

// all are the workloads, by their indices.
func (w *workloads) all(yield func(*workload) bool) {
	for i := range w.list {
		if !yield(&w.list[i]) {
			return
		}
	}
	yield(&w.others)
}

// claim returns the claim that a flow of the workload waits by.
func (w *workloads) claim(of *workload, labels *agentapi.Labels) wfq.Claim {
	c := wfq.Claim{Workload: of.label, Priority: of.priority}
	if w.workloadLabel != "" {
		if text, ok := labels.Lookup(w.workloadLabel); ok {
			c.Workload = keys.AnyName(text)
		}
	}
	if w.priorityLabel != "" {
		if text, ok := labels.Lookup(w.priorityLabel); ok {
			if p, ok := decimal.Parse(text); ok && p > 0 {
				c.Priority = p
			}
		}
	}
	c.Priority = min(max(c.Priority, wfq.MinPriority), wfq.MaxPriority) // the label that says it may come from a peer
	if w.fairnessLabel != "" {
		value, _ := labels.Lookup(w.fairnessLabel)
		c.Fairness = keys.AnyName(value)
	}
	return c
}
