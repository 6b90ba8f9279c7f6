package engine_test

import (
	"errors"
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/internal/testing/sharedtest"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// sharedRampOf returns the ramp of an engine.
func sharedRampOf(t *testing.T, e *engine.Engine) *engine.Ramp {
	t.Helper()
	c, err := e.Component("test", "ramp")
	if err != nil {
		t.Fatal(err)
	}
	r, _ := c.Ramp()
	return r
}

// Engines that share a store have one ramp: what one moves the others follow within a second, and an engine that comes later too.
func TestSharedRamps(t *testing.T) {
	for _, starts := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			ramp := policy.LoadRamp{
				ID: "ramp", Selectors: policy.At("point"), Start: starts, Steps: []policy.RampStep{{Target: 0}, {Target: 100, Duration: 100 * time.Second}},
			}
			f := newFleet(t, 2, sides.Embedded, ramp)
			stand := func(want float64, of ...int) {
				t.Helper()
				for _, i := range of {
					if got := sharedRampOf(t, f.sides[i].Engine).Percentage(); math.Abs(got-want) > 1e-6 {
						t.Errorf("the ramp of engine %d stands at %v want %v", i, got, want)
					}
				}
			}
			do := func(err error) {
				t.Helper()
				if err != nil {
					t.Error(err)
				}
			}
			synctest.Wait()
			if !starts {
				<-time.After(time.Minute + time.Second/2)
				stand(0, 0, 1)
				do(sharedRampOf(t, f.sides[0].Engine).Forward(t.Context()))
			}
			<-time.After(20 * time.Second)
			stand(20, 0, 1)
			f.add(t, sides.Embedded, ramp)
			synctest.Wait()
			stand(20, 2)
			do(sharedRampOf(t, f.sides[2].Engine).Hold(t.Context()))
			<-time.After(time.Second + time.Millisecond)
			stand(20, 0, 1, 2)
			<-time.After(time.Minute)
			do(sharedRampOf(t, f.sides[1].Engine).Backward(t.Context()))
			<-time.After(5 * time.Second)
			stand(15, 0, 1, 2)

			f.server.Forget() // the engines know where it stood
			<-time.After(5 * time.Second)
			stand(10, 0, 1, 2)
			f.stores[0].Behave(sharedtest.Behavior{Err: shared.ErrDown})
			if err := sharedRampOf(t, f.sides[0].Engine).Forward(t.Context()); !errors.Is(err, shared.ErrDown) {
				t.Errorf("Forward without the store = %v want %v", err, shared.ErrDown)
			}
			<-time.After(2 * time.Second)
			stand(8, 0, 1, 2)
			do(sharedRampOf(t, f.sides[1].Engine).Reset(t.Context()))
			f.stores[0].Behave(sharedtest.Behavior{})
			<-time.After(time.Second + time.Millisecond) // some ask at the very second
			stand(0, 0, 1, 2)
		})
	}
}
