// Package sides runs a test over every kind of agent that a client can have, so that what holds for one is tested for all:
//
//	sides.Setup{Policies: limits}.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) {
//		flow := side.Client.Start(t.Context(), "point", flowctl.Params{})
//		…
//	})
//
// A side also reports what its agent saw of the client's flows.
package sides

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/testing/sharedtest"
	"github.com/headgate-go/headgate/policy"
)

// A Kind is a kind of agent. Its text names subtests.
type Kind string

// The kinds of agents.
const (
	Embedded Kind = "embedded" // an engine in the process
	Served   Kind = "served"   // an engine that package agent serves, over gRPC in memory
	Scripted Kind = "scripted" // flowtest's agent, over gRPC in memory
	Stored   Kind = "stored"   // an engine in the process whose limits are in a store
)

var (
	// All is every kind but Stored.
	All = []Kind{Embedded, Served, Scripted}

	// Engines are the kinds that decide by policies.
	Engines = []Kind{Embedded, Served}

	// AllAndStored is for what must also hold with a store. Elsewhere a Stored engine is an Embedded one: labels,
	// caches without bounds, breakers that reject before the store is asked, and texts of errors do not depend on a store.
	AllAndStored = append(slices.Clip(All), Stored)

	// EnginesAndStored is the same without Scripted.
	EnginesAndStored = append(slices.Clip(Engines), Stored)
)

// A Setup is what a side is made of. The zero value accepts every flow.
type Setup struct {
	// Policies are those of an engine. A scripted agent has none.
	Policies []policy.Policy

	// Answers are what becomes of checks, as in flowtest's Agent.Answer. They come before an engine's policies; see
	// Side.Answer.
	Answers []flowtest.Answer

	// Travel is how long messages of a served agent take to arrive.
	Travel time.Duration

	// EngineOptions are an engine's, Options the client's.
	EngineOptions []engine.Option
	Options       []flowctl.Option
}

// Policies are one policy, "test", of these components; none if there are no components.
func Policies(components ...policy.Component) []policy.Policy {
	if len(components) == 0 {
		return nil
	}
	return []policy.Policy{{Name: "test", Components: components}}
}

// A Side is an agent and a client of it. Both are closed when the test ends. It is safe for concurrent use.
type Side struct {
	Kind   Kind
	Client *flowctl.Client

	// Engine is that of an embedded or served side; nil for a scripted one.
	Engine *engine.Engine

	// Agent asks the engine directly. The side does not see these checks. It is nil for a scripted side.
	Agent agentapi.Agent

	// Script is the agent of a scripted side; nil for the others.
	Script *flowtest.Agent

	t       testing.TB
	log     log               // of the engines' sides
	network network           // of a served side
	store   *sharedtest.Store // of a stored side; else nil
}

// Over runs f as a subtest with each kind of agent.
func (s Setup) Over(t *testing.T, kinds []Kind, f func(t *testing.T, side *Side)) {
	t.Helper()
	for _, kind := range kinds {
		t.Run(string(kind), func(t *testing.T) { f(t, s.New(t, kind)) })
	}
}

// InBubbles is Over with each subtest in a bubble of testing/synctest.
func (s Setup) InBubbles(t *testing.T, kinds []Kind, f func(t *testing.T, side *Side)) {
	t.Helper()
	for _, kind := range kinds {
		t.Run(string(kind), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { f(t, s.New(t, kind)) })
		})
	}
}

// New makes a side of the kind, which lasts until the test ends.
func (s Setup) New(t testing.TB, kind Kind) *Side {
	t.Helper()
	side := &Side{Kind: kind, t: t}
	if kind == Scripted {
		side.Script = flowtest.NewAgent(t)
		side.Script.Answer(s.Answers...)
		side.Client = side.Script.Client(s.Options...)
		return side
	}
	var err error
	opts := s.EngineOptions
	if kind == Stored {
		side.store = sharedtest.New().Instance()
		opts = append(slices.Clip(opts), engine.WithStore(side.store))
	}
	if side.Engine, err = engine.New(s.Policies, opts...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = side.Engine.Close() })
	side.Agent = side.Engine.Agent()
	side.log.answers = s.Answers
	if kind == Served {
		side.network.travel = s.Travel
		side.Client = dial(t, serve(side.Engine, &side.log), &side.network, s.Options...)
		return side
	}
	if side.Client, err = flowctl.New(&recorder{side.Engine.Agent(), side.Engine.Agent().(agentapi.Leaser), &side.log}, s.Options...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = side.Client.Close(context.WithoutCancel(t.Context())) }) // the context has ended by then
	return side
}

// Answer sets the answers to checks from now on, for every kind: the first check gets the first answer, and so on; the
// last answer stays. Without answers a scripted agent accepts every flow, and an engine decides by its policies. At an
// engine an answer can reject a flow, with Reason and RetryAfter, or Fail. If it does neither, the policies decide.
func (s *Side) Answer(answers ...flowtest.Answer) {
	if s.Script != nil {
		s.Script.Answer(answers...)
		return
	}
	s.log.script(answers)
}

// Silence makes the agent answer no more checks, as if it were gone. An engine is closed.
func (s *Side) Silence() {
	if s.Script != nil {
		s.Script.Answer(flowtest.Answer{Fail: status.Error(codes.Unavailable, "gone")})
		return
	}
	_ = s.Engine.Close()
}

// Cut cuts what decides about slots off from the flows that hold them, without a word: a served agent no longer hears its clients,
// and a stored engine no longer reaches its store. The other kinds cannot be cut off.
func (s *Side) Cut() {
	s.network.cut.Store(true)
	if s.store != nil {
		s.store.Behave(sharedtest.Behavior{Cut: true})
	}
}

// StoreResult stores a value in the agent's result cache, as another process would. A scripted agent keeps it for ever.
func (s *Side) StoreResult(controlPoint, key string, value []byte, ttl time.Duration) {
	s.t.Helper()
	if s.Script != nil {
		s.Script.SetResult(controlPoint, key, value)
		return
	}
	if err := s.Agent.Store(s.t.Context(), agentapi.CacheKey{ControlPoint: controlPoint, Key: key}, value, ttl); err != nil {
		s.t.Error(err)
	}
}

// ForgetResult has a value of the agent's result cache expire.
func (s *Side) ForgetResult(controlPoint, key string) {
	s.t.Helper()
	if s.Script != nil {
		s.Script.SetResult(controlPoint, key, nil)
		return
	}
	if err := s.Agent.Delete(s.t.Context(), agentapi.CacheKey{ControlPoint: controlPoint, Key: key}); err != nil {
		s.t.Error(err)
	}
}
