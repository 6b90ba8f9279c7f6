package redisstore

import (
	"context"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/rueidis"
)

const (
	pendingPeriod  = 100 * time.Millisecond
	topologyPeriod = 10 * time.Second
	countPeriod    = time.Second
	checkPeriod    = time.Second
)

// kick has the background goroutine look what there is to do.
func (s *Store) kick() {
	select {
	case s.kicked <- struct{}{}:
	default:
	}
}

// A round is one of a loop that does several things, each in its period.
type round struct {
	now  time.Time
	wait time.Duration // until the next one
}

// due reports whether something is due that was done then. If so, it is done now.
func (r *round) due(last *time.Time, period time.Duration) bool {
	if left := last.Add(period).Sub(r.now); left > 0 {
		r.wait = min(r.wait, left)
		return false
	}
	*last = r.now
	r.wait = min(r.wait, period)
	return true
}

// background does what no flow waits for: it returns slots, asks servers that count as down, and follows the cluster.
func (s *Store) background() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var probed, looked, returnedAt time.Time
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-timer.C:
		case <-s.kicked:
		}
		r := round{time.Now(), topologyPeriod}
		if s.cluster && r.due(&looked, s.topologyPeriod()) {
			s.follow(s.ctx)
		}
		if s.Down() && r.due(&probed, gateProbe) {
			s.askAgain(s.ctx)
		}
		if s.hasPending() && r.due(&returnedAt, pendingPeriod) {
			s.returnPending(s.ctx, r.now)
		}
		timer.Reset(r.wait)
	}
}

// renewing has leases renewed. Those of slots are renewed at a third of their time, and sooner after a failure. Those of sessions are
// renewed at a third of theirs, and when there is something new. That of the instance is renewed more often, because the others count
// it. It waits for none of them, so a shard that does not answer costs no lease at the others.
func (s *Store) renewing() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var counted, checked, refreshed time.Time
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-timer.C:
		case <-s.renewSoon:
		}
		r := round{time.Now(), countPeriod}
		if r.due(&counted, min(countPeriod, s.lease/renewAfter)) {
			s.once(&s.counting, func() { s.count(s.ctx) })
		}
		if s.lone != nil && r.due(&checked, checkPeriod) && !s.Down() {
			s.once(&s.checking, func() { s.lone.check(s.ctx, time.Now().Add(s.backgroundTimeout())) })
		}
		for _, sh := range s.shards() {
			period := s.lease / renewAfter
			if sh.unrenewed.Load() {
				period = s.lease / retryAfter
			}
			if r.due(&sh.renewed, period) {
				s.once(&sh.renewing, func() { s.renewOwn(s.ctx, sh) })
			}
		}
		if r.due(&refreshed, s.sessionPeriod()) {
			s.refreshSessions()
		}
		s.once(&s.renewingSessions, func() { s.renewSessions(s.ctx) })
		timer.Reset(r.wait)
	}
}

func (s *Store) hasPending() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.pending) > 0
}

// topologyPeriod is how often the cluster is looked at. While a server is down, another may take its place.
func (s *Store) topologyPeriod() time.Duration {
	if s.Down() {
		return gateProbe
	}
	return topologyPeriod
}

// askAgain asks servers that count as down, so that no flow has to wait for that.
func (s *Store) askAgain(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, max(s.timeout, s.backgroundTimeout()))
	defer cancel()
	var wg sync.WaitGroup
	for _, sh := range s.shards() {
		if client := s.clientOf(sh); sh.gate.Open() && client != nil {
			wg.Go(func() {
				sent := time.Now()
				s.countFailure(s.evidence(sh, s.probe(ctx, client), sent))
			})
		}
	}
	wg.Wait()
}

// probe asks a server for what flows need of it, which is a script. A server may answer PING, and no script.
func (s *Store) probe(ctx context.Context, client rueidis.Client) error {
	reply, err := runAt(unbounded{ctx}, client, s.scripts.probe, nil, nil)
	if err == nil && len(reply) != 8 {
		return errReply
	}
	return err
}

// clientOf returns the client of a shard's server alone. It is nil if the cluster's client does not know that server any more: then
// [Store.follow] finds out which one has taken its place.
func (s *Store) clientOf(sh *shard) rueidis.Client {
	if sh.address == "" {
		return s.client
	}
	for address, client := range s.client.Nodes() {
		// A server that does not know its own host tells its port only.
		if address == sh.address || sh.address[0] == ':' && strings.HasSuffix(address, sh.address) {
			return client
		}
	}
	return nil
}

// clustered is what is known of a cluster: which shard has which slots. Outside a cluster one shard has all.
type clustered struct {
	of    atomic.Pointer[[slotCount]*shard]
	mu    sync.Mutex
	lanes map[uint16]*lanes
	known map[string]*shard // by the address of the primary
	all   atomic.Pointer[[]*shard]
}

func (c *clustered) init(alone *shard) {
	c.lanes, c.known = make(map[uint16]*lanes), make(map[string]*shard)
	var of [slotCount]*shard
	for i := range of {
		of[i] = alone
	}
	c.of.Store(&of)
	c.all.Store(&[]*shard{alone})
}

// shardOf returns the shard that has a slot.
func (s *Store) shardOf(slot uint16) *shard { return s.clustered.of.Load()[slot] }

// shards returns all shards.
func (s *Store) shards() []*shard { return *s.clustered.all.Load() }

// lanesFor returns the lanes of a name.
func (s *Store) lanesFor(n name) *lanes {
	if !s.cluster {
		return s.single
	}
	return s.lanesOf(slotOf(n.tag))
}

// lanesOf returns the lanes of a slot of the cluster.
func (s *Store) lanesOf(slot uint16) *lanes {
	c := &s.clustered
	c.mu.Lock()
	defer c.mu.Unlock()
	of := c.lanes[slot]
	if of == nil {
		of = s.newLanes(func() *shard { return s.shardOf(slot) })
		c.lanes[slot] = of
	}
	return of
}

// follow learns which primary has which slots. What is known stays if the cluster does not say.
func (s *Store) follow(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, s.backgroundTimeout())
	defer cancel()
	ranges, err := s.client.Do(unbounded{ctx}, s.client.B().ClusterSlots().Build()).ToArray()
	if err != nil {
		return
	}
	c := &s.clustered
	of := *c.of.Load()
	var all []*shard
	known := make(map[string]*shard)
	for _, r := range ranges {
		parts, err := r.ToArray()
		if err != nil || len(parts) < 3 {
			return
		}
		from, err1 := parts[0].AsInt64()
		to, err2 := parts[1].AsInt64()
		node, err3 := parts[2].ToArray()
		if err1 != nil || err2 != nil || err3 != nil || len(node) < 2 || from < 0 || to >= slotCount {
			return
		}
		host, _ := node[0].ToString()
		port, _ := node[1].AsInt64()
		address := net.JoinHostPort(host, strconv.FormatInt(port, 10))
		sh := known[address]
		if sh == nil {
			if sh = c.known[address]; sh == nil {
				sh = s.newShard(address)
			}
			known[address] = sh
			all = append(all, sh)
		}
		for i := from; i <= to; i++ {
			of[i] = sh
		}
	}
	if len(all) == 0 {
		return
	}
	c.known = known // only this goroutine uses it
	c.of.Store(&of)
	c.all.Store(&all)
}
