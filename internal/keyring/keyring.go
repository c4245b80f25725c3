// Package keyring keeps a small secret in the kernel's memory across restarts of
// a process: in the user keyring (keyrings(7)) of root. It is never on a disk,
// gone after a reboot, and readable by the same uid only.
//
// Containers often forbid the keyctl system call; callers treat ErrUnavailable as
// "nothing kept".
package keyring

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// MaxSize is what a key of type "user" holds, bytes (user_defined.c in the kernel).
	MaxSize = 32767

	keyType = "user"
	// ownerOnly: KEY_USR_ALL, keyctl.h. Nothing for possessors: a process that a root
	// login started and that gave up root still possesses what root's session
	// keyring links to.
	ownerOnly = 0x003f0000
)

var (
	// ErrNotFound: nothing is kept under that name.
	ErrNotFound = errors.New("no such key in the user keyring")
	// ErrUnavailable: this process may not use keyrings.
	ErrUnavailable = errors.New("kernel keyrings are not available")
)

// Save keeps secret under name, in place of what was there, until ttl has passed.
func Save(name string, secret []byte, ttl time.Duration) error {
	if ttl < time.Second {
		return fmt.Errorf("keyring: %v is too short a time to keep a secret", ttl)
	}
	if len(secret) > MaxSize {
		return fmt.Errorf("keyring: %d bytes, at most %d", len(secret), MaxSize)
	}
	id, err := unix.AddKey(keyType, name, secret, unix.KEY_SPEC_USER_KEYRING)
	if err != nil {
		return wrap("saving", name, err)
	}
	if err := unix.KeyctlSetperm(id, ownerOnly); err != nil {
		return wrap("protecting", name, err)
	}
	if _, err := unix.KeyctlInt(unix.KEYCTL_SET_TIMEOUT, id, int(ttl/time.Second), 0, 0); err != nil {
		return wrap("limiting", name, err)
	}
	return nil
}

// Load returns what Save kept. Errors: ErrNotFound, ErrUnavailable.
func Load(name string) ([]byte, error) {
	id, err := unix.KeyctlSearch(unix.KEY_SPEC_USER_KEYRING, keyType, name, 0)
	if err != nil {
		return nil, wrap("finding", name, err)
	}
	buf := make([]byte, MaxSize)
	n, err := unix.KeyctlBuffer(unix.KEYCTL_READ, id, buf, 0)
	if err != nil {
		return nil, wrap("reading", name, err)
	}
	return buf[:n], nil
}

// Remove forgets name; it is no error if there is nothing.
func Remove(name string) error {
	id, err := unix.KeyctlSearch(unix.KEY_SPEC_USER_KEYRING, keyType, name, 0)
	if err == nil {
		_, err = unix.KeyctlInt(unix.KEYCTL_UNLINK, id, unix.KEY_SPEC_USER_KEYRING, 0, 0)
	}
	if err = wrap("removing", name, err); errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

func wrap(what, name string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOKEY), errors.Is(err, unix.EKEYREVOKED), errors.Is(err, unix.EKEYEXPIRED):
		return fmt.Errorf("%s %q: %w", what, name, ErrNotFound)
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EPERM):
		return fmt.Errorf("%s %q: %w: %w", what, name, ErrUnavailable, err)
	}
	return fmt.Errorf("%s key %q: %w", what, name, err)
}
