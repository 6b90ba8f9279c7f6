package httpguard

import (
	"net/http"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// What an agent wants set is set only if HTTP can carry it, and if it is about nothing else than the request.
func TestSetHeaders(t *testing.T) {
	h := http.Header{"X-Own": {"1"}}
	setHeaders(h, map[string]string{
		"x-user": "u", "x-own": "2", "x-empty": "", "x-lines": "a\r\nb: c", "x-nul": "a\x00", "": "v", ":path": "/", "a b": "v", "x\r\ny": "v",
		"connection": "close", "content-length": "1",
	})
	want := http.Header{"X-User": {"u"}, "X-Own": {"2"}, "X-Empty": {""}}
	if diff := cmp.Diff(want, h); diff != "" {
		t.Errorf("headers (-want +got):\n%s", diff)
	}
}
