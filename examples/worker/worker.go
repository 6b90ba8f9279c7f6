package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/flowctl"
)

const (
	// goroutines is how many jobs a worker has at a time.
	goroutines = 4

	// longest is how long a call may take. A worker that loses its store keeps its slots for two thirds of its lease, so 1.5 times
	// this time and that of an answer must be less than redisstore.WithLease, which is 10 s by default.
	longest = 5 * time.Second
)

// work calls the API with jobs of the directory, until there are none or ctx ends. Then it closes the client.
func work(ctx context.Context, client *flowctl.Client, api, jobs string) error {
	// A call waits for its turn, and comes back if what it waits for stops meanwhile: for a minute in all.
	params := flowctl.Params{MaxWait: time.Minute, OnUnreachable: flowctl.FailClosed}
	call := headgate.GuardFunc(headgate.Retrying(client, headgate.RetryPolicy{Attempts: -1, Budget: -1}), "api",
		func(context.Context, string) flowctl.Params { return params },
		func(ctx context.Context, job string) (int, error) { return post(ctx, api, job) }, nil)

	var running sync.WaitGroup
	for range goroutines {
		running.Go(func() {
			for ctx.Err() == nil {
				job, claimed := claim(jobs)
				if !claimed {
					return
				}
				code, err := call(context.WithoutCancel(ctx), filepath.Base(job)) // a job that has begun goes on
				if err := finish(job, code, err); err != nil {
					slog.Error("job", "error", err)
				}
				if errors.Is(err, flowctl.ErrUnreachable) { // no agent
					_ = client.Ready(ctx) // the next call says what is wrong
				}
			}
		})
	}
	running.Wait()
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	return client.Close(end)
}

// post calls the API, and returns its status.
func post(ctx context.Context, api, job string) (int, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, fmt.Sprintf("%s/?job=%s&pid=%d", api, job, os.Getpid()), nil)
	if err != nil {
		return 0, err
	}
	resp, err := (&http.Client{Timeout: longest}).Do(r) // its connections are those of all calls
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	return resp.StatusCode, nil
}

// claim renames the file of a job, so that nobody else has it.
func claim(jobs string) (claimed string, ok bool) {
	files, _ := filepath.Glob(filepath.Join(jobs, "*.job"))
	for _, file := range files {
		if os.Rename(file, file+mine()) == nil {
			return file + mine(), true
		}
	}
	return "", false
}

// finish removes the file of a job that is done, and puts one back that did not run or was cut off.
func finish(claimed string, code int, err error) error {
	switch {
	case err != nil:
		slog.Warn("a job is put back", "job", claimed, "error", err)
		return os.Rename(claimed, strings.TrimSuffix(claimed, mine()))
	case code != http.StatusOK:
		slog.Warn("a job has failed", "job", claimed, "code", code)
		return os.Rename(claimed, claimed+".failed")
	}
	return os.Remove(claimed)
}

// mine is added to the names of the jobs that this process has claimed.
func mine() string { return fmt.Sprintf(".%d", os.Getpid()) }
