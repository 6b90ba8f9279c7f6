//go:build unix

package policyfiles

import "syscall"

// nonblocking has a file opened without waiting for another process.
const nonblocking = syscall.O_NONBLOCK
