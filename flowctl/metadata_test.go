package flowctl_test

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"path"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/headgate-go/headgate/agent"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// strangers are metadata that a proxy may pass on from a stranger, and how many values of them cannot travel.
var strangers = []struct {
	name string
	md   metadata.MD
	left int
}{
	{"none", nil, 0},
	{"a large value", metadata.Pairs("x-junk", strings.Repeat("j", 100_000)), 1},
	{"a large binary value", metadata.Pairs("x-junk-bin", strings.Repeat("\x00", 13_000)), 1},
	{"many keys", numberedMetadata(2_000), 1_591},
	{"many values", metadata.MD{"x-junk": make([]string, 2_000)}, 2_000},
	{"no ASCII", metadata.Pairs("x-name", "é"), 1},
	{"a control character", metadata.Pairs("x-name", "a\x01"), 1},
	{"a bad key", metadata.Pairs("bad key", "v", "", "v"), 2},
	{"upper case", metadata.MD{"X-Name": {"v"}}, 0},
	{"headers of a connection", metadata.Pairs("connection", "close", "transfer-encoding", "chunked", "upgrade", "h2c",
		"keep-alive", "1", "host", "a", "host", "b", "content-length", "7"), 7},
	{"headers of gRPC's own", metadata.Pairs(":path", "/x", "grpc-timeout", "1n", "te", "x", "content-type", "text/plain",
		"grpc-encoding", "snappy", "grpc-accept-encoding", "snappy", "grpc-status", "7", "user-agent", "x"), 0},
}

func numberedMetadata(n int) metadata.MD {
	md := make(metadata.MD, n)
	for i := range n {
		md.Set(fmt.Sprintf("k%04d", i), "val")
	}
	return md
}

// Whatever metadata the caller's context has, the agent decides, ends flows and keeps values.
func TestStrangersMetadata(t *testing.T) {
	for _, tt := range strangers {
		t.Run(tt.name, func(t *testing.T) {
			var logged bytes.Buffer
			sides.Setup{
				Policies: sides.Policies(
					policy.RateLimiter{Selectors: policy.At("closed"), Capacity: 0, Interval: time.Hour},
					policy.ConcurrencyLimiter{Selectors: policy.At("slots"), Max: 5, MaxInflight: time.Hour}),
				Options: []flowctl.Option{flowctl.WithCheckTimeout(time.Minute), logTo(&logged)},
			}.Over(t, sides.Engines, func(t *testing.T, side *sides.Side) {
				logged.Reset()
				ctx := metadata.NewOutgoingContext(t.Context(), tt.md)
				if got := side.Client.Start(ctx, "closed", flowctl.Params{}); got.Decision() != flowctl.Rejected {
					t.Errorf("a flow that no limit lets in is %s: %v", got.Decision(), got.Err())
				}
				flow := side.Client.Start(ctx, "slots", flowctl.Params{ResultCacheKey: "key"})
				if err := flow.SetResultCache(ctx, []byte("v"), time.Hour); err != nil {
					t.Errorf("SetResultCache() = %v", err)
				}
				if got, err := flow.End(ctx); err != nil || got.Returned != 1 {
					t.Errorf("End() = %+v, %v", got, err)
				}
				want := ""
				if tt.left > 0 && side.Kind == sides.Served {
					want = fmt.Sprintf("left_out=%d", tt.left)
				}
				if got := logged.String(); !strings.Contains(got, want) || want == "" && got != "" || strings.Count(got, "\n") > 1 {
					t.Errorf("the log has %q want %q, once", got, want)
				}
			})
		})
	}
}

// What can travel does, although other metadata cannot. Of many keys the largest stay behind, which are the test's own.
func TestMetadataBesidesStrangers(t *testing.T) {
	for _, tt := range strangers {
		if tt.name == "many keys" {
			continue
		}
		t.Run(tt.name, func(t *testing.T) {
			script := flowtest.NewAgent(t)
			ctx := metadata.AppendToOutgoingContext(metadata.NewOutgoingContext(t.Context(), tt.md), "traceparent", "00-1-2-3", "Traceparent", "4")
			script.Client(flowctl.WithCheckTimeout(time.Minute)).Start(ctx, "point", flowctl.Params{})
			if got := script.Checks()[0].Metadata.Get("traceparent"); len(got) != 2 || got[0] != "00-1-2-3" || got[1] != "4" {
				t.Errorf("metadata traceparent = %q", got)
			}
		})
	}
}

// Another key in the caller's metadata, the upstream's or a stranger's, neither takes the place of the client's nor goes
// to the agent.
func TestStrangersAPIKey(t *testing.T) {
	for _, tt := range []struct {
		name string
		md   metadata.MD
	}{
		{"another", metadata.Pairs("x-api-key", "open")},
		{"empty", metadata.Pairs("x-api-key", "")},
		{"upper case", metadata.MD{"X-Api-Key": {"open"}}},
		{"many", metadata.MD{"x-api-key": make([]string, 100)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e, err := engine.New(sides.Policies(
				policy.RateLimiter{Selectors: policy.At("closed"), Capacity: 0, Interval: time.Hour},
				policy.ConcurrencyLimiter{Selectors: policy.At("slots"), Max: 5, MaxInflight: time.Hour}))
			if err != nil {
				t.Fatal(err)
			}
			defer e.Close()
			var sent [][]string
			server := grpc.NewServer(append(
				agent.ServerOptions(agent.WithKeys(func(key string) (string, bool) { return "shop", key == "sesame" })),
				grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
					sent = append(sent, metadata.ValueFromIncomingContext(ctx, "x-api-key"))
					return handle(ctx, req)
				}))...)
			agent.Register(server, e)
			client := sides.Dial(t, server, flowctl.WithAPIKey("sesame"), flowctl.WithCheckTimeout(time.Minute), flowctl.WithoutTelemetry())
			ctx := metadata.NewOutgoingContext(t.Context(), tt.md)
			if got := client.Start(ctx, "closed", flowctl.Params{}); got.Decision() != flowctl.Rejected {
				t.Errorf("a flow that no limit lets in is %s: %v", got.Decision(), got.Err())
			}
			if got, err := client.Start(ctx, "slots", flowctl.Params{}).End(ctx); err != nil || got.Returned != 1 {
				t.Errorf("End() = %+v, %v", got, err)
			}
			if got := fmt.Sprint(sent); got != "[[sesame] [sesame] [sesame]]" {
				t.Errorf("the keys %s were sent", got)
			}
		})
	}
}

// Checks have the content type of gRPC's own clients, which every server and proxy knows.
func TestContentType(t *testing.T) {
	e, err := engine.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	var sent []string
	server := grpc.NewServer(append(agent.ServerOptions(),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			sent = append(sent, fmt.Sprint(path.Base(info.FullMethod), metadata.ValueFromIncomingContext(ctx, "content-type")))
			return handle(ctx, req)
		}))...)
	agent.Register(server, e)
	client := sides.Dial(t, server, flowctl.WithCheckTimeout(time.Minute), flowctl.WithoutTelemetry())
	http := &flowctl.HTTPRequest{Method: "GET", Path: "/", Source: netip.MustParseAddrPort("192.0.2.1:1")}
	for _, params := range []flowctl.Params{{}, {HTTP: http}} {
		if got := client.Start(t.Context(), "point", params); got.Decision() != flowctl.Accepted {
			t.Errorf("%s: %v", got.Decision(), got.Err())
		}
	}
	if got := fmt.Sprint(sent); got != "[Check[application/grpc] CheckHTTP[application/grpc]]" {
		t.Errorf("the content types %s were sent", got)
	}
}
