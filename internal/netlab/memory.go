package netlab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// memoryDir is a file system that no disk is behind (a swap apart).
const memoryDir = "/dev/shm"

// MemoryDir returns a directory of the world's in memory, mode 0755, made at the first
// call and removed by Close and Sweep: for programs that keep private keys in files.
func (w *World) MemoryDir() (string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(memoryDir, &st); err != nil {
		return "", fmt.Errorf("netlab: %s: %w", memoryDir, err)
	}
	if st.Type != unix.TMPFS_MAGIC {
		return "", fmt.Errorf("netlab: %s is no tmpfs: private keys would be on a disk (mount -t tmpfs tmpfs %[1]s)", memoryDir)
	}
	dir := filepath.Join(memoryDir, w.id)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("netlab: %w", err)
	}
	// Mkdir is subject to the umask; other users must be able to traverse.
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", fmt.Errorf("netlab: %w", err)
	}
	return dir, nil
}
