package redisstore

import (
	"cmp"
	"context"
	"sync"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
)

// maxPending is how many slots are returned in the background at a time. More of them run out by themselves.
const maxPending = 100_000

// settled returns how long after a take was lost a server may still do it: see send. A slot that is not there then has not been taken.
func (s *Store) settled() time.Duration { return max(time.Second, 3*s.timeout) }

// Return does what [shared.Limits] says.
func (s *Store) Return(ctx context.Context, returns []shared.Return, results []shared.Result) error {
	if len(returns) == 0 {
		return nil
	}
	rs := make([]returned, len(returns))
	for i, r := range returns {
		rs[i] = returned{r, s.name(r.Key)}
		if r.Rule.Kind == shared.Slots {
			s.drop(r.Slot)
		}
	}
	var err error
	for _, b := range s.giveBack(ctx, rs) {
		if b.err != nil {
			s.returnLater(b.returns, time.Now())
			err = cmp.Or(err, b.err)
			continue
		}
		for i, at := range b.indexes {
			results[at] = b.results[i]
		}
	}
	return err
}

// A batch is what one call of a script gives back.
type batch struct {
	returns []returned
	indexes []int // of the returns, where they come from
	results []shared.Result
	err     error
}

// giveBack gives back by as few calls as there can be, all at the same time. Returns to a queue are a call for each key and rule,
// others one for each shard.
func (s *Store) giveBack(ctx context.Context, rs []returned) []*batch {
	type kind struct {
		lanes *lanes
		queue name
		rule  *shared.Rule
	}
	var batches []*batch
	latest := make(map[kind]*batch, 1)
	for i := range rs {
		r := &rs[i]
		k := kind{lanes: s.lanesFor(r.name)}
		if r.Queued {
			k = kind{k.lanes, r.name, r.Rule}
		}
		b := latest[k]
		if b == nil || len(b.returns) == maxBatch {
			b = new(batch)
			latest[k] = b
			batches = append(batches, b)
		}
		b.returns, b.indexes = append(b.returns, *r), append(b.indexes, i)
	}
	if len(batches) == 1 {
		s.send(ctx, batches[0])
		return batches
	}
	var wg sync.WaitGroup
	for _, b := range batches {
		wg.Go(func() { s.send(ctx, b) })
	}
	wg.Wait()
	return batches
}

// send gives back a batch.
func (s *Store) send(ctx context.Context, b *batch) {
	if b.returns[0].Queued {
		b.results = make([]shared.Result, len(b.returns))
		b.err = s.returnQueued(ctx, b.returns, b.results)
		return
	}
	c := &call{returns: b.returns}
	if _, b.err = s.lanesFor(b.returns[0].name).giveBack.do(ctx, c); b.err == nil {
		b.results = c.results
	}
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
	for _, b := range s.giveBack(ctx, rs) {
		if s.countFailure(b.err); b.err == nil {
			s.confirm(b, now)
		}
	}
}

// confirm forgets pending slots that have come back, or that have not been taken.
func (s *Store) confirm(b *batch, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, r := range b.returns {
		if p := s.pending[r.Slot]; b.results[i].Returned || now.Sub(p.since) > s.settled() {
			delete(s.pending, r.Slot)
		}
	}
}

// Reset does what [shared.Limits] says.
func (s *Store) Reset(ctx context.Context, key shared.Key) error {
	n := s.name(key)
	client := s.client
	sh := s.lanesFor(n).take.shard()
	results, err := s.plain(ctx, []*shard{sh, sh}, ofNumber,
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
