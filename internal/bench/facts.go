package main

import (
	"cmp"
	"context"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/symbolon/symbolon/internal/netlab"
)

// facts are what a result means nothing without.
type facts struct {
	Kernel, CPU, Go    string
	Cores              int
	MemoryMB           uint64
	Descriptors        uint64 // the hard limit of a process
	Versions           map[string]string
	LoadAverageAtStart string
	// CongestionControl is the hosts', chosen or inherited.
	CongestionControl   string
	ConntrackMax        string `json:",omitempty"`
	TransparentHugePage string `json:",omitempty"`
}

func machine(ctx context.Context, congestion string) facts {
	f := facts{
		Go: runtime.Version(), Cores: runtime.NumCPU(), Versions: make(map[string]string),
		Kernel:              readLine("/proc/sys/kernel/osrelease"),
		LoadAverageAtStart:  readLine("/proc/loadavg"),
		CongestionControl:   cmp.Or(congestion, readLine("/proc/sys/net/ipv4/tcp_congestion_control")),
		ConntrackMax:        readLine("/proc/sys/net/netfilter/nf_conntrack_max"),
		TransparentHugePage: readLine("/sys/kernel/mm/transparent_hugepage/enabled"),
	}
	for line := range strings.Lines(readFile("/proc/cpuinfo")) {
		if name, ok := strings.CutPrefix(line, "model name"); ok {
			f.CPU = strings.TrimSpace(strings.TrimLeft(name, "\t :"))
			break
		}
	}
	var info syscall.Sysinfo_t
	if syscall.Sysinfo(&info) == nil {
		f.MemoryMB = info.Totalram * uint64(info.Unit) >> 20
	}
	var descriptors syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &descriptors) == nil {
		f.Descriptors = descriptors.Max
	}
	for name, args := range map[string][]string{"haproxy": {"-v"}, "nginx": {"-v"}, "stunnel": {"-version"}, "openssl": {"version"}} {
		f.Versions[name] = says(ctx, name, args...)
	}
	return f
}

// says is the first line of what a program prints; nothing if it cannot be run.
func says(ctx context.Context, name string, args ...string) string {
	path, err := netlab.Tool(name)
	if err != nil {
		return ""
	}
	out, err := exec.CommandContext(ctx, path, args...).CombinedOutput()
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(out)) {
		// stunnel talks before it says its version.
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "Initializing") {
			return line
		}
	}
	return ""
}

func readFile(name string) string {
	text, _ := os.ReadFile(name) // a fact that is not there is left out
	return string(text)
}

func readLine(name string) string {
	line, _, _ := strings.Cut(readFile(name), "\n")
	return line
}

// noise is how much of the machine others used while we measured, in cores.
type noise struct{ Median, P90, Max float64 }

func noiseOf(all []float64) noise {
	if len(all) == 0 {
		return noise{}
	}
	all = slices.Sorted(slices.Values(all))
	return noise{median(all), all[len(all)*9/10], all[len(all)-1]}
}
