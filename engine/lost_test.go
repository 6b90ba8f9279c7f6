package engine_test

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/internal/testing/metertest"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/internal/testing/sharedtest"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// twoSlots are two slots of the store, or of each engine.
func twoSlots(local bool) policy.Component {
	return policy.ConcurrencyLimiter{ID: "c", Selectors: policy.At("point"), Max: 2, MaxInflight: time.Hour, Local: local}
}

// When a process was cut off from the store for longer than its lease lasts, flows in it that hold slots of the store count them as lost, and
// are canceled if they want that, before the store gives the slots to others. Other flows go on.
func TestLostSlotsOfAStore(t *testing.T) {
	for _, tt := range []struct {
		name    string
		local   bool
		options []flowctl.Option
		dry     bool
		begins  func(*sharedtest.Store) // before the flow
		cancels bool
		lost    uint64
	}{
		{name: "counts", lost: 1},
		{name: "cancels", options: []flowctl.Option{flowctl.WithCancelOnLostSlot()}, cancels: true, lost: 1},
		{name: "in a dry run", options: []flowctl.Option{flowctl.WithCancelOnLostSlot(), flowctl.WithDryRun()}},
		{name: "slots of the engine", local: true, options: []flowctl.Option{flowctl.WithCancelOnLostSlot()}},
		{
			name: "slots of an outage", options: []flowctl.Option{flowctl.WithCancelOnLostSlot()},
			begins: func(s *sharedtest.Store) { s.Behave(sharedtest.Behavior{Err: shared.ErrDown}) },
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log strings.Builder
				store, meter := sharedtest.New().Instance(), new(metertest.Provider)
				side := sides.Setup{
					Policies: sides.Policies(twoSlots(tt.local)),
					EngineOptions: []engine.Option{
						engine.WithStore(store), engine.WithLogger(slog.New(slog.NewTextHandler(&log, nil))),
					},
					Options: append(tt.options, flowctl.WithMeterProvider(meter)),
				}.New(t, sides.Embedded)
				if tt.begins != nil {
					tt.begins(store)
				}
				flow := side.Client.Start(t.Context(), "point", flowctl.Params{})
				<-time.After(time.Minute + 300*time.Millisecond)
				if n := side.Engine.Stats().Store.LostSlots; n != 0 || flow.Context().Err() != nil {
					t.Errorf("%d slots are lost while the lease is renewed: %v", n, flow.Context().Err())
				}
				store.Behave(sharedtest.Behavior{Cut: true})
				<-time.After(sharedtest.CountOn - time.Millisecond)
				if n := side.Engine.Stats().Store.LostSlots; n != 0 || flow.Context().Err() != nil {
					t.Errorf("%d slots are lost too early: %v", n, flow.Context().Err())
				}
				<-time.After(time.Millisecond)
				synctest.Wait()
				if got := errors.Is(context.Cause(flow.Context()), flowctl.ErrSlotLost); got != tt.cancels || (flow.Context().Err() != nil) != tt.cancels {
					t.Errorf("canceled by %v want it canceled: %v", context.Cause(flow.Context()), tt.cancels)
				}
				<-time.After(time.Minute)
				synctest.Wait()
				if n := side.Engine.Stats().Store.LostSlots; n != tt.lost || meter.Read(t.Context())["flowcontrol_lost_slots_total"] != float64(tt.lost) {
					t.Errorf("%d slots were counted, shown %v want %d", n, meter.Read(t.Context()), tt.lost)
				}
				if n := strings.Count(log.String(), "has not renewed the lease"); n != int(tt.lost) {
					t.Errorf("%d lines want %d: %s", n, tt.lost, log.String())
				}
				store.Behave(sharedtest.Behavior{})
				if _, err := flow.End(t.Context()); err != nil {
					t.Error(err)
				}
				next := side.Client.Start(t.Context(), "point", flowctl.Params{})
				<-time.After(time.Minute)
				if err := next.Context().Err(); err != nil {
					t.Errorf("a flow from after the store was back: %v", err)
				}
				if r := end(next); r.Returned != 1 {
					t.Errorf("End() = %+v want a slot", r)
				}
				if n := side.Engine.Stats().Store.LostSlots; n != tt.lost {
					t.Errorf("%d slots were counted want %d", n, tt.lost)
				}
			})
		})
	}
}

// A flow that no slot limits any more when the store is lost goes on: its policies are in dry run, or gone. Nothing is counted.
func TestLostSlotsAfterApply(t *testing.T) {
	limiter := func(edit func(*policy.ConcurrencyLimiter)) policy.Component {
		c := twoSlots(false).(policy.ConcurrencyLimiter)
		edit(&c)
		return c
	}
	inForce, dry := limiter(func(*policy.ConcurrencyLimiter) {}), limiter(func(c *policy.ConcurrencyLimiter) { c.DryRun = true })
	scheduler := func(dryRun bool) policy.Component {
		return policy.ConcurrencyScheduler{ID: "c", Selectors: policy.At("point"), Max: 2, MaxInflight: time.Hour, DryRun: dryRun}
	}
	for _, tt := range []struct {
		name    string
		begins  policy.Component
		applied [][]policy.Component
		lost    uint64
	}{
		{"other numbers", inForce, [][]policy.Component{{limiter(func(c *policy.ConcurrencyLimiter) { c.Max = 3 })}}, 1},
		{"into dry run", inForce, [][]policy.Component{{dry}}, 0},
		{"a scheduler into dry run", scheduler(false), [][]policy.Component{{scheduler(true)}}, 0},
		{"into dry run and back", inForce, [][]policy.Component{{dry}, {inForce}}, 1},
		{"removed", inForce, [][]policy.Component{nil}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := sharedtest.New().Instance()
				side := sides.Setup{
					Policies:      sides.Policies(tt.begins),
					EngineOptions: []engine.Option{engine.WithStore(store)},
					Options:       []flowctl.Option{flowctl.WithCancelOnLostSlot()},
				}.New(t, sides.Embedded)
				flow := side.Client.Start(t.Context(), "point", flowctl.Params{})
				for _, components := range tt.applied {
					if err := side.Engine.Apply(sides.Policies(components...)); err != nil {
						t.Fatal(err)
					}
				}
				store.Behave(sharedtest.Behavior{Cut: true})
				<-time.After(time.Minute)
				synctest.Wait()
				if err := flow.Context().Err(); (err != nil) != (tt.lost > 0) {
					t.Errorf("the flow's context: %v", err)
				}
				if n := side.Engine.Stats().Store.LostSlots; n != tt.lost {
					t.Errorf("%d slots are lost want %d", n, tt.lost)
				}
				end(flow)
				if flow.Context().Err() == nil {
					t.Error("the context outlasts its flow")
				}
			})
		})
	}
}

// A lease that had run out before it was renewed is noticed by the first that looks: a flow that begins, or the timer. The flows of before
// have lost their slots, those of afterwards have not. Lines are logged once a minute, with all slots since the last one.
func TestLostSlotsOfALeaseThatWasRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		store := sharedtest.New().Instance()
		side := sides.Setup{
			Policies: sides.Policies(twoSlots(false)),
			EngineOptions: []engine.Option{
				engine.WithStore(store), engine.WithLogger(slog.New(slog.NewTextHandler(&log, nil))),
			},
			Options: []flowctl.Option{flowctl.WithCancelOnLostSlot()},
		}.New(t, sides.Embedded)
		for round := range uint64(3) {
			old := side.Client.Start(t.Context(), "point", flowctl.Params{})
			store.Behave(sharedtest.Behavior{Cut: true})
			<-time.After(sharedtest.CountOn) // the timer may look now, or after what follows
			store.Behave(sharedtest.Behavior{})
			fresh := side.Client.Start(t.Context(), "point", flowctl.Params{})
			<-time.After(30 * time.Second)
			if err := context.Cause(old.Context()); !errors.Is(err, flowctl.ErrSlotLost) {
				t.Errorf("round %d: the flow of before: %v", round, err)
			}
			if err := fresh.Context().Err(); err != nil {
				t.Errorf("round %d: the flow of afterwards: %v", round, err)
			}
			end(old)
			end(fresh)
			if fresh.Context().Err() == nil {
				t.Errorf("round %d: the context outlasts its flow", round)
			}
			if n := side.Engine.Stats().Store.LostSlots; n != round+1 {
				t.Errorf("round %d: %d slots were counted", round, n)
			}
		}
		synctest.Wait()
		if n := strings.Count(log.String(), "has not renewed the lease"); n != 2 || !strings.Contains(log.String(), "slots=2") {
			t.Errorf("%d lines want two, the second of two slots: %s", n, log.String())
		}
	})
}

// After Close no slot is judged, and flows still end. A flow that did not run is not watched any more either.
func TestLostSlotsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := sharedtest.New().Instance()
		side := sides.Setup{
			Policies: sides.Policies(twoSlots(false)), EngineOptions: []engine.Option{engine.WithStore(store)},
			Options: []flowctl.Option{flowctl.WithCancelOnLostSlot()},
		}.New(t, sides.Embedded)
		var unused *flowctl.Flow
		func() {
			client, err := flowctl.New(side.Engine, flowctl.WithCancelOnLostSlot(), flowctl.WithOnDecision(func(_ context.Context, f *flowctl.Flow) {
				unused = f
				panic("a hook")
			}))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = recover() }()
			client.Start(t.Context(), "point", flowctl.Params{})
		}()
		if err := context.Cause(unused.Context()); !errors.Is(err, context.Canceled) {
			t.Errorf("the context of a flow that did not run: %v", err)
		}
		flow := side.Client.Start(t.Context(), "point", flowctl.Params{})
		if err := side.Engine.Close(); err != nil {
			t.Fatal(err)
		}
		store.Behave(sharedtest.Behavior{Cut: true})
		<-time.After(time.Minute)
		if err := flow.Context().Err(); err != nil || side.Engine.Stats().Store.LostSlots != 0 {
			t.Errorf("a closed engine: %v, %+v", err, side.Engine.Stats().Store)
		}
		end(flow)
		if flow.Context().Err() == nil {
			t.Error("the context outlasts its flow")
		}
	})
}

// Slots of clients across the network are those of their sessions. If their agent cannot renew these in the store any more, the store gives
// their slots to others. A client knows before that, however long ago the agent renewed its session last.
func TestLostSlotsOfAnAgentWithAStore(t *testing.T) {
	for _, tt := range []struct {
		name string
		ends func(*sides.Side, *sharedtest.Store) // after the flow has got a slot
	}{
		{"an agent that is cut off from the store", func(_ *sides.Side, s *sharedtest.Store) { s.Behave(sharedtest.Behavior{Cut: true}) }},
		{"an agent whose store is down", func(_ *sides.Side, s *sharedtest.Store) { s.Behave(sharedtest.Behavior{Err: shared.ErrDown}) }},
		{"an agent that is killed", func(side *sides.Side, s *sharedtest.Store) {
			s.Behave(sharedtest.Behavior{Cut: true})
			side.Silence()
		}},
	} {
		for phase := time.Duration(0); phase < 5*time.Second; phase += race.Pick(1300*time.Millisecond, 250*time.Millisecond) {
			t.Run(tt.name+" after "+phase.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					f := newFleet(t, 1, sides.Served, twoSlots(false))
					store := f.server.Instance()
					side := servedFor(t, store, twoSlots(false))
					<-time.After(time.Minute) // a session has begun
					flows := []*flowctl.Flow{side.Client.Start(t.Context(), "point", flowctl.Params{}), side.Client.Start(t.Context(), "point", flowctl.Params{})}
					<-time.After(time.Minute + phase)
					for _, flow := range flows {
						if err := flow.Context().Err(); err != nil || flow.Decision() != flowctl.Accepted {
							t.Fatalf("%v while all is well: %v", flow, err)
						}
					}
					tt.ends(side, store)
					step := race.Pick(50*time.Millisecond, 10*time.Millisecond)
					for waited := time.Duration(0); ; waited += step {
						synctest.Wait()
						lost := 0
						for _, flow := range flows {
							if errors.Is(context.Cause(flow.Context()), flowctl.ErrSlotLost) {
								lost++
							}
						}
						next := f.start(t, 0, "")
						if next.Decision() == flowctl.Accepted {
							if lost != len(flows) {
								t.Errorf("another client has a slot after %v, and %d of %d flows know that theirs are lost", waited, lost, len(flows))
							}
							break
						}
						if waited > time.Minute {
							t.Fatal("the slots do not come back")
						}
						<-time.After(step)
					}
					if n := side.Engine.Stats().Store.LostSlots; n != 0 {
						t.Errorf("the engine counts %d slots of others' flows", n)
					}
				})
			})
		}
	}
}

// A flow that goes on after its component was removed and the store was lost has later flows lose nothing.
func TestLostSlotsAfterApplyAndOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limiter := func(id, point string) policy.Component {
			return policy.ConcurrencyLimiter{ID: id, Selectors: policy.At(point), Max: 2, MaxInflight: time.Hour}
		}
		store := sharedtest.New().Instance()
		side := sides.Setup{
			Policies:      sides.Policies(limiter("x", "one"), limiter("y", "two")),
			EngineOptions: []engine.Option{engine.WithStore(store)},
			Options:       []flowctl.Option{flowctl.WithCancelOnLostSlot()},
		}.New(t, sides.Embedded)
		before := side.Client.Start(t.Context(), "one", flowctl.Params{})
		if err := side.Engine.Apply(sides.Policies(limiter("y", "two"))); err != nil {
			t.Fatal(err)
		}
		store.Behave(sharedtest.Behavior{Cut: true})
		<-time.After(time.Minute)
		store.Behave(sharedtest.Behavior{Late: 5 * time.Millisecond})
		for range 200 {
			after := side.Client.Start(t.Context(), "two", flowctl.Params{})
			<-time.After(50 * time.Millisecond)
			if err := context.Cause(after.Context()); err != nil {
				t.Fatalf("a flow of another component: %v", err)
			}
			end(after)
		}
		if err := before.Context().Err(); err != nil {
			t.Errorf("the flow whose component is gone: %v", err)
		}
		if n := side.Engine.Stats().Store.LostSlots; n != 0 {
			t.Errorf("%d slots are lost want none", n)
		}
		end(before)
	})
}

// servedFor is an agent with the store, and a client whose flows want to know of lost slots.
func servedFor(t *testing.T, store *sharedtest.Store, c policy.Component) *sides.Side {
	t.Helper()
	return sides.Setup{
		Policies: sides.Policies(c), EngineOptions: []engine.Option{engine.WithStore(store)},
		Options: []flowctl.Option{flowctl.WithCancelOnLostSlot()},
	}.New(t, sides.Served)
}

// An agent that is cut off from the store for a moment, or that has given slots without the store, loses none as long as it lives.
func TestKeptSlotsOfAnAgentWithAStore(t *testing.T) {
	long := race.Pick(10*time.Minute, time.Hour)
	for _, tt := range []struct {
		name          string
		local         bool
		before, after sharedtest.Behavior // the flow has begun
		lasts         time.Duration       // of what is after it
	}{
		{name: "all is well", lasts: long},
		{name: "a moment without the store", after: sharedtest.Behavior{Cut: true}, lasts: 3 * time.Second},
		{name: "a slot of the agent", local: true, after: sharedtest.Behavior{Err: shared.ErrDown}, lasts: long},
		{name: "a slot of an outage", before: sharedtest.Behavior{Err: shared.ErrDown}, after: sharedtest.Behavior{Err: shared.ErrDown}, lasts: long},
		{name: "a slot of an outage that ends", before: sharedtest.Behavior{Err: shared.ErrDown}, lasts: long},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := sharedtest.New().Instance()
				side := servedFor(t, store, twoSlots(tt.local))
				<-time.After(time.Minute) // a session has begun
				store.Behave(tt.before)
				flow := side.Client.Start(t.Context(), "point", flowctl.Params{})
				store.Behave(tt.after)
				<-time.After(tt.lasts)
				store.Behave(sharedtest.Behavior{})
				<-time.After(time.Minute)
				synctest.Wait()
				if err := context.Cause(flow.Context()); err != nil || flow.Decision() != flowctl.Accepted {
					t.Errorf("%v, %v want it to go on", flow, err)
				}
			})
		})
	}
}
