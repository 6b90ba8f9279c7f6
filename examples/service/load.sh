#!/usr/bin/env bash
# Measures what the service does under load, on the embedded engine and asking
# an agent, and prints a table in Markdown: requests a second, latencies and how
# many were refused, of a route without a guard beside guarded ones. It runs wrk
# for 10 seconds a row with 64 connections, all on this machine, and stops what
# it has started.
#
#   examples/service/load.sh [SECONDS]
#
# It needs Go and wrk, which it installs where it runs as root on Debian.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

seconds=${1:-10}
connections=64

if ! command -v wrk >/dev/null; then
	if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
		echo 'load.sh needs wrk (Debian: apt-get install wrk).' >&2
		exit 1
	fi
	export DEBIAN_FRONTEND=noninteractive
	{
		apt-get update -qq
		apt-get install -y -qq --no-install-recommends wrk
	} >&2
fi

tmp=$(mktemp -d)
started=()
stop() { # what was started last first: the service has something left to tell its agent
	for ((i = ${#started[@]} - 1; i >= 0; i--)); do
		kill "${started[i]}" 2>/dev/null || true
		wait "${started[i]}" || true
	done
	started=()
}
trap 'stop; rm -rf "$tmp"' EXIT

go build -o "$tmp" ./examples/service ./examples/agent

# await FILE PATTERN: what the first group of the pattern, a program's for sed,
# finds in what that program prints.
await() {
	local found
	for ((n = 0; n < 100; n++)); do
		found=$(sed -n "s|$2|\1|p" "$1")
		[ -z "$found" ] || { echo "$found" && return; }
		sleep 0.1
	done
	echo "load.sh: $1 does not say where it listens:" >&2
	cat "$1" >&2
	return 1
}

# row NAME PATH KEY: a row of the table.
row() {
	wrk --latency -t 2 -c "$connections" -d "${seconds}s" -H "X-API-Key: $3" "$url$2" >"$tmp/wrk"
	awk -v name="$1" -v decider="$decider" '
		$1 == "Requests/sec:" { rate = $2 }
		$1 ~ /^(50|75|90|99)%$/ { at[$1] = $2 }
		$2 == "requests" && $3 == "in" { total = $1 }
		$1 == "Non-2xx" { other = $NF }
		$1 == "Socket" { errors = $0 }
		END {
			printf "| %s | %s | %.0f | %s | %s | %.1f %% |\n", decider, name, rate, at["50%"], at["99%"], 100 * other / total
			if (errors != "") print "load.sh: " name ": " errors >"/dev/stderr"
		}' "$tmp/wrk"
}

# measure FLAGS: the rows of a service with these flags, by the environment that
# it has. Its agent may take long: a flow that goes on without would look fast.
measure() {
	APERTURE_APP_PORT=0 APERTURE_APP_GRPC_PORT=0 "$tmp/service" -check-timeout 5s "$@" >"$tmp/service.out" 2>"$tmp/service.err" &
	started+=($!)
	url=$(await "$tmp/service.out" 'HTTP at \(.*\)')
	row 'no guard, `/health`' /health none
	row '`Guard`, `/super`' /super none
	row 'middleware, `/orders`' /orders key-of-acme
	row 'middleware that refuses, `/orders`' /orders none
	row 'transport, `/weather`' /weather none
	stop
	cat "$tmp/service.err" >&2
}

echo "$(go env GOVERSION), $(nproc) processors, wrk and all programs on them; $connections connections, ${seconds} s a row"
echo
echo '| decided by | request | requests/s | median | 99 % | refused |'
echo '| --- | --- | --- | --- | --- | --- |'

decider='engine'
unset APERTURE_AGENT_ADDRESS
measure -policies examples/service/load.yaml

"$tmp/agent" -listen 127.0.0.1:0 -policies examples/service/load.yaml >"$tmp/agent.out" 2>"$tmp/agent.err" &
started+=($!)
decider='agent'
APERTURE_AGENT_ADDRESS=$(await "$tmp/agent.out" 'serving .* at \(.*\) until .*')
export APERTURE_AGENT_ADDRESS APERTURE_AGENT_INSECURE=true
measure
