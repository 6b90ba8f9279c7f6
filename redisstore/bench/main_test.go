package main

import (
	"bytes"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Every row measures something, and every target is judged; how fast things are is not a test's business.
func TestFleetRun(t *testing.T) {
	redistest.Find(t)
	var out bytes.Buffer
	if err := run(t.Context(), []string{"-rounds", "1", "-time", "1ms", "-keys", "1000", "-calls", "512"}, &out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		takeOne, takeThree, "Take, one hot bucket", "Take, one bucket, three instances", doOne, "Do, three shared limiters",
		"Do, one shared concurrency limiter", "Do, one leased limiter", doLocal, doStopped, bareRueidis, barePooled, bareGoRedis, redisRate, redisHot, throttling,
		"leased, 3 instances, one key, overload", "queue, two instances", "bytes for a bucket", "bytes for a slot",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the table does not have %q:\n%s", want, &out)
		}
	}
	if got, want := strings.Count(out.String(), ": met")+strings.Count(out.String(), ": missed"), 18; got != want {
		t.Errorf("%d targets judged want %d:\n%s", got, want, &out)
	}
}

// A run that fails says why, and leaves no server behind.
func TestFleetRunFails(t *testing.T) {
	for _, tt := range []struct {
		name string
		args []string
		path string
		want string
	}{
		{"a mistake in -rows", []string{"-rows", "("}, "", "-rows: "},
		{"no server", nil, "none", "redistest: no redis-server"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.path != "" {
				t.Setenv("PATH", tt.path)
			}
			var out bytes.Buffer
			if err := run(t.Context(), tt.args, &out); err == nil || !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("run() = %v want %s…", err, tt.want)
			}
		})
	}
}
