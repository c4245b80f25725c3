package serve

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/zap/zaptest"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/symbolon/symbolon/identity"
)

// role makes this test's program play another process.
const role = "SYMBOLON_SERVE_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(role) {
	case "client":
		os.Exit(client(os.Args[1]))
	case "impostor":
		os.Exit(impostor(os.Args[1], os.Args[2]))
	case "talker":
		os.Exit(talker(os.Args[1]))
	}
	os.Exit(m.Run())
}

var domain = spiffeid.RequireTrustDomainFromString("acme.example")

// authority is a source that names workloads by their user and program.
type authority struct {
	t    *testing.T
	key  *ecdsa.PrivateKey
	cert *x509.Certificate

	mu       sync.Mutex
	watchers []chan identity.Update
	serial   int64
	refuse   error
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{domain.ID().URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{t: t, key: key, cert: cert, serial: 1}
}

func (a *authority) credential(w *identity.Workload) *identity.Credential {
	a.serial++
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Error(err)
	}
	id := spiffeid.RequireFromSegments(domain, "acme", w.Attributes.Get("proc.uid")+"."+filepath.Base(w.Attributes.Get("proc.exe")))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(a.serial), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{id.URL()},
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		a.t.Error(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Error(err)
	}
	svid, err := identity.NewSVID([]*x509.Certificate{leaf}, key)
	if err != nil {
		a.t.Error(err)
	}
	partner := spiffeid.RequireTrustDomainFromString("partner.example")
	return &identity.Credential{SVID: svid, Bundles: x509bundle.NewSet(
		x509bundle.FromX509Authorities(domain, []*x509.Certificate{a.cert}),
		x509bundle.FromX509Authorities(partner, []*x509.Certificate{a.cert}),
	)}
}

// Watch gives a credential at once, and another one for each rotate.
func (a *authority) Watch(ctx context.Context, w *identity.Workload) <-chan identity.Update {
	out, in := make(chan identity.Update, 1), make(chan identity.Update, 1)
	a.mu.Lock()
	a.watchers = append(a.watchers, in)
	if a.refuse != nil {
		in <- identity.Update{Err: a.refuse}
	} else {
		in <- identity.Update{Credential: a.credential(w)}
	}
	a.mu.Unlock()
	go func() {
		defer close(out)
		for {
			select {
			case <-ctx.Done():
				return
			case u := <-in:
				if u.Credential == nil && u.Err == nil {
					a.mu.Lock()
					u.Credential = a.credential(w)
					a.mu.Unlock()
				}
				select {
				case out <- u:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return out
}

func (a *authority) tell(u identity.Update) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, w := range a.watchers {
		select {
		case w <- u:
		default:
		}
	}
}

// slow lets the test do something before a caller is looked at.
type slow struct {
	Resolver
	before func(pid int)
}

func (s slow) Process(ctx context.Context, pid int) (*identity.Workload, error) {
	if s.before != nil {
		s.before(pid)
	}
	return s.Resolver.Process(ctx, pid)
}

func start(t *testing.T, a *authority, before func(pid int)) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	r, err := identity.NewProcessResolver()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "sl-serve-") // others' users must get there
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "w.sock")
	s, err := Listen(path, a, slow{r, before}, zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return path
}

// as is this test's program in a role, as a user of its own.
func as(t *testing.T, name string, uid uint32, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "sl-serve-bin-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	program := filepath.Join(dir, name)
	if err := os.WriteFile(program, self, 0o755); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	c := exec.CommandContext(ctx, program, args...)
	c.Env = []string{role + "=" + name}
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	return c
}

// client prints the SPIFFE ID that it gets.
func client(path string) int {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	x, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr("unix://"+path))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println(x.DefaultSVID().ID)
	return 0
}

// An unmodified go-spiffe client gets its own SVID, each program another one, as its
// user; bundles too; and what is new as it comes.
func TestFetch(t *testing.T) {
	a := newAuthority(t)
	path := start(t, a, nil)
	for _, uid := range []uint32{0, 65534} {
		out, err := as(t, "client", uid, path).CombinedOutput()
		if want := fmt.Sprintf("spiffe://acme.example/acme/%d.client\n", uid); err != nil || string(out) != want {
			t.Errorf("as %d: %v, %q, want %q", uid, err, out, want)
		}
	}
	c, err := workloadapi.New(t.Context(), workloadapi.WithAddr("unix://"+path))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	w := &watcher{got: make(chan *workloadapi.X509Context, 8)}
	var watching sync.WaitGroup
	watching.Go(func() { _ = c.WatchX509Context(ctx, w) })
	first := <-w.got
	if _, err := first.Bundles.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("partner.example")); err != nil {
		t.Error(err)
	}
	a.tell(identity.Update{})
	second := <-w.got
	if first.DefaultSVID().Certificates[0].Equal(second.DefaultSVID().Certificates[0]) {
		t.Error("no rotation")
	}
	bundles, err := c.FetchX509Bundles(ctx)
	if err != nil || bundles.Len() != 2 {
		t.Errorf("%v, %v", bundles, err)
	}
	cancel()
	watching.Wait()
}

type watcher struct{ got chan *workloadapi.X509Context }

func (w *watcher) OnX509ContextUpdate(x *workloadapi.X509Context) { w.got <- x }
func (w *watcher) OnX509ContextWatchError(error)                  {}

func dial(t testing.TB, path string) *grpc.ClientConn {
	c, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func fetch(ctx context.Context, c *grpc.ClientConn) (grpc.ServerStreamingClient[workload.X509SVIDResponse], *workload.X509SVIDResponse, error) {
	stream, err := workload.NewSpiffeWorkloadAPIClient(c).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return nil, nil, err
	}
	m, err := stream.Recv()
	return stream, m, err
}

func TestRefusals(t *testing.T) {
	a := newAuthority(t)
	path := start(t, a, nil)
	c := dial(t, path)
	if _, _, err := fetch(t.Context(), c); status.Code(err) != codes.InvalidArgument {
		t.Errorf("without the header: %v", err)
	}
	ctx := metadata.AppendToOutgoingContext(t.Context(), header, "true")
	if _, err := workload.NewSpiffeWorkloadAPIClient(c).FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"x"}}); status.Code(err) != codes.Unimplemented {
		t.Errorf("JWT-SVID: %v", err)
	}
	stream, _, err := fetch(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	a.tell(identity.Update{Err: identity.ErrWithdrawn})
	if _, err := stream.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("after the identity was withdrawn: %v", err)
	}
	a.mu.Lock()
	a.refuse = fmt.Errorf("the controller is away")
	a.mu.Unlock()
	if _, _, err := fetch(ctx, c); status.Code(err) != codes.Unavailable {
		t.Errorf("without an SVID: %v", err)
	}
}

// One user's connections are bounded, and leave room for others'.
func TestTooManyConnections(t *testing.T) {
	path := start(t, newAuthority(t), nil)
	var last error
	for range maxPerUser + 1 {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		// The server speaks first: its settings.
		_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
		if _, last = c.Write([]byte(http2.ClientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00")); last == nil {
			_, last = c.Read(make([]byte, 1))
		}
	}
	if last == nil {
		t.Error("there is no bound")
	}
	if out, err := as(t, "client", 65534, path).CombinedOutput(); err != nil {
		t.Errorf("another user: %v, %s", err, out)
	}
}

// Who connects and says nothing costs descriptors, one for each of his threads: he loses
// them soon, though his connection would be let to idle for long.
func TestSilentCaller(t *testing.T) {
	path := start(t, newAuthority(t), nil)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if _, err := c.Write([]byte(http2.ClientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00")); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("he is still there")
	}
}

// Descriptors are bounded for a user, and for all, and are given back.
func TestWatchedDescriptors(t *testing.T) {
	s := &Server{watched: make(map[uint32]int)}
	var release []func()
	for uid := range uint32(maxWatching / maxWatchingPerUser) {
		r, err := s.watching(uid, maxWatchingPerUser)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.watching(uid, 1); err == nil {
			t.Error("a user has more than his share")
		}
		release = append(release, r)
	}
	if _, err := s.watching(99, 1); err == nil {
		t.Error("there is no bound for all")
	}
	for _, r := range release {
		r()
	}
	if s.allWatched != 0 || len(s.watched) != 0 {
		t.Errorf("%d are left, %v", s.allWatched, s.watched)
	}
}

// A program that connects, and has another one run in its process, cannot have that
// one's SVID fetched: neither by a child that talks on the socket, nor by one that reads
// the answer to what was written before.
func TestImpostor(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	for _, way := range []string{"talk", "listen"} {
		t.Run(way, func(t *testing.T) {
			path := start(t, newAuthority(t), func(pid int) {
				// Whoever has connected runs something else by now: the worst case.
				for range 1000 {
					exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
					if want, _ := filepath.EvalSymlinks(sleep); exe == want {
						time.Sleep(100 * time.Millisecond) // exec has still something to do
						return
					}
					time.Sleep(10 * time.Millisecond)
				}
				t.Error("it did not execute the other program")
			})
			c := as(t, "impostor", 65534, path, way)
			var out bytes.Buffer
			c.Stdout, c.Stderr = &out, &out
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			_ = c.Wait()
			if got := out.String(); !strings.Contains(got, "refused") {
				t.Errorf("the impostor got: %s", got)
			}
		})
	}
}

// impostor connects, leaves the socket to a child, and becomes sleep(1).
func impostor(path, way string) int {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	if way == "listen" {
		if _, err := conn.Write(request()); err != nil {
			fmt.Println(err)
			return 1
		}
	}
	f, err := conn.File()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	child := exec.Command("/proc/self/exe", way)
	child.Env, child.ExtraFiles = []string{role + "=talker"}, []*os.File{f}
	child.Stdout, child.Stderr = os.Stdout, os.Stderr
	if err := child.Start(); err != nil {
		fmt.Println(err)
		return 1
	}
	sleep, err := exec.LookPath("/bin/sleep")
	if err == nil {
		err = syscall.Exec(sleep, []string{"sleep", "8"}, nil)
	}
	fmt.Println(err)
	return 1
}

// request is all that a client writes to fetch an SVID, acknowledgement included.
func request() []byte {
	var out, headers bytes.Buffer
	out.WriteString(http2.ClientPreface)
	f := http2.NewFramer(&out, nil)
	_ = f.WriteSettings()
	_ = f.WriteSettingsAck()
	e := hpack.NewEncoder(&headers)
	for _, h := range [][2]string{
		{":method", "POST"}, {":scheme", "http"}, {":path", "/SpiffeWorkloadAPI/FetchX509SVID"}, {":authority", "x"},
		{"content-type", "application/grpc"}, {"te", "trailers"}, {header, "true"},
	} {
		_ = e.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]})
	}
	_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headers.Bytes(), EndHeaders: true})
	_ = f.WriteData(1, true, make([]byte, 5))
	return out.Bytes()
}

// talker fetches on the socket that it was left.
func talker(way string) int {
	conn, err := net.FileConn(os.NewFile(3, "socket"))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	if way == "listen" {
		_ = conn.SetReadDeadline(time.Now().Add(15 * time.Second))
		var got bytes.Buffer
		_, _ = got.ReadFrom(conn)
		if bytes.Contains(got.Bytes(), []byte("spiffe://")) {
			fmt.Println("an SVID")
			return 1
		}
		fmt.Printf("refused: %d bytes\n", got.Len())
		return 0
	}
	once := sync.OnceValue(func() net.Conn { return conn })
	used := false
	c, err := grpc.NewClient("passthrough:x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			if used {
				return nil, net.ErrClosed
			}
			used = true
			return once(), nil
		}))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(context.Background(), header, "true"), 15*time.Second)
	defer cancel()
	_, m, err := fetch(ctx, c)
	if err == nil {
		fmt.Println("an SVID:", m.GetSvids()[0].GetSpiffeId())
		return 1
	}
	fmt.Println("refused:", err)
	return 0
}

// The socket's name: what is no socket is left alone.
func TestPathInUse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Listen(path, nil, nil, nil)
	if err == nil || !strings.Contains(err.Error(), "no socket: choose another path") {
		t.Errorf("%v", err)
	}
	var kept map[string]any
	data, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(data, &kept)
	}
	if diff := cmp.Diff(map[string]any{}, kept); err != nil || diff != "" {
		t.Errorf("%v, %s", err, diff)
	}
}
