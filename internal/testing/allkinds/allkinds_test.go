package allkinds_test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/headgate-go/headgate/internal/testing/allkinds"
	"github.com/headgate-go/headgate/policy"
)

// A recorder is a test that notes its errors.
type recorder struct {
	testing.TB
	errors []string
}

func (*recorder) Helper() {}

func (r *recorder) Errorf(format string, args ...any) {
	r.errors = append(r.errors, fmt.Sprintf(format, args...))
}

// Components are of different kinds, each in the place of its kind.
func TestComponents(t *testing.T) {
	for i, c := range allkinds.Components(policy.At("point")...) {
		if d := (policy.Policy{Name: "p", Components: []policy.Component{c}}).Describe()[0]; d.Kind != i {
			t.Errorf("a %s has the place %d want %d", d.Name, i, d.Kind)
		}
	}
}

// Kinds that a table lacks are named, and only those of which it should have one.
func TestCovered(t *testing.T) {
	each := allkinds.Components()
	for _, tt := range []struct {
		name       string
		which      func(policy.Component) bool
		components []policy.Component
		want       []string
	}{
		{"of all kinds", allkinds.Any, each[:], nil},
		{"of all kinds but one", allkinds.Any, slices.Delete(slices.Clone(each[:]), 6, 7), []string{"the table has no sampler: add one"}},
		{"of the kinds with a field", allkinds.Having("Gradient"), []policy.Component{policy.AIMDLoadScheduler{}}, nil},
		{"of none with a field", allkinds.Having("Gradient"), []policy.Component{policy.Sampler{}}, []string{"the table has no aimd_load_scheduler: add one"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := &recorder{TB: t}
			allkinds.Covered(r, "the table", tt.which, tt.components...)
			if !slices.Equal(r.errors, tt.want) {
				t.Errorf("errors %q want %q", r.errors, tt.want)
			}
		})
	}
}
