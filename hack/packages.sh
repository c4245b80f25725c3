#!/bin/bash
# Prints package paths of one sort, for the Makefile:
#   benchmarks     those that have Go benchmarks
#   fuzz           those that have fuzz targets
#   unprivileged   those whose tests need no network namespaces
set -euo pipefail
cd "$(dirname "$0")/.."

with() { # packages with a test file that matches
	grep -rlE --include='*_test.go' --exclude-dir=bin "$1" . | xargs -r -n1 dirname | sort -u
}

case ${1:-} in
benchmarks) with '^func Benchmark' ;;
fuzz) with '^func Fuzz' ;;
unprivileged)
	for p in api identity policydb flow mtls controller internal/cli internal/settings examples; do
		[ -d "$p" ] && echo "./$p/..."
	done
	;;
*)
	echo "usage: $0 benchmarks|fuzz|unprivileged" >&2
	exit 2
	;;
esac
