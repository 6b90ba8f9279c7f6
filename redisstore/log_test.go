package redisstore_test

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/redisstore"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// logs is what a store has logged.
type logs struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logs) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), text)
}

func (l *logs) logger() redisstore.Option {
	return redisstore.WithLogger(slog.New(slog.NewTextHandler(l, nil)))
}

// While a server is down, calls fail at once, and slots that could not be returned come back when it is there again.
func TestFleetDown(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	var l logs
	const bound = 50 * time.Millisecond
	s := newStore(t, newClient(t, server.Addr()), l.logger(), redisstore.WithTimeout(bound))
	bucket := &shared.Rule{Kind: shared.Bucket, Capacity: 100, Interval: time.Hour}
	slots := &shared.Rule{Kind: shared.Slots, Capacity: 1, MaxInflight: time.Hour}
	var slot uint64
	eventually(t, "a slot", func() bool { // a machine that is busy may take longer than the bound
		answers := make([]shared.Answer, 1)
		err := s.Take(t.Context(), []shared.Ask{{Key: keyOf("s", "a"), Rule: slots, Tokens: 1}}, answers)
		slot = answers[0].Slot
		return err == nil && slot != 0
	})
	server.Stop()
	asked := 0
	eventually(t, "the server counts as down", func() bool {
		asked++
		err := s.Take(t.Context(), []shared.Ask{{Key: keyOf("b", "a"), Rule: bucket, Tokens: 1}}, make([]shared.Answer, 1))
		if err == nil {
			t.Error("a call to a server that has stopped got an answer")
		}
		return errors.Is(err, shared.ErrDown)
	})
	if !s.Down() || l.count("does not answer") != 1 {
		t.Errorf("Down() = %v, logs:\n%s", s.Down(), l.text.String())
	}
	for name, call := range map[string]func() error{
		"Take": func() error {
			return s.Take(t.Context(), []shared.Ask{{Key: keyOf("s", "a"), Rule: slots, Tokens: 1}}, make([]shared.Answer, 1))
		},
		"Return": func() error {
			return s.Return(t.Context(), []shared.Return{{Key: keyOf("s", "a"), Rule: slots, Slot: slot}}, make([]shared.Result, 1))
		},
		"Look":   func() error { _, err := s.Look(t.Context(), keyOf("s", "a"), slots); return err },
		"Reset":  func() error { return s.Reset(t.Context(), keyOf("b", "a")) },
		"Get":    func() error { _, err := s.Get(t.Context(), []shared.CacheKey{{Key: "k"}}); return err },
		"Set":    func() error { return s.Set(t.Context(), shared.CacheKey{Key: "k"}, nil, time.Hour) },
		"Delete": func() error { return s.Delete(t.Context(), shared.CacheKey{Key: "k"}) },
		"Move":   func() error { _, err := s.Move(t.Context(), keyOf("r", "a"), 0, nil); return err },
	} {
		if err := call(); !errors.Is(err, shared.ErrDown) {
			t.Errorf("%s = %v want %v", name, err, shared.ErrDown)
		}
	}
	server.Continue()
	eventually(t, "the slot comes back", func() bool {
		u, err := s.Look(t.Context(), keyOf("s", "a"), slots)
		return err == nil && u.InFlight == 0
	})
	if s.Down() || l.count("answers again") != 1 {
		t.Errorf("Down() = %v, logs:\n%s", s.Down(), l.text.String())
	}
	// Most of what timed out does not count when the server goes on, since that is later than anyone waited.
	if u, err := s.Look(t.Context(), keyOf("b", "a"), bucket); err != nil || u.Remaining <= float64(100-asked+1) {
		t.Errorf("the bucket has %+v, %v after %d calls that timed out", u, err, asked-1)
	}
}

// Two versions of a policy that take turns at a key grant no more than the larger one of them would.
func TestFleetTwoVersions(t *testing.T) {
	s := newStore(t, newClient(t, startServer(t)))
	rules := []*shared.Rule{
		{Kind: shared.Bucket, Capacity: 10, Fill: 1, Interval: time.Hour},
		{Kind: shared.Bucket, Capacity: 20, Fill: 1, Interval: time.Hour},
		{Kind: shared.Bucket, Capacity: 3, Fill: 2, Interval: time.Hour, Step: true},
	}
	granted := 0.0
	for i := range 300 {
		answers := make([]shared.Answer, 1)
		if err := s.Take(t.Context(), []shared.Ask{{Key: keyOf("b", "a"), Rule: rules[(i*7/3)%3], Tokens: 1}}, answers); err != nil {
			t.Fatal(err)
		}
		if answers[0].OK {
			granted++
		}
	}
	if granted > 20 || granted < 3 {
		t.Errorf("%v tokens were granted want at most 20", granted)
	}
}
