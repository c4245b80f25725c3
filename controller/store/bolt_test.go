package store_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/symbolon/symbolon/controller/store"
	"github.com/symbolon/symbolon/controller/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, path string) *store.Bolt {
	t.Helper()
	s, err := store.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func put(t *testing.T, s store.Store, key string, value []byte) int64 {
	t.Helper()
	rev, ok, err := s.Txn(t.Context(), nil, []store.Op{store.Put(key, value)})
	if err != nil || !ok {
		t.Fatalf("put %s: ok=%v err=%v", key, ok, err)
	}
	return rev
}

func TestBoltConformance(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store { return open(t, filepath.Join(t.TempDir(), "db")) })
}

func TestBoltSurvivesReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "made", "by", "open", "db")
	s := open(t, path)
	rev := put(t, s, "a", []byte("kept"))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
		if st, err := os.Stat(name); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: mode %v, %v; want %v", name, st.Mode().Perm(), err, want)
		}
	}
	s = open(t, path)
	if kv, err := s.Get(t.Context(), "a"); err != nil || string(kv.Value) != "kept" || kv.ModRevision != rev {
		t.Errorf("%+v, %v", kv, err)
	}
	if next := put(t, s, "b", nil); next != rev+1 {
		t.Errorf("revision after reopening %d, want %d", next, rev+1)
	}
}

func TestBoltTightensPermissions(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	if err := open(t, path).Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	open(t, path)
	if st, _ := os.Stat(path); st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, want 0600", st.Mode().Perm())
	}
}

func TestBoltIsExclusive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	open(t, path)
	if _, err := store.Open(path); !errors.Is(err, store.ErrLocked) || !strings.Contains(err.Error(), path) {
		t.Errorf("err = %v, want ErrLocked with the path", err)
	}
}

func TestBoltWatchFallsBehind(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "db"))
	start := put(t, s, "start", nil)
	// More than is remembered, in one transaction: it cannot be shown in part.
	var ops []store.Op
	for i := range 9000 {
		ops = append(ops, store.Put(fmt.Sprintf("k/%d", i), nil))
	}
	rev, _, err := s.Txn(t.Context(), nil, ops)
	if err != nil {
		t.Fatal(err)
	}
	for e, err := range s.Watch(t.Context(), "k/", start) {
		if !errors.Is(err, store.ErrCompacted) {
			t.Errorf("event %v, err %v; want ErrCompacted", e.Key, err)
		}
		break
	}
	next := put(t, s, "k/next", nil)
	for e, err := range s.Watch(t.Context(), "k/", rev) {
		if err != nil || e.ModRevision != next {
			t.Errorf("after relisting: %+v, %v", e, err)
		}
		break
	}
}

func TestBoltSnapshotOpens(t *testing.T) {
	dir := t.TempDir()
	s := open(t, filepath.Join(dir, "db"))
	rev := put(t, s, "a", []byte("1"))
	var b bytes.Buffer
	if err := s.Snapshot(t.Context(), &b); err != nil {
		t.Fatal(err)
	}
	put(t, s, "a", []byte("2"))
	copied := filepath.Join(dir, "copy")
	if err := os.WriteFile(copied, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	if kv, err := open(t, copied).Get(t.Context(), "a"); err != nil || string(kv.Value) != "1" || kv.ModRevision != rev {
		t.Errorf("%+v, %v", kv, err)
	}
}

// TestBoltDamage: a damaged file is an error with the path, never a crash and
// never an empty store.
func TestBoltDamage(t *testing.T) {
	good := filepath.Join(t.TempDir(), "db")
	s := open(t, good)
	for i := range 200 {
		put(t, s, fmt.Sprintf("key/%d", i), bytes.Repeat([]byte{byte(i)}, 2000))
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	intact, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	for name, damage := range map[string]func([]byte) []byte{
		"not a database":    func([]byte) []byte { return bytes.Repeat([]byte("text "), 5000) },
		"meta pages zeroed": func(b []byte) []byte { clear(b[:2*os.Getpagesize()]); return b },
		"truncated":         func(b []byte) []byte { return b[:8*os.Getpagesize()] },
		"data pages zeroed": func(b []byte) []byte { clear(b[4*os.Getpagesize():]); return b },
		"data pages garbage": func(b []byte) []byte {
			for i := 4 * os.Getpagesize(); i < len(b); i++ {
				b[i] = 0xA5
			}
			return b
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "db")
			if err := os.WriteFile(path, damage(bytes.Clone(intact)), 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := store.Open(path)
			if err == nil {
				_ = s.Close()
				t.Fatal("opened")
			}
			if !errors.Is(err, store.ErrCorrupt) || !strings.Contains(err.Error(), path) {
				t.Errorf("err = %v, want ErrCorrupt with the path", err)
			}
		})
	}
}

// TestBoltFullDisk fills a small tmpfs, in a mount namespace of its own so that
// the machine's mounts stay as they are.
func TestBoltFullDisk(t *testing.T) {
	const env = "SYMBOLON_TEST_FULL_DISK"
	if dir := os.Getenv(env); dir != "" {
		fullDisk(t, dir)
		return
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestBoltFullDisk$", "-test.v")
	cmd.Env = append(os.Environ(), env+"="+t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWNS | syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("the disk was full")) {
		t.Fatalf("%v\n%s", err, out)
	}
}

func fullDisk(t *testing.T, dir string) {
	if err := syscall.Mount("sl-test", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Fatal(err)
	}
	s := open(t, filepath.Join(dir, "db"))
	kept := put(t, s, "kept", []byte("yes"))
	var full error
	for i := 0; full == nil && i < 100; i++ {
		_, _, full = s.Txn(t.Context(), nil, []store.Op{store.Put(fmt.Sprintf("k%d", i), make([]byte, 256<<10))})
	}
	if !errors.Is(full, store.ErrNoSpace) {
		t.Fatalf("err = %v, want ErrNoSpace", full)
	}
	t.Logf("the disk was full: %v", full)
	if kv, err := s.Get(t.Context(), "kept"); err != nil || kv.ModRevision != kept {
		t.Errorf("after the full disk: %+v, %v", kv, err)
	}
}
