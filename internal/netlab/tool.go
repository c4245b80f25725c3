package netlab

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// packages says which Debian and Ubuntu package brings a program, where the name
// is not the same.
var packages = map[string]string{
	"ctr":                "containerd",
	"initdb":             "postgresql",
	"ip":                 "iproute2",
	"ip6tables":          "iptables",
	"ldd":                "libc-bin",
	"mariadb":            "mariadb-client",
	"mariadb-install-db": "mariadb-server",
	"mariadbd":           "mariadb-server",
	"nc":                 "netcat-openbsd",
	"nsenter":            "util-linux",
	"perl":               "perl-base",
	"postgres":           "postgresql",
	"psql":               "postgresql-client",
	"redis-cli":          "redis-tools",
	"ss":                 "iproute2",
	"ssh":                "openssh-client",
	"ssh-keygen":         "openssh-client",
	"ssh-keyscan":        "openssh-client",
	"sshd":               "openssh-server",
	"tc":                 "iproute2",
}

// toolDirs are searched after $PATH: daemons live where an ordinary user's PATH
// does not reach, and Debian keeps PostgreSQL's out of any PATH.
var toolDirs = []string{"/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/lib/postgresql/*/bin"}

// Tool finds a program. The error names the package to install.
func Tool(name string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range toolDirs {
		// The highest version sorts last (two digits each since PostgreSQL 10).
		found, _ := filepath.Glob(filepath.Join(dir, name))
		for _, path := range slices.Backward(found) {
			if _, err := exec.LookPath(path); err == nil {
				return path, nil
			}
		}
	}
	return "", fmt.Errorf("%s is not installed: apt-get install %s", name, packageOf(name))
}

// Missing returns the packages to install for the tools that are not there.
func Missing(tools ...string) []string {
	var missing []string
	for _, name := range tools {
		if _, err := Tool(name); err != nil {
			missing = append(missing, packageOf(name))
		}
	}
	slices.Sort(missing)
	return slices.Compact(missing)
}

func packageOf(tool string) string {
	if p, ok := packages[tool]; ok {
		return p
	}
	return tool
}

func join(words []string) string { return strings.Join(words, " ") }
