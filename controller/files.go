package controller

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/symbolon/symbolon/controller/seal"
)

// openToken reads a token (its name is for errors), or makes it: 32 random bytes,
// base64url. What is kept of it is its hash.
func openToken(name, path string) ([sha256.Size]byte, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		secret := make([]byte, 32)
		_, _ = rand.Read(secret) // never fails: crypto/rand
		data = []byte(base64.RawURLEncoding.EncodeToString(secret) + "\n")
		err = seal.WriteFile(path, data)
	}
	if err != nil {
		return [sha256.Size]byte{}, fmt.Errorf("%s: %w", name, err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm()&0o077 != 0 {
		return [sha256.Size]byte{}, errors.Join(err, fmt.Errorf("%s: others could read %s; chmod 600 it", name, path))
	}
	token := strings.TrimSpace(string(data))
	if len(token) < 32 {
		return [sha256.Size]byte{}, fmt.Errorf("%s: %s has %d characters, want 32 or more; remove it to get a new one", name, path, len(token))
	}
	return sha256.Sum256([]byte(token)), nil
}

// writeRoots keeps the public roots where operators and tools find them. Those may read
// at any time, so the file is there whole or as it was.
func (s *Server) writeRoots() error {
	path := s.cfg.caFile()
	next := path + ".next"
	err := os.WriteFile(next, encodePEM(s.ca.Roots()), 0o644)
	if err == nil {
		err = os.Rename(next, path)
	}
	if err != nil {
		return fmt.Errorf("controller: %w", err)
	}
	return nil
}

func encodePEM(certs []*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}
