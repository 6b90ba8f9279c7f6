package policy

import (
	"math"
	"reflect"
	"strings"
	"sync"
	"time"
	"unicode"
)

// A keyRow says how short files say a field of a Go value.
type keyRow struct {
	field string  // its name; or its type's name and its own, or a star for all of a type
	key   string  // "" is its name in snake case
	rule  keyRule // what a file may say
	zero  float64 // what a 0 in a file becomes, where Go's zero means a default; 0 for none
	value bool    // flows are compared with it
	regex bool    // it is a regular expression
	label bool    // it names a label
}

// A keyRule is what a file may say about a field.
type keyRule int

const (
	optional keyRule = iota // without the key the field is zero
	required                // the key must be there
	nonzero                 // a 0 is refused: it would mean the default, which is something else
	inline                  // the field is a struct whose keys stand beside those of the others
)

// keyRows has a row for each field of the values of this package. The fields of a name have one row if they have one
// meaning. A field without a row cannot be said in a file, and a test finds it.
var keyRows = []keyRow{ //nolint:gochecknoglobals // a table, never written to
	{field: "Policy.Name", rule: required},
	{field: "Policy.Labels"},
	{field: "Components", rule: required},

	{field: "ID"},
	{field: "Selectors", rule: required}, // at, too
	{field: "Local"},
	{field: "Share"},
	{field: "OnOutage"},
	{field: "PassThrough"},
	{field: "DryRun"},
	{field: "DeniedStatus", rule: nonzero},
	{field: "LimitBy", label: true},
	{field: "TokensLabel", label: true},
	{field: "Overrides"},
	{field: "Override.*", rule: nonzero, zero: math.SmallestNonzeroFloat64},
	{field: "MaxIdle", zero: float64(KeepIdle)},
	{field: "MaxDebt", zero: math.SmallestNonzeroFloat64},

	// Rate limiters and quota schedulers.
	{field: "Capacity", rule: required},
	{field: "Fill", rule: required},
	{field: "Interval", rule: required},
	{field: "StepFill"},
	{field: "DelayInitialFill"},
	{field: "When"},
	{field: "Load", rule: required},
	{field: "Below", rule: required},
	{field: "For"},

	// Concurrency limiters and schedulers.
	{field: "Max", rule: required},
	{field: "MaxInflight", rule: required},

	// Calendar quotas.
	{field: "Amount", rule: required},
	{field: "Period", rule: required},
	{field: "TimeZone"},
	{field: "WeekStart"},

	// Circuit breakers.
	{field: "FailureRatio"},
	{field: "FailureCount"},
	{field: "MinFlows"},
	{field: "SlowAfter"},
	{field: "Window", rule: required},
	{field: "OpenDuration", rule: required},
	{field: "Probes", rule: nonzero},
	{field: "Successes", rule: nonzero},
	{field: "ProbeTimeout", rule: nonzero},

	// Queues.
	{field: "Scheduler", rule: inline},
	{field: "Workloads"},
	{field: "Default"},
	{field: "Margin", zero: float64(time.Nanosecond)}, // practically none
	{field: "PriorityLabel", label: true},
	{field: "WorkloadLabel", label: true},
	{field: "FairnessLabel", label: true},
	{field: "MaxQueue", rule: nonzero},
	{field: "Workload.Name"},
	{field: "WorkloadParameters", rule: inline},
	{field: "Priority", rule: nonzero},
	{field: "Tokens", zero: NoTokens},
	{field: "QueueTimeout", zero: float64(NoQueue)},

	// Load schedulers.
	{field: "LoadMultiplier", rule: required},
	{field: "Signal", rule: required},
	{field: "Setpoint", rule: required},
	{field: "OverloadConfirmation"},
	{field: "WorkloadLatencyTokens"},
	{field: "MaxLoadMultiplier", rule: nonzero},
	{field: "LinearIncrement", zero: math.SmallestNonzeroFloat64},
	{field: "Gradient"},
	{field: "Slope", rule: nonzero},
	{field: "Gradient.Min", zero: math.SmallestNonzeroFloat64},
	{field: "Gradient.Max", zero: math.SmallestNonzeroFloat64},
	{field: "Over", rule: required},
	{field: "Times", rule: nonzero},

	// Samplers and load ramps.
	{field: "AcceptPercentage", rule: required},
	{field: "SessionLabel", label: true},
	{field: "PassThroughValues", value: true},
	{field: "RampMode"},
	{field: "Steps", rule: required},
	{field: "Start"},
	{field: "Target", rule: required},
	{field: "Duration", rule: required},

	// Selectors and conditions on labels.
	{field: "ControlPoint", rule: required},
	{field: "Service", value: true},
	{field: "Selector.Labels", rule: inline},
	{field: "Workload.Labels", rule: inline},
	{field: "Equal", key: "when", value: true},
	{field: "Require"},
	{field: "Expression"},
	{field: "Key", rule: required},
	{field: "Operator", rule: required},
	{field: "Values", value: true},
	{field: "Label", rule: required},
	{field: "LabelEquals.Value", rule: required, value: true},
	{field: "Regex", rule: required, regex: true},
}

// A shape is how short files say the values of a struct.
type shape struct {
	of     reflect.Type
	fields []shapeField // in the order of the struct
	keys   string       // of all fields and of those of inline ones, separated by spaces
}

// A shapeField is how they say a field.
type shapeField struct {
	keyRow
	index  int
	name   string // in errors of Go values; "" for an embedded field, which they leave out
	inner  *shape // of an inline field
	kind   reflect.Type
	status bool // an HTTP status
}

// atKey is the short form of selectors that say nothing but control points.
const atKey = "at"

// shapeOf returns the shape of a struct's type.
func shapeOf(t reflect.Type) *shape { return shapes()[t] }

// shapes has the shapes of all structs that a policy can hold.
var shapes = sync.OnceValue(func() map[reflect.Type]*shape { //nolint:gochecknoglobals // never written to afterwards
	rows := make(map[string]keyRow, len(keyRows))
	for _, row := range keyRows {
		rows[row.field] = row
	}
	shapes := map[reflect.Type]*shape{}
	var add func(t reflect.Type) *shape
	add = func(t reflect.Type) *shape {
		for t.Kind() == reflect.Slice || t.Kind() == reflect.Map || t.Kind() == reflect.Pointer {
			t = t.Elem()
		}
		if t.Kind() != reflect.Struct {
			return nil
		}
		if s, ok := shapes[t]; ok {
			return s
		}
		s := &shape{of: t}
		shapes[t] = s
		var keys []string
		for field := range t.Fields() {
			row, ok := rows[t.Name()+"."+field.Name]
			if !ok {
				row, ok = rows[t.Name()+".*"]
				if field.Type.Kind() != reflect.Float64 {
					row.zero = 0 // there is no number that is as good as 0
				}
			}
			if !ok {
				row, ok = rows[field.Name]
			}
			if !ok {
				continue
			}
			if row.key == "" {
				row.key = snake(field.Name)
			}
			f := shapeField{keyRow: row, index: field.Index[0], name: field.Name, kind: field.Type, status: field.Name == "DeniedStatus"}
			inner := add(field.Type)
			switch {
			case row.rule == inline:
				f.inner = inner
				keys = append(keys, inner.keys)
			case field.Type == reflect.TypeFor[[]Selector]():
				keys = append(keys, atKey, row.key)
			default:
				keys = append(keys, row.key)
			}
			if field.Anonymous {
				f.name = ""
			}
			if t == reflect.TypeFor[Policy]() {
				f.name = strings.ToLower(f.name)
			}
			s.fields = append(s.fields, f)
		}
		s.keys = strings.Join(keys, " ")
		return s
	}
	for _, t := range []reflect.Type{
		reflect.TypeFor[Policy](), reflect.TypeFor[MeanLatency](), reflect.TypeFor[LabelEquals](), reflect.TypeFor[LabelMatches](),
	} {
		add(t)
	}
	for i := range kinds {
		add(reflect.TypeOf(kinds[i].zero))
	}
	return shapes
})

// snake returns the name of a Go field in snake case.
func snake(name string) string {
	var b strings.Builder
	runes := []rune(name)
	for i, r := range runes {
		if i > 0 && unicode.IsUpper(r) && (unicode.IsLower(runes[i-1]) || i+1 < len(runes) && unicode.IsLower(runes[i+1])) {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}

// shapeKeys are the keys of a file, which stand above the policies.
const shapeKeys = "headgate policies"

// The keys of signals and of expressions.
const (
	meanLatencyKey = "mean_latency"
	expressionKeys = "not all any label_exists label_equals label_matches"
)

// kindKeys returns the keys of components, each the name of a kind.
func kindKeys() string {
	names := make([]string, len(kinds))
	for i := range kinds {
		names[i] = kinds[i].name
	}
	return strings.Join(names, " ")
}

// kindNamed returns the zero value of the kind with the name.
func kindNamed(name string) (zero Component, ok bool) {
	for i := range kinds {
		if kinds[i].name == name {
			return kinds[i].zero, true
		}
	}
	return nil, false
}
