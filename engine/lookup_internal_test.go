package engine

import (
	"fmt"
	"testing"
	"time"

	"github.com/headgate-go/headgate/internal/agentapi"
)

// A flow may wait after its lookup, so the verdict keeps only keys that the cache has.
func TestVerdictsKeepKeysThatAreFound(t *testing.T) {
	e, err := New(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if err := e.Agent().Store(t.Context(), agentapi.CacheKey{Key: "7", Global: true}, []byte("v"), time.Minute); err != nil {
		t.Fatal(err)
	}
	var keys []string
	for i := range 2000 {
		keys = append(keys, fmt.Sprint(i%1000))
	}
	took := 0
	asked := &agentapi.Lookup{Global: keys, Room: func(size int) bool { took += size; return true }}
	req := &agentapi.Request{ControlPoint: "point", Labels: agentapi.Labels{Shared: &agentapi.Shared{Options: agentapi.Options{Lookup: asked}}}}
	var v agentapi.Verdict
	if err := e.Agent().Check(t.Context(), req, &v); err != nil {
		t.Fatal(err)
	}
	if got := v.Details.Global; len(got) != 1 || string(got["7"].Value) != "v" || !got["7"].Hit {
		t.Errorf("the verdict keeps %v want the one key that is found", got)
	}
	if took != 1 {
		t.Errorf("the value takes %d bytes of the answer's room want 1", took)
	}
}
