package redisstore

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
)

// maxPending is how many slots are returned in the background at a time. More of them run out by themselves.
const maxPending = 100_000

// settled returns how long after a take was lost no server does it any more: see send. A slot that is not there then has not been
// taken.
func (s *Store) settled() time.Duration { return max(time.Second, 3*s.timeout) }

// Return does what [shared.Limits] says.
func (s *Store) Return(ctx context.Context, returns []shared.Return, results []shared.Result) error {
	if len(returns) == 0 {
		return nil
	}
	rs := make([]returned, len(returns))
	queued := 0
	for i, r := range returns {
		rs[i] = returned{r, s.name(r.Key)}
		if r.Rule.Kind == shared.Slots {
			s.drop(r.Slot)
		}
		if r.Queued {
			queued++
		}
	}
	switch queued {
	case 0:
		return s.giveBack(ctx, rs, results)
	case len(rs):
		return s.returnQueued(ctx, rs, results, true)
	}
	var err error
	for i := range rs {
		if rs[i].Queued {
			err = errors.Join(err, s.returnQueued(ctx, rs[i:i+1], results[i:i+1], true))
		} else {
			err = errors.Join(err, s.giveBack(ctx, rs[i:i+1], results[i:i+1]))
		}
	}
	return err
}

// giveBack gives back by calls of at most a batch, those of different shards at the same time.
func (s *Store) giveBack(ctx context.Context, rs []returned, results []shared.Result) error {
	type part struct {
		lanes   *lanes
		call    call
		indexes []int
		err     error
	}
	var parts []*part
	latest := make(map[*lanes]*part, 1)
	for i, r := range rs {
		to := s.lanesFor(r.name)
		p := latest[to]
		if p == nil || len(p.indexes) == maxBatch {
			p = &part{lanes: to}
			latest[to] = p
			parts = append(parts, p)
		}
		p.call.returns, p.indexes = append(p.call.returns, r), append(p.indexes, i)
	}
	do := func(p *part) {
		if _, p.err = p.lanes.giveBack.do(ctx, &p.call); p.err != nil {
			s.returnLater(p.call.returns, time.Now())
			return
		}
		for i, at := range p.indexes {
			results[at] = p.call.results[i]
		}
	}
	if len(parts) == 1 {
		do(parts[0])
		return parts[0].err
	}
	var wg sync.WaitGroup
	for _, p := range parts {
		wg.Go(func() { do(p) })
	}
	wg.Wait()
	var err error
	for _, p := range parts {
		err = first(err, p.err)
	}
	return err
}

// A pending slot is one that has yet to come back.
type pending struct {
	returned

	until time.Time // when it runs out
	since time.Time // when its take was lost; zero for one that was held
}

// returnLater has slots come back that could not be returned.
func (s *Store) returnLater(rs []returned, now time.Time) {
	for _, r := range rs {
		if r.Rule.Kind == shared.Slots && r.Slot != 0 {
			s.postpone(pending{returned: r, until: now.Add(r.Rule.MaxInflight)})
		}
	}
}

// lose has slots come back that may have been taken.
func (s *Store) lose(as []asked, now time.Time) {
	for _, a := range as {
		if a.Rule.Kind == shared.Slots && a.Tokens != 0 {
			back := shared.Return{Key: a.Key, Rule: a.Rule, Slot: a.id, Unused: true, Queued: a.queued}
			s.postpone(pending{returned: returned{back, a.name}, until: now.Add(a.Rule.MaxInflight), since: now})
		}
	}
}

func (s *Store) postpone(p pending) {
	s.mu.Lock()
	if len(s.pending) < maxPending {
		s.pending[p.Slot] = p
	}
	s.mu.Unlock()
	s.kick()
}

// returnPending returns slots that have not come back yet.
func (s *Store) returnPending(ctx context.Context, now time.Time) {
	s.mu.Lock()
	var rs []returned
	for id, p := range s.pending {
		if !now.Before(p.until) {
			delete(s.pending, id)
		} else if len(rs) < maxKeys && !s.lanesFor(p.name).giveBack.shard().gate.Open() {
			rs = append(rs, p.returned)
		}
	}
	s.mu.Unlock()
	byLanes := make(map[*lanes][]returned)
	byQueue := make(map[name][]returned)
	for _, r := range rs {
		if r.Queued {
			byQueue[r.name] = append(byQueue[r.name], r)
			continue
		}
		to := s.lanesFor(r.name)
		byLanes[to] = append(byLanes[to], r)
	}
	var wg sync.WaitGroup
	for to, rs := range byLanes {
		wg.Go(func() {
			for len(rs) > 0 {
				n := min(len(rs), maxBatch)
				c := &call{returns: rs[:n]}
				if _, err := to.giveBack.do(ctx, c); err == nil {
					s.confirm(c, now)
				}
				rs = rs[n:]
			}
		})
	}
	for _, rs := range byQueue {
		wg.Go(func() {
			c := &call{returns: rs, results: make([]shared.Result, len(rs))}
			if s.returnQueued(ctx, rs, c.results, false) == nil {
				s.confirm(c, now)
			}
		})
	}
	wg.Wait()
}

// confirm forgets pending slots that have come back, or that have not been taken.
func (s *Store) confirm(c *call, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, r := range c.returns {
		if p := s.pending[r.Slot]; c.results[i].Returned || now.Sub(p.since) > s.settled() {
			delete(s.pending, r.Slot)
		}
	}
}

// Reset does what [shared.Limits] says.
func (s *Store) Reset(ctx context.Context, key shared.Key) error {
	n := s.name(key)
	client := s.client
	sh := s.lanesFor(n).take.shard()
	results, err := s.plain(ctx, []*shard{sh, sh},
		client.B().Del().Key(n.all, n.all+suffixSlots, n.all+suffixEnds, n.all+suffixQueue).Build(),
		s.wakeCommand(n))
	if err != nil {
		return err
	}
	for _, r := range results {
		if err := answerError(r.Error()); err != nil {
			return err
		}
	}
	return nil
}
