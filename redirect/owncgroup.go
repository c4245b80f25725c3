package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// ownSockets is how the rules tell the proxy's sockets from others with its mark.
// CAP_NET_RAW, which containers have by default, is enough to set a mark; the
// cgroup in which a socket was made cannot be chosen.
type ownSockets struct {
	match   string // iptables matches to stand behind the mark, or empty
	warning string // why match is empty
}

const (
	// initialCgroupNS is the machine's own cgroup namespace (CGROUP_NS_INIT_INO,
	// linux/nsfs.h).
	initialCgroupNS = "cgroup:[4026531835]"
	// rootCgroupID is the id of the hierarchy's root. It is also what the sockets of
	// kernels before 5.15 have once the net_cls or net_prio controllers are in use.
	rootCgroupID = 1
)

// findOwnSockets asks where sockets that this process makes belong. What the
// machine cannot tell is a warning; what merely failed is an error, so that a lack
// of descriptors does not end in weaker rules.
func findOwnSockets() (ownSockets, error) {
	list, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return ownSockets{}, fmt.Errorf("own cgroup: %w", err)
	}
	// Absent on kernels without cgroup namespaces.
	ns, err := os.Readlink("/proc/self/ns/cgroup")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return ownSockets{}, fmt.Errorf("own cgroup: %w", err)
	}
	path, ok := cgroup2Path(string(list))
	switch {
	case !ok:
		return markAlone("this machine has no cgroup v2"), nil
	case ns != "" && ns != initialCgroupNS:
		// Kernels before 6.0 would take the path for the machine's, and another cgroup
		// for ours.
		return markAlone("the proxy runs in a cgroup namespace of its own"), nil
	case path == "/":
		return markAlone("the proxy runs in the root cgroup, in which every process is"), nil
	}
	id, err := newSocketCgroup()
	if err != nil {
		return ownSockets{}, fmt.Errorf("own cgroup: %w", err)
	}
	if id <= rootCgroupID {
		return markAlone("this kernel does not note the cgroup of a socket"), nil
	}
	// The match holds the cgroup that had the path when the rule was loaded; a cgroup
	// made anew under the same path (systemd does that when it restarts a unit) is
	// another. The comment, in which the id is never used again, shows it.
	return ownSockets{match: fmt.Sprintf(" -m cgroup --path %s -m comment --comment cgroup-%d", quoted(path), id)}, nil
}

func markAlone(why string) ownSockets {
	return ownSockets{warning: why + ": the proxy's connections are told by their mark alone, and whoever has CAP_NET_RAW on this host can set it and go around the proxy; run it as a service"}
}

// cgroup2Path finds in /proc/PID/cgroup (cgroups(7)) the path in the cgroup v2
// hierarchy, which is number 0 and has no controllers' names.
func cgroup2Path(list string) (path string, ok bool) {
	for line := range strings.Lines(list) {
		if path, ok = strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok {
			return path, strings.HasPrefix(path, "/")
		}
	}
	return "", false
}

// quoted writes a word as iptables-save does.
func quoted(word string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `'`, `\'`).Replace(word) + `"`
}

// newSocketCgroup makes a TCP socket and asks the kernel for its cgroup, which is
// what the rules will compare.
func newSocketCgroup() (id uint64, err error) {
	d, err := NewDiag()
	if err != nil {
		return 0, err
	}
	defer d.Close()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return 0, os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	loopback := [4]byte{127, 0, 0, 1}
	// Only listeners and connections can be asked for. IP_FREEBIND: the interface may
	// be down yet.
	if err := errors.Join(
		os.NewSyscallError("setsockopt IP_FREEBIND", unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_FREEBIND, 1)),
		os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrInet4{Addr: loopback})),
		os.NewSyscallError("listen", unix.Listen(fd, 0)),
	); err != nil {
		return 0, err
	}
	self, err := unix.Getsockname(fd)
	if err != nil {
		return 0, os.NewSyscallError("getsockname", err)
	}
	port := self.(*unix.SockaddrInet4).Port
	addr := netip.AddrFrom4(loopback)
	owner, err := d.Listener(netip.AddrPortFrom(addr, uint16(port)), netip.AddrPortFrom(addr, 0))
	return owner.CgroupID, err
}
