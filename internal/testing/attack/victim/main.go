// Victim is what package attack attacks: an agent, a guarded HTTP server, a guarded gRPC server, or a client.
//
//	victim [-policies FILE] [-key KEY] [-tls] agent|http|grpc
//	victim -address ADDRESS [-flows N] [-for DURATION] [-tls] client
//	victim machine
//
// A server prints its Stats as JSON, one line at first and one for each line that it reads from standard input. A client
// prints its Report. The machine is no victim: it prints Stats of the machine. All end when standard input does.
package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"

	"github.com/headgate-go/headgate/agent"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/grpcguard"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/testing/attack"
	"github.com/headgate-go/headgate/internal/testing/rawtls"
	"github.com/headgate-go/headgate/policy"
)

var (
	policies = flag.String("policies", "", "the policy file of a server's engine, instead of the built-in policies")
	key      = flag.String("key", "", "the only API key of an agent; none for an agent that wants none")
	secure   = flag.Bool("tls", false, "use TLS: an agent makes a certificate and verifies those of clients that have one, and a client trusts any")
	address  = flag.String("address", "", "the agent's address, for a client")
	flows    = flag.Int("flows", 64, "how many flows a client has at a time")
	length   = flag.Duration("for", time.Second, "how long a client starts flows")
)

func main() {
	flag.Parse()
	if err := run(flag.Arg(0)); err != nil {
		fmt.Fprintln(os.Stderr, "victim:", err)
		os.Exit(1)
	}
}

func run(kind string) error {
	if kind == "client" {
		report, err := runClient()
		if err != nil {
			return err
		}
		if err := json.NewEncoder(os.Stdout).Encode(report); err != nil {
			return err
		}
		_, err = bufio.NewReader(os.Stdin).ReadString(0) // until it ends
		if err.Error() == "EOF" {
			return nil
		}
		return err
	}
	if kind == "machine" {
		return answer("", measure())
	}
	e, err := newEngine()
	if err != nil {
		return err
	}
	defer e.Close()
	ctx := context.Background() // the program's own: a signal ends the program
	// A cache has a goroutine from its first value on. The attacks must leave no more of them than there were.
	for _, k := range []agentapi.CacheKey{{Key: "first", Global: true}, {Key: "first", ControlPoint: "point"}} {
		if err := e.Agent().Store(ctx, k, nil, time.Hour); err != nil {
			return err
		}
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	var stop func()
	served := make(chan error, 1)
	switch kind {
	case "agent":
		var opts []agent.Option
		if *key != "" {
			opts = append(opts, agent.WithKeys(func(sent string) (string, bool) {
				return "innocent", subtle.ConstantTimeCompare([]byte(sent), []byte(*key)) == 1
			}))
		}
		if *secure {
			private, err := rsa.GenerateKey(rand.Reader, 2048) // a signature by such a key costs more than by others
			if err != nil {
				return err
			}
			certificate, err := rawtls.Certificate(private)
			if err != nil {
				return err
			}
			leaf, err := x509.ParseCertificate(certificate.Certificate[0])
			if err != nil {
				return err
			}
			authorities := x509.NewCertPool()
			authorities.AddCert(leaf)
			opts = append(opts, agent.WithCredentials(credentials.NewTLS(&tls.Config{
				Certificates: []tls.Certificate{certificate}, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: authorities, MinVersion: tls.VersionTLS12,
			})))
		}
		s := grpc.NewServer(agent.ServerOptions(opts...)...)
		agent.Register(s, e)
		healthv1.RegisterHealthServer(s, health.NewServer())
		reflection.Register(s)
		go func() { served <- s.Serve(l) }()
		stop = s.Stop
	case "http":
		client, err := flowctl.New(e)
		if err != nil {
			return err
		}
		work := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("done\n")) })
		s := &http.Server{Handler: httpguard.Middleware(client, "point")(work), ReadHeaderTimeout: 5 * time.Second}
		go func() { served <- s.Serve(l) }()
		stop = func() { _ = s.Close() }
	case "grpc":
		client, err := flowctl.New(e)
		if err != nil {
			return err
		}
		s := grpc.NewServer( // as docs/operating.md has servers of strangers
			grpc.MaxHeaderListSize(64<<10), grpc.MaxConcurrentStreams(1000), grpc.ConnectionTimeout(10*time.Second), grpc.MaxRecvMsgSize(1<<20),
			grpc.ChainUnaryInterceptor(grpcguard.UnaryServerInterceptor(client, "point")),
			grpc.ChainStreamInterceptor(grpcguard.StreamServerInterceptor(client, "point")))
		healthv1.RegisterHealthServer(s, health.NewServer())
		go func() { served <- s.Serve(l) }()
		stop = s.Stop
	default:
		return errors.New("the argument must be agent, http, grpc, client or machine")
	}
	if err := answer(l.Addr().String(), new(atomic.Int64)); err != nil {
		return err
	}
	stop()
	if err := <-served; err != nil && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}

// answer prints Stats, at first and for each line of standard input.
func answer(address string, starved *atomic.Int64) error {
	out, in := json.NewEncoder(os.Stdout), bufio.NewScanner(os.Stdin)
	for {
		if err := out.Encode(attack.Stats{Address: address, Goroutines: runtime.NumGoroutine(), Starved: time.Duration(starved.Swap(0))}); err != nil {
			return err
		}
		if !in.Scan() {
			return in.Err()
		}
	}
}

// measure repeats a little work, and keeps the difference of the longest and the shortest time that it took.
func measure() *atomic.Int64 {
	starved := new(atomic.Int64)
	go func() {
		shortest := time.Hour
		var sum uint64
		for {
			begin := time.Now()
			for i := range uint64(2_000_000) {
				sum = sum*31 + i
			}
			took := time.Since(begin)
			shortest = min(shortest, took)
			starved.Store(max(starved.Load(), int64(took-shortest)))
			begin = time.Now()
			time.Sleep(5 * time.Millisecond)
			starved.Store(max(starved.Load(), int64(time.Since(begin)-5*time.Millisecond), int64(sum&1)))
		}
	}()
	return starved
}

// newEngine makes an engine of the policies in the file, or of policies that limit users but not the innocent client.
func newEngine() (*engine.Engine, error) {
	if *policies == "" {
		return engine.New([]policy.Policy{{Name: "built-in", Components: []policy.Component{
			policy.RateLimiter{Selectors: policy.At("point"), Capacity: 10, Fill: 1, Interval: time.Second, LimitBy: "user_id"},
			policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 10, MaxInflight: time.Second, LimitBy: "tenant"},
		}}})
	}
	p, err := policy.Load(*policies)
	if err != nil {
		return nil, err
	}
	return engine.New(p)
}

// runClient runs flows of all kinds, one after the other in each of so many goroutines.
func runClient() (*attack.Report, error) {
	before := runtime.NumGoroutine()
	security := flowctl.WithInsecure()
	if *secure {
		security = flowctl.WithTLSConfig(rawtls.ClientConfig())
	}
	client, err := flowctl.Dial(*address, security, flowctl.WithCheckTimeout(attack.CheckTimeout))
	if err != nil {
		return nil, err
	}
	ctx := context.Background() // the program's own, which ends with it
	r := &attack.Report{Decisions: make(map[string]int), Late: -attack.CheckTimeout}
	var mu sync.Mutex
	var working sync.WaitGroup
	end := time.Now().Add(*length)
	for i := range *flows {
		var params flowctl.Params
		switch i % 4 {
		case 0:
			params = flowctl.Params{ResultCacheKey: "r", GlobalCacheKeys: []string{"g"}}
		case 1:
			params = flowctl.Params{HTTP: &flowctl.HTTPRequest{Method: http.MethodGet, Path: "/", Headers: map[string]string{"user-agent": "victim"}}}
		default:
			params = flowctl.Params{Labels: map[string]string{"user_id": "u"}}
		}
		working.Go(func() {
			for time.Now().Before(end) {
				begin := time.Now()
				flow := client.Start(ctx, "point", params)
				late := time.Since(begin) - attack.CheckTimeout
				longest := 0
				if err := flow.Err(); err != nil {
					longest = len(err.Error())
				}
				flow.Settle("tokens", 1)
				if _, err := flow.End(ctx); err != nil {
					longest = max(longest, len(err.Error()))
				}
				mu.Lock()
				r.Flows++
				r.Decisions[flow.Decision().String()]++
				r.Late, r.LongestError = max(r.Late, late), max(r.LongestError, longest)
				mu.Unlock()
				time.Sleep(50 * time.Millisecond)
			}
		})
	}
	working.Wait()
	closing, cancel := context.WithTimeout(ctx, attack.CloseTimeout)
	defer cancel()
	begin := time.Now()
	_ = client.Close(closing) // telemetry that such an agent does not take is lost
	r.Close = time.Since(begin)
	for deadline := time.Now().Add(6 * time.Second); runtime.NumGoroutine() > before && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	r.Goroutines = runtime.NumGoroutine() - before
	return r, nil
}
