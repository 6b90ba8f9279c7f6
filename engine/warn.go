package engine

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/policy"
)

// Warnings lists what the policies in force say that an operator is unlikely to want. The most important come first:
//
//   - limits that no flow can ever meet,
//   - control points with odd names, such as "search]", which hardly any flow has,
//   - labels that do not arrive, in the order of what components read them for, and labels with odd names among them,
//   - waits that are longer than a client's check timeout,
//   - what the policies' files say that the engine does not use, as "file:line:column: field: …".
//
// The engine logs each when policies come into force. A limit of 0 is no warning, for that is how to refuse all flows.
func (e *Engine) Warnings() []string {
	w := &e.rules.Load().warnings
	all := slices.Clone(w.impossible)
	for _, m := range w.missing {
		all = append(all, m.text)
	}
	return slices.Concat(all, e.cutShort(), w.unused)
}

// warnings are those of the policies in force.
type warnings struct {
	impossible, unused []string
	missing            []missing
	waits              []longWait
}

// A longWait is what a workload, or a scheduler, says about how long flows wait.
type longWait struct {
	of      string        // the component, or its workload, in words
	timeout time.Duration // of the workload; 0 for the component
	margin  time.Duration
}

// Expect tells the engine how long the checks of a client may take; 0 or less is no limit. Clients of package flowctl
// call it.
func (e *Engine) Expect(timeout time.Duration) {
	if timeout <= 0 {
		return
	}
	e.applying.Lock() // so that each warning is logged once
	defer e.applying.Unlock()
	if old := time.Duration(e.checkTimeout.Load()); old > 0 && old <= timeout {
		return
	}
	e.checkTimeout.Store(int64(timeout))
	e.warn(e.cutShort())
}

// cutShort tells which waits the shortest check timeout of a client cuts short.
func (e *Engine) cutShort() (all []string) {
	timeout := time.Duration(e.checkTimeout.Load())
	if timeout == 0 {
		return nil
	}
	for _, w := range e.rules.Load().warnings.waits {
		switch {
		case w.timeout == 0 && w.margin >= timeout:
			all = append(all, fmt.Sprintf("%s: no flow waits: the margin of %v leaves none of a client's check timeout of %v",
				w.of, w.margin, timeout))
		case w.timeout > timeout && w.margin < timeout:
			all = append(all, fmt.Sprintf("%s: queue timeout of %v: a client's check timeout of %v lets flows wait for %v, unless "+
				"Params.CheckTimeout says more", w.of, w.timeout, timeout, timeout-w.margin))
		}
	}
	return all
}

// warn logs warnings.
func (e *Engine) warn(all []string) {
	for _, warning := range all {
		e.logger.Warn("headgate: the policies in force may not do what they are meant to", "warning", warning)
	}
}

// look finds what to warn about in a component.
func (w *warnings) look(policyName, id string, c policy.Component) {
	of := fmt.Sprintf("policy %q: component %q", policyName, id)
	free := func(string, policy.WorkloadParameters) {} // any part of a slot admits a flow, and so does a load
	switch c := c.(type) {
	case policy.RateLimiter:
		if !c.PassThrough {
			w.bucket(of, c.Capacity, c.Fill, c.Interval)
			if c.TokensLabel == "" {
				w.cost(of, c.Capacity, 1)
			}
		}
	case policy.QuotaScheduler:
		if !c.PassThrough {
			w.bucket(of, c.Capacity, c.Fill, c.Interval)
			w.scheduler(of, &c.Scheduler, c.DryRun, func(of string, p policy.WorkloadParameters) {
				if p.Tokens > 0 || c.Scheduler.TokensLabel == "" {
					w.cost(of, c.Capacity, newWorkload("", p).tokens)
				}
			})
		}
	case policy.ConcurrencyScheduler:
		if !c.PassThrough {
			w.scheduler(of, &c.Scheduler, c.DryRun, free)
		}
	case policy.LoadScheduler:
		w.scheduler(of, &c.Scheduler, c.DryRun, free)
	case policy.AIMDLoadScheduler:
		w.scheduler(of, &c.Scheduler, c.DryRun, free)
	}
}

// bucket warns of one that does not refill.
func (w *warnings) bucket(of string, capacity, fill float64, interval time.Duration) {
	if capacity > 0 && !(float64(interval)/fill < source.Century) {
		w.impossible = append(w.impossible, fmt.Sprintf("%s: a fill of %v in %v never refills the bucket: after its capacity of %v no flow is admitted",
			of, fill, interval, capacity))
	}
}

// cost warns of flows that take more than the bucket holds.
func (w *warnings) cost(of string, capacity, tokens float64) {
	if capacity > 0 && tokens > capacity+source.Slack {
		w.impossible = append(w.impossible, fmt.Sprintf("%s: no flow is ever admitted: it takes %v tokens, and the bucket holds %v",
			of, tokens, capacity))
	}
}

// scheduler looks at the workloads, with a function for each. In a dry run no flow waits.
func (w *warnings) scheduler(of string, p *policy.Scheduler, dryRun bool, each func(of string, p policy.WorkloadParameters)) {
	margin, waits := cmp.Or(p.Margin, policy.DefaultMargin), false
	look := func(name string, p policy.WorkloadParameters) {
		named := fmt.Sprintf("%s: workload %q", of, name)
		each(named, p)
		waits = waits || p.QueueTimeout >= 0
		if p.QueueTimeout > 0 && !dryRun {
			w.waits = append(w.waits, longWait{named, p.QueueTimeout, margin})
		}
	}
	for i, class := range p.Workloads {
		look(cmp.Or(class.Name, strconv.Itoa(i)), class.WorkloadParameters)
	}
	look("default", p.Default)
	if waits && !dryRun {
		w.waits = append(w.waits, longWait{of, 0, margin})
	}
}
