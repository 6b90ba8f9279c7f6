// Package version is what this library calls itself.
package version

// Version names this library in telemetry, in metrics and to agents.
const Version = "0.1.0-dev"
