package redirect

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-iptables/iptables"
)

// lockWait is how many seconds iptables waits for the lock that other programs
// hold while they change rules.
const lockWait = "5"

// MissingToolError says that a program is not installed, and what brings it.
type MissingToolError struct{ Tool, Package string }

func (e *MissingToolError) Error() string {
	return fmt.Sprintf("%s is not installed: run apt-get install %s", e.Tool, e.Package)
}

// ToolError is a program's refusal: the line of its input that failed, if it named
// one, and what it said.
type ToolError struct {
	Tool   string
	Line   int    // of the input, from 1; 0 if unknown
	Rule   string // the text of that line
	Stderr string
	Err    error
}

func (e *ToolError) Error() string {
	s := fmt.Sprintf("%s: %v", filepath.Base(e.Tool), e.Err)
	if e.Rule != "" {
		s += fmt.Sprintf(": line %d (%s)", e.Line, e.Rule)
	}
	if e.Stderr != "" {
		s += ": " + e.Stderr
	}
	return s
}

func (e *ToolError) Unwrap() error { return e.Err }

// findTool looks in PATH, then where Debian keeps these tools: the PATH of a
// service or of an unprivileged login often lacks sbin.
func findTool(name, pkg string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", &MissingToolError{name, pkg}
}

// Each says "line" in its own way: "Error occurred at line: 3", "line 7 failed",
// "Error in line 2:".
var failedLine = regexp.MustCompile(`line:? (\d+)`)

// run executes a tool with stdin and returns what it printed. It starts no
// goroutine that outlives it, and the child inherits the calling thread's network
// namespace.
func run(ctx context.Context, stdin, tool string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, tool, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	cmd.Env = append(os.Environ(), "LC_ALL=C") // messages are parsed
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	if err == nil {
		return stdout.String(), nil
	}
	if ctxErr := ctx.Err(); ctxErr != nil {
		err = ctxErr
	}
	te := &ToolError{Tool: tool, Stderr: strings.Join(strings.Fields(stderr.String()), " "), Err: err}
	if m := failedLine.FindStringSubmatch(te.Stderr); m != nil {
		te.Line, _ = strconv.Atoi(m[1])
		if lines := strings.Split(stdin, "\n"); te.Line >= 1 && te.Line <= len(lines) {
			te.Rule = lines[te.Line-1]
		}
	}
	return "", te
}

// family is one address family: its tools, its addresses, its sets.
type family struct {
	name                   string // IPv4 or IPv6, for people
	proto                  iptables.Protocol
	inet                   string // ipset's word
	command, save, restore string // paths
	loopback, any          string // addresses
	untranslatable         string // destinations that cannot become loopback, or empty
	outSet, liveSet        string
	tableNames             string // where the kernel lists the legacy tables in use
}

func newFamily(is4 bool, backend Backend) (family, error) {
	f := family{
		name: "IPv4", proto: iptables.ProtocolIPv4, inet: "inet", loopback: "127.0.0.1/32", any: "0.0.0.0",
		outSet: setOut4, liveSet: setLive4,
		tableNames: "/proc/thread-self/net/ip_tables_names",
	}
	prefix := "iptables"
	if !is4 {
		f = family{
			name: "IPv6", proto: iptables.ProtocolIPv6, inet: "inet6", loopback: "::1/128", any: "::",
			untranslatable: "fe80::/10", outSet: setOut6, liveSet: setLive6,
			tableNames: "/proc/thread-self/net/ip6_tables_names",
		}
		prefix = "ip6tables"
	}
	if backend != BackendDefault {
		prefix += "-" + string(backend)
	}
	var err error
	for _, t := range []struct {
		path   *string
		suffix string
	}{{&f.command, ""}, {&f.save, "-save"}, {&f.restore, "-restore"}} {
		if *t.path, err = findTool(prefix+t.suffix, "iptables"); err != nil {
			return f, err
		}
	}
	return f, nil
}

// probe asks whether the tables can be used at all, so that a machine without them
// (no permission, no kernel support) is told so before anything is changed.
func (f family) probe(tables []string) error {
	ipt, err := iptables.New(iptables.IPFamily(f.proto), iptables.Path(f.command), iptables.Timeout(5))
	if err != nil {
		return fmt.Errorf("probe %s: %w", f.command, err)
	}
	for _, table := range tables {
		if _, err := ipt.ListChains(table); err != nil {
			return fmt.Errorf("%s table %s cannot be used (CAP_NET_ADMIN and kernel support are needed): %w", f.name, table, err)
		}
	}
	return nil
}

// saved reads one table as it is.
func (f family) saved(ctx context.Context, table string) (savedTable, error) {
	out, err := run(ctx, "", f.save, "-t", table)
	if err != nil {
		return savedTable{}, err
	}
	return parseSaved(out), nil
}

// commit loads a restore script: atomic per table.
func (f family) commit(ctx context.Context, script string) error {
	_, err := run(ctx, script, f.restore, "-w", lockWait, "--noflush")
	return err
}

func isMissingTool(err error) bool {
	var missing *MissingToolError
	return errors.As(err, &missing)
}
