package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var out strings.Builder
		if err := run(t.Context(), &out); err != nil {
			t.Fatal(err)
		}
		const want = `a.jpg  accepted, uploaded
b.jpg  accepted, uploaded
c.jpg  accepted, uploaded
d.jpg  rejected, retry after 500ms
d.jpg  accepted, uploaded
e.jpg  rejected, retry after 500ms
e.jpg  accepted, uploaded
`
		if out.String() != want {
			t.Errorf("run printed\n%swant\n%s", &out, want)
		}
		if took := time.Since(start); took != time.Second {
			t.Errorf("run took %v, want 1s", took)
		}
	})
}

func TestInterrupt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		errInterrupt := errors.New("interrupt")
		ctx, cancel := context.WithTimeoutCause(t.Context(), 200*time.Millisecond, errInterrupt)
		defer cancel()
		var out strings.Builder
		if err := run(ctx, &out); !errors.Is(err, errInterrupt) {
			t.Errorf("run = %v, want %v", err, errInterrupt)
		}
		if strings.Contains(out.String(), "e.jpg") {
			t.Errorf("run went on:\n%s", &out)
		}
	})
}
