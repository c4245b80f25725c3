# Symbolon. `make demo` shows it, `make test` proves it, `make help` lists the rest.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

GO      ?= go
BIN     := bin
TOOLS   := $(CURDIR)/bin/tools
# Tests and demo call iptables and servers by name; not every root's PATH has them.
export PATH := $(PATH):/usr/sbin:/sbin
# Builds must not need git, nor an owner of the tree that git trusts.
export GOFLAGS := $(filter-out -buildvcs=%,$(GOFLAGS)) -buildvcs=false

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
LDFLAGS := -s -w -X main.version=$(VERSION)

# Tools, pinned. Each lives in a directory of its name and version, so that a new
# pin is a new build and nothing of the machine's own is used.
GOLANGCI_LINT := $(TOOLS)/golangci-lint@v2.15.0/golangci-lint
BUF           := $(TOOLS)/buf@v1.75.0/buf
PROTOC_GO     := $(TOOLS)/protoc-gen-go@v1.36.12/protoc-gen-go
PROTOC_CONNECT := $(TOOLS)/protoc-gen-connect-go@v1.21.1/protoc-gen-connect-go
# v1.9.0 needs a version of golang.org/x/telemetry that the module proxy withholds.
GOVULNCHECK   := $(TOOLS)/govulncheck@v1.8.0/govulncheck

DURATION     ?= 10m
TEST_TIMEOUT ?= 40m
FUZZTIME     ?= 20s
BENCH        ?= .

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##### build

# One path for each program: main package and binary.
.PHONY: build
build: $(BIN)/symbolon-proxy $(BIN)/symbolon-controller $(BIN)/symbolon ## build the three programs into bin/

# Go knows what is up to date better than make: always ask it.
.PHONY: FORCE
FORCE:

$(BIN)/symbolon-proxy: PKG := ./cmd/proxy
$(BIN)/symbolon-controller: PKG := ./cmd/controller
$(BIN)/symbolon: PKG := ./cmd/symbolon
$(BIN)/symbolon-demo: PKG := ./internal/demo
$(BIN)/symbolon-proxy $(BIN)/symbolon-controller $(BIN)/symbolon $(BIN)/symbolon-demo: FORCE
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $@ $(PKG)

# A module of its own: what it needs of SPIRE's stays out of the programs above.
COMPOSER := packaging/spire-composer

.PHONY: composer
composer: ## build SPIRE's CredentialComposer plugin into bin/
	cd $(COMPOSER) && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o $(abspath $(BIN))/symbolon-spire-composer .

##### see it and prove it

.PHONY: deps
deps: ## install what demo and tests need from the distribution
	@hack/deps.sh

.PHONY: demo
demo: deps build $(BIN)/symbolon-demo ## a small world of hosts, a NAT and a balancer, shown (needs root)
	@$(BIN)/symbolon-demo

.PHONY: test
test: deps build composer $(BIN)/symbolon-demo ## all tests, with the race detector (needs root)
	CGO_ENABLED=1 $(GO) test -race -timeout $(TEST_TIMEOUT) ./...
	cd $(COMPOSER) && CGO_ENABLED=1 $(GO) test -race -timeout $(TEST_TIMEOUT) ./...

.PHONY: spire
spire: deps ## build a real SPIRE, once (10 minutes); make test then includes the tests with it
	@GO='$(GO)' hack/spire.sh

.PHONY: soak
soak: deps build ## connections of every kind for DURATION (10m); nothing may be left (needs root)
	SYMBOLON_SOAK=$(DURATION) $(GO) test ./integration -run '^TestSoak$$' -count=1 -v -timeout 6h

.PHONY: test-short
test-short: ## the tests that need neither root nor other programs
	$(GO) test -short $$(hack/packages.sh unprivileged)

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME (20s) each
	@FUZZTIME=$(FUZZTIME) hack/fuzz.sh

.PHONY: bench
bench: bench-build ## the data plane beside HAProxy, nginx and others, and policy decisions, 15 minutes (needs root)
	$(BIN)/symbolon-bench $(BENCH_FLAGS)

.PHONY: bench-quick
bench-quick: bench-build ## the same in under 3 minutes, less exact
	$(BIN)/symbolon-bench -quick $(BENCH_FLAGS)

.PHONY: bench-build
bench-build: build
	@hack/deps.sh bench
	CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN)/symbolon-bench ./internal/bench

.PHONY: bench-go
bench-go: ## the Go benchmarks of packages; BENCH=regexp selects
	$(GO) test -run '^$$' -bench '$(BENCH)' -benchmem $$(hack/packages.sh benchmarks)

##### keep it clean

.PHONY: lint
lint: $(GOLANGCI_LINT) ## gofmt, go vet, golangci-lint, govulncheck
	@unformatted=$$(gofmt -l $$(git ls-files '*.go' 2>/dev/null || find . -name '*.go')); \
	if [ -n "$$unformatted" ]; then echo "gofmt -w these:"; echo "$$unformatted"; exit 1; fi
	$(GO) vet ./...
	$(GOLANGCI_LINT) run ./...
	cd $(COMPOSER) && $(GO) vet ./... && $(GOLANGCI_LINT) run --config $(CURDIR)/.golangci.yml ./...
	@GOVULNCHECK=$(GOVULNCHECK) hack/vulncheck.sh

.PHONY: generate
generate: $(BUF) $(PROTOC_GO) $(PROTOC_CONNECT) ## generate Go from api/*.proto
	PATH="$(dir $(PROTOC_GO)):$(dir $(PROTOC_CONNECT)):$$PATH" $(BUF) generate

.PHONY: check-generate
check-generate: generate ## fail if the committed generated code is not what api/*.proto gives
	@git diff --exit-code --stat -- api || { echo "api/ differs from what is committed: commit what make generate made"; exit 1; }

.PHONY: clean
clean: ## remove bin/
	rm -rf $(BIN)

##### tools

# The directory is name@version; the module is told by the name.
tool = GOBIN=$(@D) CGO_ENABLED=0 $(GO) install $(1)@$(lastword $(subst @, ,$(notdir $(@D))))

$(GOLANGCI_LINT):
	$(call tool,github.com/golangci/golangci-lint/v2/cmd/golangci-lint)
$(BUF):
	$(call tool,github.com/bufbuild/buf/cmd/buf)
$(PROTOC_GO):
	$(call tool,google.golang.org/protobuf/cmd/protoc-gen-go)
$(PROTOC_CONNECT):
	$(call tool,connectrpc.com/connect/cmd/protoc-gen-connect-go)
$(GOVULNCHECK):
	$(call tool,golang.org/x/vuln/cmd/govulncheck)
