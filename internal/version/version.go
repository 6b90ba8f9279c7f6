// Package version has the version of this library.
package version

// Version names this library in telemetry, in metrics and to agents.
const Version = "0.1.0-dev"
