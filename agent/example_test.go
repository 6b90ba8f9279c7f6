package agent_test

import (
	"context"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"

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
