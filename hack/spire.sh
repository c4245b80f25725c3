#!/bin/bash
# Builds a real SPIRE server and agent, once: the tests of what Symbolon does for SPIRE's
# users run the real ones. They are left in $SYMBOLON_SPIRE, by default in
# ~/.cache/symbolon/spire/VERSION, which all clones of this repository share; where they
# are there already, nothing is done. Cold, on two cores, 8 to 13 minutes and 4 GB of
# Go's caches.
#
# SPIRE gives out no module that "go install" takes: its own go.mod and go.sum count,
# by which every byte is checked, so it is built inside its own module.
set -euo pipefail

version=v1.15.3
dir=${SYMBOLON_SPIRE:-${XDG_CACHE_HOME:-$HOME/.cache}/symbolon/spire/$version}
dir=$(realpath -m "$dir")
GO=${GO:-go}

# answers tells whether DIR has both programs, of this version, and they run here.
answers() {
	[ "$(cat "$1/version" 2>/dev/null)" = "$version" ] &&
		"$1/spire-server" --version >/dev/null 2>&1 &&
		"$1/spire-agent" --version >/dev/null 2>&1
}

answers "$dir" && exit 0

parent=$(dirname "$dir")
mkdir -p "$parent"
# Whoever comes second waits, and finds them done.
exec 9>"$parent/.building"
flock 9
answers "$dir" && exit 0

if ! command -v "${CC:-gcc}" >/dev/null; then
	echo "spire: the server needs cgo, for SQLite, and there is no ${CC:-gcc}: run make deps, or apt-get install gcc libc6-dev" >&2
	exit 1
fi

work=$(mktemp -d "$parent/.spire-XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir "$work/bin" "$work/mod"
cd "$work"
# Settings of whoever calls (a vendor directory, a workspace) are not for SPIRE's module.
export GOFLAGS=-buildvcs=false GOWORK=off CGO_ENABLED=1

echo "spire: building SPIRE $version into $dir: some minutes, once" >&2
src=$("$GO" mod download -json "github.com/spiffe/spire@$version" | sed -n 's/^\s*"Dir": "\(.*\)",\?$/\1/p')
if [ -z "$src" ]; then
	echo "spire: go mod download gave no directory of github.com/spiffe/spire@$version" >&2
	exit 1
fi
cp "$src/go.mod" "$src/go.sum" mod/
chmod u+w mod/go.mod mod/go.sum
# The module proxy withholds v1.1.0 of this one, of a plugin that is not used here.
"$GO" mod edit -replace=github.com/Keyfactor/ejbca-go-client-sdk=github.com/Keyfactor/ejbca-go-client-sdk@v1.0.2 mod/go.mod
(cd "$src" && nice -n 10 "$GO" build -modfile="$work/mod/go.mod" -mod=mod -trimpath -ldflags '-s -w' -o "$work/bin/" ./cmd/spire-server ./cmd/spire-agent)

echo "$version" >bin/version
answers bin || {
	echo "spire: what was built does not answer --version" >&2
	exit 1
}
# What is there does not answer, or is of another version; no reader sees half a
# directory.
if [ -e "$dir" ]; then mv -T "$dir" "$work/old"; fi
mv -T bin "$dir"
echo "spire: built in ${SECONDS}s" >&2
