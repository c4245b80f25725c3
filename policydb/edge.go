package policydb

import (
	"net/netip"
	"time"
)

// Edge is what many connections had in common, as far as policy goes by it: who
// called whom on which port, and what became of it.
type Edge struct {
	// An end of another trust domain is Foreign; one that a host of ours answers for has
	// the namespace in which that judges it, whatever its ID's path.
	From, To Endpoint
	// FromAddress and ToAddress are set where an end has no identity: the address that
	// it was last seen with. Its Endpoint is the External that it was taken for, or the
	// zero value where it was none.
	FromAddress, ToAddress netip.Addr
	Protocol               string // "tcp" or "udp"
	Port                   uint16 // the server's
	// Allowed: policy let the connections through, as it was then.
	Allowed bool
	// Encrypted: the bytes were.
	Encrypted   bool
	Connections uint64
	First, Last time.Time
	// AddressOnly: at least one end proved no identity, but is an External or a mere
	// address.
	AddressOnly bool
}
