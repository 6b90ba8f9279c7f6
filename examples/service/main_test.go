package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const deadline = time.Minute // of what should take no time

// An agentServer is an agent with an engine of the service's own limits, across the loopback network.
type agentServer struct {
	address string
	engine  *engine.Engine
	*agent.Service
	checks atomic.Int64 // that were answered
}

// startAgent serves at the address until the test ends.
func startAgent(t *testing.T, address, policies string) *agentServer {
	t.Helper()
	limits, err := engine.Load(policies)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	a := &agentServer{address: listener.Addr().String(), engine: limits}
	server := grpc.NewServer(append(agent.ServerOptions(), grpc.UnaryInterceptor(
		func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			resp, err := handler(ctx, req)
			if err == nil && info.FullMethod == checkv1.FlowControlService_Check_FullMethodName {
				a.checks.Add(1)
			}
			return resp, err
		}))...)
	a.Service = agent.Register(server, limits)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		_ = limits.Close()
	})
	return a
}

// freeAddress is an address where nothing listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

// A service is the program under test, with clients of it.
type service struct {
	web  string // its URL
	http *http.Client
	grpc *grpc.ClientConn
	stop func() error // and give what run returns
}

// start runs the program with the agent at the address, or with the engine where there is none, until the test ends.
func start(t *testing.T, agentAddress string, args ...string) *service {
	t.Helper()
	t.Setenv("APERTURE_AGENT_ADDRESS", agentAddress)
	t.Setenv("APERTURE_API_KEY", "key")
	t.Setenv("APERTURE_AGENT_INSECURE", "true")
	t.Setenv("APERTURE_APP_PORT", "0")
	t.Setenv("APERTURE_APP_GRPC_PORT", "0")
	ctx, cancel := context.WithCancel(t.Context())
	out, printed := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := run(ctx, args, printed, io.Discard)
		_ = printed.CloseWithError(errors.Join(errors.New("run has returned"), err))
		ended <- err
	}()
	s := &service{}
	s.stop = sync.OnceValue(func() error {
		cancel()
		return <-ended
	})
	t.Cleanup(func() {
		if err := s.stop(); err != nil {
			t.Errorf("run = %v", err)
		}
	})
	var rpc, decider string
	if _, err := fmt.Fscanf(out, "HTTP at %s\ngRPC at %s\ndecided by the %s ", &s.web, &rpc, &decider); err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.Copy(io.Discard, out) }()
	if want := map[bool]string{true: "engine", false: "agent"}[agentAddress == ""]; decider != want {
		t.Errorf("decided by the %s, want the %s", decider, want)
	}

	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	t.Cleanup(transport.CloseIdleConnections)
	s.http = &http.Client{Transport: transport}
	conn, err := grpc.NewClient(rpc, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	s.grpc = conn
	return s
}

// An answer is what came back, over HTTP or gRPC.
type answer struct {
	code       any // an HTTP status or a codes.Code
	text       string
	retryAfter bool // is known
}

// get asks over HTTP, as the tenant with the key. An answer that was cut off comes with an error.
func (s *service) get(ctx context.Context, path, key string) (answer, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, s.web+path, http.NoBody)
	if err != nil {
		return answer{}, err
	}
	r.Header.Set("X-API-Key", key)
	resp, err := s.http.Do(r)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	seconds, _ := strconv.Atoi(resp.Header.Get("Retry-After"))
	return answer{resp.StatusCode, strings.TrimSpace(string(text)), seconds >= 1}, err
}

// count asks over gRPC. Its errors are answers.
func (s *service) count(ctx context.Context, key string) (answer, error) {
	words := new(wrapperspb.Int64Value)
	err := s.grpc.Invoke(metadata.AppendToOutgoingContext(ctx, "x-api-key", key), countMethod, wrapperspb.String("two words"), words)
	return answer{code: status.Code(err), text: strconv.FormatInt(words.GetValue(), 10), retryAfter: len(status.Convert(err).Details()) > 0}, nil
}

// try asks at a route: a path, or else words, which is the one over gRPC.
func (s *service) try(ctx context.Context, route, key string) (answer, error) {
	if route == "words" {
		return s.count(ctx, key)
	}
	return s.get(ctx, route, key)
}

func (s *service) ask(t *testing.T, route, key string) answer {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	a, err := s.try(ctx, route, key)
	if err != nil {
		t.Fatalf("%s: %v", route, err)
	}
	return a
}

// situations are those in which flows are decided.
var situations = []struct {
	name  string
	agent func(t *testing.T) string
}{
	{"embedded", func(*testing.T) string { return "" }},
	{"agent", func(t *testing.T) string { return startAgent(t, "127.0.0.1:0", "policy.yaml").address }},
}

// patient services do not fail open because a machine is slow.
var patient = []string{"-check-timeout", "1m"}

func TestRoutes(t *testing.T) {
	tests := []struct {
		route, key string
		runs       answer
		times      int // it runs at once; 0 is without limit
		then       answer
	}{
		{route: "/health", runs: answer{code: http.StatusOK, text: "Healthy"}},
		{route: "/connected", runs: answer{code: http.StatusOK, text: "connected"}},
		{route: "/nowhere", runs: answer{code: http.StatusNotFound, text: "404 page not found"}},
		{
			route: "/super", runs: answer{code: http.StatusAccepted, text: "awesome"}, times: 5,
			then: answer{http.StatusServiceUnavailable, "come back later", true},
		},
		{
			route: "/orders", key: "key-of-acme", runs: answer{code: http.StatusOK, text: "no orders"}, times: 5,
			then: answer{http.StatusTooManyRequests, "", true},
		},
		{
			route: "words", key: "key-of-globex", runs: answer{code: codes.OK, text: "2"}, times: 5,
			then: answer{codes.ResourceExhausted, "0", true},
		},
		{ // its words have used nothing of the orders of others
			route: "/orders", runs: answer{code: http.StatusOK, text: "no orders"}, times: 5,
			then: answer{http.StatusTooManyRequests, "", true},
		},
		{
			route: "/weather", runs: answer{code: http.StatusOK, text: "sunny"}, times: 3,
			then: answer{http.StatusServiceUnavailable, "come back later", true},
		},
		{route: "/report", runs: answer{code: http.StatusOK, text: "working on it\nall is well"}}, // one after the other
	}
	for _, situation := range situations {
		t.Run(situation.name, func(t *testing.T) {
			s := start(t, situation.agent(t), append(patient, "-report-time", "1ms")...)
			for _, tt := range tests {
				t.Run(tt.route+" "+tt.key, func(t *testing.T) {
					const enough = 20 // requests: no limit refills as fast as they come
					n := 0
					for ; n < enough; n++ {
						got := s.ask(t, tt.route, tt.key)
						if got == tt.runs {
							continue
						}
						if strings.HasPrefix(got.text, "{") { // problem+json
							got.text = ""
						}
						if tt.times == 0 || got != tt.then {
							t.Fatalf("answer %d is %+v", n, got)
						}
						break
					}
					if tt.times > 0 && (n < tt.times || n == enough) {
						t.Errorf("it ran %d times, want %d", n, tt.times)
					}
				})
			}
		})
	}
}

// Two reports are made at a time. A client that disconnects gives back its slot.
func TestReports(t *testing.T) {
	for _, situation := range situations {
		t.Run(situation.name, func(t *testing.T) {
			s := start(t, situation.agent(t), append(patient, "-report-time", "1h")...)
			var leave []context.CancelFunc
			for range 2 {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				leave = append(leave, cancel)
				resp, err := s.open(ctx)
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				if resp.StatusCode != http.StatusOK {
					t.Fatalf("%s, want that it begins", resp.Status)
				}
			}
			if got := s.ask(t, "/report", ""); got.code != http.StatusTooManyRequests {
				t.Errorf("the third report: %+v, want 429", got)
			}
			leave[0]()
			again, cancel := context.WithTimeout(t.Context(), deadline)
			defer cancel()
			for {
				resp, err := s.open(again)
				if err != nil {
					t.Fatalf("no report is made any more: %v", err)
				}
				_ = resp.Body.Close()
				if resp.StatusCode == http.StatusOK {
					break
				}
			}
			leave[1]()
			s.http.CloseIdleConnections()
		})
	}
}

// open begins a report.
func (s *service) open(ctx context.Context) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, s.web+"/report", http.NoBody)
	if err != nil {
		return nil, err
	}
	return s.http.Do(r)
}

// Without its agent the service goes on, except for outgoing requests. When the agent comes, it is asked.
func TestAgentDown(t *testing.T) {
	address := freeAddress(t)
	s := start(t, address, append(patient, "-report-time", "1ms")...)
	for _, tt := range []struct {
		route string
		want  answer
	}{
		{"/health", answer{code: http.StatusOK, text: "Healthy"}},
		{"/connected", answer{code: http.StatusServiceUnavailable, text: "not connected"}},
		{"/super", answer{code: http.StatusAccepted, text: "awesome"}},
		{"/orders", answer{code: http.StatusOK, text: "no orders"}},
		{"words", answer{code: codes.OK, text: "2"}},
		{"/report", answer{code: http.StatusOK, text: "working on it\nall is well"}},
		{"/weather", answer{code: http.StatusServiceUnavailable, text: "come back later"}},
	} {
		for range 10 { // more than any limit
			if got := s.ask(t, tt.route, "key-of-acme"); got != tt.want {
				t.Errorf("%s: %+v, want %+v", tt.route, got, tt.want)
			}
		}
	}

	agent := startAgent(t, address, "policy.yaml")
	late := time.Now().Add(deadline)
	for s.ask(t, "/connected", "").code != http.StatusOK { // each of which waits a while
		if time.Now().After(late) {
			t.Fatal("the service does not find its agent")
		}
	}
	for s.ask(t, "/super", "").code != http.StatusServiceUnavailable {
		if time.Now().After(late) {
			t.Fatal("the agent's limits do not hold")
		}
	}
	if agent.checks.Load() == 0 {
		t.Error("the agent was not asked")
	}
}

func TestHealthOverGRPC(t *testing.T) {
	s := start(t, "")
	got, err := healthgrpc.NewHealthClient(s.grpc).Check(t.Context(), new(healthgrpc.HealthCheckRequest))
	if err != nil || got.GetStatus() != healthgrpc.HealthCheckResponse_SERVING {
		t.Errorf("%v, %v; want that it serves", got, err)
	}
}

// A service that stops under load finishes what has begun, and its agent gets a report of every flow.
func TestShutdownUnderLoad(t *testing.T) {
	agent := startAgent(t, "127.0.0.1:0", "load.yaml")
	s := start(t, agent.address, append(patient, "-report-time", "100ms")...)

	const inFlight = 16
	var answered atomic.Int64
	var busy, callers sync.WaitGroup
	routes := []string{"/super", "/orders", "/report", "/weather", "words"}
	for i := range inFlight {
		route := routes[i%len(routes)]
		busy.Add(1)
		callers.Go(func() {
			for n := 0; ; n++ {
				got, err := s.try(t.Context(), route, "key-of-acme")
				switch {
				case got.code == nil, got.code == codes.Unavailable: // it listens no more
					if n < 3 {
						t.Errorf("%s: %v, %v", route, got, err)
						busy.Done()
					}
					return
				case err != nil, route == "/report" && !strings.HasSuffix(got.text, "well"):
					t.Errorf("%s was cut off: %+v, %v", route, got, err)
				case got.code == http.StatusOK, got.code == http.StatusAccepted, got.code == codes.OK:
					answered.Add(1)
				default:
					t.Errorf("%s: %+v", route, got)
				}
				if n == 2 {
					busy.Done()
				}
			}
		})
	}
	busy.Wait() // each caller is in the midst of it
	if err := s.stop(); err != nil {
		t.Errorf("run = %v", err)
	}
	callers.Wait()

	if flows, spans := agent.checks.Load(), agent.Spans(); uint64(flows) != spans || flows < answered.Load() {
		t.Errorf("%d requests were answered, %d flows started, and the agent heard of the end of %d", answered.Load(), flows, spans)
	}
	// All slots are free: as many flows can start as there are.
	probe, err := flowctl.New(agent.engine)
	if err != nil {
		t.Fatal(err)
	}
	for n := range reportSlots {
		flow := probe.Start(t.Context(), "report", flowctl.Params{})
		defer flow.EndWith(new(error))
		if !flow.ShouldRun() {
			t.Fatalf("%d of %d slots are held", reportSlots-n, reportSlots)
		}
	}
	if flow := probe.Start(t.Context(), "report", flowctl.Params{}); flow.ShouldRun() {
		t.Errorf("there are more than %d slots", reportSlots)
	}
}

// reportSlots are those of load.yaml.
const reportSlots = 1000

func TestRunErrors(t *testing.T) {
	taken := freeAddress(t)
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", taken)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	_, port, _ := net.SplitHostPort(taken)
	tests := []struct {
		name string
		env  map[string]string
		args []string
		want string
	}{
		{name: "no such flag", args: []string{"-nonsense"}, want: "nonsense"},
		{name: "an argument", args: []string{"argument"}, want: `what is "argument"?`},
		{name: "no such file", args: []string{"-policies", "no-such-file.yaml"}, want: "no-such-file.yaml"},
		{
			name: "policies for an agent", env: map[string]string{"APERTURE_AGENT_ADDRESS": "localhost:1"},
			args: []string{"-policies", "policy.yaml"}, want: "-policies",
		},
		{name: "a bad agent address", env: map[string]string{"APERTURE_AGENT_ADDRESS": "nowhere"}, want: "APERTURE_AGENT_ADDRESS"},
		{name: "a bad port", env: map[string]string{"APERTURE_APP_PORT": "http!"}, want: "APERTURE_APP_PORT"},
		{name: "a port in use", env: map[string]string{"APERTURE_APP_PORT": port}, want: "APERTURE_APP_PORT"},
		{name: "a bad port for gRPC", env: map[string]string{"APERTURE_APP_GRPC_PORT": "-1"}, want: "APERTURE_APP_GRPC_PORT"},
		{name: "a bad host", args: []string{"-host", "no host"}, want: "-host"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("APERTURE_AGENT_ADDRESS", "")
			t.Setenv("APERTURE_APP_PORT", "0")
			t.Setenv("APERTURE_APP_GRPC_PORT", "0")
			for name, value := range tt.env {
				t.Setenv(name, value)
			}
			var out bytes.Buffer
			if err := run(t.Context(), tt.args, &out, io.Discard); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("run = %v, want something about %q", err, tt.want)
			}
			if out.Len() > 0 {
				t.Errorf("it said %q", &out)
			}
		})
	}
}
