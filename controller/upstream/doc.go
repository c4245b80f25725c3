// Package upstream has the controller's intermediates signed by a SPIRE server, in whose
// trust domain the controller then is.
//
// The controller's process is a workload of a SPIRE agent on its machine, with a downstream
// entry. By the SVID that the Workload API gives it, it asks the server for a CA
// certificate (svid.v1, NewDownstreamX509CA), as a SPIRE server below another one does.
// The trust domain's roots come with the SVID, and newer ones as SPIRE rotates them.
//
// Nothing is kept here: package ca keeps what was signed, and goes on with it while agent or
// server are away.
package upstream
