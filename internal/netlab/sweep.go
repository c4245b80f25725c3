package netlab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Sweep removes what the worlds of dead processes left: it kills the processes
// in their namespaces and cgroups, and removes namespaces, cgroups and
// directories. Worlds of living processes are not touched. [New] calls it.
//
// Process ids must mean the same to all who share /run/netns; do not share that
// directory between pid namespaces.
func Sweep() error { return sweep(os.TempDir(), memoryDir) }

func sweep(tempDirs ...string) error {
	if err := sweepAll(tempDirs); err != nil {
		return fmt.Errorf("netlab: sweep: %w", err)
	}
	return nil
}

func sweepAll(tempDirs []string) error {
	names, err := orphans(netnsDir)
	if err != nil {
		return err
	}
	namespaces := make(map[inode]bool)
	for _, name := range names {
		path := filepath.Join(netnsDir, name)
		// A file without a mount on it (a crash in between) is no namespace; its
		// inode is not that of any process's namespace either.
		if ns, err := inodeOf(path); err == nil {
			namespaces[ns] = true
		}
	}
	errs := []error{killAll(namespaces)}
	for _, name := range names {
		errs = append(errs, removeNetns(name))
	}
	if root := cgroupRoot(); root != "" {
		dirs, err := orphans(root)
		errs = append(errs, err)
		for _, name := range dirs {
			errs = append(errs, removeCgroup(filepath.Join(root, name)))
		}
	}
	for _, temp := range tempDirs {
		dirs, err := orphans(temp)
		errs = append(errs, err)
		for _, name := range dirs {
			errs = append(errs, os.RemoveAll(filepath.Join(temp, name)))
		}
	}
	return errors.Join(errs...)
}

// orphans lists the entries of dir that worlds of dead processes made.
func orphans(dir string) (names []string, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if _, owner, ok := parseName(e.Name()); ok && !owner.alive() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}
