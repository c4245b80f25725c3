package proxy

import (
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// perConnection is how many descriptors one more connection may take: two
	// sockets and, where the kernel splices, four ends of pipes.
	perConnection = 6
	// descriptorReserve, in per cent, is left for everything that is no connection:
	// the controller, iptables, looking at processes.
	descriptorReserve = 5
)

// descriptors watches how many the process has open. Asking the kernel is cheap
// (Linux 6.2 keeps the number), but not cheap enough for every connection: between
// two answers it reckons.
type descriptors struct {
	limit int
	// count asks the kernel; the tests' own count.
	count func() (int, error)

	known  atomic.Int64 // the last answer
	begun  atomic.Int64 // connections since
	failed atomic.Bool  // the kernel does not answer: accept will tell
}

// newDescriptors watches against limit; 0: that of the process.
func newDescriptors(limit int) *descriptors {
	if limit == 0 {
		var l unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err == nil {
			limit = int(min(l.Cur, 1<<30))
		}
	}
	return &descriptors{limit: limit, count: countDescriptors}
}

// sample asks the kernel, and returns its answer.
func (d *descriptors) sample() int {
	begun := d.begun.Load()
	n, err := d.count()
	d.failed.Store(err != nil)
	if err != nil {
		return 0
	}
	d.known.Store(int64(n))
	d.begun.Add(-begun)
	return n
}

// full tells whether there is room for one connection more, and how many are open.
// It counts the connection as begun.
func (d *descriptors) full() (used int, full bool) {
	if d.limit <= 0 || d.failed.Load() {
		return 0, false
	}
	most := int64(d.limit) * (100 - descriptorReserve) / 100
	begun := d.begun.Add(1)
	if d.known.Load()+begun*perConnection <= most {
		return 0, false
	}
	used = d.sample()
	d.begun.Add(1)
	return used, int64(used)+perConnection > most
}

// countDescriptors is how many this process has open.
func countDescriptors() (int, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/fd", &st); err != nil {
		return 0, os.NewSyscallError("stat /proc/self/fd", err)
	}
	if st.Size > 0 { // since Linux 6.2
		return int(st.Size), nil
	}
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		return 0, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	return len(names), err
}
