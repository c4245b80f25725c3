#!/bin/bash
# Runs every fuzz target for FUZZTIME (20s). Go takes one target at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
go=${GO:-go}

for package in $(hack/packages.sh fuzz); do
	for target in $("$go" test -list '^Fuzz' "$package" | grep '^Fuzz'); do
		echo "== $package $target"
		"$go" test -run '^$' -fuzz "^$target\$" -fuzztime "${FUZZTIME:-20s}" "$package"
	done
done
