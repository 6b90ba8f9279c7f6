package redisstore

import (
	"context"
	"encoding/binary"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/redis/rueidis"

	"github.com/headgate-go/headgate/internal/shared"
)

// A holding is who holds slots, beside which tag. The store's own instance is the zero holder.
type holding struct {
	leases string
	holder shared.Holder
}

// held is how many slots a holding has, as far as this process knows, and until when they are certainly kept.
type held struct {
	count int
	kept  time.Time

	// indexed is until when the index of the holder's session has the tag. See [Store.index].
	indexed time.Time
}

// A sessionHeld is a session that is at this instance, or has ended.
type sessionHeld struct {
	until time.Time
	ended bool
}

// A slotHeld is a slot that this process has taken.
type slotHeld struct {
	holding
	until time.Time
}

// hold takes note of slots that were taken by a call that was sent then.
func (s *Store) hold(as []asked, answers []shared.Answer, sent time.Time) {
	for i := range as {
		a := &as[i]
		if a.Rule.Kind != shared.Slots || answers[i].Slot == 0 {
			continue
		}
		of := holding{a.leases, a.Holder}
		s.mu.Lock()
		h := s.held[of]
		if h == nil {
			h = new(held)
			s.held[of] = h
		}
		h.count++
		// The script leaves a lease alone that lasts for two thirds.
		if kept := sent.Add(s.lease * 2 / 3); kept.After(h.kept) {
			h.kept = kept
		}
		until := sent.Add(a.Rule.MaxInflight)
		s.slots[a.id] = slotHeld{of, until}
		soon := false
		if s.cluster && a.Holder != (shared.Holder{}) && h.indexed.Before(until.Add(-a.Rule.MaxInflight/4)) {
			h.indexed = until
			s.unindexed[of] = until
			soon = true
		}
		s.mu.Unlock()
		if soon {
			s.kick()
		}
	}
}

// drop takes note that a slot is not held any more.
func (s *Store) drop(id uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropLocked(id)
}

func (s *Store) dropLocked(id uint64) {
	one, ok := s.slots[id]
	if !ok {
		return
	}
	delete(s.slots, id)
	if h := s.held[one.holding]; h != nil {
		if h.count--; h.count == 0 {
			delete(s.held, one.holding)
		}
	}
}

// leaseOf returns how long a holder's slots are kept from now on.
func (s *Store) leaseOf(h shared.Holder, now time.Time) time.Duration {
	if h == (shared.Holder{}) {
		return s.lease
	}
	s.mu.Lock()
	one, ok := s.sessions[h]
	s.mu.Unlock()
	if !ok {
		return s.lease
	}
	return max(one.until.Sub(now), time.Millisecond)
}

// Renew does what [shared.Holders] says.
func (s *Store) Renew(session shared.Holder, lasts time.Duration) {
	s.mu.Lock()
	_, known := s.sessions[session]
	s.sessions[session] = sessionHeld{time.Now().Add(lasts), lasts <= 0}
	s.mu.Unlock()
	if !known || lasts < s.lease {
		s.renewSoon.Store(true)
		s.kick()
	}
}

// Kept does what [shared.Holders] says.
func (s *Store) Kept() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	var kept time.Time
	for of, h := range s.held {
		if of.holder == (shared.Holder{}) && (kept.IsZero() || h.kept.Before(kept)) {
			kept = h.kept
		}
	}
	return kept
}

// Instances does what [shared.Holders] says.
func (s *Store) Instances() int { return int(s.instances.Load()) }

// Down does what [shared.Holders] says.
func (s *Store) Down() bool {
	for _, sh := range s.shards() {
		if sh.gate.Open() {
			return true
		}
	}
	return false
}

// A renewal is the leases of one key that are renewed.
type renewal struct {
	key     string
	holders []holding
	arg     []byte
	n       int
}

func (r *renewal) add(h shared.Holder, lasts time.Duration) {
	r.arg = append(r.arg, h[:]...)
	r.arg = appendFloats(r.arg, float64(lasts.Microseconds()))
	r.n++
}

// index has the instance that a client's session is at know beside which tags the session holds slots. Another instance may have taken
// them, and in a cluster each tag has leases of its own. A tag is in the index until the latest of the slots runs out.
func (s *Store) index(ctx context.Context) {
	s.mu.Lock()
	unindexed := s.unindexed
	s.unindexed = make(map[holding]time.Time)
	s.mu.Unlock()
	var commands []rueidis.Completed
	var of []holding
	for h, until := range unindexed {
		key := s.sessionKey(h.holder)
		at := s.serverTime(s.shardOf(slotOf(key)), until)
		commands = append(commands,
			s.client.B().Zadd().Key(key).ScoreMember().ScoreMember(float64(at.UnixMicro()), h.leases).Build(),
			s.client.B().Pexpireat().Key(key).MillisecondsTimestamp(at.UnixMilli()+1000).Build())
		of = append(of, h)
	}
	if len(commands) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, s.backgroundTimeout())
	defer cancel()
	results := s.client.DoMulti(unbounded{ctx}, commands...)
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, h := range of {
		if _, newer := s.unindexed[h]; !newer && results[2*i].Error() != nil {
			s.unindexed[h] = unindexed[h] // again with the next renewal
		}
	}
}

// tags returns beside which tags the sessions hold slots that are at this instance.
func (s *Store) tags(ctx context.Context) map[shared.Holder][]string {
	s.mu.Lock()
	sessions := slices.Collect(maps.Keys(s.sessions))
	s.mu.Unlock()
	if !s.cluster || len(sessions) == 0 {
		return nil
	}
	commands := make([]rueidis.Completed, len(sessions))
	for i, session := range sessions {
		key := s.sessionKey(session)
		now := s.serverTime(s.shardOf(slotOf(key)), time.Now())
		commands[i] = s.client.B().Zrangebyscore().Key(key).Min(strconv.FormatInt(now.UnixMicro(), 10)).Max("+inf").Build()
	}
	ctx, cancel := context.WithTimeout(ctx, s.backgroundTimeout())
	defer cancel()
	tags := make(map[shared.Holder][]string)
	for i, r := range s.client.DoMulti(unbounded{ctx}, commands...) {
		if all, err := r.AsStrSlice(); err == nil {
			tags[sessions[i]] = all
		}
	}
	return tags
}

// backgroundTimeout bounds what no flow waits for.
func (s *Store) backgroundTimeout() time.Duration { return min(s.lease/4, time.Second) }

// renew renews the leases of all that hold slots, and of the instance, by one batch.
func (s *Store) renew(ctx context.Context) {
	if s.cluster {
		s.index(ctx)
	}
	tags := s.tags(ctx)
	now := time.Now()
	s.send(ctx, now, s.renewals(now, tags))
}

// count renews the lease of the instance alone, and learns how many instances there are. An engine's part of a limit goes by
// their number when the server is silent.
func (s *Store) count(ctx context.Context) { s.send(ctx, time.Now(), []*renewal{s.instance()}) }

// instance renews that of the instance.
func (s *Store) instance() *renewal {
	r := &renewal{key: s.instancesKey()}
	r.add(s.own, s.lease)
	return r
}

// send sends renewals, that of the instance first.
func (s *Store) send(ctx context.Context, now time.Time, renewals []*renewal) {
	multi := func(byText bool) []rueidis.Completed {
		commands := make([]rueidis.Completed, len(renewals))
		for i, r := range renewals {
			arg := append(binary.LittleEndian.AppendUint16(nil, uint16(r.n)), r.arg...)
			commands[i] = s.scripts.lease.command(s.client, byText, []string{r.key}, arg)
		}
		return commands
	}
	ctx, cancel := context.WithTimeout(ctx, s.backgroundTimeout())
	defer cancel()
	results := s.client.DoMulti(unbounded{ctx}, multi(false)...)
	for _, r := range results {
		if unknownScript(r.Error()) { // to renew twice is harmless
			results = s.client.DoMulti(unbounded{ctx}, multi(true)...)
			break
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, r := range results {
		reply, err := r.AsBytes()
		if err != nil || len(reply) != 16 {
			continue
		}
		if i == 0 {
			s.instances.Store(max(int64(floatAt(reply[8:])), 1))
		}
		for _, of := range renewals[i].holders {
			if h := s.held[of]; h != nil && of.holder == (shared.Holder{}) {
				h.kept = now.Add(s.lease)
			}
		}
	}
}

// maxHolders is how many leases one call of the script renews.
const maxHolders = 1000

// renewals returns what is to be renewed now, the instance first.
func (s *Store) renewals(now time.Time, tags map[shared.Holder][]string) []*renewal {
	all := []*renewal{s.instance()}
	byKey := make(map[string]*renewal)
	add := func(of holding, h shared.Holder, lasts time.Duration) {
		r := byKey[of.leases]
		if r == nil || r.n == maxHolders {
			r = &renewal{key: of.leases}
			byKey[of.leases] = r
			all = append(all, r)
		}
		r.holders = append(r.holders, of)
		r.add(h, lasts)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, one := range s.slots {
		if !now.Before(one.until) {
			s.dropLocked(id)
		}
	}
	for of := range s.held {
		if of.holder == (shared.Holder{}) {
			add(of, s.own, s.lease)
		}
	}
	for session, one := range s.sessions {
		lasts := max(one.until.Sub(now), 0)
		if lasts == 0 {
			delete(s.sessions, session)
			if !one.ended { // it may be at another instance
				continue
			}
		}
		if !s.cluster {
			add(holding{s.leases(name{}), session}, session, lasts)
		}
		for _, leases := range tags[session] {
			add(holding{leases, session}, session, lasts)
		}
	}
	return all
}
