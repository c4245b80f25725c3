package seal_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/symbolon/symbolon/controller/seal"
)

func key(t *testing.T) *seal.Key {
	t.Helper()
	k, err := seal.LoadOrCreate(filepath.Join(t.TempDir(), "dir", "seal.key"))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestSealOpens(t *testing.T) {
	k, secret := key(t), []byte("a secret of some length")
	sealed, err := k.Seal("root", secret, []byte("context"))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(sealed, secret) {
		t.Error("the secret stands in the sealed form")
	}
	got, err := k.Open("root", sealed, []byte("context"))
	if err != nil || !bytes.Equal(got, secret) {
		t.Errorf("opened %q, %v", got, err)
	}
	again, _ := k.Seal("root", secret, []byte("context"))
	if bytes.Equal(again, sealed) {
		t.Error("sealing twice gives the same bytes")
	}
}

func TestSealedIsBoundToKeyNameAndContext(t *testing.T) {
	k := key(t)
	sealed, err := k.Seal("root", []byte("secret"), []byte("context"))
	if err != nil {
		t.Fatal(err)
	}
	for name, open := range map[string]func() ([]byte, error){
		"other key":     func() ([]byte, error) { return key(t).Open("root", sealed, []byte("context")) },
		"other name":    func() ([]byte, error) { return k.Open("intermediate", sealed, []byte("context")) },
		"other context": func() ([]byte, error) { return k.Open("root", sealed, []byte("other")) },
	} {
		if got, err := open(); !errors.Is(err, seal.ErrWrongKey) || got != nil {
			t.Errorf("%s: %q, %v; want ErrWrongKey", name, got, err)
		}
	}
	for i := range sealed {
		altered := bytes.Clone(sealed)
		altered[i] ^= 1
		if got, err := k.Open("root", altered, []byte("context")); err == nil {
			t.Errorf("byte %d altered: opened as %q", i, got)
		}
		if _, err := k.Open("root", sealed[:i], []byte("context")); err == nil {
			t.Errorf("cut to %d bytes: opened", i)
		}
	}
}

func TestKeyFile(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, size int, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, make([]byte, size), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for path, want := range map[string]string{
		write("open", seal.KeySize, 0o640):    "chmod 600",
		write("short", seal.KeySize-1, 0o600): "31 bytes",
		write("empty", 0, 0o600):              "0 bytes",
	} {
		if _, err := seal.LoadOrCreate(path); !errors.Is(err, seal.ErrKeyFile) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: err = %v, want %q", path, err, want)
		}
	}
	if _, err := seal.Load(filepath.Join(dir, "absent")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}

	path := filepath.Join(dir, "new", "seal.key")
	k, err := seal.LoadOrCreate(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
		if st, err := os.Stat(name); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v, %v; want %v", name, st.Mode(), err, want)
		}
	}
	sealed, _ := k.Seal("x", []byte("secret"), nil)
	again, err := seal.LoadOrCreate(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := again.Open("x", sealed, nil); err != nil {
		t.Errorf("after reading the same file: %v", err)
	}
	if err := seal.WriteFile(path, []byte("other")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("writing over a key: %v, want fs.ErrExist", err)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	raw, _ := os.ReadFile(path)
	if s := fmt.Sprintf("%v %+v %#v %s", k, k, k, k); strings.Contains(s, string(raw)) || !strings.Contains(s, path) {
		t.Errorf("printed as %q", s)
	}
}
