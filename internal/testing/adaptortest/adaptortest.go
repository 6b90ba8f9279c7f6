// Package adaptortest tests what all adaptors promise. The tests of an adaptor call it:
//
//	func TestPeers(t *testing.T) { adaptortest.Server{Serve: serve, Tenant: "tenant"}.Test(t) }
package adaptortest

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"go.opentelemetry.io/otel/baggage"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// ControlPoint is where the calls of a [Server] are to be flows.
const ControlPoint = "point"

// A Server is an adaptor for calls that come in.
type Server struct {
	// Serve serves one call whose headers "baggage" have these values, and whose header or metadata "x-tenant" is "acme".
	// The adaptor is to make the latter a label. Serve reports whether the call was handled.
	Serve func(ctx context.Context, client *flowctl.Client, baggage []string) bool

	// Tenant is the label that "x-tenant" becomes.
	Tenant string
}

// Test tests the server with engines in this process and across the network.
func (s Server) Test(t *testing.T) {
	t.Run("junk hides no label", s.junk)
	t.Run("the application's baggage stays", s.applicationsBaggage)
}

// limiting has a limiter that lets one call pass for each value of a label.
func limiting(by string, opts ...flowctl.Option) sides.Setup {
	return sides.Setup{
		Policies: sides.Policies(policy.RateLimiter{
			Selectors: policy.At(ControlPoint), Capacity: 1, Fill: 1, Interval: time.Hour, LimitBy: by,
		}),
		Options: append(opts, flowctl.WithCheckTimeout(time.Minute)),
	}
}

// junk tests that the label that a limiter goes by is found, whatever baggage a stranger sends: the member that a
// gateway adds, and the header or metadata that the service itself lists. A "#" in a header is the number of the call.
func (s Server) junk(t *testing.T) {
	for _, tt := range []struct {
		name    string
		headers []string
	}{
		{"no junk", []string{"tenant=acme"}},
		{"63 members", []string{members(63) + ",tenant=acme"}},
		{"64 members", []string{members(64) + ",tenant=acme"}},
		{"1000 members", []string{members(1000) + ",tenant=acme"}},
		{"8 KiB", []string{"a=" + strings.Repeat("1", 8192) + ",tenant=acme"}},
		{"another header", []string{members(3), "tenant=acme"}},
		{"two headers of junk", []string{members(64), members(64) + ",tenant=acme"}},
		{"the stranger's own member", []string{"tenant=other#," + members(64) + ",tenant=acme"}},
		{"the stranger's own member before", []string{"tenant=other#,tenant=acme"}},
		{"an escaped key", []string{"tenant=acme,%74enant=other#"}},
		{"an escaped key in a long header", []string{"tenant=acme,%74enant=other#," + members(64)}},
		{"what is no member", []string{`tenant=acme,tenant="other#,tenant=other #,tenant=other#%,tenant=other#;"`}},
		{"what is no member in a long header", []string{members(64) + `,tenant=acme,tenant="other#,tenant=other #,tenant=other#%,tenant=other#;"`}},
		{"escapes that grow", []string{"a=" + strings.Repeat("%ff", 2000) + ",tenant=acme"}},
	} {
		for _, by := range []string{"tenant", s.Tenant} {
			for _, listed := range []bool{true, false} {
				withBaggage := flowctl.WithBaggage()
				if listed {
					withBaggage = flowctl.WithBaggage("tenant")
				}
				t.Run(fmt.Sprintf("%s by %s, listed %t", tt.name, by, listed), func(t *testing.T) {
					limiting(by, withBaggage).Over(t, sides.Engines, func(t *testing.T, side *sides.Side) {
						first := s.Serve(t.Context(), side.Client, numbered(tt.headers, "1"))
						if second := s.Serve(t.Context(), side.Client, numbered(tt.headers, "2")); !first || second {
							t.Errorf("two calls were handled: %t, %t; want one call of the tenant", first, second)
						}
					})
				})
			}
		}
	}
}

func numbered(headers []string, call string) []string {
	all := make([]string, len(headers))
	for i, header := range headers {
		all[i] = strings.ReplaceAll(header, "#", call)
	}
	return all
}

// members returns n members of baggage.
func members(n int) string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprintf("a%d=1", i)
	}
	return strings.Join(all, ",")
}

// applicationsBaggage tests that what the application has put into the context's baggage by itself stays, whatever a
// header says.
func (s Server) applicationsBaggage(t *testing.T) {
	bag, err := baggage.Parse("tenant=acme")
	if err != nil {
		t.Fatal(err)
	}
	limiting("tenant", flowctl.WithBaggage("tenant")).Over(t, sides.Engines, func(t *testing.T, side *sides.Side) {
		ctx := baggage.ContextWithBaggage(t.Context(), bag)
		for i, want := range []bool{true, false} {
			if got := s.Serve(ctx, side.Client, []string{fmt.Sprintf("%s,tenant=t%d", members(64), i)}); got != want {
				t.Errorf("call %d was handled: %t want %t", i, got, want)
			}
		}
	})
}
