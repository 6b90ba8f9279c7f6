package engine

import (
	"context"
	"time"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/shared"
)

// A sharer is a component whose state is in the store. The engine asks all that a flow meets together, and gives back together.
type sharer interface {
	component

	// offhand makes the decision if that needs no question, and reports whether it has. If it returns a drawing, the answer to the
	// question of another flow is to come, and offhand may be called again after it. So many were awaited.
	offhand(req *agentapi.Request, now int64, d *agentapi.LimiterDecision, awaited int) (done bool, more *drawing)

	// prepare fills the question for a flow, after offhand. If it is false, there is none: the decision is made.
	prepare(req *agentapi.Request, now int64, d *agentapi.LimiterDecision, ask *shared.Ask) bool

	// answered makes the decision by the answer. If taken is false, the store has given the flow nothing.
	answered(ctx context.Context, req *agentapi.Request, now int64, d *agentapi.LimiterDecision, ask *shared.Ask, answer *shared.Answer, taken bool)

	// unanswered makes the decision, because the store has not.
	unanswered(req *agentapi.Request, now int64, d *agentapi.LimiterDecision, ask *shared.Ask)

	// unasked lets the flow pass and gives it nothing: another component has rejected it, or its caller has gone.
	unasked(now int64, d *agentapi.LimiterDecision, ask *shared.Ask)

	returner
}

// A returner is a component that gives back to the store. The engine gives back together what a flow has of all of them.
type returner interface {
	agentapi.Settler

	// returns is Settle up to what the store is to do. Done is what Settle reports if there is nothing.
	returns(d *agentapi.LimiterDecision, o agentapi.Outcome) (r shared.Return, needed, done bool)

	// returned is the rest of Settle.
	returned(d *agentapi.LimiterDecision, o agentapi.Outcome, r *shared.Return, result shared.Result, err error) bool

	// elsewhere has r return what the store did not find to another key. It reports false if there is none.
	elsewhere(d *agentapi.LimiterDecision, r *shared.Return) bool
}

// A question is what one component wants to know of the store.
type question struct {
	of sharer
	at int // its decision in the verdict
}

// askTogether is ask for the components of the store: one call asks for all of them. If one of them rejects the flow without a question,
// there is no call.
func (e *Engine) askTogether(ctx context.Context, placements []placement, req *agentapi.Request, now *int64, v *agentapi.Verdict) (dropped bool, err error) {
	late := req.Late()
	var questions, rest []question // with and without an ask
	var asks []shared.Ask
	var answers []shared.Answer
	taken := true
	var of *agentapi.LimiterDecision // that is made offhand
	// This is the way out of all calls. Questions that are left are unasked. Those that the store has granted are noted instead, so that the
	// flow can give back what it got. Only a panic of a function of the program's leaves something in of and rest. These decisions are dropped.
	defer func() {
		if of != nil {
			of.Drop(0)
		}
		for _, q := range rest {
			v.At(q.at).Drop(0)
		}
		for i, q := range questions {
			if i < len(answers) && answers[i].OK {
				q.of.answered(ctx, req, *now, v.At(q.at), &asks[i], &answers[i], taken)
			} else {
				q.of.unasked(*now, v.At(q.at), &asks[i])
			}
		}
	}()
	for i := range placements {
		m := &placements[i]
		d, asks := m.meet(req, late, v)
		if d == nil {
			continue
		}
		if of = d; asks && !e.offhand(ctx, m.sharer, req, now, d, v.Start) {
			if rest == nil {
				rest = make([]question, 0, len(placements)-i)
			}
			rest = append(rest, question{m.sharer, v.Len() - 1})
		}
		of = nil
		dropped = dropped || d.Dropped && !m.id.DryRun
	}
	if len(rest) == 0 {
		return dropped, nil
	}
	// No flow waits for another one from here on, so none waits for a question that waits.
	questions = rest[:0]
	asks = make([]shared.Ask, len(rest)) // not used again: a store may keep it after a call that came to nothing
	for len(rest) > 0 {
		q := rest[0]
		d := v.At(q.at)
		asked := q.of.prepare(req, *now, d, &asks[len(questions)])
		if rest = rest[1:]; asked {
			questions = append(questions, q)
		} else {
			asks[len(questions)] = shared.Ask{}
		}
		dropped = dropped || d.Dropped && !d.Component.DryRun
	}
	if asks = asks[:len(questions)]; len(asks) == 0 || dropped && !req.DryRun() {
		return dropped, nil
	}
	answers = make([]shared.Answer, len(asks))
	err = e.take(ctx, req, e.passed(*now, v.Start), asks, answers)
	*now = e.now()
	if err != nil && ctx.Err() != nil {
		answers = nil
		return dropped, ctx.Err()
	}
	for i := range asks {
		taken = taken && (answers[i].OK || asks[i].Dry)
	}
	for len(questions) > 0 {
		q, ask, answer := questions[0], &asks[0], &answers[0]
		d := v.At(q.at)
		if err != nil {
			q.of.unanswered(req, *now, d, ask)
		}
		questions, asks, answers = questions[1:], asks[1:], answers[1:]
		if err == nil {
			q.of.answered(ctx, req, *now, d, ask, answer, taken)
		}
		dropped = dropped || d.Dropped && !d.Component.DryRun
	}
	return dropped, nil
}

// passed returns how long a check has taken up to now that began at start.
func (e *Engine) passed(now, start int64) time.Duration {
	return time.Duration(now - (start - e.epoch.UnixNano()))
}

// offhand has the component decide without a question of this flow's, and reports whether it has. The flow may wait for the answers to
// those of others.
func (e *Engine) offhand(ctx context.Context, of sharer, req *agentapi.Request, now *int64, d *agentapi.LimiterDecision, start int64) bool {
	for awaited := 0; ; awaited++ {
		done, more := of.offhand(req, *now, d, awaited)
		if done || more == nil {
			return done
		}
		answered := e.await(ctx, req, e.passed(*now, start), more)
		*now = e.now()
		switch {
		case !answered: // the question of the flow itself fails at once
			return false
		case more.failed:
			e.store.unanswered.Add(1)
			of.unanswered(req, *now, d, &shared.Ask{Tokens: d.Consumed})
			return true
		}
	}
}

// take asks the store for as long as the check may take. So long has passed of that.
func (e *Engine) take(ctx context.Context, req *agentapi.Request, passed time.Duration, asks []shared.Ask, answers []shared.Answer) error {
	bounded := ctx
	if req.Timeout > 0 {
		var cancel context.CancelFunc
		bounded, cancel = context.WithTimeout(ctx, req.Timeout-passed)
		defer cancel()
	}
	err := e.store.Take(bounded, asks, answers)
	switch {
	case err == nil:
		e.succeeded()
	case ctx.Err() == nil: // it is no failure of the store that a caller leaves
		e.countFailure(err, 1)
	}
	return err
}

// settleFrom settles the decisions of a flow that hold something, from one on. It returns how many slots the flow held there, and how many
// of them were still its own.
func (e *Engine) settleFrom(ctx context.Context, v *agentapi.Verdict, from int, o agentapi.Outcome) (held, returned int) {
	var far []agentapi.Settling
	i := from
	defer func() {
		if i < v.Len() { // a function of the program's panicked
			defer e.settleFrom(ctx, v, i+1, o)
			e.settle(ctx, far)
		}
	}()
	for ; i < v.Len(); i++ {
		d := v.At(i)
		if d.Dropped {
			continue
		}
		holds := d.Component.Slots && d.Slot() != 0
		if holds {
			held++
		}
		if _, ok := d.Component.Settler.(returner); ok {
			far = append(far, agentapi.Settling{By: d.Component.Settler, Decision: d, Outcome: o})
		} else if d.Component.Settler.Settle(ctx, d, o) && holds {
			returned++
		}
	}
	e.settle(ctx, far)
	for i := range far {
		if d := far[i].Decision; far[i].Done && d.Component.Slots && d.Slot() != 0 {
			returned++
		}
	}
	return held, returned
}

// settle settles the decisions. One call returns what is the store's.
func (e *Engine) settle(ctx context.Context, all []agentapi.Settling) {
	var batch []shared.Return
	var at []int // of all
	for i := range all {
		one := &all[i]
		of, ok := one.By.(returner)
		if !ok {
			one.Done = one.By.Settle(ctx, one.Decision, one.Outcome)
			continue
		}
		var r shared.Return
		var needed bool
		if r, needed, one.Done = of.returns(one.Decision, one.Outcome); needed {
			batch, at = append(batch, r), append(at, i)
		}
	}
	for again := false; len(batch) > 0; again = true {
		results, err := e.giveBack(ctx, batch)
		left := 0
		for i, place := range at {
			one := &all[place]
			of := one.By.(returner) //nolint:forcetypeassert // it has returned something
			one.Done = of.returned(one.Decision, one.Outcome, &batch[i], results[i], err)
			if !one.Done && err == nil && !again && of.elsewhere(one.Decision, &batch[i]) {
				batch[left], at[left] = batch[i], place
				left++
			}
		}
		batch, at = batch[:left], at[:left]
	}
}

// settleOne is settle for one decision.
func (e *Engine) settleOne(ctx context.Context, by returner, d *agentapi.LimiterDecision, o agentapi.Outcome) bool {
	one := []agentapi.Settling{{By: by, Decision: d, Outcome: o}}
	e.settle(ctx, one)
	return one[0].Done
}

// giveBack returns what the store gave. The results are zero after an error.
func (e *Engine) giveBack(ctx context.Context, batch []shared.Return) ([]shared.Result, error) {
	results := make([]shared.Result, len(batch))
	// A flow ends whether its caller waits or not. The store bounds the call.
	if err := e.store.Return(context.WithoutCancel(ctx), batch, results); err != nil {
		e.countFailure(err, 0)
		clear(results)
		return results, err
	}
	e.succeeded()
	return results, nil
}
