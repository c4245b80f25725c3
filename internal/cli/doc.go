// Package cli is the operator's command line, symbolon: a thin client of
// AdminService (api/symbolon/v1/admin.proto) that turns its answers into tables,
// JSON or YAML, and its errors into exit codes.
//
// Data goes to stdout, everything said to the person goes to stderr, so that a
// pipe gets data only. Nothing that came over the network reaches a terminal
// before its control characters were made visible (sanitize.go): hosts choose
// their names and error texts, and an operator's terminal is not theirs.
//
// The package depends on the API (and on flow, for the form of a record), not on
// policydb: resources are shown as the controller wrote them, so an older symbolon in
// front of a newer controller loses no field.
package cli
