package flowctl

import (
	"reflect"
	"testing"
)

// The allocator has a size class of 176 bytes, and the next is 192: a flow that grows costs every call.
func TestFlowFitsItsSizeClass(t *testing.T) {
	if got := reflect.TypeFor[Flow]().Size(); got > 176 {
		t.Errorf("a flow has %d bytes want at most 176", got)
	}
}

// So does a check: after 768 bytes the next size class is 896.
func TestCheckFitsItsSizeClass(t *testing.T) {
	if got := reflect.TypeFor[check]().Size(); got > 768 {
		t.Errorf("a check has %d bytes want at most 768", got)
	}
}
