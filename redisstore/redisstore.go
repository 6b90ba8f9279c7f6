// Package redisstore keeps the state of engines in Redis, or in a server that speaks its protocol and runs its scripts, such as
// Valkey. Engines with the same store and namespace have one limit:
//
//	store, err := redisstore.Open(ctx, "redis://localhost:6379")
//	…
//	defer store.Close()
//	e, err := engine.New(policies, engine.WithStore(store))
//
// # What it keeps where
//
// Each key of a limiter or scheduler is a Redis key, or a few with the same tag in braces. So the keys of a flow with several
// limiters by one label are in one slot of a cluster, and one call decides about them. The names have label values in them: up to
// 64 bytes as they are, longer ones by their beginning and a hash. Values of labels that carry credentials, such as API keys, are
// hashed; see [WithSecret].
//
// A bucket takes about 200 bytes, and is forgotten when it is full. The server's clock decides, and no other.
//
// # Queues
//
// If flows wait for a scheduler, the key has a ledger beside it, whose name ends in #q. The ledger has the waiting flows of each
// instance, by workload. It also has the tokens and slots for instances that have not asked since. Names of workloads are in it
// as hashes. If an instance does not ask for a second, its part of the ledger is gone. Messages wake instances. For these, a user
// with an access list needs the channels {<namespace>}#w:*.
//
// # The server
//
// It needs memory for all keys: a server that evicts keys makes full buckets of empty ones. So maxmemory-policy should be
// noeviction. Without an append-only file, limits begin anew when the server restarts. A failover loses what the replica did not
// have yet. [Open] logs what it finds.
//
// # When it does not answer
//
// Each call has a bound, 50 ms by default, and none is made twice for one flow: what timed out may have counted. After five calls in a
// row without an answer, over at least four times the bound, the server counts as down. Calls fail at once then, until it answers
// again.
//
// An answer that makes no sense counts as none. An error is an answer: a server that refuses calls is not down.
//
// What flows do meanwhile is up to the OnOutage of each component in package policy. By default each engine decides by its part of the
// limit. The slots of flows that began before are not counted then: work that must never exceed a limit needs policy.OutageClosed.
package redisstore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/rueidis"

	"github.com/headgate-go/headgate/internal/gate"
	"github.com/headgate-go/headgate/internal/shared"
)

const (
	defaultNamespace = "headgate"
	defaultTimeout   = 50 * time.Millisecond
	defaultLease     = 10 * time.Second

	gateFailures = 5
	gateProbe    = time.Second
)

// A Store keeps states in Redis. It is safe for concurrent use.
type Store struct {
	client  rueidis.Client
	owned   bool  // the client is closed with the store
	lone    *lone // nil for a client that is not the store's, and for several servers
	cluster bool
	scripts scripts

	namespace string
	secret    func() []byte // a function, because package fmt prints none
	timeout   time.Duration
	lease     time.Duration
	logger    *slog.Logger

	own   shared.Holder
	epoch time.Time

	ctx    context.Context // it ends with the store, and bounds what runs in the background
	cancel context.CancelFunc

	single    *lanes // of all keys, outside a cluster
	clustered clustered
	instances atomic.Int64
	failures  atomic.Uint64 // of calls of the store's own
	logged    atomic.Int64  // when a line said last that a server does not answer, from epoch on; 0 for never
	renewSoon chan struct{}

	renewingSessions, counting, checking turn
	kicked                               chan struct{}

	waiters  waiters
	encoders sync.Pool
	timers   sync.Pool

	runs chan *lane // to goroutines that stay
	idle atomic.Int64
	span atomic.Pointer[span]

	mu       sync.Mutex
	closed   bool
	goes     sync.WaitGroup
	held     map[holding]*held
	slots    map[uint64]slotHeld
	sessions map[shared.Holder]sessionHeld
	shortest time.Duration // that a session lasts; the lease if none lasts less
	pending  map[uint64]pending

	// unindexed is what the index of sessions does not have yet.
	unindexed map[holding]time.Time
}

var _ shared.Store = (*Store)(nil)

// lanes are the ways to a shard.
type lanes struct{ take, giveBack *lane }

// An Option changes how a [Store] works.
type Option interface{ apply(*Store) }

type option func(*Store)

func (o option) apply(s *Store) { o(s) }

// WithNamespace sets the beginning of the names of all keys. Engines share limits only if their stores have the same namespace.
// The default is "headgate". It must not be empty, or contain braces.
func WithNamespace(namespace string) Option {
	return option(func(s *Store) { s.namespace = namespace })
}

// WithTimeout sets how long a call may take in all. The default is 50 ms: in an outage, the first flows wait that long. Set more
// if flows should rather wait than be decided about without the store.
//
// A call ends before that when its context ends. There is one exception, which makes lone calls faster: if the bound is at most 100 ms,
// and [Open] made the store, of one server, a call may notice only at the end of the bound that its context has been canceled. It ends by the
// context's deadline all the same.
func WithTimeout(timeout time.Duration) Option { return option(func(s *Store) { s.timeout = timeout }) }

// WithLease sets how long the lease of a process lasts. If a process is killed or cut off, its slots come back when its lease has
// run out. Processes renew their leases after a third of that time. A process that was cut off for two thirds of it counts its slots as
// lost; see [flowctl.WithCancelOnLostSlot]. The default is 10 s, the least 1 s.
//
// [flowctl.WithCancelOnLostSlot]: https://pkg.go.dev/github.com/headgate-go/headgate/flowctl#WithCancelOnLostSlot
func WithLease(lease time.Duration) Option { return option(func(s *Store) { s.lease = lease }) }

// WithLogger sets the logger of the store. By default the store logs nothing.
func WithLogger(logger *slog.Logger) Option { return option(func(s *Store) { s.logger = logger }) }

// WithSecret sets the secret that hides credentials in the names of keys. Values of labels that carry API keys, cookies and the
// like are named by an HMAC with this secret. All instances need the same secret to have the same limits. Without a secret, the
// names depend on the namespace alone. Then a reader of the server's keys can guess a credential, and find out whether it was
// used. Random API keys cannot be guessed, but passwords may.
func WithSecret(secret []byte) Option {
	secret = append([]byte(nil), secret...)
	return option(func(s *Store) {
		if s.secret = nil; len(secret) > 0 {
			s.secret = func() []byte { return secret }
		}
	})
}

// New returns a store that uses the client. Close the client after the store: the store does not close it. If the program has no
// client, use [Open], which makes a suitable one and checks the server.
//
// The client should have AlwaysPipelining, DisableCache and DisableRetry, and a ConnWriteTimeout of about a second, after which a
// connection without answers is given up.
//
// Only a store that [Open] makes has a connection for lone calls, which are slower without it.
//
// The client is the program's own, and so is its trust in the server. The store bounds what a server sends only on connections that
// [Open] makes. A client of rueidis by itself reserves the memory that the server names, and panics at replies that it does not await.
func New(client rueidis.Client, opts ...Option) (*Store, error) { return newStore(client, nil, opts) }

// newStore is New with a connection for lone calls; nil for none.
func newStore(client rueidis.Client, l *lone, opts []Option) (*Store, error) {
	s := &Store{
		client:    client,
		lone:      l,
		cluster:   client.Mode() == rueidis.ClientModeCluster,
		scripts:   newScripts(),
		namespace: defaultNamespace,
		timeout:   defaultTimeout,
		lease:     defaultLease,
		logger:    slog.New(slog.DiscardHandler),
		epoch:     time.Now(),
		kicked:    make(chan struct{}, 1),
		renewSoon: make(chan struct{}, 1),
		runs:      make(chan *lane),
		held:      make(map[holding]*held),
		slots:     make(map[uint64]slotHeld),
		sessions:  make(map[shared.Holder]sessionHeld),
		pending:   make(map[uint64]pending),
		waiters:   waiters{of: make(map[string]map[*waiter]bool)},
		unindexed: make(map[holding]time.Time),
	}
	for _, o := range opts {
		o.apply(s)
	}
	if err := s.check(); err != nil {
		return nil, err
	}
	if s.secret == nil {
		s.secret = func() []byte { return []byte(s.namespace) }
	}
	_, _ = rand.Read(s.own[:])                                 // it does not fail
	s.ctx, s.cancel = context.WithCancel(context.Background()) //nolint:forbidigo // the store outlives the caller's; Close cancels it
	s.instances.Store(1)
	s.shortest = s.lease
	alone := s.newShard("")
	s.single = s.newLanes(func() *shard { return alone })
	s.clustered.init(alone)
	s.start(s.background)
	s.start(s.renewing)
	return s, nil
}

func (s *Store) check() error {
	switch {
	case s.namespace == "" || strings.ContainsAny(s.namespace, "{}"):
		return fmt.Errorf("headgate: redisstore: WithNamespace(%q): a namespace is not empty, and has no braces", s.namespace)
	case s.timeout <= 0:
		return fmt.Errorf("headgate: redisstore: WithTimeout(%v): the time must be positive", s.timeout)
	case s.lease < time.Second:
		return fmt.Errorf("headgate: redisstore: WithLease(%v): the least is 1s", s.lease)
	case s.logger == nil:
		return errors.New("headgate: redisstore: WithLogger(nil)")
	default:
		return nil
	}
}

func (s *Store) newShard(address string) *shard {
	return &shard{address: address, gate: gate.New(gateFailures, 4*s.timeout)}
}

func (s *Store) newLanes(of func() *shard) *lanes {
	return &lanes{
		take:     &lane{store: s, script: s.scripts.take, shard: of},
		giveBack: &lane{store: s, script: s.scripts.giveBack, shard: of},
	}
}

// start runs f in a goroutine that Close waits for. It reports false if the store is closed.
func (s *Store) start(f func()) bool {
	if !s.begin() {
		return false
	}
	go func() {
		defer s.goes.Done()
		f()
	}()
	return true
}

// begin has Close wait until goes.Done is called. It reports false if the store is closed.
func (s *Store) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.goes.Add(1)
	return true
}

// Close ends the store. Slots of flows in flight do not come back when the flows end after that: they come back when the lease has run
// out, or, if a session has them, when they are returned at another instance. Calls fail then, which is no outage. Close
// returns after the calls that are under way have ended, which takes no longer than their bound. A second call does nothing.
func (s *Store) Close() error {
	if s.ctx.Err() == nil && s.hasPending() && !s.Down() {
		s.returnPending(s.ctx, time.Now())
	}
	s.mu.Lock()
	closed := s.closed
	s.closed = true
	s.mu.Unlock()
	if closed {
		return nil
	}
	s.cancel()
	s.goes.Wait()
	s.leaveInstances()
	if s.owned {
		s.client.Close()
	}
	if s.lone != nil {
		s.lone.client.Close()
	}
	return nil
}

// leaveInstances has others know at once that there is one instance less.
func (s *Store) leaveInstances() {
	if s.Down() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), s.timeout) //nolint:forbidigo // the store's own has ended
	defer cancel()
	_ = s.client.Do(unbounded{ctx}, s.client.B().Zrem().Key(s.instancesKey()).Member(rueidis.BinaryString(s.own[:])).Build()).Error()
}
