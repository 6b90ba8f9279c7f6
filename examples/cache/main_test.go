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
20 after two runs                    0      0.0s  20 × report 2
`
		if got := out.String(); got != want {
			t.Errorf("output:\n%s\nwant:\n%s", got, want)
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
