// Package bench measures Headgate beside its peers, in one run: machines are noisy, and only ratios of the same run say
// something. It is a module of its own, so that nobody who uses Headgate gets its peers.
//
//	make bench
package bench
