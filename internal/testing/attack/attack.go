// Package attack is a suite of attacks on an agent, guarded servers and clients. Run it with make attack.
//
// A victim runs in a process of its own, a build of ./victim without the race detector, so that its memory can be
// measured: the suite watches the process's peak, VmHWM in /proc, and sets GOMEMLIMIT. All traffic stays on loopback. The
// suite runs on Linux only.
//
// The machine may have other work. A process beside the victim measures for how long the machine lets work wait, and
// the bounds of times are longer by some of that. Attacks of less than 10 s check all bounds except those of times,
// which they only show.
//
// # Adding an attack on a server
//
// Write a function of type assault in server_test.go, and add a row to the table in TestServers. The function gets the
// victim's address, and attacks until its context ends. Before it returns, it closes what it opened. Constants bound
// how many connections it has, and how many calls are under way. The row names the victim, which is an agent, a guarded
// HTTP server or a guarded gRPC server, and its bounds:
//
//   - memory: the peak of the victim's memory.
//   - slower: how many times longer than before the innocent client's calls may take while the attack lasts, at the 99th
//     percentile. Times below a floor are not looked at, because they are the machine's.
//   - unanswered: the share of the innocent client's calls that may fail meanwhile.
//   - timely: a call that takes longer than a client waits by default counts as failed.
//
// The runner measures the innocent client before the attack, during it, and after it. Within 5 s after the attack the
// client's calls must take as long as before, and the victim must have the goroutines that it had. A victim takes
// arguments of its own by the row's args: -policies names a policy file for the victim's engine, for example.
//
// # Adding an attack on a client
//
// Add an agent to package hostile. TestClients runs a client with 64 flows against each of them, with the bounds that
// hold for all: memory, the latest that Start returns, connections a second, and processor time.
package attack

import "time"

// Stats is what a server that is a victim reports.
type Stats struct {
	Address    string `json:"address"`
	Goroutines int    `json:"goroutines"`

	// Starved is the longest delay of a piece of work since the last Stats, in a process that only measures that.
	Starved time.Duration `json:"starved"`
}

// Report is what a client that is a victim has seen.
type Report struct {
	Flows     int            `json:"flows"`
	Decisions map[string]int `json:"decisions"`

	// Late is the longest time by which a Start outlasted its check timeout; negative when none did.
	Late time.Duration `json:"late"`

	// LongestError is the number of bytes of the longest error.
	LongestError int `json:"longest_error"`

	// Close is how long Close took with a context of CloseTimeout. Goroutines is how many were left at most 6 s later.
	Close      time.Duration `json:"close"`
	Goroutines int           `json:"goroutines"`
}

// The timeouts of a client that is a victim.
const (
	CheckTimeout = 200 * time.Millisecond
	CloseTimeout = 200 * time.Millisecond
)
