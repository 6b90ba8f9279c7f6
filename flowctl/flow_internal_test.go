package flowctl

import (
	"reflect"
	"testing"
)

// The allocator has room for 160 bytes, and then for 208: a flow that grows costs every call.
func TestFlowFitsItsSizeClass(t *testing.T) {
	if got := reflect.TypeFor[Flow]().Size(); got > 160 {
		t.Errorf("a flow has %d bytes want at most 160", got)
	}
}
