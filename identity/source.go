package identity

import (
	"context"
	"errors"
)

var (
	// ErrWithdrawn: the source says that the workload has no identity, any more or yet.
	ErrWithdrawn = errors.New("no identity")
	// ErrEnded: the process that the workload was has ended, or runs another program.
	ErrEnded = errors.New("the process has ended")
)

// Workload is what stands behind a socket on this host.
type Workload struct {
	// Key tells workloads of this host apart: equal keys mean the same cgroup,
	// executable and uid, and the same attributes on request. Comparable, opaque.
	Key Key
	// Attributes are sourced ones only (os.*, proc.*): what the host may assert.
	Attributes Attributes
}

// Key identifies a workload on this host for as long as its cgroup lives.
type Key struct {
	CgroupID uint64
	Exe      FileID
	UID      uint32
	// Asked tells apart what only attributes of OnRequest do; zero without them.
	Asked [16]byte
	// Process is zero where processes are not told apart, see NewProcessResolver.
	Process Process
}

// Process is one process of this host, beyond doubt for as long as the machine runs.
type Process struct {
	PID   int
	Start uint64 // clock ticks since boot: field 22 of /proc/PID/stat
}

// Program is k without what tells the processes of one program apart.
func (k Key) Program() Key {
	k.Process, k.Asked = Process{}, [16]byte{}
	return k
}

// FileID tells versions of a file apart without reading it.
type FileID struct {
	Dev, Ino     uint64
	Size         int64
	Mtime, Ctime int64 // nanoseconds
}

// Update is a workload's state at its source. Credential is the last good one, also
// beside an error: it stays valid until its NotAfter. It is nil as long as there
// was none.
type Update struct {
	Credential *Credential
	// Err is why there is no newer one. With ErrWithdrawn or ErrEnded there is none at
	// all: the last one must not be used any more. After ErrEnded nothing else comes.
	Err error
}

// Source gives workloads their SVIDs: the controller's CA, SPIRE, or the SPIFFE
// Workload API.
type Source interface {
	// Watch streams credentials for w: the first as soon as there is one, then one
	// per rotation, change of claims or change of bundles. The channel is closed
	// when ctx ends; a reader that is slow misses intermediate steps, never the
	// last. Safe for concurrent use.
	Watch(ctx context.Context, w *Workload) <-chan Update
}
