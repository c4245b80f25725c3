package integration

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/symbolon/symbolon/internal/fleet"
	"github.com/symbolon/symbolon/internal/netlab"
)

const proxyUnit = "symbolon-proxy.service"

// manager plays systemd's part for one proxy: Type=notify, NotifyAccess=main,
// FileDescriptorStoreMax=16. It takes the proxy over from the fleet, which has
// enrolled it.
type manager struct {
	t       *testing.T
	proxy   *fleet.Proxy
	program string
	dir     string
	socket  *net.UnixConn
	log     *os.File
	done    chan struct{} // closed when nobody listens to socket any more

	mu    sync.Mutex
	main  int // the main process
	ready int // how often it said READY=1
	store []stored
	said  []string // everything, for people
}

type stored struct {
	name string
	file *os.File
	ino  uint64
}

// newManager stops the fleet's proxy, and starts it again as a service.
func (w *world) newManager(p *fleet.Proxy) *manager {
	w.t.Helper()
	dir := filepath.Dir(p.Socket())
	m := &manager{t: w.t, proxy: p, dir: dir, program: filepath.Join(w.fleet.Bin, "symbolon-proxy"), done: make(chan struct{})}
	if err := p.Daemon().Stop(); err != nil {
		w.t.Fatal(err)
	}
	var err error
	if m.socket, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"}); err != nil {
		w.t.Fatal(err)
	}
	raw, err := m.socket.SyscallConn()
	if err != nil {
		w.t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1) })
	if err != nil {
		w.t.Fatal(err)
	}
	if m.log, err = os.OpenFile(filepath.Join(dir, "service.log"), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600); err != nil {
		w.t.Fatal(err)
	}
	go m.listen()
	w.t.Cleanup(m.close)
	m.start()
	return m
}

// start starts the service with what the store has, and waits until it is ready.
func (m *manager) start() {
	m.t.Helper()
	m.launch()
	m.await("ready", func() bool { return m.ready > 0 })
}

func (m *manager) launch() {
	m.t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	// The number that LISTEN_PID must have is known to the process itself only.
	c := m.proxy.Host.Command(context.Background(), "sh", "-c", `export LISTEN_PID=$$; exec "$@"`, "sh", m.program, "--config", m.config())
	c.Unit = proxyUnit
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Stdout, c.Stderr = m.log, m.log
	var names []string
	for _, s := range m.store {
		names = append(names, s.name)
		c.ExtraFiles = append(c.ExtraFiles, s.file)
	}
	c.Env = append(os.Environ(), "NOTIFY_SOCKET="+m.socket.LocalAddr().String(),
		"LISTEN_FDS="+strconv.Itoa(len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	if err := c.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.main, m.ready = c.Process.Pid, 0
	go func() { _ = c.Wait() }()
}

func (m *manager) config() string { return filepath.Join(m.dir, "proxy.yaml") }

// configure appends to the configuration, which the next process reads.
func (m *manager) configure(yaml string) {
	m.t.Helper()
	b, err := os.ReadFile(m.config())
	if err == nil {
		err = os.WriteFile(m.config(), append(b, yaml+"\n"...), 0o600)
	}
	if err != nil {
		m.t.Fatal(err)
	}
}

// listen does what the service says.
func (m *manager) listen() {
	defer close(m.done)
	buf, oob := make([]byte, 4096), make([]byte, 4096)
	for {
		n, oobn, _, _, err := m.socket.ReadMsgUnix(buf, oob)
		if err != nil {
			return
		}
		control, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			m.t.Error(err)
			return
		}
		var fds []int
		var sender int
		for _, c := range control {
			if cred, err := unix.ParseUnixCredentials(&c); err == nil {
				sender = int(cred.Pid)
			} else if got, err := unix.ParseUnixRights(&c); err == nil {
				fds = append(fds, got...)
			}
		}
		m.heard(sender, strings.Split(string(buf[:n]), "\n"), fds)
	}
}

func (m *manager) heard(sender int, assignments []string, fds []int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	defer func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}()
	said := fmt.Sprintf("%d: %s, %d descriptors", sender, strings.Join(assignments, " "), len(fds))
	if sender != m.main {
		m.said = append(m.said, said+": IGNORED, the main process is "+strconv.Itoa(m.main))
		return
	}
	m.said = append(m.said, said)
	values := map[string]string{}
	for _, a := range assignments {
		k, v, _ := strings.Cut(a, "=")
		values[k] = v
	}
	if values["READY"] == "1" {
		m.ready++
	}
	if pid, err := strconv.Atoi(values["MAINPID"]); err == nil {
		m.main, m.ready = pid, 0
	}
	name := values["FDNAME"]
	if values["FDSTOREREMOVE"] == "1" {
		m.store = slices.DeleteFunc(m.store, func(s stored) bool {
			if s.name == name {
				_ = s.file.Close()
			}
			return s.name == name
		})
	}
	if values["FDSTORE"] != "1" {
		return
	}
	for _, fd := range fds {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			m.t.Error(err)
			continue
		}
		if slices.ContainsFunc(m.store, func(s stored) bool { return s.ino == st.Ino }) {
			continue // it has it already
		}
		if len(m.store) == 16 {
			m.t.Error("the store is full")
			continue
		}
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			m.t.Error(err)
			continue
		}
		m.store = append(m.store, stored{name, os.NewFile(uintptr(dup), name), st.Ino})
	}
}

// await waits until cond, which is asked under the lock.
func (m *manager) await(what string, cond func() bool) {
	m.t.Helper()
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		m.mu.Lock()
		ok, main := cond(), m.main
		m.mu.Unlock()
		if ok {
			return
		}
		if time.Now().After(end) || gone(main) && what == "ready" {
			m.t.Fatalf("%s: has not happened\n%s", what, m.tail())
		}
	}
}

// tail is what was said last, to people and to the manager.
func (m *manager) tail() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, _ := os.ReadFile(m.log.Name())
	lines := strings.Split(string(b), "\n")
	return strings.Join(lines[max(0, len(lines)-15):], "\n") + strings.Join(m.said[max(0, len(m.said)-15):], "\n")
}

func (m *manager) pid() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.main
}

// names of what is in the store, sorted.
func (m *manager) names() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var names []string
	for _, s := range m.store {
		names = append(names, s.name)
	}
	slices.Sort(names)
	return names
}

// end ends every process of the service with a signal, as KillMode=control-group.
func (m *manager) end(sig syscall.Signal) {
	m.t.Helper()
	pids := m.processes()
	for _, pid := range pids {
		_ = syscall.Kill(pid, sig)
	}
	m.await("the processes end", func() bool { return len(m.processes()) == 0 })
}

// processes are those in the service's cgroup.
func (m *manager) processes() (pids []int) {
	root := "/sys/fs/cgroup"
	if _, err := os.Stat(root + "/unified"); err == nil {
		root += "/unified"
	}
	b, err := os.ReadFile(root + m.proxy.Host.Cgroup(proxyUnit) + "/cgroup.procs")
	if err != nil {
		m.t.Fatal(err)
	}
	for _, f := range strings.Fields(string(b)) {
		if pid, err := strconv.Atoi(f); err == nil && !gone(pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// gone tells whether a process has ended, reaped or not.
func gone(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(b[strings.LastIndexByte(string(b), ')'):]), ") Z")
}

// restart is "systemctl restart".
func (m *manager) restart() {
	m.t.Helper()
	m.end(syscall.SIGTERM)
	m.start()
}

// reload is "systemctl reload": it returns when another process is the main one, and
// is ready.
func (m *manager) reload() {
	m.t.Helper()
	before := m.pid()
	if err := syscall.Kill(before, syscall.SIGHUP); err != nil {
		m.t.Fatal(err)
	}
	m.await("another process is ready", func() bool { return m.main != before && m.ready > 0 })
}

// close ends the service.
func (m *manager) close() {
	if len(m.processes()) > 0 {
		m.end(syscall.SIGKILL)
	}
	_ = m.socket.Close()
	<-m.done
	if m.t.Failed() {
		m.t.Logf("the service of %s:\n%s", m.proxy.Host.Name(), m.tail())
	}
	for _, s := range m.store {
		_ = s.file.Close()
	}
	_ = m.log.Close()
}

// untilFile connects again and again until a file is there; it says how many
// connections ended in which way.
func init() {
	clients["connect-until"] = func(a []string) (string, error) {
		counts := map[string]int{}
		for {
			if _, err := os.Stat(a[1]); err == nil {
				return fmt.Sprint(counts), nil
			}
			b, err := echo(a[0], "ping")
			switch {
			case err != nil:
				counts[outcome(err)]++
			case b == "ping":
				counts["ok"]++
			default:
				counts["other:"+b]++
			}
		}
	}
}

// workers connect without pause until stop is called, which returns what each of
// them says.
func (w *world) workers(h *netlab.Host, n int, addr string) (stop func() []string) {
	w.t.Helper()
	file := filepath.Join(w.t.TempDir(), "enough")
	said := make(chan string, n)
	for range n {
		go func() { said <- w.try(h, "connect-until", addr, file) }()
	}
	return sync.OnceValue(func() (all []string) {
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			w.t.Error(err)
		}
		for range n {
			all = append(all, <-said)
		}
		return all
	})
}
