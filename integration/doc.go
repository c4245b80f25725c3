// Package integration has no code of its own: its tests run the real programs in
// netlab worlds, and read like stories of what a user sees. 'make test' builds the
// programs first.
package integration
