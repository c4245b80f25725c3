// Package serve is a SPIFFE Workload API for the programs of this host: whoever knows
// SPIFFE, and connects to its Unix socket, gets the SVID of its own workload, and the
// bundles that go with it, and both anew whenever they change.
//
// Who asks is the kernel's word, not the caller's (caller.go). What it is, is read as
// for any connection of its (identity.Resolver). A program gets a private key of its
// own: the one that its tunnels use never leaves the proxy, where the source makes
// keys here (the controller's CA). SPIRE has one for each workload, which is passed on.
//
// JWT-SVIDs are not served: Unimplemented.
package serve
