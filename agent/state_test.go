package agent_test

import (
	"bytes"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/headgate-go/headgate/agent"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

// A life is an agent from its start to its end.
type life struct {
	engine  *engine.Engine
	service *agent.Service
	client  *flowctl.Client // in the process: what matters here is the engine
	log     *lockedBuffer
}

func limited(t *testing.T, opts ...agent.ServiceOption) *life {
	t.Helper()
	l := &life{log: new(lockedBuffer)}
	var err error
	l.engine, err = engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{
		policy.RateLimiter{Selectors: policy.At("rate"), Capacity: 10, Fill: 1, Interval: time.Minute, LimitBy: "user"},
		policy.ConcurrencyLimiter{Selectors: policy.At("slots"), Max: 3, MaxInflight: time.Hour},
	}}}, engine.WithLogger(slog.New(slog.NewTextHandler(l.log, nil))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.engine.Close() })
	if l.service, err = agent.New(l.engine, opts...); err != nil {
		t.Fatal(err)
	}
	l.service.Register(grpc.NewServer(agent.ServerOptions()...))
	if l.client, err = flowctl.New(l.engine); err != nil {
		t.Fatal(err)
	}
	return l
}

// drain ends the life in good order.
func (l *life) drain(t *testing.T) {
	t.Helper()
	if err := errors.Join(l.client.Close(t.Context()), l.engine.Close(), l.service.Close(), l.service.Close()); err != nil {
		t.Error(err)
	}
}

// kill ends the life and writes nothing.
func (l *life) kill(t *testing.T) {
	t.Helper()
	if err := errors.Join(l.client.Close(t.Context()), l.engine.Close()); err != nil {
		t.Error(err)
	}
}

// start starts flows, and returns how many were accepted.
func (l *life) start(t *testing.T, point string, n int) (accepted int) {
	t.Helper()
	for range n {
		if l.client.Start(t.Context(), point, flowctl.Params{Labels: map[string]string{"user": "alice"}}).Decision() == flowctl.Accepted {
			accepted++
		}
	}
	return accepted
}

// An agent that was drained goes on where it was, with the time that has passed. After a kill, it goes on from the last copy, which
// is at most 10 s old. With a hold-off, it admits no flow to slots after a kill, nor where it finds no file, nor when it is
// killed before its first copy was due.
func TestRestarts(t *testing.T) {
	const s = time.Second
	file := func(t *testing.T) string { return filepath.Join(t.TempDir(), "state") }
	for _, tt := range []struct {
		name        string
		lives       func(t *testing.T, file string)
		rate, slots int // of 20 flows at each, that the next agent admits
		heldOff     uint64
		later       int // of 20 flows that want slots, when the hold-off is over
	}{
		{"first start", func(*testing.T, string) {}, 10, 0, 20, 3},
		{"drained", func(t *testing.T, file string) {
			l := limited(t, agent.WithState(file))
			l.start(t, "rate", 7)
			l.start(t, "slots", 2)
			l.drain(t)
			<-time.After(2 * time.Minute)
		}, 5, 1, 0, 0},
		{"drained twice", func(t *testing.T, file string) {
			l := limited(t, agent.WithState(file))
			l.start(t, "rate", 7)
			l.start(t, "slots", 2)
			l.drain(t)
			limited(t, agent.WithState(file)).drain(t)
		}, 3, 1, 0, 0},
		{"killed", func(t *testing.T, file string) {
			l := limited(t, agent.WithState(file))
			l.start(t, "rate", 7)
			l.start(t, "slots", 1)
			<-time.After(10*s + 1)
			l.start(t, "rate", 2) // which are lost
			l.kill(t)
		}, 3, 0, 20, 3}, // a copy counts for as long as the flow had run when it was made: 10 s
		{"drained, then killed at once", func(t *testing.T, file string) {
			l := limited(t, agent.WithState(file))
			l.start(t, "rate", 7)
			l.start(t, "slots", 2)
			l.drain(t)
			limited(t, agent.WithState(file)).kill(t)
		}, 3, 0, 20, 3},
		{"closed before the engine", func(t *testing.T, file string) {
			l := limited(t, agent.WithState(file))
			l.start(t, "rate", 7)
			if err := l.service.Close(); err != nil {
				t.Error(err)
			}
			l.start(t, "slots", 1)
			l.kill(t)
		}, 3, 0, 20, 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				file := file(t)
				tt.lives(t, file)
				l := limited(t, agent.WithState(file), agent.WithHoldOff(10*s))
				defer l.drain(t)
				if got := l.start(t, "rate", 20); got != tt.rate {
					t.Errorf("%d flows were admitted to the bucket want %d", got, tt.rate)
				}
				if got := l.start(t, "slots", 20); got != tt.slots {
					t.Errorf("%d flows were admitted to slots want %d", got, tt.slots)
				}
				if got := l.service.State().HeldOff; got != tt.heldOff {
					t.Errorf("%d flows were held off want %d", got, tt.heldOff)
				}
				<-time.After(10 * s)
				if got := l.start(t, "slots", 20); got != tt.later {
					t.Errorf("%d flows were admitted to slots after the hold-off want %d", got, tt.later)
				}
			})
		})
	}
}

// A file that cannot be read does not keep the agent from starting. The log and the warnings say which file and why, and the next
// copy replaces it.
func TestUnreadableState(t *testing.T) {
	drained := filepath.Join(t.TempDir(), "good")
	l := limited(t, agent.WithState(drained))
	l.start(t, "rate", 7)
	l.drain(t)
	good, err := os.ReadFile(drained)
	if err != nil {
		t.Fatal(err)
	}
	newer := bytes.Clone(good)
	newer[8]++
	for _, tt := range []struct {
		name, says string
		data       []byte
	}{
		{"truncated", "truncated", good[:len(good)-3]},
		{"changed", "damaged", bytes.Replace(good, []byte("alice"), []byte("blice"), 1)},
		{"newer", "version", newer},
		{"another", "no state", []byte("circuit:\n")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				file := filepath.Join(t.TempDir(), "state")
				if err := os.WriteFile(file, tt.data, 0o600); err != nil {
					t.Fatal(err)
				}
				l := limited(t, agent.WithState(file))
				warnings := strings.Join(l.service.Warnings(), "\n")
				for what, text := range map[string]string{"log": l.log.String(), "warnings": warnings, "error": l.service.State().Unread.Error()} {
					if !strings.Contains(text, file) || !strings.Contains(text, tt.says) || strings.Contains(text, "alice") {
						t.Errorf("the %s: %s want the file's name and %q", what, text, tt.says)
					}
				}
				if got := l.start(t, "rate", 20); got != 10 {
					t.Errorf("%d flows were admitted want all of a fresh bucket", got)
				}
				l.drain(t)
				l = limited(t, agent.WithState(file))
				if state := l.service.State(); state.Unread != nil || !state.Drained || state.Keys != 1 {
					t.Errorf("the next agent: %+v want it to have read what this one wrote", state)
				}
				l.drain(t)
			})
		})
	}
}

// A copy is made at once, and every 10 s. One that fails is logged, once a minute, and the file of before stays.
func TestStateIsCopied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "state")
		l := limited(t, agent.WithState(file))
		for i := range 3 {
			if got := l.service.State(); got.Copies != uint64(1+i) || got.Uncopied != nil {
				t.Errorf("after %d times 10 s: %+v want %d copies", i, got, 1+i)
			}
			<-time.After(10 * time.Second)
			synctest.Wait()
		}
		if err := os.Mkdir(file+".tmp", 0o700); err != nil { // in the way
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(file+".tmp", "x"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		<-time.After(75 * time.Second)
		synctest.Wait()
		if got := l.service.State(); got.Copies != 4 || got.Uncopied == nil || !strings.Contains(got.Uncopied.Error(), file) {
			t.Errorf("%+v want 4 copies, and an error that names the file", got)
		}
		if n := strings.Count(l.log.String(), "cannot be written"); n != 2 {
			t.Errorf("logged %d times in 75 s want 2:\n%s", n, l.log)
		}
		if !strings.Contains(strings.Join(l.service.Warnings(), "\n"), "was not written") {
			t.Errorf("Warnings = %q want one of the copy", l.service.Warnings())
		}
		if err := os.RemoveAll(file + ".tmp"); err != nil {
			t.Fatal(err)
		}
		<-time.After(10 * time.Second)
		synctest.Wait()
		if got := l.service.State(); got.Uncopied != nil {
			t.Errorf("%+v want no error any more", got)
		}
		l.drain(t)
	})
}

// Without a state, a service has no goroutine, writes nothing, and need not be closed. A hold-off needs no state.
func TestHoldOffWithoutState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limited(t, agent.WithHoldOff(time.Minute), nil)
		if got := l.start(t, "slots", 5); got != 0 {
			t.Errorf("%d flows were admitted want none", got)
		}
		<-time.After(time.Minute)
		if got := l.start(t, "slots", 5); got != 3 {
			t.Errorf("%d flows were admitted want 3", got)
		}
		l.drain(t)
	})
}

func TestServiceOptionErrors(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	e, err := engine.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	for _, tt := range []struct {
		name string
		opt  agent.ServiceOption
		says string
		is   error
	}{
		{"no file", agent.WithState(""), "WithState: no file", nil},
		{"no folder", agent.WithState(filepath.Join(filepath.Dir(file), "none", "state")), "WithState: ", fs.ErrNotExist},
		{"a file for a folder", agent.WithState(filepath.Join(file, "state")), "WithState: ", nil},
		{"a folder", agent.WithState(filepath.Dir(file)), "WithState: ", nil},
		{"a negative time", agent.WithHoldOff(-1), "WithHoldOff(-1ns): negative", nil},
	} {
		s, err := agent.New(e, tt.opt)
		if s != nil || err == nil || !strings.HasPrefix(err.Error(), "headgate: agent: "+tt.says) || tt.is != nil && !errors.Is(err, tt.is) {
			t.Errorf("%s: New = %v, %v want an error of %q", tt.name, s, err, tt.says)
		}
	}
	if _, err := agent.New(e, agent.WithState(""), agent.WithHoldOff(-1)); err == nil || !strings.Contains(err.Error(), "WithHoldOff") || !strings.Contains(err.Error(), "WithState") {
		t.Errorf("New = %v want both errors", err)
	}
}
