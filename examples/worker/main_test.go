package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

// asPart is the variable of the environment that makes this test's program one of the processes.
const asPart = "HEADGATE_TEST_AS_PART"

func TestMain(m *testing.M) {
	if os.Getenv(asPart) != "" {
		main()
		return
	}
	if err := os.Setenv(asPart, "1"); err != nil { // for the processes that tests start
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// Numbers that differ each time.
var numbers = regexp.MustCompile(`\d+`)

// scenes are the lines of the output that say what happens, without numbers.
func scenes(output string) (found []string) {
	for line := range strings.Lines(output) {
		if !strings.HasPrefix(line, " ") {
			found = append(found, numbers.ReplaceAllString(line, "n"))
		}
	}
	return found
}

// findServer returns the program of a server. It skips the test if there is none, or fails it if one is required.
func findServer(t *testing.T) string {
	t.Helper()
	const program, required = "redis-server", "HEADGATE_TEST_REDIS"
	if _, err := exec.LookPath(program); err != nil {
		if os.Getenv(required) == "required" {
			t.Fatalf("no %s, but %s=required (Debian: apt-get install redis-server)", program, required)
		}
		t.Skipf("no %s: nothing is tested with a store (Debian: apt-get install redis-server)", program)
	}
	return program
}

func TestShow(t *testing.T) {
	t.Parallel() // most of the time it waits for leases to run out
	for _, row := range []struct {
		name, what string
		heading    string // in the recipe, before the output; empty if it is not there
		args       func(*testing.T) (args []string, stop func() error)
	}{
		{"agent", "agent", "# Workers", func(*testing.T) ([]string, func() error) { return nil, nil }},
		{"server", "store", "## Without an agent", func(t *testing.T) ([]string, func() error) { return []string{"-store", findServer(t)}, nil }},
		{"another's server", "store", "", withServer},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			args, stop := row.args(t)
			var stdout strings.Builder
			if err := run(t.Context(), args, &stdout); err != nil {
				t.Error(err)
			}
			if stop != nil {
				if err := stop(); err != nil {
					t.Error(err)
				}
			}
			output := stdout.String()
			t.Log("\n" + output)
			judge(t, row.what, output)
			if row.heading == "" {
				return
			}
			recipe, err := os.ReadFile("../../docs/recipes/worker.md")
			if err != nil {
				t.Fatal(err)
			}
			_, shown, _ := strings.Cut("\n"+string(recipe), "\n"+row.heading)
			_, shown, _ = strings.Cut(shown, "```text\n")
			shown, _, _ = strings.Cut(shown, "```")
			if got, want := scenes(output), scenes(shown); !slices.Equal(got, want) {
				t.Errorf("scenes = %q; the recipe has %q", got, want)
			}
		})
	}
}

// judge goes by what the witness has counted.
func judge(t *testing.T, what, output string) {
	t.Helper()
	for _, want := range []string{"The " + what + " allows 10 a second.", what + " allows 6 at once."} {
		if !strings.Contains(output, want) {
			t.Errorf("the limits are not as announced: no %q", want)
		}
	}
	number := func(pattern string) float64 {
		t.Helper()
		m := regexp.MustCompile(pattern).FindStringSubmatch(output)
		if m == nil {
			t.Fatalf("the output has no %q", pattern)
		}
		n, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			t.Error(err)
		}
		return n
	}
	if most := number(`seen \d+ calls, at most (\d+) at once\.`); most != atOnce {
		t.Errorf("%v calls at once; want %d", most, atOnce)
	}
	calls, took := number(`There were (\d+) in`), number(`in (\d+\.\d) s\. Now`)
	if limit := 1 + perSecond*(took+0.05); calls > limit { // a time that was rounded
		t.Errorf("%v calls in %v s; want at most %v", calls, took, limit)
	}
	// The machine may be slow, but MaxInflight would take 5 minutes.
	if after := number(`have its slots, after (\d+\.\d) s`); after < 5 {
		t.Errorf("the slots of a worker that was killed were free after %v s", after)
	}
	if strings.Contains(output, "The server is stopped.") {
		if begun := number(`have begun (\d+) calls in`); begun != 0 {
			t.Errorf("%v calls have begun without a server; want none", begun)
		}
	}
}

// Jobs that are done go, those that fail are kept under another name, and those that were cut off are done again.
func TestWork(t *testing.T) {
	for what, limited := range map[string]func(*testing.T) (args []string, stop func() error){
		"agent": withAgent,
		"store": withServer,
	} {
		t.Run(what, func(t *testing.T) {
			args, stop := limited(t)
			testWork(t, args)
			if err := stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// withAgent starts an agent, and returns the arguments by which workers find it.
func withAgent(t *testing.T) (args []string, stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	out, printed := io.Pipe()
	served := make(chan error, 1)
	go func() {
		served <- run(ctx, []string{"-serve", "127.0.0.1:0", "-state", filepath.Join(t.TempDir(), "state")}, printed)
		printed.Close()
	}()
	var address string
	if _, err := fmt.Fscanf(out, "serving at %s\n", &address); err != nil {
		t.Fatal(err)
	}
	return []string{"-agent", address}, func() error {
		cancel()
		return <-served
	}
}

// withServer starts a server, and returns the arguments by which workers find it.
func withServer(t *testing.T) (args []string, stop func() error) {
	t.Helper()
	program := findServer(t)
	parts := &parts{ctx: t.Context()}
	t.Cleanup(parts.wait) // after the context has ended
	server, err := parts.startServer(program, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return []string{"-store", server.url()}, func() error { return server.end(syscall.SIGTERM) }
}

func testWork(t *testing.T, args []string) {
	t.Helper()
	folder := t.TempDir()
	for _, job := range []string{"good", "bad", "cut"} {
		if err := os.WriteFile(filepath.Join(folder, job+".job"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var mu sync.Mutex
	calls := make(map[string]int)
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		job := strings.TrimSuffix(r.FormValue("job"), mine())
		calls[job]++
		switch {
		case job == "bad.job":
			http.Error(w, "bad", http.StatusInternalServerError)
		case job == "cut.job" && calls[job] == 1:
			panic(http.ErrAbortHandler)
		}
	}))
	defer api.Close()
	if err := run(t.Context(), append(args, "-api", api.URL, "-jobs", folder), nil); err != nil {
		t.Error(err)
	}
	http.DefaultClient.CloseIdleConnections()

	mu.Lock()
	defer mu.Unlock()
	if want := map[string]int{"good.job": 1, "bad.job": 1, "cut.job": 2}; !maps.Equal(calls, want) {
		t.Errorf("calls = %v; want %v", calls, want)
	}
	left, err := filepath.Glob(filepath.Join(folder, "*"))
	if want := []string{filepath.Join(folder, "bad.job"+mine()+".failed")}; err != nil || !slices.Equal(left, want) {
		t.Errorf("files = %q, %v; want %q", left, err, want)
	}
}

func TestArguments(t *testing.T) {
	for _, args := range [][]string{
		{"what"},
		{"-what"},
		{"-serve", "nowhere"},
		{"-witness", "nowhere"},
		{"-store", "nowhere"},
		{"-store", "nowhere", "-api", "http://127.0.0.1:1"},
		{"-store", "redis://127.0.0.1:1", "-api", "http://127.0.0.1:1"},
	} {
		if err := run(t.Context(), args, io.Discard); err == nil {
			t.Errorf("%q: no error", args)
		}
	}
}

// The recipe of this program says how long it is.
func TestRecipe(t *testing.T) {
	recipe, err := os.ReadFile("../../docs/recipes/worker.md")
	if err != nil {
		t.Fatal(err)
	}
	agent, store := linesOf(t, "limits.go", "agent.go", "worker.go"), linesOf(t, "limits.go", "store.go", "worker.go")
	if sums := fmt.Sprintf("| **%d** | **%d** |\n", agent, store); !strings.Contains(string(recipe), sums) {
		t.Errorf("the recipe's table does not end with the lines that there are: %q", sums)
	}
}

// linesOf counts lines of code, without imports.
func linesOf(t *testing.T, files ...string) (lines int) {
	t.Helper()
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		inImports := false
		for line := range strings.Lines(string(text)) {
			line = strings.TrimSpace(line)
			inImports = line == "import (" || inImports && line != ")"
			if !inImports && line != "" && !strings.HasPrefix(line, "//") && !strings.HasPrefix(line, "package ") {
				lines++
			}
		}
		lines-- // the parenthesis that ends the imports
	}
	return lines
}
