package main

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/redisstore"
)

// embed returns a client of an engine in this process. All workers whose engines have the same store share the limits. Stop comes after
// the client's Close.
func embed(ctx context.Context, url string) (client *flowctl.Client, stop func() error, err error) {
	// Workers can wait for a slow answer. Users of a website could not.
	store, err := redisstore.Open(ctx, url, redisstore.WithTimeout(time.Second), redisstore.WithLogger(slog.Default()))
	if err != nil {
		return nil, nil, err
	}
	e, err := engine.New(limits, engine.WithStore(store), engine.WithLogger(slog.Default()))
	if err != nil {
		return nil, nil, errors.Join(err, store.Close())
	}
	stop = func() error { return errors.Join(e.Close(), store.Close()) }
	if client, err = flowctl.New(e, flowctl.WithLogger(slog.Default())); err != nil {
		return nil, nil, errors.Join(err, stop())
	}
	return client, stop, nil
}
