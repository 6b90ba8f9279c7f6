package main

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/flowctl/flowtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errInterrupt = errors.New("interrupt")

const output = `Three users call one function ten times a second. The limits come from
examples/quickstart/policy.yaml: change a limit and run this again.
A rejected call of a free user gets a fallback. Others get the time to retry.

       alice (gold)              bob (silver)              carol (free)
0.00s  accepted                  accepted                  accepted
0.10s  accepted                  accepted                  fallback
0.20s  accepted                  accepted                  fallback
0.30s  accepted                  rejected, retry in 33ms   fallback
0.40s  accepted                  accepted                  fallback
0.50s  accepted                  rejected, retry in 167ms  fallback
0.60s  accepted                  rejected, retry in 67ms   fallback
0.70s  accepted                  accepted                  fallback

       alice (gold)              bob (silver)              carol (free)
2.00s  accepted                  accepted                  accepted
2.10s  accepted                  accepted                  fallback
2.20s  accepted                  accepted                  fallback
2.30s  accepted                  rejected, retry in 33ms   fallback
2.40s  accepted                  accepted                  fallback
2.50s  accepted                  rejected, retry in 167ms  fallback
2.60s  accepted                  rejected, retry in 67ms   fallback
2.70s  accepted                  accepted                  fallback

user    tier      accepted  rejected  fallback
alice   gold            16         0         0
bob     silver          10         6         0
carol   free             2         0        14
`

func TestOutput(t *testing.T) {
	t.Setenv("APERTURE_AGENT_ADDRESS", "")
	synctest.Test(t, func(t *testing.T) {
		var stdout, stderr strings.Builder
		if err := run(t.Context(), nil, &stdout, &stderr); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(output, stdout.String()); diff != "" {
			t.Errorf("stdout (-want +got):\n%s", diff)
		}
		if stderr.Len() > 0 {
			t.Errorf("stderr is not empty:\n%s", &stderr)
		}
	})
}

// Ctrl-C leaves a summary of what there was.
func TestInterrupt(t *testing.T) {
	t.Setenv("APERTURE_AGENT_ADDRESS", "")
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeoutCause(t.Context(), 350*time.Millisecond, errInterrupt)
		defer cancel()
		var stdout, stderr strings.Builder
		if err := run(ctx, nil, &stdout, &stderr); !errors.Is(err, errInterrupt) {
			t.Errorf("run = %v, want %v", err, errInterrupt)
		}
		const want = `
0.30s  accepted                  rejected, retry in 33ms   fallback

user    tier      accepted  rejected  fallback
alice   gold             4         0         0
bob     silver           3         1         0
carol   free             1         0         3
`
		if !strings.HasSuffix(stdout.String(), want) {
			t.Errorf("run printed\n%swant at the end\n%s", &stdout, want)
		}
	})
}

func TestPolicies(t *testing.T) {
	// One call for all users together, and a key that the engine has no use for.
	const own = `
circuit:
  evaluation_interval: 1s
  components:
    - flow_control:
        rate_limiter:
          selectors: [{control_point: recommend}]
          in_ports: {bucket_capacity: {constant_signal: {value: 1}}, fill_amount: {constant_signal: {value: 0}}}
          parameters: {interval: 1s}
`
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "own.yaml"), []byte(own), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("APERTURE_AGENT_ADDRESS", "the.flag.wins:443")
	synctest.Test(t, func(t *testing.T) {
		var stdout, stderr strings.Builder
		if err := run(t.Context(), []string{"-policies", dir}, &stdout, &stderr); err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{
			dir + ": change a limit and run this again.\n",
			"0.00s  accepted                  rejected                  fallback\n",
			"alice   gold             1        15         0\n",
		} {
			if !strings.Contains(stdout.String(), want) {
				t.Errorf("stdout lacks %q:\n%s", want, &stdout)
			}
		}
		if want := "own.yaml:3:"; !strings.Contains(stderr.String(), want) {
			t.Errorf("stderr lacks %q:\n%s", want, &stderr)
		}
	})
}

// If the agent does not answer, calls run, and the summary says so.
func TestUnanswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{}, flowtest.Answer{Fail: status.Error(codes.Unimplemented, "not an agent")})
		var stdout strings.Builder
		if err := demonstrate(t.Context(), agent.Client(), &stdout); err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{
			"0.00s  accepted                  unreachable               unreachable\n",
			"47 calls ran although no agent answered",
		} {
			if !strings.Contains(stdout.String(), want) {
				t.Errorf("stdout lacks %q:\n%s", want, &stdout)
			}
		}
	})
}

// anAgent accepts every flow, and tells of its checks.
type anAgent struct {
	checkv1.UnimplementedFlowControlServiceServer
	checked func(labels map[string]string)
}

func (a *anAgent) Check(_ context.Context, r *checkv1.CheckRequest) (*checkv1.CheckResponse, error) {
	a.checked(r.GetLabels())
	return new(checkv1.CheckResponse), nil
}

// serve serves the agent on this machine until the test ends.
func serve(t *testing.T, agent *anAgent) (address string) {
	t.Helper()
	server := grpc.NewServer(grpc.WaitForHandlers(true))
	checkv1.RegisterFlowControlServiceServer(server, agent)
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := server.Serve(listener); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		server.Stop()
		serving.Wait()
	})
	return listener.Addr().String()
}

func TestAgent(t *testing.T) {
	for _, how := range []string{"flag", "environment"} {
		t.Run(how, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			var mu sync.Mutex
			tiers := make(map[string]string)
			address := serve(t, &anAgent{checked: func(labels map[string]string) {
				mu.Lock()
				defer mu.Unlock()
				tiers[labels["user_id"]] = labels["user_tier"]
				if len(tiers) == 3 {
					cancel(errInterrupt) // that is enough
				}
			}})

			args := []string{"-agent", address}
			t.Setenv("APERTURE_AGENT_ADDRESS", "")
			if how == "environment" {
				args = nil
				t.Setenv("APERTURE_AGENT_ADDRESS", address)
				t.Setenv("APERTURE_AGENT_INSECURE", "true")
			}
			var stdout, stderr strings.Builder
			if err := run(ctx, args, &stdout, &stderr); !errors.Is(err, errInterrupt) {
				t.Errorf("run = %v, want %v", err, errInterrupt)
			}
			if diff := cmp.Diff(map[string]string{"alice": "gold", "bob": "silver", "carol": "free"}, tiers); diff != "" {
				t.Errorf("users and tiers that the agent was asked about (-want +got):\n%s", diff)
			}
			if want := "come from\nthe policies of the agent at " + address + ".\n"; !strings.Contains(stdout.String(), want) {
				t.Errorf("stdout lacks %q:\n%s", want, &stdout)
			}
		})
	}
}

func TestErrors(t *testing.T) {
	t.Setenv("APERTURE_AGENT_ADDRESS", "")
	ended, cancel := context.WithCancelCause(t.Context())
	cancel(errInterrupt)
	missing := filepath.Join(t.TempDir(), "none.yaml")
	for _, tt := range []struct {
		name string
		ctx  context.Context
		args []string
		want string
	}{
		{"no such policies", t.Context(), []string{"-policies", missing}, missing},
		{"policies and an agent", t.Context(), []string{"-policies", missing, "-agent", "localhost:8089"}, "exclude each other"},
		{"an agent without a port", t.Context(), []string{"-agent", "localhost"}, "host:port"},
		{"no agent in time", ended, []string{"-agent", "localhost:8089"}, "agent not ready"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var stdout, stderr strings.Builder
			if err := run(tt.ctx, tt.args, &stdout, &stderr); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("run = %v, want an error with %q", err, tt.want)
			}
		})
	}
}
