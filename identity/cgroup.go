package identity

import (
	"path"
	"strings"
)

// cgroupFacts is what the path of a cgroup says. Every part of it was made by a
// system-wide manager (systemd, a container runtime), never by an unprivileged
// user: below a user's own manager, which users may fill with directories of any
// name, nothing but userUnit is read.
type cgroupFacts struct {
	// unit is the system unit: "nginx.service", "session-3.scope",
	// "user@1000.service".
	unit string
	// slice is the innermost slice of the system's manager that unit is in:
	// "system.slice", "user-1000.slice".
	slice string
	// userUnit is the unit of a user's own manager; the user chose its name.
	userUnit string
	// container is the runtime's id, 64 hexadecimal digits; containerAt is the cgroup that
	// has it in its name.
	container, containerAt string
}

// parseCgroup knows the layouts of systemd (system and user units), Docker and
// Podman (systemd and cgroupfs drivers) and Kubernetes (both drivers). Of nested
// units and containers it reports the outermost: only that one was named by this
// host.
func parseCgroup(p string) cgroupFacts {
	var f cgroupFacts
	parts := strings.Split(strings.Trim(p, "/"), "/")
	if strings.HasPrefix(parts[0], "lxc") {
		// All below belongs to the container's own init.
		return f
	}
	if id, depth := cgroupfsContainer(parts); id != "" {
		f.container, f.containerAt = id, "/"+strings.Join(parts[:depth], "/")
		return f
	}
	for i, part := range parts {
		if len(part) > len(".slice") && strings.HasSuffix(part, ".slice") {
			f.slice = part
		}
		if !isUnit(part) {
			continue
		}
		f.unit = part
		if strings.HasPrefix(part, "user@") && strings.HasSuffix(part, ".service") {
			for _, below := range parts[i+1:] {
				if isUnit(below) {
					f.userUnit = below
					break
				}
			}
			return f
		}
		if f.container = scopeContainer(part); f.container != "" {
			f.containerAt = "/" + strings.Join(parts[:i+1], "/")
		}
		return f
	}
	return f
}

// isUnit: systemd.unit(5), those of its types that processes can be in. A slice
// groups units and is none in this sense.
func isUnit(part string) bool {
	for _, suffix := range [...]string{".service", ".scope", ".socket", ".mount", ".swap"} {
		if len(part) > len(suffix) && strings.HasSuffix(part, suffix) {
			return true
		}
	}
	return false
}

// scopeContainer reads "docker-<id>.scope", "cri-containerd-<id>.scope",
// "crio-<id>.scope", "libpod-<id>.scope": what runtimes ask systemd for.
func scopeContainer(part string) string {
	name, ok := strings.CutSuffix(part, ".scope")
	if !ok {
		return ""
	}
	i := strings.LastIndexByte(name, '-')
	if i <= 0 || !isContainerID(name[i+1:]) {
		return ""
	}
	switch name[:i] {
	case "docker", "cri-containerd", "crio", "libpod":
		return name[i+1:]
	}
	return ""
}

// cgroupfsContainer reads what runtimes make without systemd, and how deep it lies:
//
//	/docker/<id>
//	/libpod_parent/libpod-<id>
//	/kubepods[/<qos>]/pod<uid>/<id>
func cgroupfsContainer(parts []string) (id string, depth int) {
	switch {
	case len(parts) >= 2 && parts[0] == "docker":
		id, depth = parts[1], 2
	case len(parts) >= 2 && parts[0] == "libpod_parent":
		id, _ = strings.CutPrefix(parts[1], "libpod-")
		depth = 2
	case len(parts) >= 3 && parts[0] == "kubepods":
		rest := parts[1:]
		if rest[0] == "besteffort" || rest[0] == "burstable" {
			rest = rest[1:]
		}
		if len(rest) >= 2 && strings.HasPrefix(rest[0], "pod") {
			id, depth = rest[1], len(parts)-len(rest)+2
		}
	}
	if !isContainerID(id) {
		return "", 0
	}
	return id, depth
}

func isContainerID(s string) bool {
	return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == ""
}

// isManager: systemd puts itself, as the system's and as each user's manager, into
// a cgroup of this name. Sockets made there are made for others (socket
// activation).
func isManager(cgroup string) bool { return path.Base(cgroup) == "init.scope" }

// cgroup2Mount finds in /proc/self/mountinfo (proc(5)) where cgroup v2 is mounted
// as a whole, alone or beside v1; "" if it is not.
func cgroup2Mount(mountinfo string) string {
	for line := range strings.Lines(mountinfo) {
		before, after, _ := strings.Cut(line, " - ")
		f := strings.Fields(before)
		kind, _, _ := strings.Cut(after, " ")
		if kind == "cgroup2" && len(f) >= 5 && f[3] == "/" {
			return unescapeMount.Replace(f[4])
		}
	}
	return ""
}

// unescapeMount undoes the octal escapes of space, tab, newline and backslash.
var unescapeMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
