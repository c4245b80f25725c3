package spirelab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// Version of SPIRE, as in hack/spire.sh.
const Version = "v1.15.3"

// Dir is where hack/spire.sh leaves spire-server and spire-agent. asked tells that
// SYMBOLON_SPIRE named it.
func Dir() (dir string, asked bool, err error) {
	if dir := os.Getenv("SYMBOLON_SPIRE"); dir != "" {
		dir, err = filepath.Abs(dir)
		return dir, true, err
	}
	cache := os.Getenv("XDG_CACHE_HOME")
	if cache == "" {
		home := os.Getenv("HOME")
		if home == "" {
			return "", false, errors.New("spirelab: neither SYMBOLON_SPIRE nor XDG_CACHE_HOME nor HOME is set")
		}
		cache = filepath.Join(home, ".cache")
	}
	return filepath.Join(cache, "symbolon", "spire", Version), false, nil
}

// Program is the path of spire-server or spire-agent.
func Program(name string) (string, error) {
	dir, _, err := Dir()
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("spirelab: SPIRE is not built: run 'make spire' (%w)", err)
	}
	return path, nil
}

// Test skips the test where SPIRE is not built. Where SYMBOLON_SPIRE says that it
// should be, as in continuous integration, that is a failure.
func Test(t testing.TB) {
	t.Helper()
	for _, name := range []string{"spire-server", "spire-agent"} {
		_, err := Program(name)
		if err == nil {
			continue
		}
		if _, asked, _ := Dir(); asked {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}
