package serve

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"

	"github.com/symbolon/symbolon/identity"
)

// errOther: not the process that connected speaks.
var errOther = errors.New("the process that connected is not the one that speaks, or runs another program by now")

// caller is a connection whose other end is one process that runs one program.
//
// The kernel tells who connected (SO_PEERCRED), but that process may have executed
// another program since, while a child of the first one has the socket and talks: so a
// program could be made to fetch its SVID for somebody else. Hence nothing is given
// before the process has been pinned, is watched for exec, and has written something
// *after* that: every HTTP/2 client does, since it must acknowledge the settings that
// it is sent only then. The kernel tells of all that is written who wrote it
// (SCM_CREDENTIALS).
type caller struct {
	*net.UnixConn
	workload *identity.Workload
	pin      *identity.Pin

	mu sync.Mutex
	// watch sees exec until the process is proven; queued is how many bytes were
	// written, as far as can be told, before it began.
	watch  *identity.ExecWatch
	queued int
	// unwatch gives back what watch counts for; late ends a caller that is not proven in time.
	unwatch func()
	late    *time.Timer
	err     error
	proven  chan struct{}
	closed  sync.Once
}

// AuthType is credentials.AuthInfo's.
func (*caller) AuthType() string { return "unix-peer" }

// meet finds out who is at the other end of c, which cred is of.
func meet(ctx context.Context, c *net.UnixConn, cred *unix.Ucred, find func(context.Context, int) (*identity.Workload, error)) (*caller, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	x := &caller{UnixConn: c, proven: make(chan struct{})}
	if cred.Pid <= 0 {
		return nil, fmt.Errorf("%w: its process cannot be seen from here", identity.ErrUnknownOwner)
	}
	if x.workload, err = find(ctx, int(cred.Pid)); err != nil {
		return nil, err
	}
	if x.pin, err = identity.PinProcess(x.workload); err != nil {
		return nil, err
	}
	if x.watch, err = x.pin.WatchExec(identity.MaxThreads); err == nil {
		// What is still to come beyond this was written under our eyes.
		err = control(raw, func(fd int) (err error) {
			x.queued, err = unix.IoctlGetInt(fd, unix.SIOCINQ)
			return os.NewSyscallError("ioctl", err)
		})
	}
	if err == nil {
		// Only now, for what it was before it was watched does not count.
		err = x.pin.Check()
	}
	if err != nil {
		x.letGo()
		return nil, err
	}
	return x, nil
}

func control(raw syscall.RawConn, f func(fd int) error) error {
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}

// Read is net.Conn's. It ends with errOther where another process than the caller has
// written.
func (x *caller) Read(b []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(unix.SizeofUcred))
	n, oobn, _, _, err := x.ReadMsgUnix(b, oob)
	if n <= 0 { // -1 beside an error
		return 0, err
	}
	if err := x.wrote(oob[:oobn], n); err != nil {
		return 0, err
	}
	return n, nil
}

// wrote takes note of n bytes, and of who wrote them.
func (x *caller) wrote(oob []byte, n int) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.err != nil {
		return x.err
	}
	x.err = x.judge(oob, n)
	return x.err
}

func (x *caller) judge(oob []byte, n int) error {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(messages) != 1 {
		return fmt.Errorf("%w: the kernel does not say who", errOther)
	}
	cred, err := unix.ParseUnixCredentials(&messages[0])
	if err != nil {
		return fmt.Errorf("%w: the kernel does not say who", errOther)
	}
	if int(cred.Pid) != x.workload.Key.Process.PID {
		return fmt.Errorf("%w: process %d connected, process %d wrote", errOther, x.workload.Key.Process.PID, cred.Pid)
	}
	if x.watch == nil {
		return nil
	}
	if x.queued -= n; x.queued >= 0 {
		return nil
	}
	did, err := x.watch.Executed()
	if err == nil && did {
		err = errOther
	}
	if err == nil {
		err = x.pin.Check()
	}
	if err != nil {
		return err
	}
	x.endWatch()
	close(x.proven)
	return nil
}

// check tells whether the process still is what was proven.
func (x *caller) check() error {
	x.mu.Lock()
	err := x.err
	x.mu.Unlock()
	return errors.Join(err, x.pin.Check())
}

// Close is net.Conn's.
func (x *caller) Close() error {
	err := x.UnixConn.Close()
	x.letGo()
	return err
}

func (x *caller) letGo() {
	x.closed.Do(func() {
		x.mu.Lock()
		if x.watch != nil {
			x.endWatch()
		}
		x.mu.Unlock()
		x.pin.Close()
	})
}

// endWatch is for the holder of the lock.
func (x *caller) endWatch() {
	x.watch.Close()
	x.watch = nil
	if x.late != nil {
		x.late.Stop()
	}
	if x.unwatch != nil {
		x.unwatch()
	}
}

// limit counts the descriptors that watching takes, one for each thread of the caller's,
// and lets nobody have them for long who does not prove himself.
func (x *caller) limit(count func(uid uint32, n int) (release func(), err error)) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	release, err := count(x.workload.Key.UID, x.watch.Descriptors())
	if err != nil {
		return err
	}
	x.unwatch = release
	x.late = time.AfterFunc(2*proofTimeout, func() { _ = x.UnixConn.Close() })
	return nil
}

// peers is the handshake of gRPC's that finds out who calls.
type peers struct {
	find func(context.Context, int) (*identity.Workload, error)
	// enter counts a connection of a user's, and refuses too many.
	enter func(uid uint32) (leave func(), err error)
	// slots bound how many are looked at at a time, watching the descriptors for that.
	slots    identity.Shares
	watching func(uid uint32, n int) (release func(), err error)
	log      *zap.Logger
}

var _ credentials.TransportCredentials = peers{}

func (p peers) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, nil, errors.New("not a Unix socket")
	}
	ctx, cancel := context.WithTimeout(context.Background(), attestTimeout)
	defer cancel()
	cred, err := peerOf(u)
	if err != nil {
		return nil, nil, err
	}
	// Before anything is done for him that costs.
	leave, err := p.enter(cred.Uid)
	if err != nil {
		p.log.Warn("a caller of the Workload API is refused", zap.Error(err))
		return nil, nil, err
	}
	x, err := p.meet(ctx, u, cred)
	if err == nil {
		if err = x.limit(p.watching); err != nil {
			x.letGo()
		}
	}
	if err != nil {
		leave()
		p.log.Info("a caller of the Workload API is not known", zap.Error(err))
		return nil, nil, err
	}
	return &counted{caller: x, leave: sync.OnceFunc(leave)}, x, nil
}

// meet finds out who a few callers at a time are.
func (p peers) meet(ctx context.Context, c *net.UnixConn, cred *unix.Ucred) (*caller, error) {
	release, err := p.slots.Acquire(ctx, cred.Uid)
	if err != nil {
		return nil, err
	}
	defer release()
	return meet(ctx, c, cred, p.find)
}

// peerOf is the kernel's word on who connected.
func peerOf(c *net.UnixConn) (cred *unix.Ucred, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	err = control(raw, func(fd int) (err error) {
		cred, err = unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		return os.NewSyscallError("getsockopt", err)
	})
	return cred, err
}

func (peers) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("for servers only")
}

func (peers) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix-peer"}
}
func (p peers) Clone() credentials.TransportCredentials { return p }
func (peers) OverrideServerName(string) error           { return nil }

// counted is a caller that counts among its user's until it is closed.
type counted struct {
	*caller
	leave func()
}

func (c *counted) Close() error {
	defer c.leave()
	return c.caller.Close()
}
