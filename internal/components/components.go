// Package components has what package policy tells package engine about components, beyond their fields.
package components

// A Description says what one component of a policy is.
type Description struct {
	Kind int    // the place of its kind in the tables of packages policy and engine
	Name string // of its kind, as in policy files
	ID   string // its own, or the default

	// Component is the policy.Component with the labels that it reads under the names of its policy.
	Component any

	// Reads calls read with each label that the component reads, and with "" where it could name one and does not.
	Reads func(read func(of Role, label string))

	// Names is Reads with the names that the component has for the labels, which may be its policy's own.
	Names func(read func(of Role, name string))

	// With returns the component with the numbers of a policy.Override, which is not named because package policy imports this
	// one. The error says what is wrong with the override. It is nil for a component without a state for each value of a label.
	With func(override any) (component any, err error)
}

// Value returns the component as a value of its kind P. It reports false if the component is neither a P nor a pointer to
// one.
func Value[P any](component any) (P, bool) {
	switch c := component.(type) {
	case *P:
		if c != nil {
			return *c, true
		}
	case P:
		return c, true
	}
	var zero P
	return zero, false
}

// A Role is what a component has a name for. The smaller one matters more if no flow has what is named.
type Role int

// The roles.
const (
	ActsAt      Role = iota // no label, but the control point of a selector
	LimitsBy                // it has a bucket for each value: flows without the label pass
	SamplesBy               // flows without it are sampled by chance
	CostsBy                 // the flow says what it costs
	SelectsBy               // the component acts on flows by it
	SchedulesBy             // workloads, priorities and fairness
	MeasuresBy              // latencies are told apart by it
)

// String returns the role as a verb, whose subject is the component.
func (r Role) String() string {
	switch r {
	case ActsAt:
		return "acts at"
	case LimitsBy:
		return "limits by"
	case SamplesBy:
		return "samples by"
	case CostsBy:
		return "takes the cost from"
	case SelectsBy:
		return "selects by"
	case SchedulesBy:
		return "schedules by"
	case MeasuresBy:
		return "measures latencies by"
	default:
		return ""
	}
}
