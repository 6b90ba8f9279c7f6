//go:build !unix

package policyfiles

// nonblocking is nothing where files do not wait for other processes.
const nonblocking = 0
