package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Requests are what the caller with one key sends.
type requests struct {
	what   string // for the reader
	key    string
	path   string // "" for gRPC
	times  int
	atOnce bool
}

var all = []requests{
	{what: "ann (free) asks 5 times", key: "key-of-ann", path: "/orders", times: 5},
	{what: "mallory (free, shut off) asks", key: "key-of-mallory", path: "/orders", times: 1},
	{what: "globex (paid) asks 15 times", key: "key-of-globex", path: "/orders", times: 15},
	{what: "and 2 times by gRPC", key: "key-of-globex", times: 2},
	{what: "acme (paid, with more) asks 15 times", key: "key-of-acme", path: "/orders", times: 15},
	{what: "initech (paid): 4 reports at once", key: "key-of-initech", path: "/reports", times: 4, atOnce: true},
}

// A change is what somebody does to the file of limits. What it writes in the place of old is to be read by people, too.
type change struct {
	what     string
	old, new string
	then     []requests
}

var changes = []change{
	{"the limits come into force", "&dry-run true", "&dry-run false", all},
	{
		"globex gets an exception",
		"            acme: {capacity: 20, fill: 20}",
		"            globex: {capacity: 30, fill: 30}\n            acme: {capacity: 20, fill: 20}", all[2:4],
	},
	{"a mistake changes nothing", "max: 2", "mix: 2", all[:1]},
}

// A shower shows what becomes of requests while the file of limits changes.
type shower struct {
	out        io.Writer
	client     *http.Client
	conn       grpc.ClientConnInterface
	api, admin string // URLs
	limitsFile string
	reloads    <-chan error
}

func (s *shower) show(ctx context.Context) error {
	s.heading("the first day is a dry run")
	if err := s.send(ctx, all); err != nil {
		return err
	}
	if err := s.limited(ctx); err != nil {
		return err
	}
	if err := s.metrics(ctx, "flowcontrol_dry_run_drops_total"); err != nil {
		return err
	}
	for _, c := range changes {
		s.heading(c.what)
		if err := s.change(ctx, c); err != nil {
			return err
		}
		if err := s.send(ctx, c.then); err != nil {
			return err
		}
	}
	return nil
}

func (s *shower) heading(text string) {
	fmt.Fprintf(s.out, "\n%s\n", strings.ToUpper(text[:1])+text[1:])
}

// change writes the file, and waits until it was read. A second later all have what they may have at once.
func (s *shower) change(ctx context.Context, c change) error {
	text, err := os.ReadFile(s.limitsFile)
	if err != nil {
		return err
	}
	if !strings.Contains(string(text), c.old) {
		return fmt.Errorf("%s has no %q", s.limitsFile, c.old)
	}
	if err := os.WriteFile(s.limitsFile, []byte(strings.Replace(string(text), c.old, c.new, 1)), 0o600); err != nil {
		return err
	}
	select {
	case err = <-s.reloads:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err != nil {
		text := strings.ReplaceAll(err.Error(), filepath.Dir(s.limitsFile)+string(filepath.Separator), "")
		fmt.Fprintf(s.out, "  %s\n", strings.ReplaceAll(text, "\n", "\n  "))
	}
	select {
	case <-time.After(time.Second):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// send sends requests, and prints what the answers are.
func (s *shower) send(ctx context.Context, all []requests) error {
	for _, r := range all {
		answers := make([]string, r.times)
		var sending sync.WaitGroup
		for i := range answers {
			sending.Go(func() { answers[i] = s.ask(ctx, r.path, r.key) })
			if !r.atOnce {
				sending.Wait()
			}
		}
		sending.Wait()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		counts := make(map[string]int)
		for _, answer := range answers {
			counts[answer]++
		}
		slices.Sort(answers)
		var parts []string
		for _, answer := range slices.Compact(answers) {
			parts = append(parts, fmt.Sprintf("%d × %s", counts[answer], answer))
		}
		fmt.Fprintf(s.out, "  %-40s%s\n", r.what, strings.Join(parts, ", "))
	}
	return nil
}

// ask says what the answer to a request is.
func (s *shower) ask(ctx context.Context, path, key string) string {
	if path == "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "x-api-key", key)
		answer := status.Convert(s.conn.Invoke(ctx, listMethod, new(emptypb.Empty), new(wrapperspb.StringValue)))
		for _, detail := range answer.Details() {
			if retry, ok := detail.(*errdetails.RetryInfo); ok {
				return fmt.Sprintf("%v again in %.0f s", answer.Code(), math.Ceil(retry.GetRetryDelay().AsDuration().Seconds()))
			}
		}
		return answer.Code().String()
	}
	resp, err := s.get(ctx, s.api+path, key)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, resp.Body)
	if after := resp.Header.Get("Retry-After"); after != "" {
		return fmt.Sprintf("%d again in %s s", resp.StatusCode, after)
	}
	return strconv.Itoa(resp.StatusCode)
}

func (s *shower) get(ctx context.Context, url, key string) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return nil, err
	}
	if key != "" {
		r.Header.Set("X-API-Key", key)
	}
	return s.client.Do(r)
}

// limited prints who would have been limited.
func (s *shower) limited(ctx context.Context) error {
	resp, err := s.get(ctx, s.admin+"/limited", "")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var rows []row
	if err := json.NewDecoder(resp.Body).Decode(&rows); err != nil {
		return err
	}
	s.heading("who would have been limited, by /limited")
	for _, r := range rows {
		fmt.Fprintf(s.out, "  %-10s%-10s%d\n", r.Limit, r.Value, r.Rejected)
	}
	return nil
}

// metrics prints the lines of a metric.
func (s *shower) metrics(ctx context.Context, name string) error {
	resp, err := s.get(ctx, s.admin+"/metrics", "")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	s.heading("the same in numbers, by /metrics")
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, name+"{") {
			fmt.Fprint(s.out, "  ", line)
		}
	}
	return nil
}
