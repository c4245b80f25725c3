// Package fleet puts the real programs into a netlab world: a controller, and a
// proxy for each host that takes part. Tests, demo and benchmarks use it.
package fleet

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/internal/netlab"
)

const (
	// ControllerPort is the controller's.
	ControllerPort = 7443
	// TrustDomain is every fleet's that asks for no other.
	TrustDomain = "acme.example"

	startTimeout = 60 * time.Second
)

// Fleet is a controller and its proxies. Close is the world's: everything that a
// fleet starts and writes belongs to it.
type Fleet struct {
	// Bin is the directory with symbolon, symbolon-proxy and symbolon-controller.
	Bin        string
	Dir        string // everything that the fleet writes
	Controller *netlab.Host
	Address    string // of the controller, as the proxies dial it
	options    Options
	daemon     *netlab.Daemon

	mu      sync.Mutex
	proxies map[*netlab.Host]*Proxy
}

// Options are for fleets that meet others.
type Options struct {
	// TrustDomain, if not TrustDomain.
	TrustDomain string
	// Flags are more of the controller's: "--federation-listen=[::]:8443".
	Flags []string
}

// New starts a controller in host, which is reached at address.
func New(ctx context.Context, host *netlab.Host, address string) (*Fleet, error) {
	return NewWith(ctx, host, address, Options{})
}

// NewWith is New with Options.
func NewWith(ctx context.Context, host *netlab.Host, address string, o Options) (*Fleet, error) {
	if o.TrustDomain == "" {
		o.TrustDomain = TrustDomain
	}
	bin, err := binaries()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(host.World().Dir(), "fleet-")
	if err != nil {
		return nil, err
	}
	f := &Fleet{
		Bin: bin, Dir: dir, Controller: host, proxies: make(map[*netlab.Host]*Proxy),
		Address: net.JoinHostPort(address, fmt.Sprint(ControllerPort)), options: o,
	}
	return f, f.StartController(ctx)
}

// binaries finds bin/ of the tree that this program was built from or runs in.
func binaries() (string, error) {
	if dir := os.Getenv("SYMBOLON_BIN"); dir != "" {
		return dir, nil
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			bin := filepath.Join(dir, "bin")
			if _, err := os.Stat(filepath.Join(bin, "symbolon-proxy")); err != nil {
				return "", fmt.Errorf("the programs are not built: run 'make build' (%w)", err)
			}
			return bin, nil
		}
	}
	return "", errors.New("not inside the source tree: set SYMBOLON_BIN to the directory of the programs")
}

// StartController starts it, or starts it again on the state that it left.
func (f *Fleet) StartController(ctx context.Context) (err error) {
	f.daemon, err = f.Controller.Start(ctx, netlab.Service{
		Unit: "symbolon-controller.service",
		Command: append([]string{
			filepath.Join(f.Bin, "symbolon-controller"), "--trust-domain", f.options.TrustDomain,
			"--listen", fmt.Sprintf("[::]:%d", ControllerPort), "--data-dir", f.data(),
		}, f.options.Flags...),
		Ports: []uint16{ControllerPort},
		Ready: func(context.Context) error {
			_, err := os.Stat(filepath.Join(f.data(), "admin.token"))
			return err
		},
	})
	return err
}

// Reconfigure starts the controller again with more flags.
func (f *Fleet) Reconfigure(ctx context.Context, flags ...string) error {
	if err := f.daemon.Stop(); err != nil {
		return err
	}
	f.options.Flags = append(f.options.Flags, flags...)
	return f.StartController(ctx)
}

// CAFile is the controller's ca.pem.
func (f *Fleet) CAFile() string { return filepath.Join(f.data(), "ca.pem") }

// ControllerDaemon is the running controller.
func (f *Fleet) ControllerDaemon() *netlab.Daemon { return f.daemon }

func (f *Fleet) data() string { return filepath.Join(f.Dir, "controller") }

// CLI runs the operator's program on the controller's host.
func (f *Fleet) CLI(ctx context.Context, args ...string) (netlab.Result, error) {
	c := f.Controller.Command(ctx, filepath.Join(f.Bin, "symbolon"), args...)
	c.Env = append(os.Environ(), f.CLIEnv()...)
	return c.Result()
}

// CLIEnv is what the operator's program needs to find the controller.
func (f *Fleet) CLIEnv() []string {
	return []string{
		fmt.Sprintf("SYMBOLON_CONTROLLER=127.0.0.1:%d", ControllerPort),
		"SYMBOLON_TOKEN_FILE=" + filepath.Join(f.data(), "admin.token"),
		"SYMBOLON_CA_FILE=" + filepath.Join(f.data(), "ca.pem"),
		"NO_COLOR=1",
	}
}

// Must runs the operator's program, which must succeed, and returns what it says.
func (f *Fleet) Must(ctx context.Context, args ...string) (string, error) {
	r, err := f.CLI(ctx, args...)
	if err != nil {
		return "", err
	}
	if r.ExitCode != 0 {
		return "", fmt.Errorf("symbolon %s: exit code %d\n%s%s", strings.Join(args, " "), r.ExitCode, r.Stdout, r.Stderr)
	}
	return r.Stdout, nil
}

// Apply applies policy YAML and waits until every running proxy enforces it.
func (f *Fleet) Apply(ctx context.Context, yaml string) error {
	file := filepath.Join(f.Dir, "apply.yaml")
	if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
		return err
	}
	if _, err := f.Must(ctx, "policy", "apply", "-f", file); err != nil {
		return err
	}
	return f.Settle(ctx)
}

// Settle waits until every running proxy enforces the controller's generation.
func (f *Fleet) Settle(ctx context.Context) error {
	want, err := f.Generation(ctx)
	if err != nil {
		return err
	}
	f.mu.Lock()
	all := make([]*Proxy, 0, len(f.proxies))
	for _, p := range f.proxies {
		all = append(all, p)
	}
	f.mu.Unlock()
	for _, p := range all {
		if p.daemon == nil || p.daemon.Ended() {
			continue
		}
		if err := p.waitGeneration(ctx, want); err != nil {
			return err
		}
	}
	return nil
}

// Generation is the controller's.
func (f *Fleet) Generation(ctx context.Context) (uint64, error) {
	out, err := f.Must(ctx, "status", "-o", "json")
	if err != nil {
		return 0, err
	}
	var s struct {
		Generation json.Number `json:"generation"`
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		return 0, fmt.Errorf("status: %w", err)
	}
	n, err := s.Generation.Int64()
	return uint64(n), err
}

// Enrolment is what a host joins with.
type Enrolment struct {
	Namespace string
	Labels    map[string]string
	// Config is appended to proxy.yaml, such as "redirect: {inbound_ports: [80]}".
	Config string
	// Join is what stands in the configuration's "controller" in the place of a join token:
	// "join: x509pop, cert_file: ...".
	Join string
	// Files are files of the machine, by name, which the proxy finds with this content
	// instead; SetFile changes them.
	Files map[string]string
}

// Proxy is a host's proxy.
type Proxy struct {
	Host   *netlab.Host
	fleet  *Fleet
	config string
	files  map[string]string // the machine's, to those that stand in for them
	dir    string
	daemon *netlab.Daemon
}

// Proxy enrols a host and starts its proxy.
func (f *Fleet) Proxy(ctx context.Context, h *netlab.Host, e Enrolment) (*Proxy, error) {
	p := &Proxy{Host: h, fleet: f, dir: filepath.Join(f.Dir, "proxy-"+h.Name())}
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return nil, err
	}
	join := e.Join
	if join == "" {
		if err := p.getToken(ctx, e); err != nil {
			return nil, err
		}
		join = fmt.Sprintf("join_token_file: %q", p.tokenFile())
	}
	p.config = filepath.Join(p.dir, "proxy.yaml")
	yaml := fmt.Sprintf("controller: {address: %q, %s}\nsocket: %q\nflows: %q\n%s\n",
		f.Address, join, p.Socket(), p.FlowFile(), e.Config)
	if err := os.WriteFile(p.config, []byte(yaml), 0o600); err != nil {
		return nil, err
	}
	p.files = make(map[string]string)
	for name, content := range e.Files {
		p.files[name] = filepath.Join(p.dir, fmt.Sprintf("file-%d", len(p.files)))
		if err := p.SetFile(name, content); err != nil {
			return nil, err
		}
	}
	f.mu.Lock()
	f.proxies[h] = p
	f.mu.Unlock()
	return p, p.Start(ctx)
}

func (p *Proxy) getToken(ctx context.Context, e Enrolment) error {
	args := []string{"host", "token", "--namespace", e.Namespace}
	for k, v := range e.Labels {
		args = append(args, "--label", k+"="+v)
	}
	token, err := p.fleet.Must(ctx, args...)
	if err != nil {
		return err
	}
	return os.WriteFile(p.tokenFile(), []byte(token), 0o600)
}

func (p *Proxy) tokenFile() string { return filepath.Join(p.dir, "join.token") }

// Socket is the proxy's debug socket.
func (p *Proxy) Socket() string { return filepath.Join(p.dir, "p.sock") }

// FlowFile has the proxy's records.
func (p *Proxy) FlowFile() string { return filepath.Join(p.dir, "flows.jsonl") }

// JoinToken is the token that the host enrolled with; it is spent.
func (p *Proxy) JoinToken() (string, error) {
	b, err := os.ReadFile(p.tokenFile())
	return strings.TrimSpace(string(b)), err
}

// Daemon is the running proxy.
func (p *Proxy) Daemon() *netlab.Daemon { return p.daemon }

// Start starts the proxy, or starts it again, and waits until it enforces a policy.
func (p *Proxy) Start(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	p.daemon, err = p.Host.Start(ctx, netlab.Service{
		Unit:        "symbolon-proxy.service",
		Command:     p.command(),
		StopTimeout: 20 * time.Second,
		Ready: func(ctx context.Context) error {
			r, err := p.page(ctx, "/readyz")
			if err != nil {
				return err
			}
			if r.status != http.StatusOK {
				return errors.New(strings.TrimSpace(string(r.body)))
			}
			return nil
		},
	})
	return err
}

// command starts the proxy, where files are to stand in for others in a mount namespace
// of its own.
func (p *Proxy) command() []string {
	own := []string{filepath.Join(p.fleet.Bin, "symbolon-proxy"), "--config", p.config}
	if len(p.files) == 0 {
		return own
	}
	script := "set -e\n"
	var names []string
	for name, other := range p.files {
		script += "mount --bind \"$1\" \"$2\"; shift 2\n"
		names = append(names, other, name)
	}
	outer := append([]string{"unshare", "--mount", "--propagation", "private", "sh", "-c", script + "exec \"$@\"", "sh"}, names...)
	return append(outer, own...)
}

// SetFile changes one of Enrolment.Files.
func (p *Proxy) SetFile(name, content string) error {
	return os.WriteFile(p.files[name], []byte(content), 0o644) // in its place: it is mounted
}

// Forget removes the host's identity from the kernel's keyring. Call it when the
// world ends.
func (p *Proxy) Forget(ctx context.Context) error {
	return p.Host.Command(ctx, filepath.Join(p.fleet.Bin, "symbolon-proxy"), "forget", "--socket", p.Socket()).Run()
}

// Forget does so for every proxy of the fleet.
func (f *Fleet) Forget(ctx context.Context) error {
	var errs []error
	for _, p := range f.proxies {
		errs = append(errs, p.Forget(ctx))
	}
	return errors.Join(errs...)
}

// Cleanup takes the proxy's rules out of the host's kernel.
func (p *Proxy) Cleanup(ctx context.Context) error {
	return p.Host.Command(ctx, filepath.Join(p.fleet.Bin, "symbolon-proxy"), "cleanup").Run()
}

type answer struct {
	status int
	body   []byte
}

// page asks the debug socket.
func (p *Proxy) page(ctx context.Context, path string) (answer, error) {
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", p.Socket())
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://proxy"+path, nil)
	if err != nil {
		return answer{}, err
	}
	res, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	var b bytes.Buffer
	_, err = b.ReadFrom(res.Body)
	return answer{res.StatusCode, b.Bytes()}, err
}

// Debug reads a debug page into v.
func (p *Proxy) Debug(ctx context.Context, page string, v any) error {
	r, err := p.page(ctx, "/debug/"+page)
	if err != nil {
		return err
	}
	return json.Unmarshal(r.body, v)
}

func (p *Proxy) waitGeneration(ctx context.Context, want uint64) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		var s struct {
			Generation uint64 `json:"generation"`
		}
		err := p.Debug(ctx, "status", &s)
		if err == nil && s.Generation >= want {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s enforces generation %d, want %d (%w)\n%s", p.Host.Name(), s.Generation, want, errors.Join(ctx.Err(), err), p.daemon.Log())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Flows are the records that the proxy has written so far.
func (p *Proxy) Flows() ([]flow.Line, error) {
	data, err := os.ReadFile(p.FlowFile())
	if err != nil {
		return nil, err
	}
	var lines []flow.Line
	s := bufio.NewScanner(bytes.NewReader(data))
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		var l flow.Line
		if err := json.Unmarshal(s.Bytes(), &l); err != nil {
			return nil, fmt.Errorf("%s: %q: %w", p.FlowFile(), s.Text(), err)
		}
		lines = append(lines, l)
	}
	return lines, s.Err()
}

// WaitFlow waits for a record that match accepts: records are written when
// connections end.
func (p *Proxy) WaitFlow(ctx context.Context, match func(*flow.Line) bool) (*flow.Line, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		lines, err := p.Flows()
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		for i := len(lines) - 1; i >= 0; i-- {
			if match(&lines[i]) {
				return &lines[i], nil
			}
		}
		select {
		case <-ctx.Done():
			last := ""
			if len(lines) > 0 {
				b, _ := json.Marshal(lines[len(lines)-1])
				last = string(b)
			}
			return nil, fmt.Errorf("no such record among %d of %s; the last: %s", len(lines), p.Host.Name(), last)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
