package agentapi

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestLabelsPrecedence(t *testing.T) {
	layered := Labels{
		Params:  map[string]string{"a": "params"},
		Context: map[string]string{"a": "context", "b": "context"},
		Shared: &Shared{Layers: Layers{
			Baggage:   map[string]string{"a": "baggage", "b": "baggage", "c": "baggage"},
			Transport: map[string]string{"a": "transport", "b": "transport", "c": "transport", "d": "transport"},
			Defaults:  map[string]string{"a": "default", "b": "default", "c": "default", "d": "default", "e": "default"},
		}},
	}
	want := map[string]string{"a": "params", "b": "context", "c": "baggage", "d": "transport", "e": "default"}
	if diff := cmp.Diff(want, layered.Merged()); diff != "" {
		t.Errorf("Merged() (-want +got):\n%s", diff)
	}
	for key, value := range want {
		if got, ok := layered.Lookup(key); got != value || !ok {
			t.Errorf("Lookup(%q) = %q, %v want %q, true", key, got, ok, value)
		}
	}
	if got, ok := layered.Lookup("f"); got != "" || ok {
		t.Errorf("Lookup(f) = %q, %v want none", got, ok)
	}
	if len(layered.Params) != 1 || len(layered.Shared.Defaults) != 5 {
		t.Error("Merged wrote to a layer")
	}
}

func TestLabelsEmpty(t *testing.T) {
	var none Labels
	if got := none.Merged(); len(got) != 0 {
		t.Errorf("Merged() = %v want none", got)
	}
	if _, ok := none.Lookup("a"); ok {
		t.Error("Lookup(a) found a label")
	}
	if got := none.Service(); got != "" {
		t.Errorf("Service() = %q want none", got)
	}
}

func TestVerdictDecisions(t *testing.T) {
	var v Verdict
	if v.Len() != 0 {
		t.Fatalf("Len() = %d want 0", v.Len())
	}
	components := []*Component{{ID: "0"}, {ID: "1"}, {ID: "2"}}
	for _, c := range components {
		v.Add(c).Label = c.ID
	}
	if v.Len() != len(components) {
		t.Fatalf("Len() = %d want %d", v.Len(), len(components))
	}
	for i, c := range components {
		if d := v.At(i); d.Component != c || d.Label != c.ID {
			t.Errorf("At(%d) = %+v want that of component %s", i, d, c.ID)
		}
	}
}
