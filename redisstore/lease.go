package redisstore

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/rueidis"

	"github.com/headgate-go/headgate/internal/shared"
)

// A holding is the slots of one holder beside one tag. The zero holder is the store's own instance.
type holding struct {
	leases string
	holder shared.Holder
}

// What is counted on of a lease. A process that is cut off knows that its slots are lost by its own clock, and needs time to end their
// flows. So it counts on its own lease for two thirds of it, from the sending of the last renewal, or of the last call that took a slot.
// Others get the slots after the whole, or after eleven twelfths in the second case. A session's lease outlasts the session by a period of
// renewals. So what the store has confirmed covers the session until the next renewal, and most of its time after that.
const (
	spare      = 3  // a process does not count on this part of its lease
	renewAfter = 3  // a lease is renewed after this part of it, and a session after this part of the time that it lasts
	retryAfter = 12 // a renewal that has failed is made again after this part
	leftAlone  = 12 // a call that takes a slot leaves a lease alone that lacks less than this part; see lease in slots.lua
)

// countedOn is how long the process counts on its lease.
func (s *Store) countedOn() time.Duration { return s.lease - s.lease/spare }

// sureOf returns how much of a lease is left at the least, after a call that may have left it alone.
func sureOf(lease time.Duration) time.Duration { return lease - lease/leftAlone }

// held is how many slots a holding has, as far as this process knows, and until when the process counts on them.
type held struct {
	count int
	kept  time.Time

	// indexed is until when the index of the holder's session has the tag. See [Store.index].
	indexed time.Time
}

// A sessionHeld is a session that is at this instance, or has ended.
type sessionHeld struct {
	until time.Time
	lasts time.Duration // from when that was said
	due   bool          // its leases have yet to be renewed
	kept  time.Time     // until when all its leases last, as servers have confirmed
}

// leased returns until when the leases of the session are to last.
func (one sessionHeld) leased() time.Time { return one.until.Add(max(one.lasts, 0) / renewAfter) }

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
		h.countOn(sent.Add(s.countedOn()))
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
			s.renewLater()
		}
	}
}

// countOn takes note that slots are kept until then.
func (h *held) countOn(kept time.Time) {
	if kept.After(h.kept) {
		h.kept = kept
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
	return max(one.leased().Sub(now), time.Millisecond)
}

// Renew does what [shared.Holders] says. A session that is new, or has ended, is renewed at once, and others at a third of the time that
// they last.
func (s *Store) Renew(session shared.Holder, lasts time.Duration) (kept time.Time) {
	s.mu.Lock()
	one, known := s.sessions[session]
	soon := !known || lasts <= 0
	kept = one.kept
	s.sessions[session] = sessionHeld{time.Now().Add(lasts), lasts, soon || one.due, kept}
	if lasts > 0 && lasts < s.shortest {
		s.shortest, soon = lasts, true // the next round is sooner
	}
	s.mu.Unlock()
	if soon {
		s.renewLater()
	}
	return kept
}

// sessionPeriod is how often the leases of sessions are renewed.
func (s *Store) sessionPeriod() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.shortest / renewAfter
}

// refreshSessions has the leases of all sessions renewed.
func (s *Store) refreshSessions() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shortest = s.lease
	for session, one := range s.sessions {
		one.due = true
		s.sessions[session] = one
		if one.lasts > 0 {
			s.shortest = min(s.shortest, one.lasts)
		}
	}
}

// dueSessions returns until when the leases are to last of sessions that have yet to be renewed. One that has ended is renewed once more,
// for no time. One that nobody has renewed may be at another instance.
func (s *Store) dueSessions(now time.Time) map[shared.Holder]time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	due := make(map[shared.Holder]time.Time)
	for session, one := range s.sessions {
		switch {
		case !now.Before(one.until):
			delete(s.sessions, session)
			if one.lasts > 0 {
				continue
			}
		case !one.due:
			continue
		default:
			one.due = false
			s.sessions[session] = one
		}
		due[session] = one.leased()
	}
	return due
}

// confirmSessions notes which renewals of sessions, sent then, have been confirmed. Unconfirmed has how many renewals of each session failed.
// Those sessions are renewed again.
func (s *Store) confirmSessions(due map[shared.Holder]time.Time, unconfirmed map[shared.Holder]int, sent time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for session, until := range due {
		one, ok := s.sessions[session]
		switch {
		case !ok:
		case unconfirmed[session] > 0:
			one.due = true
			s.sessions[session] = one
		default:
			if kept := sent.Add(sureOf(until.Sub(sent))); kept.After(one.kept) {
				one.kept = kept
				s.sessions[session] = one
			}
		}
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

// Failures does what [shared.Holders] says.
func (s *Store) Failures() uint64 { return s.failures.Load() }

// countFailure counts a call of the store's own that failed. One that was not made, or that Close has ended, is none.
func (s *Store) countFailure(err error) {
	if err != nil && !errors.Is(err, shared.ErrDown) && !errors.Is(err, errClosed) {
		s.failures.Add(1)
	}
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
	arg     []byte // of holders
	holders []shared.Holder
}

func (r *renewal) add(h shared.Holder, lasts time.Duration) {
	r.arg = append(r.arg, h[:]...)
	r.arg = appendFloats(r.arg, float64(lasts.Microseconds()))
	r.holders = append(r.holders, h)
}

// index has the instance that a client's session is at know beside which tags the session holds slots. Another instance may have taken
// them, and in a cluster each tag has leases of its own. A tag is in the index until the latest of the slots runs out. It returns the
// sessions of which the index does not have all.
func (s *Store) index(ctx context.Context) (lacking []shared.Holder) {
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
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, s.backgroundTimeout())
	defer cancel()
	results := s.client.DoMulti(unbounded{ctx}, commands...)
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, h := range of {
		if results[2*i].Error() == nil {
			continue
		}
		lacking = append(lacking, h.holder)
		if _, newer := s.unindexed[h]; !newer {
			s.unindexed[h] = unindexed[h] // again in the next round
		}
	}
	return lacking
}

// tags returns beside which tags of a cluster sessions hold slots.
func (s *Store) tags(ctx context.Context, sessions []shared.Holder) map[shared.Holder][]string {
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

// renewLater has leases renewed without waiting for it.
func (s *Store) renewLater() {
	select {
	case s.renewSoon <- struct{}{}:
	default:
	}
}

// A turn is that of something which is done once at a time.
type turn struct {
	mu           sync.Mutex
	taken, again bool
}

// take reports whether the turn is the caller's. If it is not, the turn comes again.
func (t *turn) take() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	free := !t.taken
	t.taken, t.again = true, !free
	return free
}

// comesAgain ends the turn, unless it comes again.
func (t *turn) comesAgain() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.taken, t.again = t.again, false
	return t.taken
}

// once does something in a goroutine of its own. If it is being done, it is done once more after that.
func (s *Store) once(t *turn, do func()) {
	if !t.take() {
		return
	}
	s.start(func() {
		do()
		for t.comesAgain() {
			do()
		}
	})
}

// renewOwn renews the leases of the slots that the instance itself holds at a shard. If some are not confirmed, it has them renewed again
// soon.
func (s *Store) renewOwn(ctx context.Context, sh *shard) {
	now := time.Now()
	all := s.renewals(now, sh)
	confirmed := 0
	s.renewAt(ctx, sh, all, func(r *renewal, _ []byte) {
		confirmed++
		s.mu.Lock()
		defer s.mu.Unlock()
		if h := s.held[holding{leases: r.key}]; h != nil {
			h.countOn(now.Add(s.countedOn()))
		}
	})
	if sh.unrenewed.Store(confirmed < len(all)); confirmed < len(all) {
		s.renewLater()
	}
}

// renewals returns what is to be renewed now of the slots that the instance itself holds at a shard.
func (s *Store) renewals(now time.Time, sh *shard) (all []*renewal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, one := range s.slots {
		if !now.Before(one.until) {
			s.dropLocked(id)
		}
	}
	for of := range s.held {
		if of.holder == (shared.Holder{}) && s.shardOfLeases(of.leases) == sh {
			r := &renewal{key: of.leases}
			r.add(s.own, s.lease)
			all = append(all, r)
		}
	}
	return all
}

// shardOfLeases returns the shard that has a key of leases.
func (s *Store) shardOfLeases(key string) *shard {
	if !s.cluster {
		return s.shardOf(0)
	}
	return s.shardOf(slotOf(key[:strings.IndexByte(key, '}')+1]))
}

// renewSessions renews the leases of sessions, in a cluster beside each tag that they hold slots under.
func (s *Store) renewSessions(ctx context.Context) {
	began := time.Now()
	unconfirmed := make(map[shared.Holder]int) // how many renewals of each
	if s.cluster {
		for _, session := range s.index(ctx) {
			unconfirmed[session]++
		}
	}
	due := s.dueSessions(began)
	sessions := slices.Collect(maps.Keys(due))
	if len(sessions) == 0 {
		return
	}
	var tags map[shared.Holder][]string
	if s.cluster {
		tags = s.tags(ctx, sessions)
	}
	now := time.Now()
	byShard, latest := make(map[*shard][]*renewal, 1), make(map[string]*renewal)
	add := func(leases string, session shared.Holder) {
		unconfirmed[session]++
		r := latest[leases]
		if r == nil || len(r.holders) == maxHolders {
			r = &renewal{key: leases}
			latest[leases] = r
			sh := s.shardOfLeases(leases)
			byShard[sh] = append(byShard[sh], r)
		}
		r.add(session, max(due[session].Sub(now), 0))
	}
	for _, session := range sessions {
		if !s.cluster {
			add(s.leases(name{}), session)
		}
		if _, known := tags[session]; s.cluster && !known {
			unconfirmed[session]++
		}
		for _, leases := range tags[session] {
			add(leases, session)
		}
	}
	var wg sync.WaitGroup
	var mu sync.Mutex // of unconfirmed
	for sh, renewals := range byShard {
		wg.Go(func() {
			s.renewAt(ctx, sh, renewals, func(r *renewal, _ []byte) {
				mu.Lock()
				defer mu.Unlock()
				for _, session := range r.holders {
					unconfirmed[session]--
				}
			})
		})
	}
	wg.Wait()
	s.confirmSessions(due, unconfirmed, began) // a slot that was taken since then is kept for longer
}

// maxHolders is how many leases one call of the script renews.
const maxHolders = 1000

// count renews the lease of the instance, and learns how many instances there are. An engine's part of a limit goes by their number when
// the server is silent.
func (s *Store) count(ctx context.Context) {
	r := &renewal{key: s.instancesKey()}
	r.add(s.own, s.lease)
	s.renewAt(ctx, s.shardOfLeases(r.key), []*renewal{r}, func(_ *renewal, reply []byte) { s.instances.Store(max(int64(floatAt(reply[8:])), 1)) })
}

// renewAt renews leases at one shard, and calls confirmed for each that the server has confirmed. The outcome is evidence of how the
// shard is, as that of a flow's call is: there may be no flows.
func (s *Store) renewAt(ctx context.Context, sh *shard, renewals []*renewal, confirmed func(r *renewal, reply []byte)) {
	if len(renewals) == 0 || sh.gate.Open() { // askAgain asks it then
		return
	}
	sent := time.Now()
	ctx, cancel := context.WithTimeout(ctx, s.backgroundTimeout())
	defer cancel()
	sc := s.scripts.lease
	call := func(r *renewal) ([]string, []byte) {
		return []string{r.key}, append(binary.LittleEndian.AppendUint16(nil, uint16(len(r.holders))), r.arg...)
	}
	commands := make([]rueidis.Completed, len(renewals))
	for i, r := range renewals {
		keys, arg := call(r)
		commands[i] = sc.command(s.client, false, keys, arg)
	}
	var failed error
	answered := false
	for i, result := range s.client.DoMulti(unbounded{ctx}, commands...) {
		reply, err := result.AsBytes()
		if unknownScript(err) {
			keys, arg := call(renewals[i])
			reply, err = s.run(unbounded{ctx}, sc, keys, arg)
		}
		switch {
		case err != nil:
		case len(reply) == 16:
			confirmed(renewals[i], reply)
		default:
			err = errReply
		}
		if _, refused := rueidis.IsRedisErr(err); err == nil || refused {
			answered = true
		}
		failed = cmp.Or(failed, err)
	}
	if answered {
		_ = s.evidence(sh, nil, sent)
	} else {
		failed = s.evidence(sh, failed, sent)
	}
	if s.ctx.Err() == nil {
		s.countFailure(failed)
	}
}
