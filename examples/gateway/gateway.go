package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/labels"
	"github.com/headgate-go/headgate/policy"
)

// limits are what tenants may use, and what the vendor allows.
var limits = []policy.Policy{
	{Name: "tenants", Components: []policy.Component{
		policy.ConcurrencyLimiter{
			ID: "requests", Selectors: policy.At("chat"), Max: 6, MaxInflight: 5 * time.Minute, LimitBy: "tenant",
		},
		// A scheduler without a queue, and not a rate limiter: answers from the cache cost nothing.
		policy.QuotaScheduler{
			ID: "tokens", Selectors: policy.At("prompt"), Capacity: 600, Fill: 600, Interval: time.Minute, LimitBy: "tenant",
			Scheduler: policy.Scheduler{
				TokensLabel: "tokens", DeniedStatus: http.StatusTooManyRequests,
				Default: policy.WorkloadParameters{QueueTimeout: policy.NoQueue},
			},
		},
	}},
	{Name: "models", Components: []policy.Component{calls("large", 4), calls("small", 40)}},
}

// calls allows so many calls of a model a second. People are served before batches, and do not wait for long. Within each of
// the two, tenants take turns.
func calls(model string, perSecond float64) policy.Component {
	return policy.QuotaScheduler{
		ID: model, Selectors: policy.At(model), Capacity: 2, Fill: perSecond, Interval: time.Second,
		Scheduler: policy.Scheduler{
			Workloads: []policy.Workload{{
				Name:               "batch",
				Labels:             policy.LabelMatcher{Equal: map[string]string{"kind": "batch"}},
				WorkloadParameters: policy.WorkloadParameters{Priority: 1},
			}, {
				Name:               "interactive",
				WorkloadParameters: policy.WorkloadParameters{Priority: 1000, QueueTimeout: time.Second},
			}},
			FairnessLabel: "tenant", DeniedStatus: http.StatusTooManyRequests,
		},
	}
}

// A prompt is what a caller asks. Callers send it in the form in which the upstream takes it.
type prompt struct {
	Text string `json:"prompt"`

	live *stream // to the caller
}

// An answer is what is kept of a whole answer.
type answer struct {
	Model, Text string
	Tokens      int // of the prompt and the answer
}

// typical is how many tokens an answer counts for until its real cost is known.
const typical = 50

// params describes the flow of a prompt. Its answer is kept for its tenant only, because a call that shares the run of another
// one shares its decision too, and other tenants may have tokens left where this one has none.
func params(ctx context.Context, p prompt) flowctl.Params {
	explicit, _, _ := labels.FromContext(ctx)
	hash := sha256.Sum256([]byte(p.Text))
	return flowctl.Params{
		Labels:         map[string]string{"tokens": strconv.Itoa(len(strings.Fields(p.Text)) + typical)},
		ResultCacheKey: "v1/" + explicit["tenant"] + "/" + hex.EncodeToString(hash[:]),
		OnUnreachable:  flowctl.FailClosed, // tokens are money
	}
}

// A gateway asks models for its callers.
type gateway struct {
	upstream string                  // its URL
	models   map[string]*http.Client // by the name of the model
	answer   func(context.Context, prompt) (answer, error)
}

// newGateway makes the handler. It sends prompts by base.
func newGateway(client headgate.Starter, base http.RoundTripper, upstream string) http.Handler {
	model := func(name string) *http.Client {
		return &http.Client{Transport: httpguard.NewTransport(client, name, base,
			httpguard.WithParams(func(*http.Request) flowctl.Params {
				return flowctl.Params{MaxWait: time.Minute, OnUnreachable: flowctl.FailClosed} // the policy lets people wait for less
			}),
			httpguard.WithMaxWait(3*time.Second), // while the upstream pauses
			httpguard.WithRetries(headgate.RetryPolicy{}),
		)}
	}
	g := &gateway{upstream: upstream, models: map[string]*http.Client{"large": model("large"), "small": model("small")}}
	g.answer = headgate.CachedFunc(client, "prompt", params, g.ask, nil, headgate.CachePolicy[answer]{TTL: time.Hour})

	guard := httpguard.Middleware(client, "chat")
	mux := http.NewServeMux()
	mux.Handle("POST /chat", identified(guard(http.HandlerFunc(g.chat))))
	return http.MaxBytesHandler(mux, 1<<20)
}

// tenants are those of the keys.
var tenants = map[string]string{"key-of-acme": "acme", "key-of-globex": "globex", "key-of-initech": "initech"}

// identified lets requests with a key pass, and labels all their flows with the tenant and the kind.
func identified(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		tenant := tenants[r.Header.Get("X-API-Key")]
		if tenant == "" { // a flow without a tenant would pass unlimited
			http.Error(w, "who are you? send an X-API-Key header", http.StatusUnauthorized)
			return
		}
		kind := "interactive"
		if r.Header.Get("X-Kind") == "batch" {
			kind = "batch"
		}
		next.ServeHTTP(w, r.WithContext(labels.With(r.Context(), "tenant", tenant, "kind", kind)))
	})
}

// chat answers a request. The text is streamed as it comes in.
func (g *gateway) chat(w http.ResponseWriter, r *http.Request) {
	p := prompt{live: &stream{w: w}}
	if err := json.NewDecoder(r.Body).Decode(&p); err != nil {
		http.Error(w, "bad request", http.StatusBadRequest)
		return
	}
	a, err := g.answer(r.Context(), p)
	begun := p.live.end()
	switch {
	case err == nil:
		if !begun { // the answer was in the cache, or another request began it
			send(w, event{Text: a.Text})
		}
		send(w, event{Model: a.Model, Usage: usage{a.Tokens}})
		fmt.Fprint(w, "data: [DONE]\n\n")
	case begun:
		panic(http.ErrAbortHandler) // the caller must see that the answer was cut
	case httpguard.Answer(w, r, err):
	default:
		http.Error(w, "the model does not answer", http.StatusBadGateway)
	}
}

// ask asks the large model, or the small one if the large one is used up.
func (g *gateway) ask(ctx context.Context, p prompt) (answer, error) {
	return fallback.Rescue(
		func(ctx context.Context) (answer, error) { return g.askModel(ctx, "large", p) },
		fallback.Call(func(ctx context.Context) (answer, error) { return g.askModel(ctx, "small", p) }),
	)(ctx)
}

// askModel asks one model. It settles the tenant's tokens for what the upstream says that the answer has cost. If the answer
// is cut before that, what the flow took stays taken.
func (g *gateway) askModel(ctx context.Context, model string, p prompt) (answer, error) {
	body, err := json.Marshal(p)
	if err != nil {
		return answer{}, err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, g.upstream+"/"+model, bytes.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	resp, err := g.models[model].Do(r)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusTooManyRequests, http.StatusServiceUnavailable: // for longer than the transport waits
		return answer{}, &flowctl.RejectedError{ControlPoint: model, HTTPStatus: resp.StatusCode}
	default:
		return answer{}, fmt.Errorf("%s: %s", model, resp.Status)
	}
	a := answer{Model: model}
	for e, err := range events(resp.Body) {
		if err != nil {
			return answer{}, err
		}
		if e.Text != "" {
			a.Text += e.Text
			p.live.send(e.Text)
		}
		if e.Usage.Tokens > 0 {
			a.Tokens = e.Usage.Tokens
			if flow, ok := flowctl.FromContext(ctx); ok { // the prompt's, which g.answer began
				flow.Settle("tokens", float64(a.Tokens))
			}
		}
	}
	if a.Tokens == 0 {
		return answer{}, io.ErrUnexpectedEOF
	}
	return a, nil
}

// A stream is where an answer goes while it comes in. The run that makes the answer may outlive the request that began it, if
// other requests wait for it too.
type stream struct {
	mu           sync.Mutex
	w            http.ResponseWriter
	begun, ended bool
}

func (s *stream) send(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended {
		s.begun = true
		send(s.w, event{Text: text})
	}
}

// end leaves the ResponseWriter to the handler. It reports whether something was sent.
func (s *stream) end() (begun bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	return s.begun
}

// An event is a piece of a streamed answer. The last one says what the answer has cost.
type event struct {
	Text  string `json:"text,omitempty"`
	Model string `json:"model,omitempty"`
	Usage usage  `json:"usage,omitzero"`
}

type usage struct {
	Tokens int `json:"total_tokens"`
}

// send writes a server-sent event.
func send(w http.ResponseWriter, e event) {
	w.Header().Set("Content-Type", "text/event-stream")
	data, _ := json.Marshal(e) // strings and a number cannot fail
	fmt.Fprintf(w, "data: %s\n\n", data)
	_ = http.NewResponseController(w).Flush()
}

// events reads server-sent events.
func events(r io.Reader) iter.Seq2[event, error] {
	return func(yield func(event, error) bool) {
		lines := bufio.NewScanner(r)
		for lines.Scan() {
			data, ok := bytes.CutPrefix(lines.Bytes(), []byte("data: "))
			if !ok || string(data) == "[DONE]" {
				continue
			}
			var e event
			if err := json.Unmarshal(data, &e); !yield(e, err) {
				return
			}
		}
		if err := lines.Err(); err != nil {
			yield(event{}, err)
		}
	}
}
