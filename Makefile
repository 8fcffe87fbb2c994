# Needs Go, make, bash, a C compiler for the race detector, and the servers that the tests start. Only
# lint, servers and test-long install anything.

GO ?= go

# Each fuzz target runs for this long. A number of runs, like 10000x, does as well.
test:      FUZZTIME ?= 3s
test-long: FUZZTIME ?= 1m
fuzz:      FUZZTIME ?= 5m

COUNT     ?= 20
SEEDS     ?= 20000
BENCH     ?= .
BENCHTIME ?= 1s

# Modules of their own, whose dependencies are not the root module's.
NESTED := throttlerd throttlerprom throttlerotel watch examples/observed internal/faulttest internal/adapters internal/browsertest benchmarks

RATELIMIT_VERSION     := v1.4.1-0.20260122083618-3fb702589d36
GRPCURL_VERSION       := v1.9.3
GOLANGCI_LINT_VERSION := v2.12.0
BENCHSTAT_VERSION     := v0.0.0-20260908200009-22c9c6c9d4da

# The program that throttlerd is compared with. It is built in seconds once its modules are there, and else in a minute.
RATELIMIT ?= $(CURDIR)/bin/ratelimit-$(RATELIMIT_VERSION)/service_cmd

# A client that asks throttlerd.
GRPCURL ?= $(CURDIR)/bin/grpcurl-$(GRPCURL_VERSION)/grpcurl

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help test test-long servers simulate fuzz bench bench-redis bench-postgres bench-go bench-wait bench-observe bench-ratelimit bench-check demo-failover demo-load demo-observe lint

# $(call find,Fuzz) prints package:function for each fuzz target, $(call find,Benchmark) for each
# benchmark. They are found and not listed, so that none is forgotten.
find = $(GO) list -f '{{range .TestGoFiles}}{{println $$.ImportPath (printf "%s/%s" $$.Dir .)}}{{end}}{{range .XTestGoFiles}}{{println $$.ImportPath (printf "%s/%s" $$.Dir .)}}{{end}}' ./... | \
	while read -r package file; do \
		if [ -n "$$file" ]; then sed -n "s|^func \($(1)[^a-z(][^(]*\)(.*|$$package:\1|p" "$$file"; fi; \
	done

# One processor for -cpu: with several, Go before 1.27 now and then ends a fuzz run that found
# nothing with "context deadline exceeded" (go.dev/issue/75804). The number of workers, which
# -parallel sets, remains that of the processors. Minimizing for longer than ten tries would take most
# of the time.
define fuzz
	@set -euo pipefail; \
	targets=$$($(call find,Fuzz)); \
	[ -n "$$targets" ] || { echo 'found no fuzz target' >&2; exit 1; }; \
	for target in $$targets; do \
		(set -x; $(GO) test -run '^$$' -fuzz "^$${target##*:}\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x -cpu 1 "$${target%:*}"); \
	done
endef

# What needs no server, as programs of 32 bits, which Linux runs on amd64. The mutants take long and say the same.
define test-32-bit
	@[ "$$($(GO) env GOHOSTOS)/$$($(GO) env GOHOSTARCH)" != linux/amd64 ] || (set -ex; export GOARCH=386 CGO_ENABLED=0; $(GO) vet ./...; \
		THROTTLER_SEEDS=20 $(GO) test -skip '^(TestWithoutOneOfTheRules|TestTheStoragePasses)' \
			. ./storage ./internal/law ./storage/runtime ./storage/failover ./throttlerhttp ./internal/batch; \
		THROTTLER_SEEDS=20 $(GO) test -run '^(TestRule|TestTheBound|TestNew|TestStats)' ./storage/lease)
endef

others = RATELIMIT='$(RATELIMIT)' GRPCURL='$(GRPCURL)'

help: ## Show this list (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

test: servers $(RATELIMIT) $(GRPCURL) ## Vet, test with the race detector and on 32 bits, fuzz each target for FUZZTIME=3s
	$(GO) vet ./...
	$(GO) test -race ./...
	$(test-32-bit)
	cd throttlerd && $(others) $(GO) test -race -tags=ratelimit,clients ./...
	cd throttlerprom && $(GO) test -race ./...
	cd throttlerotel && $(GO) test -race ./...
	cd internal/faulttest && $(GO) test -race ./...
	cd internal/adapters && $(GO) test -race ./...
	cd watch && $(GO) test -race ./...
	cd examples/observed && $(GO) test -race ./...
	cd internal/browsertest && $(GO) test ./...
	cd benchmarks && $(GO) vet ./...
	$(fuzz)

test-long: servers $(RATELIMIT) $(GRPCURL) ## Test COUNT=20 times, fuzz each target for FUZZTIME=1m, test with other versions of Redis and Postgres
	THROTTLER_LONG=1 $(GO) test -race -count=$(COUNT) -timeout=3h ./...
	$(MAKE) simulate
	cd throttlerd && $(others) THROTTLER_LONG=1 $(GO) test -race -tags=ratelimit,clients -count=$(COUNT) -timeout=1h ./...
	cd throttlerprom && $(GO) test -race -count=$(COUNT) -timeout=1h ./...
	cd throttlerotel && $(GO) test -race -count=$(COUNT) ./...
	cd internal/faulttest && $(GO) test -race -count=$(COUNT) -timeout=1h ./...
	cd internal/adapters && $(GO) test -race -count=$(COUNT) ./...
	cd watch && $(GO) test -race -count=$(COUNT) ./...
	cd examples/observed && $(GO) test -race -count=$(COUNT) ./...
	cd internal/browsertest && $(GO) test -count=$(COUNT) -timeout=1h ./...
	$(fuzz)
	GO='$(GO)' internal/servers/others.sh

# A server that runs, or a program in another place, is named in the environment.
servers: ## Install with apt-get what the tests start, unless it is there: redis-server, postgresql, pgbouncer, chromium, prometheus, nginx, caddy, nodejs
	@[ -n "$$REDIS_SERVER$$THROTTLER_REDIS_URL" ] || command -v redis-server >/dev/null || internal/servers/install.sh redis-server
	@[ -n "$$POSTGRES_BIN$$THROTTLER_POSTGRES_URL" ] || command -v postgres /usr/lib/postgresql/*/bin/postgres >/dev/null || internal/servers/install.sh postgresql
	@[ -n "$$PGBOUNCER$$THROTTLER_POSTGRES_URL" ] || command -v pgbouncer /usr/sbin/pgbouncer >/dev/null || internal/servers/install.sh pgbouncer
	@[ -n "$$CHROMIUM" ] || command -v chromium chromium-browser google-chrome >/dev/null || internal/servers/install.sh chromium
	@command -v prometheus promtool >/dev/null || internal/servers/install.sh prometheus
	@[ -n "$$NGINX" ] || command -v nginx /usr/sbin/nginx >/dev/null || internal/servers/install.sh nginx
	@command -v node >/dev/null || internal/servers/install.sh nodejs
	@[ -n "$$CADDY" ] || command -v caddy >/dev/null || internal/servers/install.sh caddy

$(CURDIR)/bin/ratelimit-$(RATELIMIT_VERSION)/service_cmd:
	GOBIN='$(@D)' $(GO) install github.com/envoyproxy/ratelimit/src/service_cmd@$(RATELIMIT_VERSION)

$(CURDIR)/bin/grpcurl-$(GRPCURL_VERSION)/grpcurl:
	GOBIN='$(@D)' $(GO) install github.com/fullstorydev/grpcurl/cmd/grpcurl@$(GRPCURL_VERSION)

simulate: ## Run SEEDS=20000 of the simulations of failover and of leases: about half an hour
	THROTTLER_SEEDS=$(SEEDS) $(GO) test -timeout=3h -run '^(TestTheBoundHoldsWhateverFails|TestAllIsBack)' ./storage/failover
	THROTTLER_SEEDS=$$(( $(SEEDS) / 20 )) $(GO) test -timeout=3h -run '^TestTheBoundHoldsUnderLeases' ./storage/failover
	THROTTLER_SEEDS=$(SEEDS) $(GO) test -timeout=3h -run '^TestTheBound' ./storage/lease

fuzz: ## Fuzz each target for FUZZTIME=5m
	$(fuzz)

# Flags of the program, such as FLAGS='-rounds 2 -d 50ms'. It is built and not run by "go run", which would pass
# no SIGTERM on.
bench: servers ## Put this beside its peers and write docs/benchmarks.md, in about 15 minutes
	@command -v wrk >/dev/null || internal/servers/install.sh wrk || echo 'without wrk there are no figures for HTTP' >&2
	@cd benchmarks && $(GO) build -o ../bin/bench . && exec ../bin/bench -out ../docs $(FLAGS)

bench-redis: servers ## Print the part of "make bench" about Redis, of fewer rounds
	@cd benchmarks && $(GO) build -o ../bin/bench . && exec ../bin/bench -only '^redis' -rounds 3 $(FLAGS)

bench-postgres: servers ## Print the part of "make bench" about Postgres, of fewer rounds
	@cd benchmarks && $(GO) build -o ../bin/bench . && exec ../bin/bench -only '^postgres' -rounds 3 $(FLAGS)

bench-go: ## Run the Go benchmarks that match BENCH=. for BENCHTIME=1s each
	@set -euo pipefail; \
	packages=$$($(call find,Benchmark) | sed 's/:[^:]*$$//' | sort -u); \
	[ -n "$$packages" ] || { echo 'found no benchmark' >&2; exit 1; }; \
	(set -x; $(GO) test -run '^$$' -bench '$(BENCH)' -benchtime $(BENCHTIME) -benchmem $$packages)

# The rates on one processor, as what is measured is late on one that is busy. The crowd on all: the others go on beside it.
bench-wait: servers ## Put Wait beside its peers, Consume and bare goroutines: rates, calls with tokens, a crowd that leaves
	cd benchmarks && $(GO) test -run '^$$' -bench '^Benchmark(Wait|WaitWithTokens)$$' -benchtime 5x -cpu 1 -timeout 30m .
	cd benchmarks && $(GO) test -run '^$$' -bench '^BenchmarkLeave$$' -benchtime 5x .

bench-observe: ## Run the Go benchmarks of observing: nobody, an empty function, metrics, watch
	@set -euo pipefail; for module in throttlerprom throttlerotel watch; do \
		(set -x; cd $$module && $(GO) test -run '^$$' -bench Observe -benchtime $(BENCHTIME) -cpu 1 .); \
	done

bench-ratelimit: servers $(RATELIMIT) ## Measure throttlerd beside envoyproxy/ratelimit, in turns of ROUNDS=20, for two minutes
	cd throttlerd && RATELIMIT='$(RATELIMIT)' $(GO) test -tags=ratelimit -run '^$$' -bench BesideEnvoyproxyRatelimit -benchtime 1x .

bench-check: ## Fail if the hot path got slower since BASE, by default the last tag: in turns, by benchstat
	@set -euo pipefail; \
	installed=$$($(GO) version -m bin/benchstat 2>/dev/null | awk '$$1 == "mod" { print $$3 }') || true; \
	if [ "$$installed" != '$(BENCHSTAT_VERSION)' ]; then \
		(set -x; GOBIN='$(CURDIR)/bin' $(GO) install golang.org/x/perf/cmd/benchstat@$(BENCHSTAT_VERSION)); \
	fi
	@GO='$(GO)' benchmarks/check.sh $(BASE)

# A program of its own and not "go run", which would pass no SIGTERM on.
demo-failover: servers ## Kill Redis under load and start it again, for 16 s: a line each second says who decides
	@$(GO) build -o bin/demo-failover ./examples/failover && exec bin/demo-failover

demo-load: ## Overload the example without and with -elastic, for a minute: a line each second says who is answered
	@$(GO) build -o bin/ ./examples/fastapi-like ./examples/load && exec bin/load -server bin/fastapi-like $(FLAGS)

# The same of a program with a go.mod of its own.
demo-observe: ## Run examples/observed under a load with one attacker for 30 s, and say which page to open
	@cd examples/observed && $(GO) build -o ../../bin/demo-observe . && exec ../../bin/demo-observe -load 30s

# Its cache tells findings by path, and knows equal files of two checkouts as one: after a checkout is removed,
# its findings came back in another, past every nolint. So each checkout has a cache of its own.
lint: export GOLANGCI_LINT_CACHE := $(CURDIR)/bin/golangci-lint-cache
lint: ## Check formatting, go.mod and the code; golangci-lint is installed in bin/ if need be
	@set -euo pipefail; \
	unformatted=$$(gofmt -l .); \
	[ -z "$$unformatted" ] || { printf 'run gofmt -w on:\n%s\n' "$$unformatted" >&2; exit 1; }
	@set -euo pipefail; for module in . $(NESTED); do (set -x; cd $$module && $(GO) mod tidy -diff); done
	@set -euo pipefail; \
	installed=$$($(GO) version -m bin/golangci-lint 2>/dev/null | awk '$$1 == "mod" { print $$3 }') || true; \
	if [ "$$installed" != '$(GOLANGCI_LINT_VERSION)' ]; then \
		(set -x; GOBIN='$(CURDIR)/bin' $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT_VERSION)); \
	fi
	@set -euo pipefail; for module in . $(NESTED); do (set -x; cd $$module && '$(CURDIR)/bin/golangci-lint' run --allow-parallel-runners ./...); done
