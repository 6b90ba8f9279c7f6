package adaptor

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMethodLabels(t *testing.T) {
	tests := []struct{ fullMethod, service, method string }{
		{"/shop.v1.Orders/Get", "shop.v1.Orders", "Get"},
		{"shop.v1.Orders/Get", "shop.v1.Orders", "Get"},
		{"/a/b/c", "a/b", "c"},
		{"/Get", "", "Get"},
		{"/shop.v1.Orders/", "shop.v1.Orders", ""},
		{"//", "", ""},
		{"", "", ""},
	}
	m := new(Methods)
	for _, tt := range tests {
		for range 2 { // made, and remembered
			want := map[string]string{"rpc.service": tt.service, "rpc.method": tt.method}
			if diff := cmp.Diff(want, m.Labels(tt.fullMethod)); diff != "" {
				t.Errorf("Labels(%q) (-want +got):\n%s", tt.fullMethod, diff)
			}
		}
	}
}

// Peers can make up methods. That fills no memory, and mixes up no labels.
func TestMethodsAreBounded(t *testing.T) {
	const goroutines = 4
	m := new(Methods)
	var wg sync.WaitGroup
	for g := range goroutines {
		wg.Go(func() {
			for i := range 3 * maxMethods {
				name := fmt.Sprint((i + g) % (2 * maxMethods))
				if got := m.Labels("/s/" + name)["rpc.method"]; got != name {
					t.Errorf("rpc.method of %q = %q", name, got)
				}
				m.Labels("/s/" + name + strings.Repeat("x", maxMethodLen))
			}
		})
	}
	wg.Wait()
	kept := 0
	for fullMethod := range m.known.Range {
		kept++
		if n := len(fullMethod.(string)); n > maxMethodLen {
			t.Errorf("a method of %d bytes is kept", n)
		}
	}
	if kept < maxMethods || kept >= maxMethods+goroutines {
		t.Errorf("%d methods are kept want %d", kept, maxMethods)
	}
}
