package redisstore_test

import (
	"testing"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
)

// keyOf is a key of the value.
func keyOf(component, value string) shared.Key {
	return shared.Key{Policy: "checkout", Component: component, Label: "user", Value: value}
}

// A flow gets all that it wants, or nothing.
func TestFleetAllOrNothing(t *testing.T) {
	s := newStore(t, newClient(t, startServer(t)))
	bucket := &shared.Rule{Kind: shared.Bucket, Capacity: 2, Fill: 0, Interval: time.Hour}
	slots := &shared.Rule{Kind: shared.Slots, Capacity: 1, MaxInflight: time.Minute}
	asks := []shared.Ask{{Key: keyOf("rate", "a"), Rule: bucket, Tokens: 1}, {Key: keyOf("slots", "a"), Rule: slots, Tokens: 1}}
	answers := make([]shared.Answer, 2)
	if err := s.Take(t.Context(), asks, answers); err != nil {
		t.Fatal(err)
	}
	if !answers[0].OK || answers[0].Left != 1 || !answers[1].OK || answers[1].Slot == 0 {
		t.Fatalf("first Take = %+v", answers)
	}
	slot := answers[1].Slot
	if err := s.Take(t.Context(), asks, answers); err != nil {
		t.Fatal(err)
	}
	if !answers[0].OK || answers[0].Left != 1 || answers[1].OK || answers[1].Slot != 0 || answers[1].Wait <= 0 {
		t.Fatalf("Take without a free slot = %+v want no token taken", answers)
	}
	results := make([]shared.Result, 1)
	for _, want := range []bool{true, false} { // the second time it is not there
		err := s.Return(t.Context(), []shared.Return{{Key: asks[1].Key, Rule: slots, Slot: slot}}, results)
		if err != nil || results[0].Returned != want {
			t.Fatalf("Return = %+v, %v want %v", results[0], err, want)
		}
	}
	if err := s.Reset(t.Context(), asks[0].Key); err != nil {
		t.Fatal(err)
	}
	if u, err := s.Look(t.Context(), asks[0].Key, bucket); err != nil || u.Remaining != 2 {
		t.Errorf("Look after Reset = %+v, %v want 2", u, err)
	}
}
