package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A request is what tenants send, times at once.
type request struct {
	what    string // for the reader
	tenant  string
	kind    string
	prompt  string
	times   int           // 0 means 1. If there are more, each has a prompt of its own
	delayed time.Duration // after the one before, which it does not wait for; 0 if it does
}

var requests = []request{
	{what: "acme asks", tenant: "acme", prompt: "What is flow control?"},
	{what: "acme asks the same", tenant: "acme", prompt: "What is flow control?"},
	{what: "acme wants long answers", tenant: "acme", prompt: "say 250"},
	{what: "", tenant: "acme", prompt: "say 251"},
	{what: "", tenant: "acme", prompt: "say 252"},
	{what: "and has used up its minute", tenant: "acme", prompt: "say 1"},
	{what: "initech asks", tenant: "initech", prompt: "What is flow control?"},
	{what: "initech sends a batch of 8", tenant: "initech", kind: "batch", prompt: "Sum up document", times: 8},
	{what: "globex asks 3 times meanwhile", tenant: "globex", prompt: "What is in chapter", times: 3, delayed: 100 * time.Millisecond},
	{what: "the large model pauses for 1 s", tenant: "globex", prompt: "pause 1"},
	{what: "it pauses for a minute", tenant: "globex", prompt: "pause 60"},
	{what: "globex asks again", tenant: "globex", prompt: "What is a pause?"},
}

// show sends the requests, and prints what becomes of them.
func show(ctx context.Context, out io.Writer, client *http.Client, url string, vendor *upstream) error {
	fmt.Fprintf(out, "%-32s%-54s%s\n", "what happens", "answers", "after")
	for i := 0; i < len(requests); {
		n := 1 // that are sent together
		for i+n < len(requests) && requests[i+n].delayed > 0 {
			n++
		}
		rows := make([]string, n)
		var sending sync.WaitGroup
		for k, r := range requests[i : i+n] {
			sending.Go(func() {
				select {
				case <-time.After(r.delayed):
					rows[k] = r.send(ctx, client, url)
				case <-ctx.Done():
				}
			})
		}
		sending.Wait()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		for _, row := range rows {
			fmt.Fprintln(out, row)
		}
		i += n
	}
	fmt.Fprintln(out, vendor)
	return nil
}

// send sends the request, and says what became of it.
func (r *request) send(ctx context.Context, client *http.Client, url string) string {
	begin := time.Now()
	results := make([]string, max(r.times, 1))
	var sending sync.WaitGroup
	for i := range results {
		text := r.prompt
		if r.times > 0 {
			text = fmt.Sprint(text, " ", i+1)
		}
		sending.Go(func() { results[i] = ask(ctx, client, url, r.tenant, r.kind, text) })
	}
	sending.Wait()
	took := time.Since(begin)

	counts := make(map[string]int)
	for _, result := range results {
		counts[result]++
	}
	slices.Sort(results)
	different := slices.Compact(results)
	for i, result := range different {
		if len(results) > 1 {
			different[i] = fmt.Sprint(counts[result], " × ", result)
		}
	}
	return fmt.Sprintf("%-32s%-54s%.1f s", r.what, strings.Join(different, "; "), took.Seconds())
}

// ask sends one prompt, and says what the answer is.
func ask(ctx context.Context, client *http.Client, url, tenant, kind, text string) string {
	body, err := json.Marshal(prompt{Text: text})
	if err != nil {
		return err.Error()
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/chat", strings.NewReader(string(body)))
	if err != nil {
		return err.Error()
	}
	r.Header.Set("X-API-Key", "key-of-"+tenant)
	r.Header.Set("X-Kind", kind)
	resp, err := client.Do(r)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		if after := resp.Header.Get("Retry-After"); after != "" {
			return fmt.Sprintf("%d, again in %s s", resp.StatusCode, after)
		}
		return strconv.Itoa(resp.StatusCode)
	}
	var last event
	for e, err := range events(resp.Body) {
		if err != nil {
			return err.Error()
		}
		last = e
	}
	return fmt.Sprintf("%d from %s, %d tokens", resp.StatusCode, last.Model, last.Usage.Tokens)
}
