package engine

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/headgate-go/headgate/policy"
)

// Warnings lists what is in the policies in force that an operator is unlikely to want. The most important come first:
//
//   - limits that are less than what a flow costs or that never refill, circuit breakers that a single flow opens, conditions on
//     labels that contradict each other, and selectors of flows without the label that their component limits by,
//   - quota schedulers that are to lease tokens from a store: they ask it for each flow,
//   - control points with odd names, such as "search]" and "search,find", which hardly any flow has,
//   - labels that do not arrive, that have odd names, or that are misspelt labels of adaptors, in the order of what components read
//     them for, and names of a policy's for labels that no component of it reads,
//   - selectors that have picked no flow, although their control points had some,
//   - waits that are longer than the check timeout of a client that has not been closed, less the margin, or than the MaxWait of a
//     flow that came to the queue; and in this process, also than the CheckTimeout of such a flow, less the margin; and margins that
//     leave a flow of this process no time to wait,
//   - what the policies' files say that the engine does not use, as "file:line:column: field: …".
//
// Of conditions, only those that must all hold are compared, by labels that are there or not, and by their exact values. Regular
// expressions are not looked into. The engine logs each warning when policies come into force. A limit of 0 gives no warning: it
// rejects all flows on purpose.
func (e *Engine) Warnings() []string {
	w := &e.rules.Load().warnings
	all := slices.Concat(w.impossible, w.exact)
	for _, m := range w.missing {
		all = append(all, m.text)
	}
	return slices.Concat(all, e.rules.Load().unpicked(), e.cutShort(), w.unused)
}

// warnings are those of the policies in force.
type warnings struct {
	impossible, unused []string
	exact              []string // what is leased, and asks for each flow
	shared             bool     // there is a store
	missing            []missing
	waits              []longWait
}

// A longWait is what a workload, or a scheduler, says about how long flows wait.
type longWait struct {
	of       string        // the component, or its workload, in words
	timeout  time.Duration // of the workload; 0 for the component
	margin   time.Duration
	workload int       // its index
	by       component // at work
}

// shortest returns the shortest MaxWait and check timeout of flows that cut a wait short; 0 where there was none. For a component it is
// the check timeout of flows that did not wait at all.
func (w *longWait) shortest() (maxWait, check time.Duration) {
	p, ok := w.by.(interface {
		shortestWaits(workload int) (maxWait, check time.Duration)
		shortestCheck() time.Duration
	})
	switch {
	case !ok:
		return 0, 0
	case w.timeout > 0:
		return p.shortestWaits(w.workload)
	default:
		return 0, p.shortestCheck()
	}
}

// cutShort returns a warning for each wait that clients cut short: by the shortest of their check timeouts, or by the
// MaxWait or the CheckTimeout of a flow.
func (e *Engine) cutShort() (all []string) {
	timeout := time.Duration(e.checkTimeout.Load())
	for _, w := range e.rules.Load().warnings.waits {
		switch {
		case timeout == 0:
		case w.timeout == 0 && w.margin >= timeout:
			all = append(all, fmt.Sprintf("%s: no flow waits, unless Params.MaxWait says so: the margin of %v leaves none of a client's "+
				"check timeout of %v", w.of, w.margin, timeout))
		case w.timeout > timeout-w.margin && w.margin < timeout:
			all = append(all, fmt.Sprintf("%s: queue timeout of %v: a client's check timeout of %v lets flows wait for %v, unless "+
				"Params.MaxWait or Params.CheckTimeout says more", w.of, w.timeout, timeout, timeout-w.margin))
		}
		most, check := w.shortest()
		if most > 0 {
			all = append(all, fmt.Sprintf("%s: queue timeout of %v: the Params.MaxWait of a flow let it wait for %v", w.of, w.timeout, most))
		}
		switch {
		case check > 0 && w.timeout == 0:
			all = append(all, fmt.Sprintf("%s: a flow did not wait: the margin of %v left none of its Params.CheckTimeout of %v", w.of, w.margin, check))
		case check > 0:
			all = append(all, fmt.Sprintf("%s: queue timeout of %v: the Params.CheckTimeout of a flow let it wait for %v", w.of, w.timeout, max(check-w.margin, 0)))
		}
	}
	return all
}

// unpicked returns a warning for each selector that has picked none of its control point's flows.
func (r *rules) unpicked() (all []string) {
	for _, p := range r.installed {
		for i, s := range p.acts {
			if n := r.missed(s); n > 0 {
				all = append(all, fmt.Sprintf("policy %q: component %q: selectors[%d] has picked none of the %d flows that the control point %q "+
					"has accepted since the component came into force", p.named.policy, p.named.id, i, n, s.controlPoint))
			}
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

// scheduler notes how long the workloads' flows may wait. In a dry run no flow waits.
func (w *warnings) scheduler(of string, p *policy.Scheduler, dryRun bool) {
	if dryRun {
		return
	}
	margin, waits := cmp.Or(p.Margin, policy.DefaultMargin), false
	workload := 0
	workloadsOf(of, p, func(named string, p policy.WorkloadParameters) {
		waits = waits || p.QueueTimeout >= 0
		if p.QueueTimeout > 0 {
			w.waits = append(w.waits, longWait{of: named, timeout: p.QueueTimeout, margin: margin, workload: workload})
		}
		workload++
	})
	if waits {
		w.waits = append(w.waits, longWait{of: of, margin: margin})
	}
}

// mostOverridden is how many overrides of a component are looked at for warnings.
const mostOverridden = 100

// overridden calls each with the overrides that differ, in the order of their values. Of says by its numbers which one it is: values of
// labels are in no log.
func overridden(of string, all map[string]policy.Override, each func(of string, o policy.Override)) {
	seen := make(map[policy.Override]bool)
	for _, value := range slices.Sorted(maps.Keys(all)) {
		o := all[value]
		if seen[o] {
			continue
		}
		if seen[o] = true; len(seen) > mostOverridden {
			return
		}
		each(fmt.Sprintf("%s: an override (%s)", of, numbersIn(o)), o)
	}
}

// numbersIn lists the numbers of an override, as in "Capacity 5, Interval 1s".
func numbersIn(o policy.Override) string {
	var list []string
	v := reflect.ValueOf(o)
	for i := range v.NumField() {
		number := v.Field(i)
		if number.IsZero() {
			continue
		}
		said := number.Interface()
		if f, ok := said.(float64); ok {
			said = replaced(0, f)
		}
		list = append(list, fmt.Sprintf("%s %v", v.Type().Field(i).Name, said))
	}
	return strings.Join(list, ", ")
}

// replaced returns a number of a component, or that of an override if it says one.
func replaced(own, other float64) float64 {
	switch other {
	case 0:
		return own
	case math.SmallestNonzeroFloat64:
		return 0
	default:
		return other
	}
}

// workloadsOf calls each with every workload of the scheduler.
func workloadsOf(of string, p *policy.Scheduler, each func(named string, p policy.WorkloadParameters)) {
	for i, class := range p.Workloads {
		each(fmt.Sprintf("%s: workload %q", of, cmp.Or(class.Name, strconv.Itoa(i))), class.WorkloadParameters)
	}
	each(of+`: workload "default"`, p.Default)
}

// conditions warns of conditions on labels that never hold: what they select is nothing.
func (w *warnings) conditions(of, at string, v reflect.Value) {
	switch v.Kind() { //nolint:exhaustive // the others hold no conditions
	case reflect.Interface, reflect.Pointer:
		if !v.IsNil() {
			w.conditions(of, at, v.Elem())
		}
	case reflect.Slice:
		for i := range v.Len() {
			w.conditions(of, at+"["+strconv.Itoa(i)+"]", v.Index(i))
		}
	case reflect.Struct:
		if m, ok := reflect.TypeAssert[policy.LabelMatcher](v); ok {
			if why := neverHolds(m); why != "" {
				w.impossible = append(w.impossible, fmt.Sprintf("%s: %s%s", of, at, why))
			}
			return
		}
		if s, ok := reflect.TypeAssert[policy.Selector](v); ok {
			w.conditions(of, at+".Labels", reflect.ValueOf(s.Labels))
			return
		}
		if by := v.FieldByName("LimitBy"); by.IsValid() {
			selectors, _ := reflect.TypeAssert[[]policy.Selector](v.FieldByName("Selectors"))
			w.unlimited(of, by.String(), selectors)
		}
		for i := range v.NumField() {
			w.conditions(of, strings.TrimPrefix(at+"."+v.Type().Field(i).Name, "."), v.Field(i))
		}
	}
}

// unlimited warns of selectors whose flows cannot have the label that their component limits by.
func (w *warnings) unlimited(of, by string, selectors []policy.Selector) {
	for i, s := range selectors {
		if by != "" && knownOf(s.Labels)[by].absent {
			w.impossible = append(w.impossible, fmt.Sprintf(
				"%s: Selectors[%d] limits no flow: it selects flows without the label %q, and the component limits by that label", of, i, by))
		}
	}
}
