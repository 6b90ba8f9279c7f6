package flowctl_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http/httptest"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/flowctl"
)

// acceptAll accepts every flow, and remembers the key that came with the last.
type acceptAll struct {
	checkv1.UnimplementedFlowControlServiceServer
	key atomic.Value
}

func (a *acceptAll) Check(ctx context.Context, _ *checkv1.CheckRequest) (*checkv1.CheckResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	a.key.Store(append(md.Get("x-api-key"), "")[0])
	return new(checkv1.CheckResponse), nil
}

// TLS is the default, and trusts whom it is told to trust.
func TestTLS(t *testing.T) {
	site := httptest.NewTLSServer(nil) // for its certificate
	defer site.Close()
	roots := x509.NewCertPool()
	roots.AddCert(site.Certificate())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	agent := new(acceptAll)
	server := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&site.TLS.Certificates[0])))
	checkv1.RegisterFlowControlServiceServer(server, agent)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	defer func() {
		server.Stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Error(err)
		}
	}()
	address := l.Addr().String()
	trusting := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	for _, tt := range []struct {
		name string
		env  string // of APERTURE_AGENT_SKIP_VERIFY
		opts []flowctl.Option
		want flowctl.Decision
	}{
		{name: "the system's roots", want: flowctl.Unreachable},
		{name: "plaintext", opts: []flowctl.Option{flowctl.WithInsecure()}, want: flowctl.Unreachable},
		{name: "WithTLSConfig", opts: []flowctl.Option{flowctl.WithTLSConfig(trusting)}, want: flowctl.Accepted},
		{name: "WithTransportCredentials", opts: []flowctl.Option{flowctl.WithTransportCredentials(credentials.NewTLS(trusting))}, want: flowctl.Accepted},
		{name: "no verification, by the environment", env: "true", want: flowctl.Accepted},
		{name: "verification, by the environment", env: "false", want: flowctl.Unreachable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			opts := slices.Concat(tt.opts, []flowctl.Option{
				flowctl.WithCheckTimeout(5 * time.Second), flowctl.WithAPIKey("sesame"), flowctl.WithoutTelemetry(),
			})
			var client *flowctl.Client
			var err error
			if tt.env == "" {
				client, err = flowctl.Dial(address, opts...)
			} else {
				t.Setenv("APERTURE_AGENT_ADDRESS", address)
				t.Setenv("APERTURE_AGENT_INSECURE", "")
				t.Setenv("APERTURE_AGENT_SKIP_VERIFY", tt.env)
				client, err = flowctl.DialEnv(opts...)
			}
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close(t.Context())
			agent.key.Store("")
			flow := client.Start(t.Context(), "point", flowctl.Params{})
			if flow.Decision() != tt.want {
				t.Errorf("%v, %v want %v", flow, flow.Err(), tt.want)
			}
			if key := agent.key.Load(); (key == "sesame") != (tt.want == flowctl.Accepted) {
				t.Errorf("the agent got the key %q", key)
			}
		})
	}
}
