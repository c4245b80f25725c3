package ca

import (
	"crypto/tls"
	"net"
	"sync"
	"time"
)

// ServerCertificate gives the controller's listener its certificate, and a new one
// with a new key, in memory, when half of its life is over.
type ServerCertificate struct {
	ca        *CA
	names     []string
	addresses []net.IP

	mu      sync.Mutex
	current *tls.Certificate
	on      *footing
	renewAt time.Time
}

// ServerCertificate is for the names and addresses that clients dial.
func (c *CA) ServerCertificate(names []string, addresses []net.IP) *ServerCertificate {
	return &ServerCertificate{ca: c, names: names, addresses: addresses}
}

// Get is for tls.Config.GetCertificate. The chain ends with the root, for hosts
// that know no more of it than the pin in their join token; while the root is rotated,
// with both.
func (s *ServerCertificate) Get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.ca.cfg.Now()
	on := s.ca.stands()
	// Not after the intermediate or a root was replaced, either: so nothing of the old one
	// is left.
	if s.current != nil && now.Before(s.renewAt) && s.on == on && s.ca.inForce(s.current.Certificate) {
		return s.current, nil
	}
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	issued, err := s.ca.IssueController(key.Public(), s.names, s.addresses)
	if err != nil {
		return nil, err
	}
	s.current = &tls.Certificate{
		Certificate: append(issued.Chain, on.anchors...),
		PrivateKey:  key,
		Leaf:        issued.Leaf,
	}
	s.on, s.renewAt = on, now.Add(issued.Leaf.NotAfter.Sub(now)/2)
	return s.current, nil
}
