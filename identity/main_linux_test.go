package identity

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// helperMode makes the test binary a process of the tests: "hold" keeps what it
// inherited, "dial ADDR" connects, "listen" listens, "crowd ADDR" connects and
// hides that behind more descriptors than are looked at. It says the socket's inode
// and ends with its standard input.
const helperMode = "SYMBOLON_IDENTITY_HELPER"

func TestMain(m *testing.M) {
	if mode, arg, _ := strings.Cut(os.Getenv(helperMode), " "); mode != "" {
		if err := helper(mode, arg); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func helper(mode, arg string) error {
	var c syscall.Conn
	switch mode {
	case "dial", "crowd":
		conn, err := net.Dial("tcp", arg)
		if err != nil {
			return err
		}
		defer conn.Close()
		c = conn.(*net.TCPConn)
		if mode == "crowd" {
			return crowd(conn.(*net.TCPConn))
		}
	case "listen":
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		defer l.Close()
		c = l.(*net.TCPListener)
	}
	inode := uint64(0)
	if c != nil {
		var err error
		if inode, err = inodeOf(c); err != nil {
			return err
		}
	}
	return say(inode)
}

func say(inode uint64) error {
	fmt.Println(inode)
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

// fewDescriptors is the bound that tests put in the place of maxDescriptors, which
// may be above what this machine lets a process have; crowdLast is where a crowd's
// socket is.
const fewDescriptors, crowdLast = 8192, fewDescriptors + 1000

// crowd leaves the socket to the last descriptor, after a gap.
func crowd(c *net.TCPConn) error {
	inode, err := inodeOf(c)
	if err != nil {
		return err
	}
	f, err := c.File()
	if err != nil {
		return err
	}
	c.Close()
	hidden, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD, crowdLast)
	if err != nil {
		return err
	}
	defer unix.Close(hidden)
	f.Close()
	for range fewDescriptors + 16 {
		if _, err := unix.Dup(0); err != nil {
			return err
		}
	}
	return say(inode)
}

func inodeOf(c syscall.Conn) (uint64, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var st unix.Stat_t
	var serr error
	if err := raw.Control(func(fd uintptr) { serr = unix.Fstat(int(fd), &st) }); err != nil {
		return 0, err
	}
	return st.Ino, serr
}

// child is a running helper.
type child struct {
	cmd   *exec.Cmd
	stdin io.Closer
	inode uint64
}

// start runs exe as a helper; change edits the command before.
func start(t testing.TB, exe, mode string, change func(*exec.Cmd)) *child {
	t.Helper()
	cmd := exec.Command(exe)
	cmd.Dir = "/"
	cmd.Env = []string{helperMode + "=" + mode}
	cmd.Stderr = os.Stderr
	if change != nil {
		change(cmd)
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &child{cmd: cmd, stdin: stdin}
	t.Cleanup(c.end)
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("%s did not start: %v", exe, err)
	}
	if c.inode, err = strconv.ParseUint(strings.TrimSpace(line), 10, 64); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *child) end() {
	if c.stdin != nil {
		c.stdin.Close()
		c.stdin = nil
		c.cmd.Process.Kill()
		c.cmd.Wait()
	}
}

// as runs a command as another user, without groups.
func as(uid uint32) func(*exec.Cmd) {
	return func(c *exec.Cmd) {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
}

// with adds an inherited socket, as descriptor 3.
func with(t testing.TB, c interface{ File() (*os.File, error) }, then func(*exec.Cmd)) func(*exec.Cmd) {
	t.Helper()
	f, err := c.File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return func(cmd *exec.Cmd) {
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
		if then != nil {
			then(cmd)
		}
	}
}

// publicDir is a directory that every user may read; t.TempDir's are not.
func publicDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sl-identity-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// program copies this test binary to a file of its own: another executable.
func program(t testing.TB, dir, name string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(self)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	path := filepath.Join(dir, name)
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	// What tells copies apart by contents.
	if _, err := out.WriteString(name); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: other users' processes")
	}
}
