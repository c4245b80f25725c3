package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain makes this binary the next process, where Spawn has started it.
func TestMain(m *testing.M) {
	if os.Getenv(parentEnv) != "" || os.Getenv("HANDOVER_TEST_CHILD") != "" {
		if err := next(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// next takes over, says what its children would inherit, and serves one connection
// when it is told to.
func next() error {
	in, err := Inherit()
	if err != nil {
		return err
	}
	defer in.Close()
	if in.Control == nil {
		return errors.New("no control")
	}
	defer in.Control.Close()
	l, err := in.TakeListener("front", os.Getenv("HANDOVER_TEST_ADDRESS"))
	if err != nil || l == nil {
		return fmt.Errorf("listener %v: %w", l, err)
	}
	f := in.Take("secret")
	b, err := Unseal(f)
	if err != nil {
		return err
	}
	seen, err := childSees(l, f)
	if err != nil {
		return err
	}
	if err := in.Control.Send(Ready, []byte(string(b)+" "+seen)); err != nil {
		return err
	}
	if m, _, err := in.Control.Receive(time.Time{}); err != nil || m != Go {
		return fmt.Errorf("%d, %w", m, err)
	}
	c, err := l.AcceptTCP()
	if err != nil {
		return err
	}
	_, err = io.WriteString(c, "served by the next")
	return errors.Join(err, c.Close())
}

// childSees tells what of the inheritance a program would have that we start.
func childSees(l *net.TCPListener, secret *os.File) (string, error) {
	dup, err := File(l, "front")
	if err != nil {
		return "", err
	}
	defer dup.Close()
	out, err := exec.Command("sh", "-c", "readlink /proc/self/fd/*; env").Output()
	if len(out) == 0 {
		return "", err
	}
	var seen []string
	for _, f := range []*os.File{dup, secret} {
		target, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
		if err != nil {
			return "", err
		}
		if strings.Contains(string(out), target) {
			seen = append(seen, target)
		}
	}
	for _, name := range []string{"LISTEN_FDS=", "LISTEN_PID=", parentEnv} {
		if strings.Contains(string(out), name) {
			seen = append(seen, name)
		}
	}
	return fmt.Sprint(seen), nil
}

func TestSpawnedProcessTakesOver(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("HANDOVER_TEST_ADDRESS", l.Addr().String())
	front, err := File(l.(*net.TCPListener), "front")
	if err != nil {
		t.Fatal(err)
	}
	defer front.Close()
	secret, err := Seal("secret", []byte("sesame"))
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Close()
	n, err := Spawn(os.Args[0], []*os.File{front, secret})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Kill()
	m, payload, err := n.Control.Receive(time.Now().Add(30 * time.Second))
	if err != nil || m != Ready {
		t.Fatalf("%d, %v", m, err)
	}
	if got := string(payload); got != "sesame []" {
		t.Errorf("%q: want the secret, and nothing that its own children would inherit", got)
	}
	// We still accept: the listener's mode is as it was.
	one, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	if a, err := l.Accept(); err != nil {
		t.Fatal(err)
	} else {
		_ = a.Close()
	}
	_ = l.Close()
	two, err := net.Dial("tcp", l.Addr().String()) // waits in the backlog
	if err != nil {
		t.Fatal(err)
	}
	defer two.Close()
	if err := n.Control.Send(Go, nil); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(two); err != nil || string(b) != "served by the next" {
		t.Errorf("%q, %v", b, err)
	}
	<-n.Ended()
}

func TestSpawnOfWhatIsNotThere(t *testing.T) {
	if _, err := Spawn(filepath.Join(t.TempDir(), "none"), nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
	n, err := Spawn("/bin/false", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Kill()
	if _, _, err := n.Control.Receive(time.Now().Add(30 * time.Second)); !errors.Is(err, io.EOF) {
		t.Errorf("%v, want the end of the stream", err)
	}
	<-n.Ended()
	if n.Err() == nil {
		t.Error("no error of a process that failed")
	}
}

// A process that was told of another parent than its own is not what Spawn has
// started.
func TestForeignParent(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), parentEnv+"=1", "LISTEN_FDS=1", "LISTEN_FDNAMES=handover")
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "started this one") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestTakeListenerRefusesOthers(t *testing.T) {
	in := func(f *os.File) *Inherited { return &Inherited{files: map[string][]*os.File{"front": {f}}} }
	socket := func(listen bool) (*os.File, string) {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
		}
		if err == nil && listen {
			err = unix.Listen(fd, 1)
		}
		if err != nil {
			t.Fatal(err)
		}
		name, err := unix.Getsockname(fd)
		if err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fd), "front"), fmt.Sprintf("127.0.0.1:%d", name.(*unix.SockaddrInet4).Port)
	}
	f, address := socket(false)
	if _, err := in(f).TakeListener("front", address); err == nil || !strings.Contains(err.Error(), "does not listen") {
		t.Errorf("a socket that does not listen: %v", err)
	}
	f, _ = socket(true)
	if _, err := in(f).TakeListener("front", "127.0.0.1:1"); err == nil || !strings.Contains(err.Error(), "want tcp") {
		t.Errorf("another address: %v", err)
	}
	f, address = socket(true)
	l, err := in(f).TakeListener("front", address)
	if err != nil || l == nil {
		t.Fatalf("%v, %v", l, err)
	}
	_ = l.Close()
	if l, err := (&Inherited{}).TakeListener("front", address); l != nil || err != nil {
		t.Errorf("none: %v, %v", l, err)
	}
	file, err := createTemp(t)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := in(file).TakeListener("front", address); err == nil {
		t.Error("a file was taken for a listener")
	}
}

func createTemp(t *testing.T) (*os.File, error) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err == nil {
		t.Cleanup(func() { _ = f.Close() })
	}
	return f, err
}

func unsealed() (*os.File, error) {
	fd, err := unix.MemfdCreate("open", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	return os.NewFile(uintptr(fd), "open"), err
}

// The manager hears what is said and gets the descriptors, under their names.
func TestStore(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	hear := func(want string, fds int) {
		t.Helper()
		buf, oob := make([]byte, 512), make([]byte, 512)
		n, oobn, _, _, err := manager.ReadMsgUnix(buf, oob)
		if err != nil {
			t.Fatal(err)
		}
		got := 0
		control, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range control {
			rights, err := unix.ParseUnixRights(&c)
			if err != nil {
				t.Fatal(err)
			}
			for _, fd := range rights {
				got++
				_ = unix.Close(fd)
			}
		}
		if string(buf[:n]) != want || got != fds {
			t.Errorf("%q with %d descriptors, want %q with %d", buf[:n], got, want, fds)
		}
	}
	t.Setenv("NOTIFY_SOCKET", socket)
	s := ManagerStore()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := errors.Join(s.Notify("READY=1", "STATUS=fine"), s.PutListener("front", l.(*net.TCPListener)), s.Remove("front")); err != nil {
		t.Fatal(err)
	}
	hear("READY=1\nSTATUS=fine", 0)
	hear("FDSTORE=1\nFDNAME=front\nFDPOLL=0", 1)
	hear("FDSTOREREMOVE=1\nFDNAME=front", 0)
	for _, err := range []error{Store{}.Notify("READY=1"), Store{}.Put("x", 0), Store{}.Remove("x"), Store{}.PutListener("x", l.(*net.TCPListener))} {
		if !errors.Is(err, ErrNoStore) {
			t.Errorf("without a manager: %v", err)
		}
	}
	_ = manager.Close()
	if err := s.Notify("READY=1"); err == nil {
		t.Error("nobody listens, and it is no error")
	}
}

// Messages come whole, whatever their size; one beyond the bound is refused on both
// sides.
func TestControl(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*Control
	for i, fd := range pair {
		f := os.NewFile(uintptr(fd), "end")
		if ends[i], err = newControl(f); err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
		defer ends[i].Close()
	}
	big := make([]byte, 5<<20)
	sent := make(chan error, 1)
	go func() { sent <- errors.Join(ends[0].Send(Policy, big), ends[0].Send(Reissue, nil)) }()
	if m, b, err := ends[1].Receive(time.Time{}); m != Policy || len(b) != len(big) || err != nil {
		t.Errorf("%d, %d bytes, %v", m, len(b), err)
	}
	if m, b, err := ends[1].Receive(time.Time{}); m != Reissue || len(b) != 0 || err != nil {
		t.Errorf("%d, %d bytes, %v", m, len(b), err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	if err := ends[0].Send(Policy, make([]byte, MaxSnapshot+1)); err == nil {
		t.Error("a message beyond the bound was sent")
	}
	if _, err := ends[0].conn.Write([]byte{byte(Policy), 255, 255, 255, 255}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := ends[1].Receive(time.Time{}); err == nil {
		t.Error("a message beyond the bound was taken")
	}
	if _, _, err := ends[1].Receive(time.Now()); !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the deadline: %v", err)
	}
}
