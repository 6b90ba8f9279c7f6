package main

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		if err := run(t.Context(), &out); err != nil {
			t.Fatal(err)
		}
		const want = `callers                           runs      took  got
20 at once                           1      1.0s  20 × report 1
20 more                              0      0.0s  20 × report 1
20 after it has expired              1      1.0s  20 × report 2
`
		// Which of the last twenty are let in is a race between them.
		if got := out.String(); len(got) < len(want) || got[:len(want)] != want {
			t.Errorf("output:\n%s\nwant:\n%s", got, want)
		}
		for _, part := range []string{"5 × report 3", "15 × report 2"} {
			if !bytes.Contains(out.Bytes(), []byte(part)) {
				t.Errorf("output lacks %q:\n%s", part, out.String())
			}
		}
	})
}

func TestInterrupt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := run(ctx, new(bytes.Buffer)); !errors.Is(err, context.Canceled) {
			t.Errorf("run = %v", err)
		}
	})
}
