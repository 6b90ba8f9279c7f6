package policy_test

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/policy"
)

// What is wrong with a circuit breaker, in Go and in a file.
func TestCircuitBreakerMistakes(t *testing.T) {
	const file = `circuit:
  components:
    - flow_control:
        circuit_breaker:
          selectors: [{control_point: payment}]
          parameters:
            {failure_count: 9, failure_ratio: RATIO, window: WINDOW, open_duration: OPEN, OTHER}
`
	breaker := func(change func(*policy.CircuitBreaker)) policy.CircuitBreaker {
		b := policy.CircuitBreaker{Selectors: policy.At("payment"), FailureCount: 9, Window: time.Minute, OpenDuration: time.Minute}
		change(&b)
		return b
	}
	for _, tt := range []struct {
		name    string
		breaker policy.CircuitBreaker
		edits   []string // of the file: the keys and their values
		field   string   // of the Go value
		key     string
		want    string
	}{
		{"ratio above 1", breaker(func(b *policy.CircuitBreaker) { b.FailureRatio = 50 }), []string{"RATIO", "50"}, "FailureRatio", "failure_ratio", "must be a share from 0 to 1, is 50"},
		{"ratio that is no number", breaker(func(b *policy.CircuitBreaker) { b.FailureRatio = math.NaN() }), []string{"RATIO", ".nan"}, "FailureRatio", "failure_ratio", "must be a share from 0 to 1, is NaN"},
		{"no window", breaker(func(b *policy.CircuitBreaker) { b.Window = 0 }), []string{"WINDOW", "~"}, "Window", "window", "is required"},
		{"negative window", breaker(func(b *policy.CircuitBreaker) { b.Window = -1 }), []string{"WINDOW", "-1ns"}, "Window", "window", "must be at least 5ms, is -1ns"},
		{"window that is too short", breaker(func(b *policy.CircuitBreaker) { b.Window = time.Millisecond }), []string{"WINDOW", "1ms"}, "Window", "window", "must be at least 5ms, is 1ms"},
		{"negative open duration", breaker(func(b *policy.CircuitBreaker) { b.OpenDuration = -1 }), []string{"OPEN", "-1ns"}, "OpenDuration", "open_duration", "must be positive, is -1ns"},
		{"negative slow after", breaker(func(b *policy.CircuitBreaker) { b.SlowAfter = -1 }), []string{"OTHER", "slow_after: -1ns"}, "SlowAfter", "slow_after", "must not be negative, is -1ns"},
		{"negative probe timeout", breaker(func(b *policy.CircuitBreaker) { b.ProbeTimeout = -1 }), []string{"OTHER", "probe_timeout: -1ns"}, "ProbeTimeout", "probe_timeout", "must not be negative, is -1ns"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := policy.Policy{Name: "p", Components: []policy.Component{tt.breaker}}.Validate()
			if err == nil {
				t.Fatal("Validate = nil")
			}
			if diff := cmp.Diff(`policy "p": components[0].`+tt.field+": "+tt.want, err.Error()); diff != "" {
				t.Errorf("Validate (-want +got):\n%s", diff)
			}
			text := strings.NewReplacer(append(tt.edits, "RATIO", "0", "WINDOW", "1m", "OPEN", "1m", "OTHER", "probes: 1")...).Replace(file)
			_, err = policy.Parse("limits.yaml", []byte(text))
			if err == nil {
				t.Fatal("Parse = nil")
			}
			place, message, _ := strings.Cut(err.Error(), ": ")
			if diff := cmp.Diff("circuit.components[0].flow_control.circuit_breaker.parameters."+tt.key+": "+tt.want, message); diff != "" ||
				!strings.HasPrefix(place, "limits.yaml:7:") {
				t.Errorf("Parse at %s (-want +got):\n%s", place, diff)
			}
		})
	}
}

// Numbers of flows are whole.
func TestCircuitBreakerCounts(t *testing.T) {
	set := func(field string, n int) policy.CircuitBreaker {
		b := policy.CircuitBreaker{Selectors: policy.At("payment"), FailureRatio: 0.5, Window: time.Minute, OpenDuration: time.Minute}
		*map[string]*int{"FailureCount": &b.FailureCount, "MinFlows": &b.MinFlows, "Probes": &b.Probes, "Successes": &b.Successes}[field] = n
		return b
	}
	for field, key := range map[string]string{"FailureCount": "failure_count", "MinFlows": "min_flows", "Probes": "probes", "Successes": "successes"} {
		for value, want := range map[string]string{
			"0": "", "1": "", "2147483647": "", "-1": "-1", "1.5": "1.5", "2147483648": "2.147483648e+09", "1e300": "1e+300", ".nan": "NaN",
		} {
			t.Run(key+" "+value, func(t *testing.T) {
				_, err := policy.Parse("limits.yaml", []byte(`circuit: {components: [{flow_control: {circuit_breaker: {selectors: [{control_point: payment}],
  parameters: {failure_ratio: 0.5, window: 1m, open_duration: 1m, `+key+`: `+value+`}}}}]}`))
				if want == "" {
					if err != nil {
						t.Error(err)
					}
					return
				}
				if err == nil || !strings.HasSuffix(err.Error(), "."+key+": must be a whole number from 0 to 2147483647, is "+want) {
					t.Errorf("Parse = %v", err)
				}
			})
		}
		err := policy.Policy{Name: "p", Components: []policy.Component{set(field, -1)}}.Validate()
		if err == nil || err.Error() != `policy "p": components[0].`+field+`: must be a whole number from 0 to 2147483647, is -1` {
			t.Errorf("Validate = %v", err)
		}
	}
}

func TestCircuitBreakerWithoutKeys(t *testing.T) {
	_, err := policy.Parse("limits.yaml", []byte("circuit: {components: [{flow_control: {circuit_breaker: {}}}]}"))
	const at = "limits.yaml:1:57: circuit.components[0].flow_control.circuit_breaker"
	want := at + ".selectors: is required\n" + at + ".parameters.window: is required\n" + at + ".parameters.open_duration: is required\n" +
		at + ": needs a failure ratio or a failure count above 0: without one it never opens"
	if err == nil || err.Error() != want {
		t.Errorf("Parse = %v want %s", err, want)
	}
	err = policy.Policy{Name: "p", Components: []policy.Component{&policy.CircuitBreaker{}}}.Validate()
	const in = `policy "p": components[0]`
	want = in + ".Selectors: needs at least one selector\n" + in + ".Window: is required\n" + in + ".OpenDuration: must be positive, is 0s\n" +
		in + ": needs a failure ratio or a failure count above 0: without one it never opens"
	if err == nil || err.Error() != want {
		t.Errorf("Validate = %v want %s", err, want)
	}
}
