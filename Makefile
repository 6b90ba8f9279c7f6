# What there is to do with Headgate's sources: `make help` lists it.
#
# Testing needs Go, git and, for the race detector, a C compiler. The linters
# and generators that the other targets need are built from source when they
# are first used, in the versions that tools/ pins.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --warn-undefined-variables --no-builtin-rules --no-print-directory

# Each module is on its own: with go.work, the versions that one needs would
# also be those that the others are tested with.
export GOWORK := off

# When a process exits, the race detector waits for a second for races in goroutines that are left. Tests leave none,
# and there are many processes.
export GORACE ?= atexit_sleep_ms=10

# Every module but the tools.
MODULES := $(filter-out tools tools/%,$(patsubst %/,%,$(dir $(wildcard go.mod */go.mod */*/go.mod))))

TOOL := go tool -modfile='$(CURDIR)/tools/go.mod'
BUF := go tool -modfile='$(CURDIR)/tools/buf/go.mod' buf

# To be set on the command line: `make test RACE=`, `make test-long LONG=Memory`, `make fuzz FUZZTIME=10m`, `make soak SOAK=1h`, `make attack ATTACK=3s`, `make bench BENCHFLAGS="-rounds 9"`, `make load LOAD=30`.
RACE ?= -race
TESTFLAGS ?=
LONG ?= .
PACKAGES32 ?= ./...
FUZZTIME ?= 20s
SOAK ?= 10m
ATTACK ?= 20s
BENCHFLAGS ?=
LOAD ?= 10

# $(call in-modules,NAME,COMMAND) runs COMMAND in every module, in the others
# too when it fails in one, and then fails. $(call in-modules,NAME,COMMAND,MODULES)
# does so in these.
in-modules = failed=; \
	for module in $(or $(value 3),$(MODULES)); do \
		echo "$(1) ($$module)"; \
		(cd "$$module" && $(2)) || failed+=" $$module"; \
	done; \
	[ -z "$$failed" ] || { echo "$(1): failed in$$failed" >&2; exit 1; }

# Tests that need processes of their own are named so.
PROCESS := ^TestProcess

# Tests that need Redis servers, which they start, are named so.
FLEET := ^TestFleet

EXAMPLES := $(filter examples/%,$(MODULES))

.PHONY: help
help: ## Say what there is to make
	@grep -hE '^[a-z0-9-]+:.* ## ' '$(firstword $(MAKEFILE_LIST))' | \
		awk -F ':.* ## ' '{ printf "make %-14s %s\n", $$1, $$2 }'

.PHONY: all
all: test lint ## Test and lint

.PHONY: test
test: racedetector ## Run the tests of all modules, the race detector on
	@$(call in-modules,go test,$(call test-named,-v,$(PROCESS)|$(FLEET)|^TestMain$$|^Benchmark,$(RACE) -skip '$(PROCESS)|$(FLEET)'),$(filter-out $(EXAMPLES),$(MODULES)))

.PHONY: test-process
test-process: racedetector ## Run the tests that need processes: agents that are killed
	@$(call in-modules,go test -run $(PROCESS),$(call test-named,,$(PROCESS),$(RACE) -run '$(PROCESS)'),$(filter-out $(EXAMPLES),$(MODULES)))

.PHONY: test-examples
test-examples: racedetector ## Run the tests of the examples, each of which is a program
	@$(call in-modules,go test the examples,go test $(RACE) -shuffle=on -parallel 8 $(TESTFLAGS) $$(go list ./... | grep /examples/),$(EXAMPLES) redisstore .)

# Without redis-server these tests are skipped, and say so. With HEADGATE_TEST_REDIS=required they fail. Most of their time they wait
# for leases to run out, or for servers to find each other.
.PHONY: test-fleet
test-fleet: racedetector ## Run the tests that need Redis servers, which they start, stop and kill
	@$(call in-modules,go test -run $(FLEET),$(call test-named,,$(FLEET),$(RACE) -run '$(FLEET)' -parallel 8),$(filter-out $(EXAMPLES),$(MODULES)))

# $(call test-named,OPTION,NAMES,FLAGS) tests the packages that have a test whose name matches NAMES, an extended regular expression, or
# with the option -v one whose name does not. Other packages are not linked.
test-named = packages=$$(go list -f '{{.Dir}}' ./... | grep -v /examples/ | while read -r dir; do \
		names=$$(sed -n 's/^func \([A-Z][A-Za-z0-9_]*\)(.*/\1/p' "$$dir"/*_test.go 2>/dev/null || true); \
		[ -z "$$names" ] || ! grep -qE $(1) '$(2)' <<<"$$names" || echo "$$dir"; \
	done); \
	[ -z "$$packages" ] || go test -shuffle=on $(3) $(TESTFLAGS) $$packages

# Tests that do one thing very often do it less often under the race detector.
.PHONY: test-long
test-long: ## Run the tests that match LONG in full, without the race detector
	@$(call in-modules,go test in full,$(call test-named,,$(LONG),-run '$(LONG)' -skip '$(PROCESS)|$(FLEET)'),. policy/difftest)

# Without a C compiler the go command only says that -race requires cgo.
.PHONY: racedetector
racedetector:
	@[ -z '$(RACE)' ] || [ "$$(go env GOOS)" = darwin ] || { \
		cc=$$(go env CC); \
		[ "$$(go env CGO_ENABLED)" = 1 ] && command -v "$${cc%% *}" >/dev/null; \
	} || { \
		echo 'The race detector needs cgo and a C compiler (Debian: apt-get install gcc libc6-dev).' >&2; \
		echo 'To test without it: make test RACE=' >&2; \
		exit 1; \
	}

# Not every kernel runs programs of 32 bits, not even on amd64. There is no race
# detector for them. Other modules have nothing that an int could be too small for.
.PHONY: test32
test32: ## Run PACKAGES32 of the root module with ints of 32 bits, where this machine can
	@dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	printf 'package main\n\nfunc main() {}\n' >"$$dir/main.go"; \
	export GOOS=linux GOARCH=386 CGO_ENABLED=0; \
	go build -o "$$dir/main" "$$dir/main.go"; \
	if "$$dir/main" 2>/dev/null; then \
		go test -shuffle=on $(TESTFLAGS) $(PACKAGES32); \
	else \
		echo 'test32: this machine does not run programs of 32 bits, nothing was tested'; \
	fi

# The go command keeps what it has built. So this can be done while something else waits.
.PHONY: tools
tools: ## Build the linters, at the lowest priority
	@nice -n 19 $(TOOL) golangci-lint version >/dev/null

.PHONY: lint
lint: ## Run the linters, and check formatting and go.mod files
	@$(call in-modules,golangci-lint,$(TOOL) golangci-lint run --config='$(CURDIR)/.golangci.yml' ./...)
	@$(call in-modules,go vet for 32 bits,$(vet-32),. redisstore)
	@$(call in-modules,go mod tidy,go mod tidy -diff)
	@$(call in-modules,go mod verify,go mod verify)

# golangci-lint has vet's analyzers for this machine. Types are of the same size
# on 386 and arm. So vet finds for arm what it finds for 386, except in packages
# that have other files there. Without them, nothing is compiled for arm. The
# other modules are programs and tests of ours, whose dependencies would have to
# be compiled for 386 too.
define vet-32
export GOOS=linux CGO_ENABLED=0 && \
files() { GOARCH=$$1 go list -f '{{.ImportPath}} {{.GoFiles}} {{.SFiles}} {{.TestGoFiles}} {{.XTestGoFiles}}' ./... | sort; } && \
GOARCH=386 go vet ./... && on386=$$(files 386) && onarm=$$(files arm) && \
{ packages=$$(comm -13 <(echo "$$on386") <(echo "$$onarm") | cut -d ' ' -f 1); [ -z "$$packages" ] || GOARCH=arm go vet $$packages; }
endef

.PHONY: format
format: ## Format all sources
	$(TOOL) gofumpt -w .
	cd api && $(BUF) format --write

# Generated aside first: a generator that fails leaves the tree as it was. The
# old files go, so that none outlives the .proto file that it came from.
.PHONY: generate
generate: ## Lint the protocol, and generate its Go code
	@new=$$(mktemp -d); trap 'rm -rf "$$new"' EXIT; \
	cd api; \
	$(BUF) lint; \
	$(BUF) format --diff --exit-code; \
	$(BUF) generate --output "$$new"; \
	find . -name '*.pb.go' -delete; \
	cp -R "$$new/." .; \
	$(generated) >generated.sum

# buf takes minutes to build, and these files rarely change. So generated.sum has the hashes of what the code was generated by and from, and
# of the code. Whatever else changes one of them has to be generated anew.
generated = { find . ../tools/buf/go.mod -name '*.proto' -o -name '*.pb.go' -o -name 'buf*.yaml' -o -name go.mod; } | LC_ALL=C sort | \
	while read -r file; do echo "$$(git hash-object "$$file") $$file"; done

.PHONY: checkgenerate
checkgenerate: ## Fail if the protocol or its Go code has changed since make generate
	@cd api; diff generated.sum <($(generated)) || { \
		echo 'api/ is not what make generate left. Run it, and commit what it generates.' >&2; \
		exit 1; \
	}

.PHONY: fuzz
fuzz: ## Run every fuzz target for FUZZTIME
	@$(call in-modules,go test -fuzz,$(fuzz-module))

# go test fuzzes one target of one package at a time.
define fuzz-module
go test -list '^Fuzz' ./... | \
	awk '/^Fuzz/ { found[n++] = $$1 } /^ok/ { for (i = 0; i < n; i++) print $$2, found[i]; n = 0 }' | \
	{ failed=; trap 'exit 130' INT; while read -r package target; do \
		go test -run '^$$' -fuzz "^$$target\$$" -fuzztime '$(FUZZTIME)' -fuzzminimizetime 1x "$$package" </dev/null || failed+=" $$target"; \
	done; [ -z "$$failed" ] || { echo "fuzz: failed:$$failed" >&2; exit 1; }; }
endef

.PHONY: soak
soak: ## Keep an agent busy for SOAK that is killed again and again
	HEADGATE_SOAK='$(SOAK)' go test $(RACE) -run '^TestSoak$$' -timeout 0 -v ./agent

.PHONY: soak-fleet
soak-fleet: ## Have processes share limits for SOAK while their server and they are killed, stopped and restarted
	cd redisstore && HEADGATE_TEST_REDIS=required HEADGATE_SOAK='$(SOAK)' go test -run '^TestFleetSoak$$' -count=1 -timeout 0 -v ./internal/soak

# Each attack lasts for ATTACK. The victims are processes of their own, without the race detector.
.PHONY: attack
attack: ## Attack agents, guarded servers and clients, and measure what it costs them
	HEADGATE_ATTACK='$(ATTACK)' go test -timeout 0 -count=1 -v ./internal/testing/attack

.PHONY: bench
bench: ## Measure Headgate beside its peers, in one run
	cd bench && go run . $(BENCHFLAGS)

.PHONY: bench-fleet
bench-fleet: ## Measure the store in Redis beside its peers, in one run, on a server that it starts
	cd redisstore/bench && go run . $(BENCHFLAGS)

.PHONY: load
load: ## Measure the example service under load, for LOAD seconds a row
	@examples/service/load.sh '$(LOAD)'

# Code counts as covered by whichever package's tests run it. Generated code
# and examples do not count.
.PHONY: cover
cover: ## Measure how much code the tests run, in .tmp/cover.html line by line
	@mkdir -p .tmp
	@packages=$$(go list ./... | grep -vE '/(api|examples)(/|$$)' | paste -sd , -); \
	go test -covermode=atomic -coverpkg="$$packages" -coverprofile=.tmp/cover.out ./... >.tmp/cover.log || \
		{ cat .tmp/cover.log; exit 1; }
	@go tool cover -html=.tmp/cover.out -o .tmp/cover.html
	@go tool cover -func=.tmp/cover.out | tail -n 1
