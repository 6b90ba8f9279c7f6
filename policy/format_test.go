package policy_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/policy"
)

// roundTrip writes policies to a short file, and expects to read them from it.
func roundTrip(t *testing.T, policies []policy.Policy) {
	t.Helper()
	text, err := policy.Format(policies)
	if err != nil {
		t.Fatal(err)
	}
	again, err := policy.Parse("short.yaml", text)
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if diff := cmp.Diff(policies, again, cmpopts.IgnoreFields(policy.Policy{}, "Warnings"), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("(-written +read):\n%s\n%s", diff, text)
	}
}

// TestFormat compares a file in full: what it looks like is what people edit.
func TestFormat(t *testing.T) {
	policies, err := policy.Load("testdata/kinds.yaml", "testdata/match.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got, err := policy.Format(policies)
	if err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/short-kinds.yaml"
	if *policy.Update {
		if err := os.WriteFile(golden, got, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("go test ./policy -run TestFormat -update writes %s anew (-want +got):\n%s", golden, diff)
	}
}

// Text that some readers of YAML take for something else is quoted.
func TestFormatQuotes(t *testing.T) {
	for _, value := range []string{
		"", " ", "a b", "null", "~", "True", "no", "1", "1e3", "0x1f", "010", "1_000", ".5", "- a", "a: b", "a #b", "#", "'", `"`, `\`, "a\nb", "\t", "[", "{}", "*a", "&a", "!a",
		"%a", "@a", "`", "é", "\u0085", "\u2028", "\ufeff", "\x00", "\x7f", "…", "😀", "---", "<<", "y", "=", "x-a", "a,", strings.Repeat("long ", 100),
	} {
		l := policy.RateLimiter{
			ID: value, Selectors: []policy.Selector{{ControlPoint: clip("a" + value), Service: value, Labels: policy.LabelMatcher{Equal: map[string]string{clip(value) + "k": value}}}},
			Interval: time.Second,
		}
		roundTrip(t, []policy.Policy{{Name: "p" + value, Components: []policy.Component{l}}})
		l.Selectors = policy.At(clip("a" + value))
		roundTrip(t, []policy.Policy{{Name: "p" + value, Components: []policy.Component{l}}})
	}
}

// clip cuts text to what a label's name may have.
func clip(s string) string { return s[:min(len(s), 200)] }

func TestFormatRefuses(t *testing.T) {
	good := policy.Policy{Name: "p", Components: []policy.Component{policy.RateLimiter{Selectors: policy.At("a"), Interval: time.Second}}}
	var deep policy.Expression = policy.LabelExists("a")
	for range 100 {
		deep = policy.Not{Of: deep}
	}
	with := func(m policy.LabelMatcher) policy.Policy {
		return policy.Policy{Name: "p", Components: []policy.Component{policy.RateLimiter{Selectors: []policy.Selector{{ControlPoint: "a", Labels: m}}, Interval: time.Second}}}
	}
	for _, tt := range []struct {
		name     string
		policies []policy.Policy
		want     string
	}{
		{"no policy", nil, "no policy to write"},
		{"two of a name", []policy.Policy{good, good}, `policy "p": is there twice`},
		{"a bad one", []policy.Policy{good, {Name: "q"}}, `policy "q": components: needs at least one flow-control component`},
		{"depth", []policy.Policy{with(policy.LabelMatcher{Expression: deep})}, `policy "p": is nested more than 64 levels deep`},
		{"bytes", []policy.Policy{with(policy.LabelMatcher{Equal: map[string]string{"a": "\xff"}})}, `policy "p": components[0].Selectors[0].Labels.Equal["a"]: is not valid UTF-8`},
		{"a placeholder", []policy.Policy{with(policy.LabelMatcher{Equal: map[string]string{"a": "__REQUIRED_FIELD__"}})}, `policy "p": components[0].Selectors[0].Labels.Equal["a"]: has __REQUIRED_FIELD__, which is to be replaced`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			text, err := policy.Format(tt.policies)
			if err == nil || err.Error() != tt.want {
				t.Errorf("Format = %q, %v, want the error %s", text, err, tt.want)
			}
		})
	}
}

// Pointers and negative numbers mean the same as values and the constants.
func TestFormatOfEqual(t *testing.T) {
	of := func(c policy.Component) string {
		text, err := policy.Format([]policy.Policy{{Name: "p", Components: []policy.Component{c}}})
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	limiter := policy.RateLimiter{Selectors: policy.At("a"), Interval: time.Second, MaxIdle: policy.KeepIdle}
	other := limiter
	other.MaxIdle = -time.Hour
	if a, b := of(limiter), of(&other); a != b {
		t.Errorf("files %s and %s", a, b)
	}
}

// A maker makes random values of fields.
type maker struct{ *rand.Rand }

func pick[T any](m maker, of ...T) T { return of[m.IntN(len(of))] }

var words = []string{"user", "a b", "true", "1e3", "x: y", "né\n", "http.request.header.x", "- 'q'\"", "#", strings.Repeat("long", 60)}

// component returns a valid component of a kind.
func (m maker) component(of policy.Component) policy.Component {
	for {
		v := reflect.New(reflect.TypeOf(of)).Elem()
		m.fill(v, "", 0)
		c := v.Interface().(policy.Component)
		if (policy.Policy{Name: "p", Components: []policy.Component{c}}).Validate() == nil {
			return c
		}
	}
}

// fill fills a field, or leaves it zero.
func (m maker) fill(v reflect.Value, name string, depth int) {
	switch name {
	case "Selectors", "Components", "Interval", "MaxInflight", "Window", "OpenDuration", "Over", "Period", "ControlPoint", "Key", "Operator", "Label", "Regex", "Steps",
		"Signal", "Setpoint", "LoadMultiplier", "":
	case "When": // needs another component
		return
	default:
		if m.IntN(3) == 0 {
			return
		}
	}
	switch p := v.Addr().Interface().(type) {
	case *time.Duration:
		*p = pick(m, 5*time.Millisecond, 1500*time.Millisecond, time.Second, time.Minute+time.Nanosecond, 90*time.Minute, 24*time.Hour)
		if (name == "MaxIdle" || name == "QueueTimeout") && m.IntN(2) == 0 {
			*p = -1
		} else if name == "Margin" && m.IntN(2) == 0 {
			*p = 1
		}
		return
	case *policy.Expression:
		*p = m.expression(depth)
		return
	case *policy.Signal:
		*p = policy.Constant(m.Float64())
		if m.IntN(3) == 0 {
			*p = policy.Named(pick(m, words...))
		} else if m.IntN(2) == 0 {
			latency := policy.MeanLatency{}
			m.fill(reflect.ValueOf(&latency).Elem(), "", depth+1)
			*p = latency
		}
		return
	case *policy.Requirement:
		*p = policy.Requirement{Key: pick(m, words...), Operator: pick(m, policy.In, policy.NotIn, policy.Exists, policy.DoesNotExist)}
		if p.Operator == policy.In || p.Operator == policy.NotIn {
			p.Values = []string{pick(m, words...), ""}
		}
		return
	case *policy.Share:
		*p = pick(m, policy.ShareExact, policy.ShareLeased)
		return
	case *policy.Outage:
		*p = pick(m, policy.OutageShare, policy.OutageOpen, policy.OutageClosed)
		return
	case *policy.Period:
		*p = pick(m, policy.PeriodHour, policy.PeriodDay, policy.PeriodWeek, policy.PeriodMonth)
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(pick(m, words...))
		switch name {
		case "TimeZone":
			v.SetString(pick(m, "UTC", "Europe/Berlin"))
		case "WeekStart":
			v.SetString(pick(m, "", "", "sunday"))
		case "Regex":
			v.SetString(pick(m, "^a", `\d+"#`))
		}
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Float64:
		v.SetFloat(pick(m, 0.1, m.Float64(), 1))
		switch name {
		case "Capacity", "Fill", "Max", "Amount":
			v.SetFloat(pick(m, 0, 1, 1e9, 1e300, 0.1+0.2))
		case "MaxDebt":
			v.SetFloat(pick(m, math.SmallestNonzeroFloat64, -1, 1e-9, 5))
		case "Tokens":
			v.SetFloat(pick(m, policy.NoTokens, 2.5))
		case "Min", "LinearIncrement":
			v.SetFloat(pick(m, math.SmallestNonzeroFloat64, 0.25))
		}
	case reflect.Int:
		v.SetInt(int64(m.IntN(1000)) + 1)
		if name == "DeniedStatus" {
			v.SetInt(400 + int64(m.IntN(200)))
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		m.fill(v.Elem(), "", depth+1)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1+m.IntN(2), 2))
		for i := range v.Len() {
			m.fill(v.Index(i), "", depth+1)
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for range m.IntN(3) {
			value := reflect.New(v.Type().Elem()).Elem()
			m.fill(value, "", depth+1)
			v.SetMapIndex(reflect.ValueOf(pick(m, words...)), value)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			m.fill(v.Field(i), v.Type().Field(i).Name, depth+1)
		}
	default:
		panic("no values of " + v.Type().String())
	}
}

func (m maker) expression(depth int) policy.Expression {
	some := func() (e []policy.Expression) {
		for range m.IntN(3) {
			e = append(e, m.expression(depth+1))
		}
		return e
	}
	switch kinds := m.IntN(6); {
	case kinds == 0 && depth < 8:
		return policy.Not{Of: m.expression(depth + 1)}
	case kinds == 1 && depth < 8:
		return policy.All(some())
	case kinds == 2 && depth < 8:
		return policy.Any(some())
	case kinds == 3:
		return policy.LabelEquals{Label: pick(m, words...), Value: pick(m, words...)}
	case kinds == 4:
		return policy.LabelMatches{Label: pick(m, words...), Regex: "^[a-z]"}
	default:
		return policy.LabelExists(pick(m, words...))
	}
}

// random returns a policy with a component of each kind.
func random(seed uint64) policy.Policy {
	m := maker{rand.New(rand.NewPCG(seed, 1))}
	p := policy.Policy{Name: pick(m, words...)}
	if m.IntN(2) == 0 {
		p.Labels = map[string]string{"user_type": pick(m, words...), "1": "b"}
	}
	for i, kind := range allKinds {
		c := reflect.New(reflect.TypeOf(kind)).Elem()
		c.Set(reflect.ValueOf(m.component(kind)))
		c.FieldByName("ID").SetString("") // those of components must not be the same
		if m.IntN(2) == 0 {
			c.FieldByName("ID").SetString(words[i])
		}
		p.Components = append(p.Components, c.Interface().(policy.Component))
	}
	when := policy.Escalation{Load: p.Describe()[4].ID, Below: m.Float64() + 0.1, For: time.Minute, Capacity: pick(m, 0, 2.5)}
	limit, queue := p.Components[0].(policy.RateLimiter), p.Components[2].(policy.QuotaScheduler)
	limit.When, queue.When = when, when
	p.Components[0], p.Components[2] = limit, queue
	return p
}

// allKinds has a component of each kind.
var allKinds = [policy.Kinds]policy.Component{
	policy.RateLimiter{},
	policy.ConcurrencyLimiter{},
	policy.QuotaScheduler{},
	policy.ConcurrencyScheduler{},
	policy.LoadScheduler{},
	policy.AIMDLoadScheduler{},
	policy.Sampler{},
	policy.LoadRamp{},
	policy.CalendarQuota{},
	policy.CircuitBreaker{},
}

// Any policies are the same after they were written and read.
func TestFormatOfRandomPolicies(t *testing.T) {
	for seed := range uint64(race.Pick(10, 50)) {
		roundTrip(t, []policy.Policy{random(seed)})
	}
}

func FuzzFormat(f *testing.F) {
	f.Add(uint64(0), "orders")
	f.Fuzz(func(t *testing.T, seed uint64, name string) {
		p := random(seed)
		p.Name = name
		if _, err := policy.Format([]policy.Policy{p}); err != nil {
			t.Skip(err)
		}
		roundTrip(t, []policy.Policy{p})
	})
}

// numbersOf calls each with the numbers in a value: counts, amounts and durations.
func numbersOf(v reflect.Value, each func(reflect.Value)) {
	switch v.Kind() { //nolint:exhaustive // policies have no numbers of other kinds
	case reflect.Int, reflect.Int64, reflect.Float64:
		each(v)
	case reflect.Struct:
		for _, field := range v.Fields() {
			numbersOf(field, each)
		}
	case reflect.Slice:
		for i := range v.Len() {
			numbersOf(v.Index(i), each)
		}
	case reflect.Pointer:
		if !v.IsNil() {
			numbersOf(v.Elem(), each)
		}
	}
}

// What Go values may say, files may say too: any number that a policy is valid with can be written and read.
func TestFormatOfExtremes(t *testing.T) {
	tiny := math.SmallestNonzeroFloat64
	integers := []int64{math.MinInt64, math.MinInt32, -1, 1, math.MaxInt32, math.MaxInt32 + 1, 1<<53 + 1, math.MaxInt64}
	floats := []float64{-math.MaxFloat64, -1, -tiny, tiny, 1e-320, 0.1, 1 << 60, math.MaxFloat64}
	check := func(c policy.Component, what string) {
		t.Helper()
		p := []policy.Policy{{Name: "p", Components: []policy.Component{c}}}
		if p[0].Validate() != nil {
			return
		}
		text, err := policy.Format(p)
		if err != nil {
			t.Errorf("%T with %s: Format = %v", c, what, err)
			return
		}
		again, err := policy.Parse("short.yaml", text)
		if err != nil {
			t.Errorf("%T with %s: Parse = %v\n%s", c, what, err, text)
			return
		}
		if twice, err := policy.Format(again); err != nil || string(twice) != string(text) { // which forgives numbers that mean the same
			t.Errorf("%T with %s: written again, %v:\n%s\nwant\n%s", c, what, err, twice, text)
		}
	}
	// every sets each number of the value to its extremes, one number at a time.
	every := func(v reflect.Value, then func(what string)) {
		i := 0
		numbersOf(v, func(n reflect.Value) {
			before := reflect.ValueOf(n.Interface())
			if n.Kind() == reflect.Float64 {
				for _, x := range floats {
					n.SetFloat(x)
					then(fmt.Sprintf("%v as number %d", x, i))
				}
			} else {
				for _, x := range integers {
					n.SetInt(x)
					then(fmt.Sprintf("%v as number %d", x, i))
				}
			}
			n.Set(before)
			i++
		})
	}
	for _, kind := range allKinds {
		v := reflect.New(reflect.TypeOf(kind)).Elem()
		v.Set(reflect.ValueOf(maker{rand.New(rand.NewPCG(1, 2))}.component(kind)))
		if f := v.FieldByName("Steps"); f.IsValid() { // the slices of a value are its own
			f.Set(reflect.AppendSlice(reflect.MakeSlice(f.Type(), 0, f.Len()), f))
		}
		every(v, func(what string) {
			check(v.Interface().(policy.Component), what+" of "+fmt.Sprintf("%T", kind))
		})
		if !v.FieldByName("Overrides").IsValid() {
			continue
		}
		v.FieldByName("LimitBy").SetString("user")
		var o policy.Override
		every(reflect.ValueOf(&o).Elem(), func(what string) {
			v.FieldByName("Overrides").Set(reflect.ValueOf(map[string]policy.Override{"ann": o}))
			check(v.Interface().(policy.Component), what+" of an override of "+fmt.Sprintf("%T", kind))
		})
	}
}
