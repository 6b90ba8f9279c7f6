package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"time"

	"google.golang.org/grpc"

	"github.com/headgate-go/headgate/agent"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
)

// serve has workers share the limits until ctx ends. What the limits hold then is in the file, for the next agent.
func serve(ctx context.Context, address, state string, holdOff time.Duration, stdout io.Writer) error {
	e, err := engine.New(limits, engine.WithLogger(slog.Default()))
	if err != nil {
		return err
	}
	// It listens first. So if another agent is still there, this one leaves the file alone.
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return errors.Join(err, e.Close())
	}
	served, err := agent.New(e, agent.WithState(state), agent.WithHoldOff(holdOff))
	if err != nil {
		return errors.Join(err, listener.Close(), e.Close())
	}
	server := grpc.NewServer(agent.ServerOptions()...)
	served.Register(server)
	stopped := context.AfterFunc(ctx, func() {
		served.Drain() // calls that wait are told to come back soon
		late := time.AfterFunc(500*time.Millisecond, server.Stop)
		defer late.Stop()
		server.GracefulStop() // answers on their way arrive. Calls in flight end at the next agent
	})
	defer stopped()
	fmt.Fprintf(stdout, "serving at %s\n", listener.Addr())
	err = server.Serve(listener)
	if errors.Is(err, grpc.ErrServerStopped) { // ctx ended before it began
		err = nil
	}
	return errors.Join(err, e.Close(), served.Close()) // the file comes last, when nothing can change
}

// dial returns a client of the agent. All its workers share the limits.
func dial(address string) (*flowctl.Client, error) {
	return flowctl.Dial(address, flowctl.WithInsecure(), flowctl.WithLogger(slog.Default()), flowctl.WithCancelOnLostSlot())
}
