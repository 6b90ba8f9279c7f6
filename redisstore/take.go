package redisstore

import (
	"cmp"
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
)

// maxAsks is the most keys that one flow may ask for. A script reads all of them by one command, and Lua bounds what a command takes.
const maxAsks = 1000

// Take does what [shared.Limits] says. Keys of one shard are one call of a script. In a cluster, shards are asked at the same time, and
// what one of them has taken is given back if another refuses.
func (s *Store) Take(ctx context.Context, asks []shared.Ask, answers []shared.Answer) error {
	if len(asks) == 0 {
		return nil
	}
	if len(asks) > maxAsks {
		return errTooMany
	}
	if !s.cluster && s.single.take.shard().gate.Open() { // before names are made that nobody needs
		return shared.ErrDown
	}
	as := make([]asked, len(asks))
	for i := range asks {
		as[i] = s.asked(asks[i])
	}
	if err := s.take(ctx, as, answers); err != nil {
		return err
	}
	taken := granted(as, answers)
	for i := range as {
		if !taken && as[i].Rule.Kind != shared.Bucket {
			answers[i].Slot = 0
		}
	}
	return nil
}

// take asks the one shard that has all keys, or several.
func (s *Store) take(ctx context.Context, as []asked, answers []shared.Answer) error {
	if !s.cluster {
		return s.takePart(ctx, s.single, as, answers)
	}
	parts := s.parts(as)
	if len(parts) == 1 {
		return s.takePart(ctx, parts[0].lanes, as, answers)
	}
	return s.takeParts(ctx, parts, as, answers)
}

func (s *Store) asked(a shared.Ask) asked {
	n := s.name(a.Key)
	one := asked{Ask: a, name: n}
	if a.Rule.Kind == shared.Slots {
		one.leases = s.leases(n)
		for one.id == 0 {
			one.id = rand.Uint64()
		}
	}
	return one
}

// A part is what one call of a script decides about.
type part struct {
	lanes   *lanes
	asks    []asked
	indexes []int // of the asks
	answers []shared.Answer
	err     error
}

// parts divides asks by the slot of the cluster.
func (s *Store) parts(as []asked) []*part {
	var parts []*part
	slots := make(map[uint16]*part, 2)
	for i := range as {
		slot := slotOf(as[i].name.tag)
		p := slots[slot]
		if p == nil {
			p = &part{lanes: s.lanesOf(slot)}
			slots[slot] = p
			parts = append(parts, p)
		}
		p.asks, p.indexes = append(p.asks, as[i]), append(p.indexes, i)
	}
	return parts
}

// granted reports whether what was asked has been taken.
func granted(as []asked, answers []shared.Answer) bool {
	for i := range as {
		if !answers[i].OK && !as[i].Dry {
			return false
		}
	}
	return true
}

// takePart takes what one call can take. Slots are this process's from then on.
func (s *Store) takePart(ctx context.Context, to *lanes, as []asked, answers []shared.Answer) error {
	c := &call{asks: as}
	maybe, err := to.take.do(ctx, c)
	if err != nil {
		if maybe {
			s.lose(as, time.Now())
		}
		return err
	}
	copy(answers, c.answers)
	if granted(as, answers) {
		s.hold(as, answers, c.sent)
	}
	return nil
}

// takeParts takes from several shards. If one of them refuses, or does not answer, the others get back what they gave.
func (s *Store) takeParts(ctx context.Context, parts []*part, as []asked, answers []shared.Answer) error {
	began := time.Now()
	var wg sync.WaitGroup
	for _, p := range parts {
		p.answers = make([]shared.Answer, len(p.asks))
		wg.Go(func() { p.err = s.takePart(ctx, p.lanes, p.asks, p.answers) })
	}
	wg.Wait()
	var err error
	for _, p := range parts {
		err = cmp.Or(err, p.err)
		for i, at := range p.indexes {
			answers[at] = p.answers[i]
		}
	}
	if err == nil && granted(as, answers) {
		return nil
	}
	var back []shared.Return
	for _, p := range parts {
		if p.err == nil {
			back = append(back, undo(p.asks, p.answers, err != nil, time.Since(began))...)
		}
	}
	for i := range as {
		if answers[i].OK {
			answers[i].Drawn = 0
		}
	}
	if len(back) > 0 {
		left, cancel := context.WithDeadline(ctx, began.Add(s.timeout))
		defer cancel()
		// What does not come back is lost; slots are returned in the background.
		_ = s.Return(left, back, make([]shared.Result, len(back)))
	}
	return err
}

// undo returns what gives back all that asks have got, which were answered after so long. It takes as long again until it is back. A
// refused ask may have tokens ahead. They come back if that is said.
func undo(as []asked, answers []shared.Answer, ahead bool, took time.Duration) []shared.Return {
	var back []shared.Return
	all := granted(as, answers)
	for i, a := range as {
		tokens := 0.0
		switch {
		case a.look:
		case all && answers[i].OK:
			tokens = a.Tokens + answers[i].Drawn
		case ahead:
			tokens = answers[i].Drawn
		}
		if tokens -= brought(a.Rule, 2*took); tokens > 0 {
			back = append(back, shared.Return{Key: a.Key, Rule: a.Rule, Slot: answers[i].Slot, Tokens: tokens, Unused: true})
		}
	}
	return back
}

// brought returns how many tokens come to a bucket in some time. So many do not come back of those that were taken so long: they
// might have come to a full bucket, and all together would be more than its bound.
func brought(r *shared.Rule, in time.Duration) float64 {
	if r.Kind != shared.Bucket || r.Interval <= 0 {
		return 0
	}
	return r.Fill * float64(in) / float64(r.Interval)
}

// leave gives back what a call has got that nobody waits for any more, as far as that keeps the bound. Slots come back by [Store.lose].
func (s *Store) leave(c *call) {
	if c.err != nil || c.asks == nil {
		return
	}
	for _, back := range undo(c.asks, c.answers, true, time.Since(c.sent)) {
		if back.Rule.Kind != shared.Slots {
			n := s.name(back.Key)
			s.lanesFor(n).giveBack.submit(&call{returns: []returned{{back, n}}, done: make(chan struct{})})
		}
	}
}

// Look does what [shared.Limits] says.
func (s *Store) Look(ctx context.Context, key shared.Key, rule *shared.Rule) (shared.Usage, error) {
	a := s.asked(shared.Ask{Key: key, Rule: rule, Dry: true})
	a.look = true
	c := &call{asks: []asked{a}}
	if _, err := s.lanesFor(a.name).take.do(ctx, c); err != nil {
		return shared.Usage{}, err
	}
	u := shared.Usage{Remaining: c.answers[0].Left}
	if rule.Kind == shared.Slots {
		u.InFlight = int(c.answers[0].Slot)
	}
	return u, nil
}
