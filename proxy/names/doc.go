// Package names keeps the addresses of DNS names that policy speaks of: Externals and
// Services by fqdns.
//
// Whole names are resolved again and again, by the host's own /etc/resolv.conf, each
// when most of its answer's TTL has passed (at least 1 s, at most 1 h, with jitter).
// Names under a wildcard cannot be listed: one of those is resolved when a client asks
// for it, and what the client says counts only if the address that it has dialled is
// in the answer.
//
// An address counts until the TTL of the last answer that had it has passed, and for
// linger longer: the client may have been given it a moment before. If no answer comes,
// the last good one is kept for staleFailure after its TTL, and if the answer is that
// there are no addresses, for staleNegative.
//
// DNS is not authenticated. An answer is taken only from the server that was asked, on
// a port of its own for each question, and with the question's number and text, which
// keeps out who is not on the path; it is no proof against who is. Addresses that no
// name of another's should have (loopback, link-local, multicast) are left out, and
// policydb lets no name stand against a deny or a Service.
//
// Search domains and other options of /etc/resolv.conf but timeout and attempts are
// ignored, and so are /etc/hosts and NSS: names are absolute.
package names
