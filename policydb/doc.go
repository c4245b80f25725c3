// Package policydb says what may talk to what.
//
// Its resources are those of api/symbolon/v1/policy.proto; people write them in
// YAML (docs/policy.md). The package does no I/O and is the same in the
// controller, in the proxies, in explain and in tests:
//
//	Parse, FormatYAML      text to resources and back; errors show line and caret
//	DB, Plan, Snapshot     the working set: a checked change is one generation or nothing
//	DB.Test, Lint          every PolicyTest with its grounds; what is valid and hardly meant
//	Snapshot.VisibleTo     what one host needs of it
//	Snapshot.Assign        which namespace, name, labels and claims a workload gets
//	Compile, Decide        one side's verdict on one connection, in nanoseconds
//	Explain                the same in words: every candidate and why it fails
//	Reference              the same in a few lines, for fuzzing to hold Decide against
//
// A connection is judged twice, by two calls of Decide: the client's side by the
// policies on the chain of the client's namespace, the server's side by those on
// the server's. Both must allow; the stricter Protection of the two holds.
//
//	c, err := policydb.Compile(resources, generation)
//	q := &policydb.Query{From: client, To: server, Protocol: "tcp", Port: 443}
//	d := c.Decide(policydb.Client, q, time.Now())
//
// What is not known denies: an unknown namespace, a chain with a hole, a policy
// that this version cannot read.
package policydb
