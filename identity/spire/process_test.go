package spire

import (
	"bufio"
	"bytes"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/symbolon/symbolon/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// process is a real one, whose program waits for a line to go on.
type process struct {
	cmd *exec.Cmd
	in  io.Writer
	w   *identity.Workload
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// goOn lets it do what it is to do next.
func (p *process) goOn(t *testing.T) {
	t.Helper()
	if _, err := io.WriteString(p.in, "\n"); err != nil {
		t.Fatal(err)
	}
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// sleeper waits until it is killed.
func sleeper(t *testing.T) *process { return started(t, "sh", "-c", "echo ready; read x") }

// started runs a program that says a line when it is ready.
func started(t *testing.T, argv ...string) *process {
	t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &process{cmd: cmd, in: in}
	t.Cleanup(func() { in.Close(); p.kill() })
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	p.w = workloadOf(t, p.pid())
	return p
}

// workloadOf is what a process resolver makes of a process, by its own reading.
func workloadOf(t *testing.T, pid int) *identity.Workload {
	t.Helper()
	dir := "/proc/" + strconv.Itoa(pid)
	b, err := os.ReadFile(dir + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	begun, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir+"/exe", &st); err != nil {
		t.Fatal(err)
	}
	return &identity.Workload{
		Key: identity.Key{
			CgroupID: 1, UID: uint32(os.Geteuid()), Process: identity.Process{PID: pid, Start: begun},
			Exe: identity.FileID{
				Dev: st.Dev, Ino: st.Ino, Size: st.Size,
				Mtime: st.Mtim.Sec*1e9 + st.Mtim.Nsec, Ctime: st.Ctim.Sec*1e9 + st.Ctim.Nsec,
			},
		},
		Attributes: identity.Attributes{{Key: "proc.uid", Value: strconv.Itoa(os.Geteuid())}},
	}
}

// exe names what a process runs.
func exe(t *testing.T, pid int) string {
	t.Helper()
	path, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe")
	if err != nil {
		t.Error(err)
	}
	return path
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root (CAP_PERFMON): whether a process executes another program")
	}
}
