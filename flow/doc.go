// Package flow is what is known of connections afterwards: one record for each,
// written as a JSON line and sent to the controller in batches.
//
// What many records have in common is an edge: who reached whom on which port, and
// what became of it, with counts. A Reporter gathers edges for a minute each, and
// sends them beside the records.
//
// Nothing here ever holds up a connection: where a reader is slower than the
// records, records are dropped and counted.
package flow
