package redisstore

import (
	"context"
	"errors"
	"os"
	"testing"

	"github.com/headgate-go/headgate/internal/shared"
)

func TestMayHaveCounted(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  error
		want bool
	}{
		{"none", nil, false},
		{"no answer in time", errTimeout, true},
		{"no answer in time, because the caller left", errors.Join(errTimeout, context.Canceled), true},
		{"a connection that broke", errConnection, true},
		{"an answer without sense", errReply, true},
		{"a script that failed", &serverError{"ERR"}, true},
		{"a script that met a value of another kind", &serverError{"WRONGTYPE"}, true},
		{"a code that is not known", &serverError{"NEW"}, true},
		{"no memory", &serverError{"OOM"}, false},
		{"a replica", &serverError{"READONLY"}, false},
		{"no replica", &serverError{"NOREPLICAS"}, false},
		{"a slot that has moved", &serverError{"MOVED"}, false},
		{"not asked", shared.ErrDown, false},
		{"too late by the server's clock", errLate, false},
		{"a calendar that is too far away", errCalendar, false},
		{"a newer version's state", errNewer, false},
		{"closed", errClosed, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := mayHaveCounted(tt.err); got != tt.want {
				t.Errorf("mayHaveCounted(%v) = %v want %v", tt.err, got, tt.want)
			}
		})
	}
}

// The errors of calls that took too long are timeouts to net, net/http and os.
func TestTimeouts(t *testing.T) {
	for err, want := range map[error]bool{errTimeout: true, errConnection: false, errClosed: false} {
		if os.IsTimeout(err) != want {
			t.Errorf("os.IsTimeout(%v) = %v want %v", err, !want, want)
		}
	}
}
