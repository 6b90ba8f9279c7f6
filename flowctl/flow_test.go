package flowctl

import (
	"reflect"
	"testing"
)

// The allocator has room for 192 bytes, and then for 208: a flow that grows costs every call.
func TestFlowFitsItsSizeClass(t *testing.T) {
	if got := reflect.TypeFor[Flow]().Size(); got > 192 {
		t.Errorf("a flow has %d bytes want at most 192", got)
	}
}
