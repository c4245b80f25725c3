package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/flow"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/policydb"
	"github.com/symbolon/symbolon/redirect"
)

// patience is how long a test waits for what must happen.
const patience = 15 * time.Second

// testTimeouts are short, yet long enough for a handshake on a loaded machine. Tests
// that wait for a deadline shorten it.
var testTimeouts = Timeouts{
	Setup: patience, Connect: 5 * time.Second, Handshake: 5 * time.Second,
	Quiet: 200 * time.Millisecond, Drain: time.Second,
}

// baseline is the policy of most tests: web may call db, and nothing else.
const baseline = `
kind: Namespace
name: /
mode: enforce
default: deny
protection: encrypted
attributes: {app: {}, ext: {}}
---
kind: Namespace
name: /prod
mode: enforce
---
kind: Policy
namespace: /prod
name: web-calls-db
subject: {app: web}
verb: allow
object: {app: db}
`

// world is a proxy that serves this process's host, and what is around it.
type world struct {
	*testing.T
	p       *Proxy
	ca      *authority
	creds   *credentials
	records *recorder
	clock   *clock
	app     *app
	stop    func() error // ends Run and returns its error
	gen     uint64
}

// newWorld starts a proxy for which this process is the workload /prod/db.
func newWorld(t *testing.T, change ...func(*Options)) *world {
	t.Helper()
	w := &world{T: t, ca: newAuthority(t, "acme.example"), records: newRecorder(t), clock: &clock{}}
	w.creds = &credentials{byUID: map[string]*identity.Credential{
		"0": w.ca.workload("/prod/db", map[string][]string{"app": {"db"}}),
	}}
	o := Options{
		Host: "protected", Workloads: must(identity.NewResolver())(t), Credentials: w.creds, Records: w.records,
		Log: zaptest.NewLogger(t, zaptest.Level(zap.ErrorLevel)), Timeouts: testTimeouts, Now: w.clock.now,
	}
	cfg := redirect.DefaultConfig()
	for _, a := range cfg.OutboundAddrs() {
		o.Outbound = append(o.Outbound, listen(t, a.String()))
	}
	o.Inbound = []*net.TCPListener{listen(t, cfg.InboundAddr().String())}
	o.Diag, o.Conntrack = must(redirect.NewDiag())(t), must(redirect.NewConntrack())(t)
	if g, err := redirect.OpenCgroups(); err == nil {
		o.Cgroups = g
		t.Cleanup(func() { _ = g.Close() })
	} else if !errors.Is(err, redirect.ErrNoCgroup) {
		t.Fatal(err)
	}
	o.Connects = must(redirect.OpenConnects(cfg))(t)
	t.Cleanup(func() { _, _, _ = o.Diag.Close(), o.Conntrack.Close(), o.Connects.Close() })
	for _, f := range change {
		f(&o)
	}
	w.p = New(o)
	w.p.SetHostCredential(w.ca.host("h1"))
	w.policy(baseline)
	w.app = newApp(t)

	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.p.Run(ctx) }()
	for _, l := range o.Outbound {
		eventually(t, "the listeners are set up", func() bool { return w.p.tls.StockTLS || inherits(t, l) })
	}
	w.stop = sync.OnceValue(func() error { cancel(); return within(t, done, "the proxy's end") })
	t.Cleanup(func() {
		if err := w.stop(); err != nil {
			t.Errorf("run: %v", err)
		}
		if n := w.creds.pins.Load(); n != 0 {
			t.Errorf("%d credentials are still pinned", n)
		}
	})
	return w
}

// inherits tells whether bare has set l up: from then on Run opens no more descriptors, which
// whoever counts them would take for left behind.
func inherits(t testing.TB, l *net.TCPListener) (set bool) {
	t.Helper()
	raw, err := l.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			n, _ := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE)
			set = n == 1
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return set
}

// policy puts YAML in force, instead of all that was.
func (w *world) policy(yaml string) {
	w.Helper()
	docs, err := policydb.Parse("test.yaml", []byte(yaml))
	if err != nil {
		w.Fatal(err)
	}
	var rs []*symbolonv1.Resource
	for _, d := range docs {
		rs = append(rs, d.Resource)
	}
	w.gen++
	if err := w.p.SetPolicy(rs, w.gen); err != nil {
		w.Fatal(err)
	}
}

// web is a credential that policy lets call db.
func (w *world) web() *identity.Credential {
	return w.ca.workload("/prod/web", map[string][]string{"app": {"web"}})
}

// cost is what runs and is open in this process.
type cost struct {
	goroutines goleak.Option
	files      int
}

func (w *world) cost() cost {
	w.Helper()
	return cost{goleak.IgnoreCurrent(), openFiles(w.T)}
}

// nothingLeft waits until everything since before is gone.
func (w *world) nothingLeft(before cost) {
	w.Helper()
	rests := goleak.IgnoreTopFunction("github.com/symbolon/symbolon/proxy.(*crew).work")
	if err := goleak.Find(before.goroutines, rests); err != nil {
		w.Errorf("left behind: %v", err)
	}
	eventually(w.T, "descriptors are closed", func() bool { return openFiles(w.T) <= before.files })
}

func openFiles(t testing.TB) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range files {
		// Pollers and namespaces belong to the runtime and to inOther; what leaks is sockets and pipes.
		if target, err := os.Readlink("/proc/self/fd/" + f.Name()); err == nil && (strings.HasPrefix(target, "socket:") || strings.HasPrefix(target, "pipe:")) {
			n++
		}
	}
	return n
}

// clock is the proxy's: the real one, moved.
type clock struct{ ahead atomic.Int64 }

func (c *clock) now() time.Time           { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) advance(by time.Duration) { c.ahead.Add(int64(by)) }

// credentials is the Source of identity: by the uid of the workload.
type credentials struct {
	mu    sync.Mutex
	byUID map[string]*identity.Credential
	keys  map[string]identity.Key
	pins  atomic.Int64
	// stall, if set, may make Get wait.
	stall func(ctx context.Context, uid string)
}

func (c *credentials) Get(ctx context.Context, w *identity.Workload) (*identity.Credential, error) {
	uid := w.Attributes.Get("proc.uid")
	if c.stall != nil {
		c.stall(ctx, uid)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.keys == nil {
		c.keys = make(map[string]identity.Key)
	}
	c.keys[uid] = w.Key
	if cred := c.byUID[uid]; cred != nil {
		return cred, nil
	}
	return nil, fmt.Errorf("%w: uid %s", identity.ErrNoCredential, uid)
}

func (c *credentials) set(uid string, cred *identity.Credential) identity.Key {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.byUID[uid] = cred
	return c.keys[uid]
}

func (c *credentials) Known(w *identity.Workload) (*identity.Credential, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	uid := w.Attributes.Get("proc.uid")
	cred := c.byUID[uid]
	return cred, cred != nil && c.keys[uid] == w.Key && c.stall == nil
}

func (c *credentials) Pin(w *identity.Workload) (*identity.Credential, func()) {
	c.pins.Add(1)
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.byUID[w.Attributes.Get("proc.uid")], func() { c.pins.Add(-1) }
}

// recorder keeps what the proxy records, in order.
type recorder struct {
	t  testing.TB
	ch chan *symbolonv1.FlowRecord
}

func newRecorder(t testing.TB) *recorder {
	return &recorder{t, make(chan *symbolonv1.FlowRecord, 4096)}
}

func (r *recorder) Record(x *symbolonv1.FlowRecord) { r.ch <- x }

// next waits for one more record.
func (r *recorder) next() *flow.Line {
	r.t.Helper()
	return flow.NewLine(within(r.t, r.ch, "a record"))
}

// none holds that every connection so far has had its record.
func (r *recorder) none() {
	r.t.Helper()
	select {
	case x := <-r.ch:
		r.t.Errorf("a record too many: %v", x)
	default:
	}
}

func listen(t testing.TB, address string) *net.TCPListener {
	t.Helper()
	l, err := redirect.ListenConfig(redirect.DefaultKeepAlive).Listen(context.Background(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// within receives, or fails the test.
func within[T any](t testing.TB, ch <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(patience):
		t.Fatalf("%s: has not happened", what)
		panic("unreachable")
	}
}

// eventually waits for what the kernel or another goroutine brings about unseen.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: has not happened", what)
		}
	}
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// ctx ends with the test's patience.
func (w *world) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	w.Cleanup(cancel)
	return ctx
}

// tunnel is the client's half of symbolon/1 as a proxy of ours makes it, from the
// other host to the application here. Its error is that of dialling or the verdict.
func (w *world) tunnel(cred *identity.Credential, protection symbolonv1.Protection) (*mtls.Conn, error) {
	w.Helper()
	ctx := w.ctx()
	tcp := w.call(w.app.addr)
	t, err := mtls.Dial(ctx, tcp, mtls.NewEndpoint(cred, mtls.Options{}), func(*mtls.Peer) (*symbolonv1.Open, error) {
		return mtls.NewOpen(mtls.NewFlowID(), w.app.addr, protection, 1), nil
	})
	if err != nil {
		return nil, err
	}
	if _, err := t.ReadVerdict(ctx); err != nil {
		return nil, err
	}
	return t, nil
}
