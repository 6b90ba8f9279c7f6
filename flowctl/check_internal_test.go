package flowctl

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

type outlastKey struct{}

// A call ends when its timeout has passed, and abandonAfter later than the caller's context at the latest. It never ends
// because of the caller's context alone, and it has its values.
func TestOutlast(t *testing.T) {
	for _, tt := range []struct {
		name    string
		timeout time.Duration
		leaves  time.Duration // when the caller's context ends; -1: it never does, -2: it cannot
		want    time.Duration
	}{
		{"the caller cannot leave", 2 * time.Second, -2, 2 * time.Second},
		{"the caller stays", 2 * time.Second, -1, 2 * time.Second},
		{"the caller leaves, and there is no timeout", 0, time.Second, time.Second + abandonAfter},
		{"the caller leaves long before a long timeout", 5 * time.Second, time.Second, time.Second + abandonAfter},
		{"the caller leaves shortly before a long timeout", 5 * time.Second, 4900 * time.Millisecond, 5 * time.Second},
		{"the caller has left, and the timeout is a little longer than that may last", abandonAfter + 1, 0, abandonAfter},
		{"the caller has left, and the timeout is as long", abandonAfter, 0, abandonAfter},
		{"the caller leaves before a short timeout", 200 * time.Millisecond, time.Millisecond, 200 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				gone := errors.New("gone")
				caller := context.WithValue(context.WithoutCancel(t.Context()), outlastKey{}, "value")
				if tt.leaves != -2 {
					var leave context.CancelCauseFunc
					caller, leave = context.WithCancelCause(caller)
					defer leave(nil)
					switch {
					case tt.leaves == 0:
						leave(gone)
					case tt.leaves > 0:
						time.AfterFunc(tt.leaves, func() { leave(gone) })
					}
				}
				begin := time.Now()
				c := new(check)
				call := c.outlast(caller, tt.timeout)
				if call.Value(outlastKey{}) != "value" {
					t.Error("the call lacks the caller's values")
				}
				<-call.Done()
				if took := time.Since(begin); took != tt.want {
					t.Errorf("the call ended after %v want %v", took, tt.want)
				}
				if cause := context.Cause(call); errors.Is(cause, gone) {
					t.Errorf("the call ended by %v want a cause of its own", cause)
				}
				c.release()
			})
		})
	}
}

// What a call's context allocates, beside one that only has a timeout.
func TestOutlastAllocations(t *testing.T) {
	caller, leave := context.WithCancel(t.Context())
	defer leave()
	for _, tt := range []struct {
		name    string
		timeout time.Duration
		more    float64
	}{
		{"the default timeout", defaultCheckTimeout, 0},
		{"a long timeout", time.Minute, 3},
	} {
		c := new(check)
		bare := testing.AllocsPerRun(100, func() {
			_, end := context.WithTimeout(caller, tt.timeout)
			end()
		})
		got := testing.AllocsPerRun(100, func() {
			c.outlast(caller, tt.timeout)
			c.release()
		})
		if got > bare+tt.more {
			t.Errorf("%s: %v allocations want at most %v", tt.name, got, bare+tt.more)
		}
	}
}
