package netlab_test

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/symbolon/symbolon/internal/netlab"
)

type page struct{ body, client string }

func get(t *testing.T, h *netlab.Host, address string) page {
	t.Helper()
	p, err := tryGet(t.Context(), h, address)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func tryGet(ctx context.Context, h *netlab.Host, address string) (page, error) {
	transport := &http.Transport{DialContext: h.Dial, DisableKeepAlives: true}
	client := http.Client{Transport: transport, Timeout: 10 * time.Second}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/", nil)
	if err != nil {
		return page{}, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return page{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return page{string(b), resp.Header.Get("X-Client-Address")}, err
}

func TestNginxAnswersOthersAsAUnit(t *testing.T) {
	w := netlab.Test(t, "nginx", "curl")
	n := w.TwoHosts()
	d, err := n.Server.Nginx(t.Context(), netlab.Nginx{Port: 80, Body: "hello from nginx"})
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{"10.2.0.2", "[fd00:2::2]"} {
		out, err := n.Client.Output(t.Context(), "curl", "-sS", "http://"+address+"/")
		if err != nil {
			t.Fatal(err)
		}
		if out != "hello from nginx" {
			t.Errorf("%s answered %q", address, out)
		}
	}
	if got := get(t, n.Client, "10.2.0.2:80").client; got != "10.1.0.2" {
		t.Errorf("nginx took %q for its client", got)
	}
	wantCgroup(t, d.Pid, n.Server.Cgroup("nginx.service"))
	if err := d.Stop(); err != nil {
		t.Error(err)
	}
	if r, err := n.Client.Run(t.Context(), "curl", "-sS", "http://10.2.0.2/"); err != nil || r.ExitCode != 7 {
		t.Errorf("after Stop curl gave %+v, %v, want exit code 7 (refused)", r, err)
	}
}

// wantCgroup checks the cgroup v2 line of a process, where there is cgroup v2.
func wantCgroup(t *testing.T, pid int, want string) {
	t.Helper()
	if want == "" {
		t.Log("no cgroup v2 on this machine")
		return
	}
	b, err := os.ReadFile(filepath.Join("/proc", itoa(pid), "cgroup"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains("\n"+string(b), "\n0::"+want+"\n") {
		t.Errorf("process %d is in\n%swant 0::%s", pid, b, want)
	}
}

func TestPostgresKeepsDataOverACrash(t *testing.T) {
	w := netlab.Test(t, "postgres", "initdb", "psql")
	n := w.TwoHosts()
	d, err := n.Server.Postgres(t.Context(), 5432)
	if err != nil {
		t.Fatal(err)
	}
	wantCgroup(t, d.Pid, n.Server.Cgroup("postgresql.service"))
	psql := func(address, sql string) string {
		t.Helper()
		out, err := n.Client.Output(t.Context(), "psql", "-h", address, "-U", "postgres", "-XAtc", sql)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
	psql("10.2.0.2", "create table notes (text text)")
	psql("10.2.0.2", "insert into notes values ('kept')")
	if err := d.Kill(); err != nil {
		t.Fatal(err)
	}
	if d, err = n.Server.Postgres(t.Context(), 5432); err != nil {
		t.Fatal(err)
	}
	if got := psql("fd00:2::2", "select text from notes"); got != "kept" {
		t.Errorf("after the crash the table holds %q", got)
	}
	if got := psql("10.2.0.2", "select inet_client_addr()"); got != "10.1.0.2" {
		t.Errorf("postgres took %q for its client", got)
	}
	if err := d.Stop(); err != nil {
		t.Error(err)
	}
}

func TestSSHDSpeaksFirst(t *testing.T) {
	w := netlab.Test(t, "sshd", "ssh-keygen", "ssh-keyscan")
	n := w.TwoHosts()
	s, err := n.Server.SSHD(t.Context(), 22)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := n.Client.Dial(t.Context(), "tcp", "[fd00:2::2]:22")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	banner, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil || !strings.HasPrefix(banner, "SSH-2.0-OpenSSH") {
		t.Errorf("banner %q, %v", banner, err)
	}
	out, err := n.Client.Output(t.Context(), "ssh-keyscan", "-t", "ed25519", "10.2.0.2")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out, "10.2.0.2 "+s.HostKey) {
		t.Errorf("ssh-keyscan found %q, want the host key %q", out, s.HostKey)
	}
	for _, key := range []string{"host", "user"} {
		info, err := os.Stat(filepath.Join(filepath.Dir(s.Identity), key))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm()&0o077 != 0 {
			t.Errorf("private key %s has mode %v", key, info.Mode())
		}
	}
}

func TestRedisAnswers(t *testing.T) {
	w := netlab.Test(t, "redis-server", "redis-cli")
	n := w.TwoHosts()
	if _, err := n.Server.Redis(t.Context(), 6379); err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{"10.2.0.2", "fd00:2::2"} {
		out, err := n.Client.Output(t.Context(), "redis-cli", "-h", address, "PING")
		if err != nil || strings.TrimSpace(out) != "PONG" {
			t.Errorf("%s: %q, %v", address, out, err)
		}
	}
}

func TestMariaDBAnswers(t *testing.T) {
	w := netlab.Test(t, "mariadbd", "mariadb-install-db", "mariadb")
	n := w.TwoHosts()
	if _, err := n.Server.MariaDB(t.Context(), 3306); err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{"10.2.0.2", "fd00:2::2"} {
		out, err := n.Client.Output(t.Context(), "mariadb", "--no-defaults", "-h", address, "-u", "app", "-Ne", "select user()", "app")
		if err != nil || !strings.HasPrefix(out, "app@") {
			t.Errorf("%s: %q, %v", address, out, err)
		}
	}
}

func TestStartTellsWhyADaemonFailed(t *testing.T) {
	w := netlab.Test(t)
	h := w.Host("a")
	_, err := h.Start(t.Context(), netlab.Service{
		Unit:    "broken.service",
		Command: []string{"sh", "-c", "echo no such configuration >&2; exit 3"},
		Ports:   []uint16{80},
	})
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "no such configuration") {
		t.Errorf("error does not tell exit status and log: %v", err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	began := time.Now()
	_, err = h.Start(ctx, netlab.Service{Unit: "deaf.service", Command: []string{"sleep", "1000"}, Ports: []uint16{80}})
	if err == nil || !strings.Contains(err.Error(), "port 80") {
		t.Errorf("error does not tell the port: %v", err)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("a deaf daemon took %v to give up on", took)
	}
}

func TestAUnitRunsOnce(t *testing.T) {
	w := netlab.Test(t)
	h := w.Host("a")
	s := netlab.Service{Unit: "sleep.service", Command: []string{"sleep", "1000"}}
	d, err := h.Start(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Start(t.Context(), s); err == nil {
		t.Error("the unit was started twice")
	}
	if err := d.Kill(); err != nil {
		t.Fatal(err)
	}
	<-d.Done()
	if _, err := h.Start(t.Context(), s); err != nil {
		t.Errorf("start after kill: %v", err)
	}
}

func TestStopKillsWhatDoesNotEnd(t *testing.T) {
	w := netlab.Test(t)
	h := w.Host("a")
	// The shell ignores the signal and leaves a child behind that does so too.
	d, err := h.Start(t.Context(), netlab.Service{
		Unit:        "stubborn.service",
		Command:     []string{"sh", "-c", "trap '' TERM; (trap '' TERM; sleep 1000) & echo up; wait"},
		StopTimeout: 100 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	for !strings.Contains(d.Log(), "up") {
		time.Sleep(5 * time.Millisecond)
	}
	if err := d.Stop(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("Stop of a stubborn daemon returned %v", err)
	}
	if w.HasCgroups() {
		for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
			if _, err := os.Stat(root + h.Cgroup("stubborn.service")); err == nil {
				t.Error("its cgroup is still there")
			}
		}
	}
}

// between returns what is between two strings.
func between(s, before, after string) string {
	_, s, _ = strings.Cut(s, before)
	s, _, _ = strings.Cut(s, after)
	return s
}
