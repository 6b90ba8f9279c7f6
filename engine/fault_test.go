package engine_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/policy"
)

// goodFile is a policy file in order, for tests to break.
const goodFile = `apiVersion: fluxninja.com/v1alpha1
kind: Policy
metadata: {name: per-user}
spec:
  circuit:
    components:
      - flow_control:
          rate_limiter:
            selectors: [{control_point: point}]
            in_ports:
              bucket_capacity: {constant_signal: {value: 1}}
              fill_amount: {constant_signal: {value: 1}}
            parameters: {interval: 1h, limit_by_label_key: user_id}
`

// A policy file that is not in order makes no engine, and the error says where to look. This is cheap, whatever is in
// the file.
func TestFaultyPolicyFiles(t *testing.T) {
	edit := func(old, text string) string {
		if !strings.Contains(goodFile, old) {
			t.Fatalf("the good file has no %q", old)
		}
		return strings.Replace(goodFile, old, text, 1)
	}
	aliases := "x-a: &a [x, x, x, x, x, x, x, x, x]\n"
	for c := 'b'; c <= 'z'; c++ {
		aliases += fmt.Sprintf("x-%c: &%[1]c [%s]\n", c, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*%c, ", c-1), 9), ", "))
	}
	withoutParameters, _, _ := strings.Cut(goodFile, "            parameters")
	const limiter = "spec.circuit.components[0].flow_control.rate_limiter"
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  string // FILE:line:column and what is wrong
	}{
		{"empty", map[string]string{"bad.yaml": ""}, "bad.yaml:1:1: holds no policy"},
		{"only comments", map[string]string{"bad.yaml": "# soon\n---\n"}, "bad.yaml:1:1: holds no policy"},
		{"truncated in a word", map[string]string{"bad.yaml": goodFile[:len(goodFile)-9]}, `bad.yaml:13:25: bad YAML: "{" is not closed; "}" is missing`},
		{"truncated between lines", map[string]string{"bad.yaml": withoutParameters}, "bad.yaml:8:11: " + limiter + ".parameters.interval: is required"},
		{"truncated to nothing much", map[string]string{"bad.yaml": goodFile[:20]}, `bad.yaml:1:13: apiVersion: want fluxninja.com/v1alpha1, have "fluxninj"`},
		{"exploding aliases", map[string]string{"bad.yaml": aliases + goodFile}, "aliases stand for more than 32 MiB"},
		{"20 MB", map[string]string{"bad.yaml": goodFile + strings.Repeat("# padding\n", 2<<20)}, "bad.yaml:1:1: is larger than 16 MiB"},
		{"wrong type", map[string]string{"bad.yaml": edit("{value: 1}", "[1]")}, "bad.yaml:11:50: " + limiter + ".in_ports.bucket_capacity.constant_signal: want a mapping, have a sequence"},
		{"wrong type of a number", map[string]string{"bad.yaml": edit("1h", "3600")}, "bad.yaml:13:36: " + limiter + `.parameters.interval: want a duration such as "1.5s", have a number`},
		{"unknown key", map[string]string{"bad.yaml": edit("limit_by_label_key", "limit_by_label")}, "bad.yaml:13:40: " + limiter + `.parameters.limit_by_label: unknown key; did you mean "limit_by_label_key"?`},
		{"duplicate key", map[string]string{"bad.yaml": edit("{interval: 1h,", "{interval: 1h, interval: 1s,")}, `bad.yaml:13:40: duplicate key, first at line 13, column 26`},
		{"duplicate names in a file", map[string]string{"bad.yaml": goodFile + "---\n" + goodFile}, `bad.yaml:17:18: metadata.name: policy "per-user" is at `},
		{"duplicate names in two files", map[string]string{"a.yaml": goodFile, "bad.yaml": goodFile}, `bad.yaml:3:18: metadata.name: policy "per-user" is at `},
		{"one file of several", map[string]string{"a.yaml": goodFile, "bad.yaml": edit("name: per-user", "nam: other")}, `bad.yaml:3:12: metadata.nam: unknown key; did you mean "name"?`},
		{"no file", nil, ": the directory has no .yaml or .yml file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, data := range tt.files {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			e, err := engine.Load(dir)
			runtime.ReadMemStats(&after)
			if e != nil || err == nil {
				t.Fatalf("Load() = %v, %v want an error", e, err)
			}
			var at *policy.Error
			if !errors.As(err, &at) || !strings.HasPrefix(at.File, dir) {
				t.Errorf("Load() = %v want a *policy.Error with the file", err)
			}
			if !strings.Contains(err.Error(), tt.want) || len(err.Error()) > 1000 {
				t.Errorf("Load() = %v\nwant %s", err, tt.want)
			}
			if took := after.TotalAlloc - before.TotalAlloc; took > 64<<20 {
				t.Errorf("Load() took %d MiB", took>>20)
			}
		})
	}

	file := filepath.Join(t.TempDir(), "good.yaml")
	if err := os.WriteFile(file, []byte(goodFile), 0o600); err != nil {
		t.Fatal(err)
	}
	e, err := engine.Load(file)
	if err != nil {
		t.Fatalf("the file that was broken is broken itself: %v", err)
	}
	_ = e.Close()
}
