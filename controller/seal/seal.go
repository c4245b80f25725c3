// Package seal keeps secrets at rest: AES-256-GCM under keys derived from an
// operator's key file.
//
// A sealed secret opens only with the same key file, under the same name and with
// the same context, so that one cannot be put in another's place.
package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

const (
	// KeySize is the size of the key file, bytes.
	KeySize = 32

	version  = 1
	saltSize = 32
	info     = "symbolon seal v1: "
)

var (
	// ErrWrongKey: it was sealed with another key file, or altered since.
	ErrWrongKey = errors.New("the key file does not open it: it is not the one that sealed it, or the data was altered")
	// ErrKeyFile: the key file cannot be used as it is.
	ErrKeyFile = errors.New("key file")
)

// Key is what a key file holds. It never prints itself.
type Key struct {
	path   string
	secret [KeySize]byte
}

// String names the file, not the secret.
func (k *Key) String() string { return k.path }

// GoString is String, so that %#v does not print the secret either.
func (k *Key) GoString() string { return k.path }

// Load reads a key file: exactly 32 random bytes, readable by its owner only.
// Errors: ErrKeyFile (wrapping fs.ErrNotExist if that is why).
func Load(path string) (*Key, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKeyFile, err)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%w: %s has mode %04o, others could read it; chmod 600 it", ErrKeyFile, path, st.Mode().Perm())
	}
	if st.Size() != KeySize {
		return nil, fmt.Errorf("%w: %s has %d bytes, want %d random ones", ErrKeyFile, path, st.Size(), KeySize)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKeyFile, err)
	}
	if len(b) != KeySize {
		return nil, fmt.Errorf("%w: %s changed while being read", ErrKeyFile, path)
	}
	return &Key{path: path, secret: [KeySize]byte(b)}, nil
}

// LoadOrCreate is Load, but makes the file (0600, in a directory 0700) if there
// is none.
func LoadOrCreate(path string) (*Key, error) {
	k, err := Load(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return k, err
	}
	b := make([]byte, KeySize)
	_, _ = rand.Read(b) // never fails: crypto/rand
	if err := WriteFile(path, b); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKeyFile, err)
	}
	return Load(path)
}

// WriteFile makes a file of mode 0600, durably and all at once. It never replaces
// one: fs.ErrExist.
func WriteFile(path string, data []byte) (err error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		_ = tmp.Close()
		_ = os.Remove(tmp.Name())
	}()
	if _, err := tmp.Write(data); err != nil {
		return err
	}
	if err := tmp.Sync(); err != nil {
		return err
	}
	// A link, unlike a rename, fails if somebody else made the file meanwhile.
	if err := os.Link(tmp.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	return d.Sync()
}

func (k *Key) aead(salt []byte, name string) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, k.secret[:], salt, info+name, 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// Seal encrypts a secret under a name. context is authenticated with it and is
// needed again to open it; it is not kept. The result is a version byte, a random
// salt of 32 bytes, then nonce and ciphertext.
func (k *Key) Seal(name string, secret, context []byte) ([]byte, error) {
	out := make([]byte, 1+saltSize, 1+saltSize+len(secret)+64)
	out[0] = version
	_, _ = rand.Read(out[1:]) // never fails: crypto/rand
	aead, err := k.aead(out[1:], name)
	if err != nil {
		return nil, fmt.Errorf("seal %s: %w", name, err)
	}
	return aead.Seal(out, nil, secret, context), nil
}

// Open decrypts what Seal made. Errors: ErrWrongKey.
func (k *Key) Open(name string, sealed, context []byte) ([]byte, error) {
	if len(sealed) < 1+saltSize || sealed[0] != version {
		return nil, fmt.Errorf("open %s: not in the sealed form, version %d", name, version)
	}
	aead, err := k.aead(sealed[1:1+saltSize], name)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	secret, err := aead.Open(nil, nil, sealed[1+saltSize:], context)
	if err != nil {
		return nil, fmt.Errorf("open %s with %s: %w", name, k.path, ErrWrongKey)
	}
	return secret, nil
}
