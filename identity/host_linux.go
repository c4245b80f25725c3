package identity

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// HostAttributes are the os.* attributes that all workloads of this host share:
//
//	os.kernel        the release: "6.1.0-13-amd64"
//	os.distribution  two values, "debian" and "debian-12", from os-release(5)
func HostAttributes() (Attributes, error) {
	m := make(map[string][]string)
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, fmt.Errorf("host attributes: %w", os.NewSyscallError("uname", err))
	}
	m["os.kernel"] = []string{unix.ByteSliceToString(u.Release[:])}
	for _, name := range [...]string{"/etc/os-release", "/usr/lib/os-release"} {
		b, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("host attributes: %w", err)
		}
		m["os.distribution"] = distribution(string(b))
		break
	}
	return NewAttributes(m), nil
}

func distribution(osRelease string) []string {
	var id, version string
	lines := bufio.NewScanner(strings.NewReader(osRelease))
	for lines.Scan() {
		k, v, ok := strings.Cut(strings.TrimSpace(lines.Text()), "=")
		if !ok {
			continue
		}
		v = unquote(v)
		switch k {
		case "ID":
			id = v
		case "VERSION_ID":
			version = v
		}
	}
	if id == "" {
		return nil
	}
	if version == "" { // rolling
		return []string{id}
	}
	return []string{id, id + "-" + version}
}

// unquote takes a shell's simple quotes off, which is all that os-release(5) lets
// these two values have.
func unquote(v string) string {
	if n := len(v); n >= 2 && (v[0] == '"' || v[0] == '\'') && v[n-1] == v[0] {
		return v[1 : n-1]
	}
	return v
}
