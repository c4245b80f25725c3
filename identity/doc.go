// Package identity says who a workload is, and proves it.
//
// A workload is what policy speaks of. On a plain host it is a (cgroup,
// executable, uid): a systemd unit's process or a login's; where an agent attests
// processes (package spire) it is one process. Resolver finds it from the kernel's
// word on a socket; Source gives it an X.509-SVID, which Manager keeps fresh; Verify judges the certificates of the other side, and says who it is.
//
// Attributes are key=value pairs. Where a value comes from is part of its key,
// and a source can only set its own:
//
//	host.*       attested at enrolment
//	cloud.*      a verified instance document
//	os.*         the host's operating system and the workload's user
//	proc.*       the process: exe, exe_sha256, uid, cgroup, unit, user_unit, slice;
//	             on request args, start, parent_unit
//	container.*  container.id by its cgroup; name, runtime, and k8s.* and image.*, by the
//	             word of the runtime (identity/containers)
//	spiffe.*     derived from the verified certificate: id, trust_domain
//	anything else, without a dot-separated source: labels, given by Profiles
//
// The ones that policy may need are the SVID's claims: an extension of the leaf
// (claims.go). Nothing that a process says of itself is an attribute, but for
// proc.args, which is there only where it was asked for.
package identity
