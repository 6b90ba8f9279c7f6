package main

import (
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// An upstream stands for a vendor's models, so that this program needs none. It answers with 20 words, or with 200 for "say 200".
// At "pause 5" its large model refuses all calls during the next 5 seconds. "cut" breaks the answer off.
type upstream struct {
	mu      sync.Mutex
	pauses  map[string]time.Time // by prompt, when they end
	calls   map[string]int       // by model
	refused int
}

func newUpstream() *upstream {
	return &upstream{pauses: make(map[string]time.Time), calls: make(map[string]int)}
}

// handler serves each model at a path of its name.
func (u *upstream) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /{model}", u.answer)
	return mux
}

func (u *upstream) answer(w http.ResponseWriter, r *http.Request) {
	var p prompt
	if err := json.NewDecoder(r.Body).Decode(&p); err != nil {
		http.Error(w, "bad request", http.StatusBadRequest)
		return
	}
	if wait := u.called(r.PathValue("model"), p.Text); wait > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
		http.Error(w, "too many requests", http.StatusTooManyRequests)
		return
	}
	words, cut := 20, p.Text == "cut"
	_, _ = fmt.Sscanf(p.Text, "say %d", &words)
	wait := 100 * time.Millisecond // until the first word
	for i := range words {
		select {
		case <-time.After(wait):
		case <-r.Context().Done():
			return
		}
		if cut && i == 10 {
			panic(http.ErrAbortHandler)
		}
		send(w, event{Text: "word "})
		wait = 2 * time.Millisecond
	}
	send(w, event{Usage: usage{len(strings.Fields(p.Text)) + words}})
	fmt.Fprint(w, "data: [DONE]\n\n")
}

// called counts a call, and returns for how long the model refuses it.
func (u *upstream) called(model, text string) time.Duration {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.calls[model]++
	if model != "large" {
		return 0
	}
	var seconds int
	if _, err := fmt.Sscanf(text, "pause %d", &seconds); err == nil && u.pauses[text].IsZero() {
		u.pauses[text] = time.Now().Add(time.Duration(seconds) * time.Second)
	}
	var wait time.Duration
	for _, end := range u.pauses {
		wait = max(wait, time.Until(end))
	}
	if wait > 0 {
		u.refused++
	}
	return wait
}

// String says what was asked of it.
func (u *upstream) String() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return fmt.Sprintf("calls of the large model: %d, of the small one: %d, refused: %d", u.calls["large"], u.calls["small"], u.refused)
}
