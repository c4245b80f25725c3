package identity

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// pinnable starts cmd, which reads a line before it does what it is to do, and
// returns its workload.
func pinnable(t *testing.T, argv ...string) (*Workload, io.Writer, *exec.Cmd) {
	t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
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
	t.Cleanup(func() { in.Close(); cmd.Process.Kill(); cmd.Wait() })
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	return workloadOf(t, cmd.Process.Pid), in, cmd
}

func workloadOf(t *testing.T, pid int) *Workload {
	t.Helper()
	p, err := openProcess("/proc", pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	start, _ := p.start()
	exe, _ := p.exe()
	uid, err := p.euid()
	if err != nil {
		t.Fatal(err)
	}
	return &Workload{
		Key:        Key{CgroupID: 1, Exe: exe, UID: uid, Process: Process{pid, start}},
		Attributes: Attributes{{"proc.uid", "0"}},
	}
}

func pinned(t *testing.T, w *Workload) *Pin {
	t.Helper()
	p, err := PinProcess(w)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	if err := p.Check(); err != nil {
		t.Fatal(err)
	}
	return p
}

// eventually waits for what a process of a test does.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("never: " + what)
		}
	}
}

func TestPinSeesTheEnd(t *testing.T) {
	w, _, cmd := pinnable(t, "sh", "-c", "echo ready; read x")
	p := pinned(t, w)
	select {
	case <-p.Ended():
		t.Fatal("ended while it runs")
	default:
	}
	cmd.Process.Kill()
	cmd.Wait()
	select {
	case <-p.Ended():
	case <-time.After(20 * time.Second):
		t.Fatal("its end is not seen")
	}
	if err := p.Check(); !errors.Is(err, ErrEnded) {
		t.Errorf("Check: %v", err)
	}
	if _, err := PinProcess(w); !errors.Is(err, ErrEnded) {
		t.Errorf("PinProcess of a dead one: %v", err)
	}
}

// Another process with the same number is not the workload, nor is the same process
// with another program.
func TestPinRefusesAnother(t *testing.T) {
	w, in, _ := pinnable(t, "sh", "-c", "echo ready; read x; exec sleep 1000")
	later := *w
	later.Key.Process.Start--
	if _, err := PinProcess(&later); !errors.Is(err, ErrEnded) {
		t.Errorf("a reused number: %v", err)
	}
	p := pinned(t, w)
	io.WriteString(in, "\n")
	eventually(t, "the other program is seen", func() bool { return errors.Is(p.Check(), ErrEnded) })
	if _, err := PinProcess(w); !errors.Is(err, ErrEnded) {
		t.Errorf("PinProcess after exec: %v", err)
	}
}

// The same program executed anew, or with other groups, is to be attested anew.
func TestPinSeesChanges(t *testing.T) {
	needRoot(t)
	w, in, _ := pinnable(t, "sh", "-c", `echo ready; read x; exec sh -c "read y"`)
	p := pinned(t, w)
	io.WriteString(in, "\n")
	eventually(t, "exec of the same program is seen", func() bool { return errors.Is(p.Check(), ErrChanged) })

	if _, err := exec.LookPath("python3"); err != nil {
		t.Skip("python3 is not there to change its groups")
	}
	w, in, _ = pinnable(t, "python3", "-c", "import os,sys\nprint('ready',flush=True)\nsys.stdin.readline()\nos.setgroups([77])\nsys.stdin.readline()")
	p = pinned(t, w)
	io.WriteString(in, "\n")
	eventually(t, "other groups are seen", func() bool { return errors.Is(p.Check(), ErrChanged) })
}

// A program that runs another one for a moment and comes back looks the same before
// and after. Only the watch tells, whichever thread did it.
func TestWatchExec(t *testing.T) {
	needRoot(t)
	back := "import os,sys\nif len(sys.argv)<2:\n  print('ready',flush=True)\n  sys.stdin.readline()\n  " +
		"os.execv('/bin/sh',['sh','-c','exec \"$0\" -c \"import sys;sys.stdin.readline()\"',sys.executable])"
	thread := "import os,sys,threading\nprint('ready',flush=True)\ndef f():\n  sys.stdin.readline()\n  " +
		"os.execv('/bin/sh',['sh','-c','exec \"$0\" -c \"import sys;sys.stdin.readline()\"',sys.executable])\n" +
		"def g():\n  t=threading.Thread(target=f);t.start();t.join()\nsys.stdin.readline()\nt=threading.Thread(target=g);t.start();t.join()"
	for name, script := range map[string]string{"leader": back, "thread made later": thread} {
		t.Run(name, func(t *testing.T) {
			w, in, _ := pinnable(t, "python3", "-c", script)
			p := pinned(t, w)
			x, err := p.WatchExec(MaxThreads)
			if err != nil {
				t.Fatal(err)
			}
			defer x.Close()
			if did, err := x.Executed(); did || err != nil {
				t.Fatalf("executed %v, %v before it has", did, err)
			}
			io.WriteString(in, "\n")
			if name != "leader" {
				eventually(t, "its threads run", func() bool { return threads(t, w) == 3 })
				if did, err := x.Executed(); did || err != nil {
					t.Errorf("executed %v, %v: it has only made threads", did, err)
				}
				io.WriteString(in, "\n")
			}
			eventually(t, "exec is seen", func() bool { did, err := x.Executed(); return did && err == nil })
		})
	}
}

func threads(t *testing.T, w *Workload) int {
	t.Helper()
	list, err := os.ReadDir("/proc/" + strconv.Itoa(w.Key.Process.PID) + "/task")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// A child that runs something is not the process.
func TestWatchExecIgnoresChildren(t *testing.T) {
	needRoot(t)
	w, in, _ := pinnable(t, "sh", "-c", "echo ready; read x; sleep 1000 & read y")
	p := pinned(t, w)
	x, err := p.WatchExec(MaxThreads)
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	io.WriteString(in, "\n")
	eventually(t, "the child runs its program", func() bool {
		b, _ := os.ReadFile("/proc/" + strconv.Itoa(w.Key.Process.PID) + "/task/" + strconv.Itoa(w.Key.Process.PID) + "/children")
		var child int
		for _, c := range string(b) {
			if c < '0' || c > '9' {
				break
			}
			child = 10*child + int(c-'0')
		}
		name, _ := os.ReadFile("/proc/" + strconv.Itoa(child) + "/comm")
		if string(name) != "sleep\n" {
			return false
		}
		t.Cleanup(func() { syscall.Kill(child, syscall.SIGKILL) })
		return true
	})
	if did, err := x.Executed(); did || err != nil {
		t.Errorf("executed %v, %v: that was its child", did, err)
	}
}

// A watch takes no more descriptors than it was given.
func TestWatchExecIsBounded(t *testing.T) {
	needRoot(t)
	w, _, _ := pinnable(t, "python3", "-c", "import sys,threading,time\nfor i in range(9): threading.Thread(target=time.sleep,args=(1000,),daemon=True).start()\nprint('ready',flush=True)\nsys.stdin.readline()")
	p := pinned(t, w)
	eventually(t, "its threads run", func() bool { return threads(t, w) == 10 })
	if n, err := p.Threads(); n != 10 || err != nil {
		t.Errorf("%d threads, %v", n, err)
	}
	if x, err := p.WatchExec(9); !errors.Is(err, ErrChanged) {
		t.Errorf("watched with %v, error %v", x, err)
	}
	x, err := p.WatchExec(10)
	if err != nil {
		t.Fatal(err)
	}
	if n := x.Descriptors(); n != 10 {
		t.Errorf("%d descriptors", n)
	}
	x.Close()
}
