package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/benchtable"
)

const (
	apiKey       = "key"
	checkTimeout = 5 * time.Second // of a client that must not fail open in a benchmark
	inFlight     = 64
)

// serveAgent is the other process: package agent with an engine. It prints its address, and serves until standard input
// ends, which is when its parent ends.
func serveAgent(ctx context.Context, stdout io.Writer) error {
	limits, err := engine.New(policies(1))
	if err != nil {
		return err
	}
	defer limits.Close()
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := grpc.NewServer(agent.ServerOptions()...)
	agent.Register(server, limits)
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		server.Stop()
	}()
	fmt.Fprintln(stdout, listener.Addr())
	return server.Serve(listener)
}

// remotes are the rows over gRPC. Their agent is another process, so that what is counted is the client's.
type remotes struct {
	ctx    context.Context //nolint:containedctx // the run's
	agent  *exec.Cmd
	stdin  io.Closer
	client *flowctl.Client
	silent *flowctl.Client // sends no telemetry
	dead   *flowctl.Client // its agent is gone and its breaker open
	conn   *grpc.ClientConn
	bare   checkv1.FlowControlServiceClient
}

func openRemotes(ctx context.Context) (_ *remotes, err error) {
	r := &remotes{ctx: ctx}
	defer func() {
		if err != nil {
			err = firstError(err, r.close(ctx))
		}
	}()
	address, err := r.startAgent(ctx)
	if err != nil {
		return nil, err
	}
	opts := []flowctl.Option{flowctl.WithInsecure(), flowctl.WithAPIKey(apiKey), flowctl.WithCheckTimeout(checkTimeout)}
	if r.client, err = flowctl.Dial(address, opts...); err != nil {
		return nil, err
	}
	if r.silent, err = flowctl.Dial(address, append(opts, flowctl.WithoutTelemetry())...); err != nil {
		return nil, err
	}
	r.conn, err = grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithPerRPCCredentials(key{}))
	if err != nil {
		return nil, err
	}
	r.bare = checkv1.NewFlowControlServiceClient(r.conn)
	if err := errors.Join(r.client.Ready(ctx), r.silent.Ready(ctx)); err != nil {
		return nil, err
	}
	r.dead, err = openBreaker(ctx)
	return r, err
}

// startAgent starts this program again, as the agent.
func (r *remotes) startAgent(ctx context.Context) (address string, err error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	r.agent = exec.CommandContext(ctx, self, "-serve")
	r.agent.Env = append(os.Environ(), serveVariable+"=1")
	r.agent.Stderr = os.Stderr
	if r.stdin, err = r.agent.StdinPipe(); err != nil {
		return "", err
	}
	stdout, err := r.agent.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := r.agent.Start(); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	return strings.TrimSpace(line), err
}

// serveVariable makes a test binary serve too, because it has flags of its own.
const serveVariable = "HEADGATE_BENCH_SERVE"

// openBreaker makes a client whose agent does not answer, and waits until it no longer asks.
func openBreaker(ctx context.Context) (*flowctl.Client, error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	address := listener.Addr().String()
	if err := listener.Close(); err != nil { // so that connections to it are refused
		return nil, err
	}
	client, err := flowctl.Dial(address, flowctl.WithInsecure(), flowctl.WithAgentBreaker(flowctl.AgentBreaker{Span: time.Millisecond, Probe: time.Hour}))
	if err != nil {
		return nil, err
	}
	for range 1000 {
		flow := client.Start(ctx, rateLimited, flowctl.Params{})
		_, _ = flow.End(ctx)
		unreachable, ok := errors.AsType[*flowctl.UnreachableError](flow.Err())
		if ok && strings.Contains(unreachable.Cause().Error(), "did not answer lately") {
			return client, nil
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Millisecond):
		}
	}
	return nil, firstError(client.Close(ctx), errors.New("the agent breaker of a client without an agent does not open"))
}

func (r *remotes) close(ctx context.Context) error {
	errs := []error{r.client.Close(ctx), r.silent.Close(ctx), r.dead.Close(ctx)}
	if r.conn != nil {
		errs = append(errs, r.conn.Close())
	}
	if r.stdin != nil {
		errs = append(errs, r.stdin.Close())
	}
	if r.agent != nil && r.agent.Process != nil {
		errs = append(errs, r.agent.Wait())
	}
	return firstError(errs...)
}

// key is the API key as a bare client sends it.
type key struct{}

var _ credentials.PerRPCCredentials = key{}

func (key) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"x-api-key": apiKey}, nil
}

func (key) RequireTransportSecurity() bool { return false }

// The calls that a client without Headgate would make.
const (
	bareCheck    = "bare Check over gRPC"
	bareCheckEnd = "bare Check and FlowEnd over gRPC"
)

func (r *remotes) rows() []*benchtable.Row {
	like := func(bare string) []benchtable.Target {
		return []benchtable.Target{benchtable.AtMost(benchtable.InTime, bare, 1.1), benchtable.AtMost(benchtable.InParallel, bare, 1.1), benchtable.AtMost(benchtable.InAllocs, bare, 1.1)}
	}
	rows := []*benchtable.Row{
		{Name: "Guard over gRPC", Call: r.guard(r.client, rateLimited), Targets: like(bareCheck)},
		{Name: "Do over gRPC", Call: r.do(r.client, rateLimited), Targets: like(bareCheck)},
		{Name: "Do over gRPC, without telemetry", Call: r.do(r.silent, rateLimited), Targets: []benchtable.Target{
			benchtable.Beside(benchtable.InTime, bareCheck), benchtable.Beside(benchtable.InParallel, bareCheck), benchtable.Beside(benchtable.InAllocs, bareCheck),
		}},
		{Name: bareCheck, Call: r.check},
		{Name: "Do over gRPC, with a FlowEnd", Call: r.do(r.client, concurrency), Targets: like(bareCheckEnd)},
		{Name: bareCheckEnd, Call: r.checkEnd},
	}
	for _, row := range rows {
		row.InFlight = inFlight
	}
	return append(rows, &benchtable.Row{
		Name: "Do over gRPC, the agent breaker open", Call: r.failOpen, Targets: []benchtable.Target{benchtable.AtMost(benchtable.InTime, "", 1000)},
	})
}

func (r *remotes) failOpen() func() error {
	params := flowctl.Params{Labels: oneLabel()}
	return func() error { return headgate.Do(r.ctx, r.dead, rateLimited, params, workFlow) }
}

func (r *remotes) guard(client *flowctl.Client, controlPoint string) func() func() error {
	guarded := headgate.Guard(client, controlPoint, flowctl.Params{Labels: oneLabel(), OnUnreachable: flowctl.FailClosed}, workContext, nil)
	return func() func() error {
		return func() error { _, err := guarded(r.ctx); return err }
	}
}

func (r *remotes) do(client *flowctl.Client, controlPoint string) func() func() error {
	params := flowctl.Params{Labels: oneLabel(), OnUnreachable: flowctl.FailClosed}
	return func() func() error {
		return func() error { return headgate.Do(r.ctx, client, controlPoint, params, workFlow) }
	}
}

func (r *remotes) check() func() error {
	labels := oneLabel()
	return func() error {
		ctx, cancel := context.WithTimeout(r.ctx, checkTimeout)
		defer cancel()
		_, err := r.bare.Check(ctx, &checkv1.CheckRequest{ControlPoint: rateLimited, Labels: labels, ExpectEnd: true})
		return err
	}
}

func (r *remotes) checkEnd() func() error {
	labels := oneLabel()
	return func() error {
		ctx, cancel := context.WithTimeout(r.ctx, checkTimeout)
		defer cancel()
		response, err := r.bare.Check(ctx, &checkv1.CheckRequest{ControlPoint: concurrency, Labels: labels, ExpectEnd: true})
		if err != nil {
			return err
		}
		d := response.GetLimiterDecisions()[0]
		info := d.GetConcurrencyLimiterInfo()
		ended, err := r.bare.FlowEnd(ctx, &checkv1.FlowEndRequest{
			ControlPoint: concurrency,
			InflightRequests: []*checkv1.InflightRequestRef{{
				PolicyName: d.GetPolicyName(), PolicyHash: d.GetPolicyHash(), ComponentId: d.GetComponentId(),
				Label: info.GetLabel(), RequestId: info.GetRequestId(), Tokens: info.GetTokensInfo().GetConsumed(),
			}},
		})
		if err == nil && !ended.GetTokenReturnStatuses()[0].GetReturned() {
			return errors.New("the slot was not returned")
		}
		return err
	}
}
