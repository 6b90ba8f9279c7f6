package engine

import (
	"context"
	"crypto/sha256"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/internal/shared"
)

// WithStore lets engines share their limits. All engines with the same store have the same buckets, quotas and slots, and a limit
// holds for them together. Package redisstore has such a store. Components that a policy marks as Local stay the engine's own. So
// do load schedulers, circuit breakers and samplers. Two components are the same if their policies' names, their IDs and their
// labels are the same. By default there is no store.
//
// After the limiters in memory have let a flow pass, the flow asks the store once for all shared limiters that it meets. While
// the store does not answer, the OnOutage of each component decides. [Engine.Stats] shows this in StoreStats.
//
// Each engine has its own queues for quota and concurrency schedulers. The store divides tokens and slots among the workloads of
// all engines, by their priorities, wherever their flows wait. Within one workload, the engines with waiting flows take turns.
// Values of the fairness label have equal shares only within each engine. While flows wait at a key, an engine asks the store at
// most every 5 ms.
//
// The engine does not close the store. In the store, values of labels that carry credentials are named by a hash without a key,
// because all engines must use the same names.
func WithStore(s shared.Store) Option {
	return option(func(e *Engine) error {
		if s == nil {
			return errors.New("WithStore: the store is nil")
		}
		e.store = &store{Store: s}
		e.store.watched.limited = e.limited
		sum := sha256.Sum256([]byte("headgate: names of credentials in a store"))
		e.store.names.Set(sum[:])
		return nil
	})
}

// A store is what an engine knows of the store that it shares with others.
type store struct {
	shared.Store
	names keys.Secret // the same for all engines

	watched watched // what flows in this process hold

	failures, unanswered atomic.Uint64

	log     minutely     // about flows that the store did not decide about
	failing atomic.Int64 // when a failure was logged that no success came after, by the engine's time; 0 for none

	goes  sync.WaitGroup // what asks for flows that wait
	mu    sync.Mutex
	ended bool // none begins any more; guarded by mu
}

// closedFor is after which time flows may come back that were rejected because the store did not answer: a store that is down is asked
// once a second whether it is back.
const closedFor = int64(time.Second)

// begin runs f in a goroutine that Close waits for. It reports false after Close.
func (s *store) begin(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return false
	}
	s.goes.Go(f)
	return true
}

// end waits until what has begun ends. It is called when the engine is closed.
func (s *store) end() {
	if s == nil {
		return
	}
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.goes.Wait()
}

// detached is the context of calls that are for no flow in particular.
func (*store) detached() context.Context {
	return context.Background() //nolint:forbidigo // no caller ends these calls; the store bounds each of them
}

// StoreStats are about the store that engines share.
type StoreStats struct {
	// Shared reports whether there is one; see [WithStore].
	Shared bool

	// Down reports whether it did not answer lately. The engine is degraded then: each component's OnOutage says what holds.
	Down bool

	// Instances is how many have used the store lately, this one included.
	Instances int

	// Failures counts the calls that the store did not answer, or answered with an error. It has those of flows, and those that the
	// store makes by itself, such as renewals of leases. It does not have those that are not made, because the store is down or closed:
	// Unanswered counts the flows of these. Engines in one process with the same store all count the store's own calls.
	Failures uint64

	// Unanswered counts the flows that were decided about without the store because of that.
	Unanswered uint64

	// LostSlots counts the slots of flows in this process that the store may give to others soon, or has given to others. A slot
	// counts if the process's lease was not renewed for two thirds of its time, from the sending of the last renewal: the process was
	// cut off from the store, or stood still. Others get the slot after the whole lease.
	LostSlots uint64
}

func (s *store) stats() StoreStats {
	if s == nil {
		return StoreStats{}
	}
	return StoreStats{true, s.Down(), s.Instances(), s.failures.Load() + s.Store.Failures(), s.unanswered.Load(), s.watched.lost.Load()}
}

// countFailure counts a call that failed, if it was made, and logs once a minute that there are some. Flows is how many were decided about
// without the store. A failure of a closed store is logged only if flows were decided about without it.
func (e *Engine) countFailure(err error, flows uint64) {
	s, now := e.store, e.now()
	closed := errors.Is(err, shared.ErrClosed)
	if !closed && !errors.Is(err, shared.ErrDown) {
		s.failures.Add(1)
	}
	n := s.unanswered.Add(flows)
	if closed && flows == 0 {
		return
	}
	if more, due := s.log.due(now, n); due {
		s.failing.CompareAndSwap(0, max(now, 1))
		e.logger.Warn("headgate: the store does not answer; limits hold as OnOutage says", "error", err, "flows", more)
	}
}

// A minutely is log lines about something that is counted, one a minute at the most. The zero value is ready.
type minutely struct {
	last atomic.Int64  // when there was one, by the engine's time; 0 for never
	told atomic.Uint64 // the count by then
}

// due reports whether there is to be one now, and how many more have been counted since the last, if the count is n.
func (w *minutely) due(now int64, n uint64) (more uint64, due bool) {
	last := w.last.Load()
	if last != 0 && now-last < int64(sweepEvery) || !w.last.CompareAndSwap(last, max(now, 1)) {
		return 0, false
	}
	return n - w.told.Swap(n), true
}

// answered notes what became of a call. It is no failure of the store that a caller leaves.
func (e *Engine) answered(ctx context.Context, err error) {
	switch {
	case err == nil:
		e.succeeded()
	case ctx.Err() == nil:
		e.countFailure(err, 0)
	}
}

// succeeded logs that the store answers again, if it was logged that it does not.
func (e *Engine) succeeded() {
	s := e.store
	if s.failing.Load() == 0 { // most calls
		return
	}
	if since := s.failing.Swap(0); since != 0 {
		e.logger.Info("headgate: the store answers again", "after", time.Duration(e.now()-since).Round(time.Millisecond))
	}
}
