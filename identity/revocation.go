package identity

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// ErrRevoked: the certificate is valid, but it, its holder or the host that it was
// issued to was revoked.
var ErrRevoked = errors.New("revoked")

// ErrRevocationsMissed: a change is of another set than the one that is there. Ask for
// the whole.
var ErrRevocationsMissed = errors.New("a change of revocations is missing")

// errRevocation: part of a set is not understood.
var errRevocation = errors.New("revocations not understood, and not in force")

// Revocations is a set of revocations, ready to judge by. Immutable; nil revokes
// nothing.
type Revocations struct {
	number  uint64
	entries map[string]*symbolonv1.Revocation
	// The values are the entries' ids.
	ids     map[string]string
	serials map[revokedSerial]string
	hosts   map[revokedHost]string
	labels  map[Attribute][]revokedLabels // by the first of the labels
}

type revokedSerial struct {
	trustDomain string
	serial      Serial
}

type revokedHost struct {
	trustDomain string
	tag         hostTag
}

type revokedLabels struct {
	all Attributes
	id  string
}

// Update is the set after a change, or a whole one. What of it cannot be understood,
// since it is of a later version or malformed, is the error; the rest is in the set.
// ErrRevocationsMissed: nothing is; the set is as it was.
func (r *Revocations) Update(m *symbolonv1.Revocations) (*Revocations, error) {
	if m.GetBase() != 0 && m.GetBase() != r.Number() {
		return r, fmt.Errorf("%w: the change is of %d, there is %d", ErrRevocationsMissed, m.GetBase(), r.Number())
	}
	entries := make(map[string]*symbolonv1.Revocation, len(m.GetAdded()))
	if m.GetBase() != 0 {
		maps.Copy(entries, r.entries)
	}
	for _, id := range m.GetRemoved() {
		delete(entries, id)
	}
	for _, e := range m.GetAdded() {
		entries[e.GetId()] = e
	}
	next := &Revocations{
		number: m.GetNumber(), entries: entries,
		ids: make(map[string]string), serials: make(map[revokedSerial]string),
		hosts: make(map[revokedHost]string), labels: make(map[Attribute][]revokedLabels),
	}
	var unknown []string
	for id, e := range entries {
		if !next.add(id, e) {
			unknown = append(unknown, id)
		}
	}
	if len(unknown) == 0 {
		return next, nil
	}
	slices.Sort(unknown)
	return next, fmt.Errorf("%w: %d of %d, %s first", errRevocation, len(unknown), len(entries), unknown[0])
}

func (r *Revocations) add(id string, e *symbolonv1.Revocation) bool {
	switch s := e.GetSubject().(type) {
	case *symbolonv1.Revocation_SpiffeId:
		r.ids[s.SpiffeId] = id
		return s.SpiffeId != ""
	case *symbolonv1.Revocation_Serial:
		r.serials[revokedSerial{s.Serial.GetTrustDomain(), Serial(s.Serial.GetSerial())}] = id
		return len(s.Serial.GetSerial()) > 0
	case *symbolonv1.Revocation_Host:
		r.hosts[revokedHost{s.Host.GetTrustDomain(), tagOf(s.Host.GetHostId())}] = id
		return s.Host.GetHostId() != ""
	case *symbolonv1.Revocation_Labels:
		var all Attributes
		for k, v := range s.Labels.GetLabels() {
			all = append(all, Attribute{k, v})
		}
		if len(all) == 0 {
			return false // it would be everybody
		}
		r.labels[all[0]] = append(r.labels[all[0]], revokedLabels{all, id})
		return true
	}
	return false
}

// Empty tells whether nothing is revoked.
func (r *Revocations) Empty() bool {
	return r == nil || len(r.ids)+len(r.serials)+len(r.hosts)+len(r.labels) == 0
}

// Check judges a certificate by its serial number and its holder; serial "" is that of
// a certificate that is still to be issued. Errors: ErrRevoked, with the revocation's
// id.
func (r *Revocations) Check(serial Serial, p *Principal) error {
	if r == nil {
		return nil
	}
	if id, ok := r.ids[p.ID.String()]; ok {
		return fmt.Errorf("%w: %s, by revocation %s", ErrRevoked, p.ID, id)
	}
	if err := r.CheckCertificate(serial, p); err != nil {
		return err
	}
	if tag, ok := serial.tag(); ok && len(r.hosts) > 0 {
		if id, ok := r.hosts[revokedHost{p.ID.TrustDomain().Name(), tag}]; ok {
			return fmt.Errorf("%w: the host of %s, by revocation %s", ErrRevoked, p.ID, id)
		}
	}
	if len(r.labels) == 0 {
		return nil
	}
	for _, a := range p.Attributes {
		for _, l := range r.labels[a] {
			if l.match(p.Attributes) {
				return fmt.Errorf("%w: %s, which has the labels of revocation %s", ErrRevoked, p.ID, l.id)
			}
		}
	}
	return nil
}

// CheckCertificate judges by the serial number alone, and not by who its holder is or
// what host it was issued to.
func (r *Revocations) CheckCertificate(serial Serial, p *Principal) error {
	if r == nil || len(r.serials) == 0 {
		return nil
	}
	if id, ok := r.serials[revokedSerial{p.ID.TrustDomain().Name(), serial}]; ok {
		return fmt.Errorf("%w: the certificate %s of %s, by revocation %s", ErrRevoked, serial, p.ID, id)
	}
	return nil
}

// CheckHost judges a host by its id.
func (r *Revocations) CheckHost(trustDomain, hostID string) error {
	if r == nil {
		return nil
	}
	if id, ok := r.hosts[revokedHost{trustDomain, tagOf(hostID)}]; ok {
		return fmt.Errorf("%w: host %s, by revocation %s", ErrRevoked, hostID, id)
	}
	return nil
}

func (l *revokedLabels) match(attrs Attributes) bool {
	for _, want := range l.all {
		if !slices.Contains(attrs, want) {
			return false
		}
	}
	return true
}

// Number is the set's; 0: none has come.
func (r *Revocations) Number() uint64 {
	if r == nil {
		return 0
	}
	return r.number
}

// Len is how many revocations there are.
func (r *Revocations) Len() int {
	if r == nil {
		return 0
	}
	return len(r.entries)
}

// Proto is the whole set, by id; nil for none.
func (r *Revocations) Proto() *symbolonv1.Revocations {
	if r == nil {
		return nil
	}
	m := &symbolonv1.Revocations{Number: r.number}
	for _, id := range slices.Sorted(maps.Keys(r.entries)) {
		m.Added = append(m.Added, r.entries[id])
	}
	return m
}
