package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
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

func TestShow(t *testing.T) {
	t.Setenv(asPart, "1")
	var stdout strings.Builder
	if err := run(t.Context(), nil, &stdout); err != nil {
		t.Error(err)
	}
	output := stdout.String()
	t.Log("\n" + output)

	recipe, err := os.ReadFile("../../docs/recipes/worker.md")
	if err != nil {
		t.Fatal(err)
	}
	_, shown, _ := strings.Cut(string(recipe), "```text\n")
	shown, _, _ = strings.Cut(shown, "```")
	if got, want := scenes(output), scenes(shown); !slices.Equal(got, want) {
		t.Errorf("scenes = %q; the recipe has %q", got, want)
	}
	for _, want := range []string{"The agent allows 10 a second.", "allows 6 at once."} {
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
	if most := number(`at most (\d+) at once\.`); most != atOnce {
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
}

// Jobs that are done go, those that fail are kept under another name, and those that were cut off are done again.
func TestWork(t *testing.T) {
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

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
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
	if err := run(t.Context(), []string{"-agent", address, "-api", api.URL, "-jobs", folder}, nil); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-served; err != nil {
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
	for _, args := range [][]string{{"what"}, {"-what"}, {"-serve", "nowhere"}, {"-witness", "nowhere"}} {
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
	lines := 0
	for _, file := range []string{"agent.go", "worker.go"} {
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
	if sum := fmt.Sprintf("| **%d** |\n", lines); !strings.Contains(string(recipe), sum) {
		t.Errorf("the recipe's table does not end with the %d lines that agent.go and worker.go have", lines)
	}
}
