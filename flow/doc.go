// Package flow is what is known of connections afterwards: one record for each,
// written as a JSON line and sent to the controller in batches.
//
// Nothing here ever holds up a connection: where a reader is slower than the
// records, records are dropped and counted.
package flow
