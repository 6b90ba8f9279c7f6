// Package soak has a test in which many processes share limits while servers and processes are killed, stopped and restarted. It fails
// if a limit did not hold.
package soak
