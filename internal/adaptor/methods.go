package adaptor

import (
	"strings"
	"sync"
	"sync/atomic"

	"github.com/headgate-go/headgate/internal/cleanpath"
)

// Methods keeps the labels of remote procedures. The flows of a procedure share them. The zero value is ready. It is
// safe for concurrent use.
type Methods struct {
	known sync.Map // from full methods to maps that do not change
	count atomic.Int64
}

// What is kept is bounded: a server with a handler for unknown services lets its peers make up methods.
const (
	maxMethods   = 1000
	maxMethodLen = 255 // bytes
)

// Labels returns the labels rpc.service and rpc.method of a procedure, by its name /package.Service/Method. The map
// must not be changed.
func (m *Methods) Labels(fullMethod string) map[string]string {
	if known, ok := m.known.Load(fullMethod); ok {
		return known.(map[string]string)
	}
	service, method := "", strings.TrimPrefix(fullMethod, "/")
	if i := strings.LastIndexByte(method, '/'); i >= 0 {
		service, method = method[:i], method[i+1:]
	}
	made := map[string]string{"rpc.service": service, "rpc.method": method}
	if len(fullMethod) <= maxMethodLen && m.count.Load() < maxMethods {
		if _, known := m.known.LoadOrStore(strings.Clone(fullMethod), made); !known {
			m.count.Add(1)
		}
	}
	return made
}

// MatchMethods returns a function that reports whether a procedure is one of these. A name that ends in "*" stands for
// all procedures that begin with what is before it. The first "/" of a name may be left out. The "*" matches only
// names.
func MatchMethods(methods ...string) func(fullMethod string) bool {
	names := make([]string, len(methods))
	for i, method := range methods {
		names[i] = strings.TrimPrefix(method, "/")
	}
	return func(fullMethod string) bool {
		called := strings.TrimPrefix(fullMethod, "/")
		for _, name := range names {
			prefix, isPrefix := strings.CutSuffix(name, "*")
			if called == name || isPrefix && strings.HasPrefix(called, prefix) && plain(called) {
				return true
			}
		}
		return false
	}
}

// plain reports whether a procedure's name, without its first slash, is a service and a method and nothing else to any
// reader.
func plain(called string) bool {
	return strings.Count(called, "/") == 1 && cleanpath.Is("/"+called) && !strings.HasSuffix(called, "/")
}
