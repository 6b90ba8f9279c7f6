package flowctl_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/gzip" // as a process that imports package agent has it
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/testing/hostile"
	"github.com/headgate-go/headgate/internal/testing/rawtls"
)

func dialHostile(t *testing.T, a hostile.Agent, opts ...flowctl.Option) (*flowctl.Client, *hostile.Server) {
	t.Helper()
	s := hostile.Serve(t, a)
	security := flowctl.WithInsecure()
	if a.Secure {
		security = flowctl.WithTLSConfig(rawtls.ClientConfig())
	}
	client, err := flowctl.Dial(s.Address, append([]flowctl.Option{security}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Second)
		defer cancel()
		_ = client.Close(ctx)
	})
	return client, s
}

// Whatever an agent does to the connection or answers: flows are decided, and a client closes when its context ends. What
// it costs is measured by the suite of attacks.
func TestHostileAgents(t *testing.T) {
	for _, a := range hostile.Agents() {
		t.Run(a.Name, func(t *testing.T) {
			t.Parallel()
			client, _ := dialHostile(t, a, flowctl.WithCheckTimeout(20*time.Millisecond))
			for _, params := range []flowctl.Params{
				{},
				{ResultCacheKey: "r"},
				{HTTP: &flowctl.HTTPRequest{Method: "GET", Path: "/", Source: netip.MustParseAddrPort("192.0.2.1:1")}},
			} {
				var flows sync.WaitGroup
				for range 4 {
					flows.Go(func() {
						flow := client.Start(t.Context(), "point", params)
						switch flow.Decision() {
						case flowctl.Unreachable, flowctl.Accepted, flowctl.Rejected:
						default:
							t.Errorf("%v, %v", flow, flow.Err())
						}
						if err := flow.Err(); err != nil && len(err.Error()) > 2048 {
							t.Errorf("an error of %d bytes: %.100s…", len(err.Error()), err)
						}
						_, _ = flow.End(t.Context())
					})
				}
				flows.Wait()
			}
		})
	}
}

func agentNamed(t *testing.T, name string) hostile.Agent {
	t.Helper()
	for _, a := range hostile.Agents() {
		if a.Name == name {
			return a
		}
	}
	t.Fatalf("there is no agent that %s", name)
	return hostile.Agent{}
}

// An agent that took the connection and reads nothing more kept Close for five seconds, whatever its context.
func TestCloseOfAnAgentThatReadsNothing(t *testing.T) {
	a := agentNamed(t, "reads nothing after the settings")
	for _, tt := range []struct {
		name    string
		timeout time.Duration
		want    time.Duration
	}{
		{"in time", 100 * time.Millisecond, 110 * time.Millisecond}, // with what is allowed for closing
		{"at once", 0, 10 * time.Millisecond},
		{"the time is enough", time.Minute, 15 * time.Second}, // gRPC's own limit, and that of telemetry
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, err := flowctl.Dial("passthrough:///localhost", flowctl.WithInsecure(), flowctl.WithDialOptions(
					grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
						near, far := net.Pipe()
						go func() {
							defer far.Close()
							a.Serve(t.Context(), far)
						}()
						return near, nil
					})))
				if err != nil {
					t.Fatal(err)
				}
				_, _ = client.Start(t.Context(), "point", flowctl.Params{}).End(t.Context())
				ctx, cancel := context.WithTimeout(t.Context(), tt.timeout)
				defer cancel()
				begin := time.Now()
				if err := client.Close(ctx); !errors.Is(err, ctx.Err()) {
					t.Errorf("Close() = %v want %v", err, ctx.Err())
				}
				if took := time.Since(begin); took > tt.want {
					t.Errorf("Close() took %v want at most %v", took, tt.want)
				}
			})
		})
	}
}

// An agent, or a proxy before it, that accepted connections and ended them had the client open thousands a second, and
// the breaker stayed closed.
func TestConnectionsAreSpaced(t *testing.T) {
	for _, a := range hostile.Agents() {
		if !strings.HasPrefix(a.Name, "goes away") && a.Name != "accepts and closes" && a.Name != "resets after the settings" && a.Name != "speaks HTTP/1" {
			continue
		}
		t.Run(a.Name, func(t *testing.T) {
			t.Parallel()
			var log lockedBuffer
			client, server := dialHostile(t, a, flowctl.WithCheckTimeout(50*time.Millisecond), flowctl.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
			begin := time.Now()
			silent := func() bool { return strings.Contains(log.String(), "the agent does not answer") }
			answers := a.Name == "goes away with each answer"
			pace := time.NewTicker(time.Millisecond)
			defer pace.Stop()
			for time.Since(begin) < time.Second || !answers && !silent() && time.Since(begin) < time.Minute {
				_, _ = client.Start(t.Context(), "point", flowctl.Params{}).End(t.Context())
				<-pace.C
			}
			if !answers && !silent() {
				t.Errorf("the breaker stayed closed:\n%s", log.String())
			}
			if n, most := server.Connections(), 4+int64(3*time.Since(begin)/time.Second); n > most {
				t.Errorf("%d connections in %v want at most %d", n, time.Since(begin), most)
			}
		})
	}
}

// A connection that brings nothing but connections' own frames is ended.
func TestFloodedConnectionsEnd(t *testing.T) {
	for _, a := range hostile.Agents() {
		if !strings.HasPrefix(a.Name, "floods") {
			continue
		}
		t.Run(a.Name, func(t *testing.T) {
			client, server := dialHostile(t, a, flowctl.WithCheckTimeout(50*time.Millisecond))
			pace := time.NewTicker(time.Millisecond)
			defer pace.Stop()
			for begin := time.Now(); server.Connections() < 2; {
				_, _ = client.Start(t.Context(), "point", flowctl.Params{}).End(t.Context())
				<-pace.C
				if time.Since(begin) > 2*time.Minute {
					t.Fatal("the connection goes on")
				}
			}
		})
	}
}

// An answer that was small on the wire had hundreds of megabytes in memory, and was decoded after its check's time.
func TestAnswersAreBounded(t *testing.T) {
	decisions := func(n int) []byte { return bytes.Repeat([]byte{0x62, 3, 0x0a, 1, 'p'}, n) }
	empty := func(n int) []byte { return bytes.Repeat([]byte{0x62, 0}, n) }
	encoded := func(m proto.Message) []byte {
		data, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	labelled := func(values int) proto.Message {
		return &checkv1.CheckResponse{TelemetryFlowLabels: map[string]string{"large": strings.Repeat("v", values)}}
	}
	for _, tt := range []struct {
		name   string
		agent  hostile.Agent
		params flowctl.Params
		want   flowctl.Decision
		why    string
	}{
		{name: "as many elements as may be", agent: hostile.Answering(decisions(4096)), want: flowctl.Accepted},
		{name: "one more", agent: hostile.Answering(decisions(4097)), want: flowctl.Unreachable, why: "more than 4096 elements"},
		{name: "as many to a check of caches", agent: hostile.Answering(decisions(1 << 20)), params: flowctl.Params{ResultCacheKey: "r"}, want: flowctl.Unreachable, why: "more than 4096 elements"},
		{name: "as many empty elements as may be", agent: hostile.Answering(empty(1024)), want: flowctl.Accepted},
		{name: "one more that is empty", agent: hostile.Answering(empty(1025)), want: flowctl.Unreachable, why: "most of which are empty"},
		{name: "8 KiB of empty elements", agent: hostile.Answering(empty(4050)), want: flowctl.Unreachable, why: "most of which are empty"},
		{name: "as many unknown fields as may be", agent: hostile.Answering(bytes.Repeat([]byte{0xf8, 0x7f, 0}, 1024)), want: flowctl.Accepted},
		{name: "one more unknown field", agent: hostile.Answering(bytes.Repeat([]byte{0xf8, 0x7f, 0}, 1025)), want: flowctl.Unreachable, why: "more than 1024 unknown fields"},
		{name: "many entries", agent: hostile.Answering(bytes.Repeat([]byte{0x3a, 0}, 4097)), want: flowctl.Unreachable, why: "most of which are empty"},
		{name: "200 KiB", agent: hostile.Answering(encoded(labelled(200 << 10))), want: flowctl.Accepted},
		{name: "300 KiB", agent: hostile.Answering(encoded(labelled(300 << 10))), want: flowctl.Unreachable, why: "larger than max"},
		{
			name: "300 KiB that repeat the question", agent: hostile.Answering(encoded(labelled(300 << 10))),
			params: flowctl.Params{Labels: map[string]string{
				"1": strings.Repeat("v", 4096), "2": strings.Repeat("v", 4096), "3": strings.Repeat("v", 4096),
				"4": strings.Repeat("v", 4096), "5": strings.Repeat("v", 4096), "6": strings.Repeat("v", 4096),
			}}, want: flowctl.Accepted,
		},
		{name: "300 KiB to a check of caches", agent: hostile.Answering(encoded(labelled(300 << 10))), params: flowctl.Params{ResultCacheKey: "r"}, want: flowctl.Accepted},
		{name: "17 MiB to a check of caches", agent: hostile.Answering(make([]byte, 17<<20)), params: flowctl.Params{ResultCacheKey: "r"}, want: flowctl.Unreachable, why: "larger than max"},
		{name: "gzip that was not asked for", agent: hostile.Gzipped(encoded(labelled(10))), want: flowctl.Unreachable, why: "had not asked for that"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			client, _ := dialHostile(t, tt.agent, flowctl.WithCheckTimeout(time.Minute))
			flow := client.Start(t.Context(), "point", tt.params)
			if flow.Decision() != tt.want || tt.why != "" && !strings.Contains(inFull(flow.Err()), tt.why) {
				t.Errorf("%v, %s want %v for %q", flow, inFull(flow.Err()), tt.want, tt.why)
			}
		})
	}
}

// The decision of an agent is small in memory, however it is encoded.
func TestBombsCostLittle(t *testing.T) {
	bomb := hostile.Gzipped(bytes.Repeat([]byte{0x62, 0}, 8<<20-64))
	client, _ := dialHostile(t, bomb, flowctl.WithCheckTimeout(time.Minute))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 8 {
		_, _ = client.Start(t.Context(), "point", flowctl.Params{ResultCacheKey: "r"}).End(t.Context())
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 32<<20 {
		t.Errorf("8 answers took %d MiB", n>>20)
	}
}

// A client that compresses its questions takes answers that are compressed.
func TestCompressionThatWasAskedFor(t *testing.T) {
	if encoding.GetCompressor("gzip") == nil {
		t.Fatal("there is no compressor")
	}
	agent := flowtest.NewAgent(t) // which answers as it is asked
	agent.Answer(flowtest.Answer{Reason: flowctl.ReasonRateLimited})
	client := agent.Client(flowctl.WithCheckTimeout(time.Minute), flowctl.WithDialOptions(grpc.WithDefaultCallOptions(grpc.UseCompressor("gzip"))))
	if flow := client.Start(t.Context(), "point", flowctl.Params{}); flow.Decision() != flowctl.Rejected {
		t.Errorf("%v, %v want rejected", flow, flow.Err())
	}
}

// An agent that answered nothing may have admitted the flow all the same. So a check is made once, whatever a service
// config says. A check that the agent certainly did not process is made twice, which is gRPC's.
func TestChecksAreNotRetried(t *testing.T) {
	const retries = `{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.001s",
		"maxBackoff": "0.001s", "backoffMultiplier": 1, "retryableStatusCodes": ["UNAVAILABLE"]}}]}`
	agent := flowtest.NewAgent(t)
	agent.Answer(flowtest.Answer{Fail: status.Error(codes.Unavailable, "no")})
	client := agent.Client(flowctl.WithCheckTimeout(time.Minute), flowctl.WithDialOptions(grpc.WithDefaultServiceConfig(retries)))
	if flow := client.Start(t.Context(), "point", flowctl.Params{}); flow.Decision() != flowctl.Unreachable {
		t.Errorf("%v want unreachable", flow)
	}
	if n := len(agent.Checks()); n != 1 {
		t.Errorf("%d checks want 1", n)
	}
}

// inFull is the text of an error with what it has for the program's own logs; "" for nil.
func inFull(err error) string {
	if err == nil {
		return ""
	}
	text := err.Error()
	if c, ok := errors.AsType[interface {
		error
		Cause() error
	}](err); ok {
		text += ": " + c.Cause().Error()
	}
	if r, ok := errors.AsType[*flowctl.RejectedError](err); ok {
		text += ": " + r.Policy()
	}
	return text
}

// A peer's text is kept up to a length, wherever it is kept.
func TestTextsOfPeersAreClipped(t *testing.T) {
	const most = 1<<10 + 200 // and what we say
	long := strings.Repeat("ä", 10<<10)
	short := func(what string, err error) {
		t.Helper()
		if err == nil {
			t.Errorf("%s: no error", what)
			return
		}
		if text := inFull(err); len(text) > most || !utf8.ValidString(text) || !strings.Contains(text, "ää") {
			t.Errorf("%s: %d bytes, %.300q…", what, len(text), text)
		}
	}
	t.Run("statuses", func(t *testing.T) {
		var log lockedBuffer
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{Slots: 1}, flowtest.Answer{Fail: status.Error(codes.Unavailable, long)})
		agent.AnswerEnds(flowtest.Answer{Fail: status.Error(codes.Internal, long)})
		agent.AnswerSpans(flowtest.Answer{Fail: status.Error(codes.Internal, long)})
		client := agent.Client(flowctl.WithCheckTimeout(time.Minute), flowctl.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
		flow := client.Start(t.Context(), "point", flowctl.Params{})
		_, err := flow.End(t.Context())
		short("End", err)
		short("Start", client.Start(t.Context(), "point", flowctl.Params{}).Err())
		short("Close", client.Close(t.Context()))
		for line := range strings.SplitSeq(log.String(), "\n") {
			if len(line) > most+200 {
				t.Errorf("log: %d bytes, %.80q…", len(line), line)
			}
		}
	})
	t.Run("a status of a mebibyte", func(t *testing.T) {
		client, _ := dialHostile(t, hostile.Text("16", strings.Repeat("ä", 1<<19)), flowctl.WithCheckTimeout(time.Minute))
		if text := inFull(client.Start(t.Context(), "point", flowctl.Params{}).Err()); len(text) > most {
			t.Errorf("%d bytes, %.80q…", len(text), text)
		}
	})
	t.Run("Ready", func(t *testing.T) {
		client, _ := dialHostile(t, hostile.Text("16", long))
		short("Ready", client.Ready(t.Context()))
	})
	t.Run("caches", func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{Response: &checkv1.CheckResponse{CacheLookupResponse: &checkv1.CacheLookupResponse{
			ResultCacheResponse: &checkv1.KeyLookupResponse{OperationStatus: checkv1.CacheOperationStatus_ERROR, Error: long},
		}}})
		_, _, err := agent.Client(flowctl.WithCheckTimeout(time.Minute)).Start(t.Context(), "point", flowctl.Params{ResultCacheKey: "r"}).ResultCache()
		short("ResultCache", err)
	})
	t.Run("names", func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{Response: &checkv1.CheckResponse{
			DecisionType: checkv1.CheckResponse_DECISION_TYPE_REJECTED,
			LimiterDecisions: []*checkv1.LimiterDecision{{
				PolicyName: long, ComponentId: "c", Dropped: true,
			}},
		}})
		short("Start", agent.Client(flowctl.WithCheckTimeout(time.Minute)).Start(t.Context(), "point", flowctl.Params{}).Err())
	})
	t.Run("denied requests", func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{HTTPResponse: &checkhttpv1.CheckHTTPResponse{
			Status: &rpcstatus.Status{Code: int32(codes.Unavailable)},
			HttpResponse: &checkhttpv1.CheckHTTPResponse_DeniedResponse{DeniedResponse: &checkhttpv1.DeniedHttpResponse{
				Headers: map[string]string{"reason": long, long: "x"}, Body: long,
			}},
		}})
		flow := agent.Client(flowctl.WithCheckTimeout(time.Minute)).Start(t.Context(), "point", flowctl.Params{HTTP: &flowctl.HTTPRequest{Method: "GET"}})
		answer, ok := flow.HTTPAnswer()
		if !ok || len(answer.Body) > 1<<10 || len(answer.Header["reason"]) > 1<<10 || len(answer.Header) != 1 || !utf8.ValidString(answer.Body) {
			t.Errorf("a body of %d bytes, %d headers, one of %d bytes", len(answer.Body), len(answer.Header), len(answer.Header["reason"]))
		}
	})
}
