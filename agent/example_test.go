package agent_test

import (
	"context"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/headgate-go/headgate/agent"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

// Two processes, here two clients, share one limit.
func ExampleRegister() {
	ctx := context.Background()
	limits, err := engine.New([]policy.Policy{{Name: "mail", Components: []policy.Component{policy.RateLimiter{
		Selectors: policy.At("send-mail"), Capacity: 1, Fill: 1, Interval: time.Minute,
	}}}})
	if err != nil {
		panic(err)
	}
	defer limits.Close()
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	server := grpc.NewServer(agent.ServerOptions()...)
	agent.Register(server, limits)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		if err := server.Serve(listener); err != nil {
			fmt.Println(err)
		}
	}()

	for range 2 {
		client, err := flowctl.Dial(listener.Addr().String(), flowctl.WithInsecure(), flowctl.WithCheckTimeout(10*time.Second))
		if err != nil {
			panic(err)
		}
		flow := client.Start(ctx, "send-mail", flowctl.Params{})
		fmt.Println(flow.Decision())
		_, _ = flow.End(ctx)
		_ = client.Close(ctx)
	}
	server.Stop()
	<-stopped
	// Output:
	// accepted
	// rejected
}

// An agent that starts again goes on where the one before was.
func ExampleNew() {
	folder, err := os.MkdirTemp("", "agent")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(folder)
	for range 2 {
		limits, err := engine.New([]policy.Policy{{Name: "mail", Components: []policy.Component{policy.RateLimiter{
			Selectors: policy.At("send-mail"), Capacity: 1, Fill: 1, Interval: time.Hour,
		}}}})
		if err != nil {
			panic(err)
		}
		served, err := agent.New(limits, agent.WithState(filepath.Join(folder, "agent.state")), agent.WithHoldOff(10*time.Second))
		if err != nil {
			panic(err)
		}
		server := grpc.NewServer(agent.ServerOptions()...)
		served.Register(server)

		client, err := flowctl.New(limits) // in place of one in another process
		if err != nil {
			panic(err)
		}
		flow := client.Start(context.Background(), "send-mail", flowctl.Params{})
		fmt.Println(flow.Decision())
		_, _ = flow.End(context.Background())
		_ = client.Close(context.Background())

		server.GracefulStop()
		if err := errors.Join(limits.Close(), served.Close()); err != nil {
			panic(err)
		}
	}
	// Output:
	// accepted
	// rejected
}

// newCertificate is for the example below: a certificate for this machine, and the roots that it is verified with.
func newCertificate() (certificate tls.Certificate, roots *x509.CertPool) {
	site := httptest.NewTLSServer(nil)
	defer site.Close()
	roots = x509.NewCertPool()
	roots.AddCert(site.Certificate())
	return site.TLS.Certificates[0], roots
}

// An agent that speaks TLS, and answers only callers with the key.
func ExampleServerOptions() {
	ctx := context.Background()
	certificate, roots := newCertificate()
	limits, err := engine.Load("../examples/quickstart/policy.yaml")
	if err != nil {
		panic(err)
	}
	defer limits.Close()

	const key = "open sesame"
	valid := func(sent string) (name string, ok bool) {
		return "shop", subtle.ConstantTimeCompare([]byte(sent), []byte(key)) == 1
	}
	server := grpc.NewServer(agent.ServerOptions(
		agent.WithKeys(valid),
		agent.WithCredentials(credentials.NewServerTLSFromCert(&certificate)),
	)...)
	agent.Register(server, limits)

	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	go func() { _ = server.Serve(listener) }()
	defer server.Stop()

	for _, k := range []string{key, "sesame"} {
		client, err := flowctl.Dial(listener.Addr().String(), flowctl.WithAPIKey(k),
			flowctl.WithTLSConfig(&tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}))
		if err != nil {
			panic(err)
		}
		fmt.Println(client.Ready(ctx))
		_ = client.Close(ctx)
	}
	// Output:
	// <nil>
	// headgate: agent not ready: it refuses the API key
}
