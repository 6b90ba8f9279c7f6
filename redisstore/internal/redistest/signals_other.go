//go:build !unix

package redistest

import "syscall"

// Signals that no process gets: there is no redis-server here.
const (
	stopSignal     = syscall.SIGINT
	continueSignal = syscall.SIGINT
)
