package httpguard

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// No encoding of a PausedError shows the host, which is the value of a label.
func TestPausedErrorHidesItsHostFromJSON(t *testing.T) {
	data, err := json.Marshal(newPausedError("point", "secret.example:443", 429, time.Second))
	if err != nil || strings.Contains(string(data), "secret") || !strings.Contains(string(data), "point") {
		t.Errorf("Marshal() = %s, %v want the control point, and no host", data, err)
	}
}
