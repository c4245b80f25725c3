package handover

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// MaxSnapshot bounds what is handed over, bytes: a generation of policy may have
// 64 MiB, and a host 4,096 certificates of some 3 KiB.
const MaxSnapshot = 96 << 20

// seals keep a memory file as it is, for good.
const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// ErrNotSealed: the descriptor is no memory file that nobody can change.
var ErrNotSealed = errors.New("not a sealed memory file")

// Seal puts data in a memory file (memfd_create(2)) and seals it. It has no name in
// any file system, and its memory goes when the last descriptor does. The caller
// closes it.
func Seal(name string, data []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), name)
	_, err = f.Write(data)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals)
		err = os.NewSyscallError("fcntl F_ADD_SEALS", err)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("memory file %s: %w", name, err)
	}
	return f, nil
}

// Unseal reads what Seal wrote. It refuses what another process could still change
// and what is larger than MaxSnapshot. The caller wipes the bytes when they were of
// use, and closes f.
func Unseal(f *os.File) ([]byte, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var have int
	var sealErr error
	if err := raw.Control(func(fd uintptr) { have, sealErr = unix.FcntlInt(fd, unix.F_GET_SEALS, 0) }); err != nil {
		return nil, err
	}
	if sealErr != nil || have&seals != seals {
		return nil, fmt.Errorf("%s: %w", f.Name(), ErrNotSealed)
	}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() > MaxSnapshot {
		return nil, fmt.Errorf("%s: %d bytes, at most %d", f.Name(), info.Size(), MaxSnapshot)
	}
	// The offset is shared with whoever has the descriptor, too.
	data := make([]byte, info.Size())
	if _, err := io.ReadFull(io.NewSectionReader(f, 0, info.Size()), data); err != nil {
		clear(data)
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return data, nil
}
