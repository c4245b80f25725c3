package record

import (
	"bytes"
	"encoding/hex"
	"sync"
)

const (
	randomSize = 32
	// DefaultHandshakes bounds the handshakes that a KeyLog follows at a time.
	DefaultHandshakes = 16 << 10
)

// KeyLog takes traffic secrets from crypto/tls to the Tap of their connection: set
// it as tls.Config.KeyLogWriter. Lines are of the NSS key log format, "LABEL
// client_random secret" in hex; all but the two application traffic secrets are
// thrown away, as is every line of a connection without a Tap. Nothing is written
// anywhere. Safe for concurrent use.
//
// The client random is the peer's choice where this end is the server, and it is
// readable on the way: somebody may run a handshake of their own, whose secrets they
// know, beside one that they would like to read, with the same random. Two
// handshakes under one random at a time are therefore not told apart, and neither
// gets secrets (ErrNoSecrets). For the same reason clients and servers of one
// process, which might talk to each other, must not share a KeyLog.
type KeyLog struct {
	limit   int
	mu      sync.Mutex
	waiting map[[randomSize]byte]*secrets
}

// secrets are those of one client random, guarded by the KeyLog's mutex.
type secrets struct {
	client, server []byte
	holders        int // Taps; more than one: ambiguous for good
	ambiguous      bool
}

func (s *secrets) complete() bool { return s.client != nil && s.server != nil }

// NewKeyLog makes a KeyLog for at most limit handshakes at a time, DefaultHandshakes
// where it is 0. Handshakes beyond get no secrets.
func NewKeyLog(limit int) *KeyLog {
	if limit <= 0 {
		limit = DefaultHandshakes
	}
	return &KeyLog{limit: limit, waiting: make(map[[randomSize]byte]*secrets)}
}

// Len is how many handshakes are being followed.
func (k *KeyLog) Len() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.waiting)
}

// expect begins to listen for a random; nil where there are too many already.
func (k *KeyLog) expect(random [randomSize]byte) *secrets {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.waiting[random]
	switch {
	case s != nil && !s.complete():
		s.ambiguous = true
		s.holders++
		s.wipe()
		return s
	case s == nil && len(k.waiting) >= k.limit:
		return nil
	}
	// Secrets that are complete came before this handshake could have any: they stay
	// with their holder, whom the map need not know any more.
	s = &secrets{holders: 1}
	k.waiting[random] = s
	return s
}

// forget ends expect.
func (k *KeyLog) forget(random [randomSize]byte, s *secrets) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if s.holders--; s.holders > 0 {
		return
	}
	s.wipe()
	if k.waiting[random] == s {
		delete(k.waiting, random)
	}
}

// get is the pair of secrets, if they are there and certain. They are s's own.
func (k *KeyLog) get(s *secrets) (client, server []byte, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if s.ambiguous || !s.complete() {
		return nil, nil, false
	}
	return s.client, s.server, true
}

// wipe needs the lock.
func (s *secrets) wipe() {
	clear(s.client)
	clear(s.server)
	s.client, s.server = nil, nil
}

// Write takes one line. It never fails: an error would end the handshake.
func (k *KeyLog) Write(line []byte) (int, error) {
	label, rest, _ := bytes.Cut(bytes.TrimSuffix(line, []byte("\n")), []byte(" "))
	client := string(label) == "CLIENT_TRAFFIC_SECRET_0"
	if !client && string(label) != "SERVER_TRAFFIC_SECRET_0" {
		return len(line), nil
	}
	hexRandom, hexSecret, _ := bytes.Cut(rest, []byte(" "))
	var random [randomSize]byte
	if len(hexRandom) != 2*randomSize {
		return len(line), nil
	}
	if _, err := hex.Decode(random[:], hexRandom); err != nil {
		return len(line), nil
	}
	secret := make([]byte, hex.DecodedLen(len(hexSecret)))
	if _, err := hex.Decode(secret, hexSecret); err != nil {
		return len(line), nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.waiting[random]
	if s == nil || s.ambiguous {
		clear(secret)
		return len(line), nil
	}
	if client {
		s.client = secret
	} else {
		s.server = secret
	}
	return len(line), nil
}
