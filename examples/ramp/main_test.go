package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const output = `the ramp      at
forward     10 %   · · · · · · · · · · · · · · · · · · · t · · · · · ·
forward     20 %   · · · · · · · · · · · · · · · p · · · t · · · · · ·
forward     30 %   · · · · e · · · · · · l · · · p · · · t · · w · · ·
forward     40 %   · · · · e · · · · · · l · · · p · r · t u · w · y ·
forward     50 %   · · c · e · · h · · k l · · · p · r · t u · w · y ·
forward     60 %   a b c · e · · h i · k l · · o p · r · t u v w · y z
hold        60 %   a b c · e · · h i · k l · · o p · r · t u v w · y z
hold        60 %   a b c · e · · h i · k l · · o p · r · t u v w · y z
backward    50 %   · · c · e · · h · · k l · · · p · r · t u · w · y ·
backward    40 %   · · · · e · · · · · · l · · · p · r · t u · w · y ·
backward    30 %   · · · · e · · · · · · l · · · p · · · t · · w · · ·
forward     40 %   · · · · e · · · · · · l · · · p · r · t u · w · y ·
forward     50 %   · · c · e · · h · · k l · · · p · r · t u · w · y ·
forward     60 %   a b c · e · · h i · k l · · o p · r · t u v w · y z
forward     70 %   a b c · e · g h i j k l · · o p q r · t u v w x y z
forward     80 %   a b c · e · g h i j k l · · o p q r s t u v w x y z
forward     90 %   a b c d e · g h i j k l m · o p q r s t u v w x y z
forward    100 %   a b c d e f g h i j k l m n o p q r s t u v w x y z
`

func TestOutput(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var stdout strings.Builder
		if err := run(t.Context(), nil, &stdout); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(output, stdout.String()); diff != "" {
			t.Errorf("stdout (-want +got):\n%s", diff)
		}
	})
}

func TestInterrupt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var stdout strings.Builder
		if err := run(ctx, nil, &stdout); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("run = %v want %v", err, context.DeadlineExceeded)
		}
		if got := strings.Count(stdout.String(), "forward"); got != 2 {
			t.Errorf("%d rows want 2:\n%s", got, &stdout)
		}
	})
}
