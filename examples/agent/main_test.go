package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

func TestMain(m *testing.M) {
	if os.Getenv(asAgent) != "" { // started by TestProcessRestart
		main()
		return
	}
	goleak.VerifyTestMain(m)
}

func TestRun(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	// A limit that does not come back while a slow machine runs the test.
	file := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(file, []byte(`circuit:
  components:
    - flow_control:
        rate_limiter:
          selectors:
            - {control_point: recommend}
            - {control_point: recommend, service: shop}
          in_ports: {bucket_capacity: {constant_signal: {value: 1}}, fill_amount: {constant_signal: {value: 1}}}
          parameters: {interval: 1h, limit_by_label_key: user_id}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	out, printed := io.Pipe()
	var stderr bytes.Buffer // to be read when run has returned
	done := make(chan error, 1)
	go func() {
		err := run(ctx, policy.Load, []string{"-listen", "127.0.0.1:0", "-policies", file}, nil, printed, &stderr)
		printed.Close()
		done <- err
	}()
	var policies, address string
	if _, err := fmt.Fscanf(out, "serving %s at %s until interrupted\n", &policies, &address); err != nil {
		t.Fatal(err)
	}

	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	health, err := healthv1.NewHealthClient(conn).Watch(t.Context(), &healthv1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := health.Recv(); m.GetStatus() != healthv1.HealthCheckResponse_SERVING {
		t.Errorf("health = %v, %v want SERVING", m, err)
	}
	if names := reflected(t, conn); !slices.Contains(names, "aperture.flowcontrol.check.v1.FlowControlService") {
		t.Errorf("reflection lists %q", names)
	}

	params := flowctl.Params{
		Labels:       map[string]string{"user_id": "carol"},
		CheckTimeout: 10 * time.Second,
	}
	var accepted int
	for range 2 { // of two processes, as it were
		client, err := flowctl.Dial(address, flowctl.WithInsecure())
		if err != nil {
			t.Fatal(err)
		}
		flow := client.Start(t.Context(), "recommend", params)
		if !flow.Success() {
			t.Errorf("%v: %v", flow, flow.Err())
		}
		if flow.ShouldRun() {
			accepted++
		}
		_, _ = flow.End(t.Context())
		if err := client.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if accepted != 1 {
		t.Errorf("%d of two calls were accepted want one: the limit is shared", accepted)
	}

	cancel()
	if m, err := health.Recv(); m.GetStatus() != healthv1.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health = %v, %v want NOT_SERVING as it stops", m, err)
	}
	_ = conn.Close() // the agent does not wait for clients that only watch
	rest, err := io.ReadAll(out)
	if err != nil || !strings.Contains(string(rest), "clients reported 2 flows") {
		t.Errorf("last words = %q, %v", rest, err)
	}
	if err := <-done; err != nil {
		t.Errorf("run = %v", err)
	}
	if !strings.Contains(stderr.String(), `warning: policy "policy": component "root.0"`) {
		t.Errorf("no warning of a selector that picks nothing: %q", &stderr)
	}
}

// reflected is the services that reflection lists.
func reflected(t *testing.T, conn *grpc.ClientConn) (names []string) {
	t.Helper()
	stream, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&reflectionv1.ServerReflectionRequest{
		MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{},
	}); err != nil {
		t.Fatal(err)
	}
	m, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range m.GetListServicesResponse().GetService() {
		names = append(names, s.GetName())
	}
	return names
}

// Policies that are right come into force, and others do not.
func TestRunReloads(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	file := filepath.Join(t.TempDir(), "policy.yaml")
	write := func(limit string) {
		text := `circuit: {components: [{flow_control: {rate_limiter: {selectors: [{control_point: recommend}], parameters: {interval: 1h},
  in_ports: {bucket_capacity: {constant_signal: {value: ` + limit + `}}, fill_amount: {constant_signal: {value: 1}}}}}}]}`
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("0")
	out, printed := io.Pipe()
	said, says := io.Pipe()
	hangup := make(chan os.Signal)
	done := make(chan error, 1)
	go func() {
		err := run(ctx, policy.Load, []string{"-listen", "127.0.0.1:0", "-policies", file}, hangup, printed, says)
		printed.Close()
		says.Close()
		done <- err
	}()
	var policies, address string
	if _, err := fmt.Fscanf(out, "serving %s at %s until interrupted\n", &policies, &address); err != nil {
		t.Fatal(err)
	}
	client, err := flowctl.Dial(address, flowctl.WithInsecure())
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(said)
	for _, tt := range []struct {
		limit, says string // after a hangup
		runs        bool
	}{
		{"none", "the policies stay as they are: ", false},
		{"1", file + " has been read again", true},
		{"none", "the policies stay as they are: ", false},
	} {
		write(tt.limit)
		hangup <- syscall.SIGHUP
		if !lines.Scan() || !strings.HasPrefix(lines.Text(), tt.says) {
			t.Errorf("limit %s: it says %q want %q", tt.limit, lines.Text(), tt.says)
		}
		flow := client.Start(t.Context(), "recommend", flowctl.Params{CheckTimeout: 10 * time.Second})
		if !flow.Success() || flow.ShouldRun() != tt.runs {
			t.Errorf("limit %s: %v: %v", tt.limit, flow, flow.Err())
		}
		_, _ = flow.End(t.Context())
	}
	if err := client.Close(t.Context()); err != nil {
		t.Error(err)
	}
	cancel()
	if _, err := io.Copy(io.Discard, out); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Errorf("run = %v", err)
	}
}

// An interrupt that comes before the server has begun is one, too.
func TestRunIsInterruptedAtOnce(t *testing.T) {
	for range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		interrupt := writer(func() {
			cancel()
			runtime.Gosched()
		})
		if err := run(ctx, policy.Load, []string{"-listen", "127.0.0.1:0", "-policies", "../quickstart/policy.yaml"}, nil, interrupt, io.Discard); err != nil {
			t.Errorf("run = %v", err)
		}
		cancel()
	}
}

// A read of the policies that hangs keeps nobody waiting: neither the first one nor one after a hangup.
func TestRunDoesNotWaitForPolicies(t *testing.T) {
	for _, tt := range []struct {
		name    string
		answers int // that many reads do not hang
		wrong   bool
	}{
		{"at the start", 0, true},
		{"after a hangup", 1, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			hangs, ends, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
			reads := 0
			read := func(paths ...string) ([]policy.Policy, error) {
				if reads++; reads <= tt.answers {
					return policy.Load(paths...)
				}
				defer close(ended)
				close(hangs)
				<-ends
				return nil, nil
			}
			hangup := make(chan os.Signal, 1)
			hangup <- syscall.SIGHUP
			done := make(chan error, 1)
			go func() {
				done <- run(ctx, read, []string{"-listen", "127.0.0.1:0", "-policies", "../quickstart/policy.yaml"}, hangup, io.Discard, io.Discard)
			}()
			<-hangs
			cancel()
			select {
			case err := <-done:
				if (err != nil) != tt.wrong {
					t.Errorf("run = %v, want an error: %t", err, tt.wrong)
				}
			case <-time.After(time.Minute):
				t.Error("run waits for the read")
			}
			close(ends)
			<-ended
		})
	}
}

// A writer calls a function for what is written.
type writer func()

func (w writer) Write(p []byte) (int, error) {
	w()
	return len(p), nil
}

func TestRunErrors(t *testing.T) {
	for name, args := range map[string][]string{
		"no such file":  {"-policies", "no-such-file.yaml"},
		"no such flag":  {"-nonsense"},
		"an argument":   {"argument"},
		"no key file":   {"-policies", "../quickstart/policy.yaml", "-listen", "127.0.0.1:0", "-keys", "no-such-file"},
		"a bad address": {"-policies", "../quickstart/policy.yaml", "-listen", "nowhere"},
	} {
		t.Run(name, func(t *testing.T) {
			var stderr bytes.Buffer
			if err := run(t.Context(), policy.Load, args, nil, io.Discard, &stderr); err == nil {
				t.Error("run = nil")
			}
		})
	}
}

func TestReadKeys(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       map[string]string // owners by key
	}{
		{"two", "shop sesame\n\n  mail\topen \n", map[string]string{"sesame": "shop", "open": "mail"}},
		{"none", "\n", nil},
		{"no name", "sesame\n", nil},
		{"three words", "shop open sesame\n", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "keys")
			if err := os.WriteFile(file, []byte(tt.text), 0o600); err != nil {
				t.Fatal(err)
			}
			keys, err := readKeys(file)
			if (err != nil) != (tt.want == nil) || err != nil && strings.Contains(err.Error(), "sesame") {
				t.Errorf("error = %v", err)
			}
			if len(keys) != len(tt.want) {
				t.Errorf("%d keys want %d", len(keys), len(tt.want))
			}
			for key, name := range tt.want {
				if got := keys[sha256.Sum256([]byte(key))]; got != name {
					t.Errorf("a key is %q's want %q", got, name)
				}
			}
		})
	}
}
