//go:build linux

package attack_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/attack"
	"github.com/headgate-go/headgate/internal/testing/rawtls"
)

// An assault attacks the server at the address until ctx ends. It closes what it has opened before it returns.
type assault func(ctx context.Context, t *testing.T, address string)

// The bounds of a server under attack.
type bounds struct {
	memory     int     // MiB, at the peak
	slower     float64 // times the innocent client's calls may take as long as before, at the 99th percentile
	unanswered float64 // the share of the innocent client's calls that may fail

	timely bool // a call that takes longer than a client waits by default has failed
}

// standard are the bounds for what a peer with a key may do.
var standard = bounds{memory: 1024, slower: 10, unanswered: 0.02}

// keyless are the bounds for what a peer without a key may do: 64 connections, with 1 MiB each.
var keyless = bounds{memory: 64 + base, slower: 10, unanswered: 0.02}

// timely returns bounds by which a call fails that a client would not have waited for. A client waits for 200 ms by default.
func timely(b bounds) bounds {
	b.timely = true
	return b
}

// base is the memory of a server that is not attacked, in MiB, with the innocent client's.
const base = 48

// innocentKey is the innocent client's API key, at victims that want one.
const innocentKey = "innocent"

const (
	floor    = 20 * time.Millisecond // times below are the machine's
	recovery = 5 * time.Second       // after an attack
)

func TestServers(t *testing.T) {
	length := length(t)
	program := build(t)
	machine := start(t, program, "machine")
	defer machine.stop(t)
	machine.read(t, new(attack.Stats))
	type row struct {
		name   string
		victim string   // agent, http or grpc
		args   []string // of the victim, before its name
		attack assault
		bounds bounds
		alone  bool // a victim of its own, because the bound of its memory is its own
	}
	keyed := []string{"-key", innocentKey}
	secure := []string{"-key", innocentKey, "-tls"}
	rows := []row{
		{"garbage", "agent", nil, garbage, standard, false},
		{"garbage", "http", nil, garbage, standard, false},
		{"garbage", "grpc", nil, garbage, standard, false},
		{"idle connections", "agent", nil, idle, standard, false},
		{"idle connections", "http", nil, idle, standard, false},
		{"idle connections", "grpc", nil, idle, standard, false},
		{"resets", "agent", nil, resets(methodCheck), standard, false},
		{"resets", "grpc", nil, resets(methodHealth), standard, false},
		{"slow bodies", "agent", nil, slowBodies(methodCheck, methodHTTP), standard, false},
		{"calls without messages", "agent", nil, openCalls(methodCheck), standard, false},
		{"slow messages", "agent", nil, slowMessages(methodCheck), standard, false},
		{"slow bodies", "grpc", nil, slowBodies(methodHealth), standard, false},
		{"slow headers and bodies", "http", nil, slowHeaders, standard, false},
		{"large bodies", "agent", nil, largeBodies(methodCheck), standard, false},
		{"large bodies", "grpc", nil, largeBodies(methodHealth), standard, false},
		{"header floods", "agent", nil, headerFlood(methodCheck), standard, false},
		{"header floods", "grpc", nil, headerFlood(methodHealth), standard, false},
		{"header floods", "http", nil, headersOverHTTP, standard, false},
		{"metadata", "agent", nil, metadataFlood(methodCheck), standard, false},
		{"metadata", "grpc", nil, metadataFlood(methodHealth), standard, false},
		{"connections", "agent", nil, connections, standard, false},
		{"connections", "grpc", nil, connections, standard, false},
		{"checks with cache keys that wait", "agent", []string{"-policies", "victim/waiters.yaml"}, waiters("queue", 1000), timely(bounds{memory: 256, slower: 10, unanswered: 0.02}), true},
		{"connections", "http", nil, connections, standard, false},
		{"answers that are not read", "agent", nil, unread, standard, false},
		{name: "answers of all kinds that are not read", victim: "agent", attack: unreadAnswers(400*time.Millisecond, unreadCalls()...), bounds: bounds{memory: 600, slower: 10, unanswered: 0.02}, alone: true},
		{"labels that are not read", "agent", nil, unreadLabels, standard, false},
		{"reflection that is not read", "agent", nil, unreadReflection, standard, false},
		{"messages of sessions", "agent", nil, sessions(12 << 10), standard, false},
		{"messages of sessions in small frames", "agent", nil, sessions(1), standard, false},
		{"data in frames of a byte", "agent", nil, storms(8, crumbs, crumbsInSessions(), dataOf(1)), timely(standard), false},
		{name: "returns in sessions", victim: "agent", attack: returns, bounds: bounds{memory: 320, slower: 10, unanswered: 0.02}, alone: true},
		{"zeros", "agent", nil, zeros(methodCheck), standard, false},
		{"a barrage of bombs", "agent", nil, barrage(request{methodCheck, append(field(1, []byte("point")), sameLabel()...)}, request{methodCheck, make([]byte, 64<<20)}), timely(standard), false},
		{"a barrage of bombs of reflection", "agent", nil, barrage(request{reflectionv1.ServerReflection_ServerReflectionInfo_FullMethodName, field(1, make([]byte, largest))}), timely(standard), false},
		{"zeros", "grpc", nil, zeros(methodHealth), standard, false},
		{"slots without a key", "agent", keyed, bomb(10*time.Millisecond, request{flowService + "FlowEnd", bytes.Repeat([]byte{0x12, 0}, largest/2)}), keyless, false},
		{"watches without a key", "agent", keyed, bomb(pauseOfBombs, request{methodWatch, field(1, make([]byte, largest))}), keyless, false},
		{"health checks without a key", "agent", keyed, bomb(pauseOfBombs, request{methodHealth, field(1, make([]byte, largest))}), keyless, false},
		{"large health checks without a key", "agent", keyed, largeBodies(methodHealth), keyless, false},
		{"metadata without a key", "agent", keyed, metadataFlood(methodCheck), keyless, false},
		{"slow bodies without a key", "agent", keyed, slowBodies(methodCheck, methodHealth, methodWatch), keyless, false},
		{"resets without a key", "agent", keyed, resets(methodCheck), keyless, false},
		{"frames that mean nothing, without a key", "agent", keyed, storms(8, priorities(), continuations, acknowledgements(), updates()), timely(keyless), false},
		{"calls and frames that are refused, without a key", "agent", keyed, storms(6, refusals(header(methodCheck)...), refusals(":method", "GET"), manySettings(), dataOf(1), dataOf(1024)), timely(keyless), false},
		{"calls that are refused with a long text, without a key", "agent", keyed, echoes, timely(keyless), false},
		{"idle connections without a key", "agent", keyed, idle, bounds{memory: 64 + base, slower: 10, unanswered: 0.02}, false},
	}
	for name, attack := range attacksOnTLS(t) {
		rows = append(rows, row{name + ", without a key", "agent", secure, attack, timely(keyless), false})
	}
	for name, attack := range bombs() {
		rows = append(rows, row{name, "agent", nil, attack, standard, false})
	}
	slices.SortStableFunc(rows, func(a, b row) int {
		alone := 0
		switch {
		case a.alone && !b.alone:
			alone = 1
		case b.alone && !a.alone:
			alone = -1
		}
		return cmp.Or(cmp.Compare(a.victim, b.victim), cmp.Compare(len(a.args), len(b.args)), alone)
	})
	// The attacks on one victim follow each other.
	var v *victim
	var address string
	var call func(ctx context.Context) error
	done := func() {}
	var before calls
	var goroutines int
	for i, tt := range rows {
		if i == 0 || tt.alone || rows[i-1].alone || tt.victim != rows[i-1].victim || len(tt.args) != len(rows[i-1].args) {
			done()
			if v != nil {
				v.stop(t)
			}
			v = start(t, program, append(slices.Clone(tt.args), tt.victim)...)
			var first attack.Stats
			v.read(t, &first)
			address = first.Address
			call, done = innocent(t, tt.victim, address, slices.Contains(tt.args, "-tls"))
			machine.stats(t)
			before = measure(t.Context(), call, min(length, 2*time.Second))
			goroutines = v.stats(t).Goroutines
		}
		t.Run(tt.victim+" "+tt.name, func(t *testing.T) {
			machine.stats(t)
			worked := v.processor(t)
			ctx, cancel := context.WithTimeout(t.Context(), length)
			defer cancel()
			var attacking sync.WaitGroup
			attacking.Go(func() { tt.attack(ctx, t, address) })
			during := measure(ctx, call, length)
			if tt.bounds.timely {
				during = during.within(attack.CheckTimeout)
			}
			attacking.Wait()
			processor := v.processor(t) - worked
			slack := starvations * machine.stats(t).Starved

			// The innocent client's calls, and the goroutines, are as before soon.
			var after calls
			var left int
			for end := time.Now().Add(recovery); ; {
				after, left = measure(t.Context(), call, min(length/10, 500*time.Millisecond)), v.stats(t).Goroutines
				slow := length >= holdsTimes && after.p99() > max(2*before.p99(), floor)+slack
				if !slow && after.failed == 0 && left <= goroutines {
					break
				}
				if time.Now().After(end) {
					t.Errorf("%v after the attack: calls take %v (before: %v), %d fail; %d goroutines (before: %d)",
						recovery, after.p99(), before.p99(), after.failed, left, goroutines)
					break
				}
			}
			peak := v.peak(t)
			t.Logf("peak %d MiB; %.2f of a core; an innocent client: p99 %v before, %v while it lasts, %v after; %.1f %% of %d calls failed; goroutines %d before, %d after; slack %v",
				peak, processor.Seconds()/length.Seconds(), before.p99(), during.p99(), after.p99(), 100*during.share(), len(during.took)+during.failed, goroutines, left, slack)
			if peak > tt.bounds.memory {
				t.Errorf("peak %d MiB want at most %d", peak, tt.bounds.memory)
			}
			if most := max(time.Duration(tt.bounds.slower*float64(before.p99())), floor) + slack; length >= holdsTimes && during.p99() > most {
				t.Errorf("calls take %v at the 99th percentile, %v before, want at most %v", during.p99(), before.p99(), most)
			}
			if during.share() > tt.bounds.unanswered {
				t.Errorf("%.1f %% of the calls failed want at most %.1f %%", 100*during.share(), 100*tt.bounds.unanswered)
			}
			if len(before.took) == 0 || len(during.took) == 0 {
				t.Error("the innocent client was not answered at all")
			}
		})
	}
	done()
	v.stop(t)
}

// calls are an innocent client's.
type calls struct {
	took   []time.Duration // in order, of those that were answered
	failed int
}

func (c calls) p99() time.Duration {
	if len(c.took) == 0 {
		return 0
	}
	return c.took[len(c.took)*99/100]
}

func (c calls) share() float64 {
	if c.failed == 0 {
		return 0
	}
	return float64(c.failed) / float64(c.failed+len(c.took))
}

// within returns the calls as a client sees them that waits for so long.
func (c calls) within(most time.Duration) calls {
	i, _ := slices.BinarySearch(c.took, most+1)
	return calls{took: c.took[:i], failed: c.failed + len(c.took) - i}
}

// measure makes calls for a time, four at once with pauses between.
func measure(ctx context.Context, call func(ctx context.Context) error, length time.Duration) calls {
	var c calls
	var mu sync.Mutex
	var working sync.WaitGroup
	end := time.Now().Add(length)
	for range 4 {
		working.Go(func() {
			for time.Now().Before(end) && ctx.Err() == nil {
				begin := time.Now()
				err := call(context.WithoutCancel(ctx))
				took := time.Since(begin)
				mu.Lock()
				if err != nil {
					c.failed++
				} else {
					c.took = append(c.took, took)
				}
				mu.Unlock()
				<-time.After(5 * time.Millisecond)
			}
		})
	}
	working.Wait()
	slices.Sort(c.took)
	return c
}

// innocent is a client that does what a victim is for, and has connected.
func innocent(t *testing.T, victim, address string, secure bool) (call func(ctx context.Context) error, done func()) {
	t.Helper()
	const patience = 2 * time.Second // of a call
	switch victim {
	case "agent":
		security := []flowctl.Option{flowctl.WithInsecure(), flowctl.WithInsecureAPIKey()}
		if secure {
			security = []flowctl.Option{flowctl.WithTLSConfig(rawtls.ClientConfig())}
		}
		client, err := flowctl.Dial(address, append(security, flowctl.WithAPIKey(innocentKey), flowctl.WithoutTelemetry(), flowctl.WithCheckTimeout(patience))...)
		if err != nil {
			t.Fatal(err)
		}
		if err := client.Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		return func(ctx context.Context) error {
			flow := client.Start(ctx, "point", flowctl.Params{Labels: map[string]string{"innocent": "yes"}})
			_, err := flow.End(ctx)
			if flow.Decision() != flowctl.Accepted {
				err = flow.Err()
			}
			return err
		}, func() { _ = client.Close(t.Context()) }
	case "http":
		transport := new(http.Transport)
		client := &http.Client{Transport: transport, Timeout: patience}
		return func(ctx context.Context) error {
			r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/", nil)
			if err != nil {
				return err
			}
			response, err := client.Do(r)
			if err != nil {
				return err
			}
			return response.Body.Close()
		}, transport.CloseIdleConnections
	default:
		conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		client := healthv1.NewHealthClient(conn)
		return func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, patience)
			defer cancel()
			_, err := client.Check(ctx, new(healthv1.HealthCheckRequest))
			return err
		}, func() { _ = conn.Close() }
	}
}

// attackers is how many connections an attack has at a time.
const attackers = 64

// together runs one for each of so many connections, until ctx ends.
func together(ctx context.Context, connections int, one func()) {
	var working sync.WaitGroup
	for range connections {
		working.Go(func() {
			for ctx.Err() == nil {
				one()
			}
		})
	}
	working.Wait()
}

// dial connects; nil when ctx has ended, or the server takes no connection.
func dial(ctx context.Context, address string) net.Conn {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil
	}
	return conn
}

// garbage sends bytes that mean nothing, over connections that follow each other.
func garbage(ctx context.Context, _ *testing.T, address string) {
	together(ctx, attackers, func() {
		conn := dial(ctx, address)
		if conn == nil {
			return
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(100 * time.Millisecond))
		_, _ = conn.Write([]byte(rand.Text() + rand.Text()))
		_, _ = conn.Read(make([]byte, 1024))
		<-time.After(10 * time.Millisecond)
	})
}

// idle opens connections, says nothing, and keeps them.
func idle(ctx context.Context, _ *testing.T, address string) {
	const most = 1000
	var open []net.Conn
	for range most {
		if conn := dial(ctx, address); conn != nil {
			open = append(open, conn)
		}
	}
	<-ctx.Done()
	for _, conn := range open {
		_ = conn.Close()
	}
}
