package integration

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/symbolon/symbolon/internal/fleet"
)

func init() {
	// talk ADDR FILE: open, say "open", exchange a line again and again until the file is
	// there, and say that it was.
	clients["talk"] = func(a []string) (string, error) {
		c, err := dial(a[0])
		if err != nil {
			return "", err
		}
		defer c.Close()
		r := bufio.NewReader(c)
		if _, err := r.ReadString('\n'); err != nil { // the greeting
			return "", err
		}
		for n := 0; ; n++ {
			if _, err := os.Stat(a[1]); err == nil {
				return "done", nil
			}
			_ = c.SetDeadline(time.Now().Add(clientTimeout))
			if _, err := io.WriteString(c, "line\n"); err != nil {
				return "", err
			}
			if _, err := r.ReadString('\n'); err != nil {
				return "", err
			}
			if n == 0 {
				fmt.Println("open")
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
}

// talk is a conversation that a client has with the server until it is ended, and what it
// said in the end.
type talk struct {
	w    *world
	file string
	said chan string
}

func (w *world) talk(addr string) *talk {
	w.t.Helper()
	t := &talk{w: w, file: filepath.Join(w.t.TempDir(), "enough"), said: make(chan string, 1)}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	c := w.Client.Command(ctx, self(w.t))
	c.Env = append(os.Environ(), programEnv+"=talk "+addr+" "+t.file, "GORACE=atexit_sleep_ms=0")
	c.Unit = "client.service"
	out, err := c.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		w.t.Fatal(err)
	}
	r := bufio.NewReader(out)
	first, err := r.ReadString('\n')
	w.t.Cleanup(func() { cancel(); _ = c.Wait() })
	if err != nil || first != "open\n" {
		w.t.Fatalf("a conversation with %s: %q, %v", addr, first, err)
	}
	go func() {
		rest, _ := io.ReadAll(r)
		t.said <- strings.TrimSpace(string(rest))
	}()
	return t
}

// alive fails the test if the conversation has ended.
func (t *talk) alive(when string) {
	t.w.t.Helper()
	select {
	case said := <-t.said:
		t.w.t.Fatalf("%s: the conversation has ended: %q", when, said)
	default:
	}
}

// end ends it, and wants it to have gone on until then.
func (t *talk) end(when string) {
	t.w.t.Helper()
	if err := os.WriteFile(t.file, nil, 0o600); err != nil {
		t.w.t.Fatal(err)
	}
	t.w.expect(when, within(t.w.t, t.said), "done")
}

// rootBehind are the hosts that the next step of the root's rotation waits for.
func (w *world) rootBehind() (ids []string) {
	w.t.Helper()
	out, err := w.fleet.Must(w.ctx(), "ca", "status", "-o", "json")
	if err != nil {
		w.t.Fatal(err)
	}
	var s struct {
		RootRotation struct {
			Behind []struct {
				HostID    string `json:"hostId"`
				Connected bool   `json:"connected"`
			} `json:"behind"`
		} `json:"rootRotation"`
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		w.t.Fatal(err)
	}
	for _, b := range s.RootRotation.Behind {
		if b.Connected {
			ids = append(ids, b.HostID)
		} else {
			ids = append(ids, b.HostID+" away")
		}
	}
	return ids
}

func (w *world) rotateRoot(flags ...string) {
	w.t.Helper()
	if _, err := w.fleet.Must(w.ctx(), append([]string{"ca", "rotate", "--root"}, flags...)...); err != nil {
		w.t.Fatal(err)
	}
}

// ownRoots is how many roots of the own trust domain a proxy believes, and their version.
func (w *world) ownRoots(p *fleet.Proxy) (n int, version uint64) {
	w.t.Helper()
	var s struct {
		TrustDomain   string `json:"trust_domain"`
		BundleVersion uint64 `json:"bundle_version"`
		Bundles       map[string]struct {
			Roots int `json:"roots"`
		} `json:"bundles"`
	}
	if err := p.Debug(w.ctx(), "status", &s); err != nil {
		w.t.Fatal(err)
	}
	return s.Bundles[s.TrustDomain].Roots, s.BundleVersion
}

// The root is rotated under traffic. Nothing is refused. Connections that began under the
// old root go on all the way, encrypted or authenticated, once they are renewed; one that had
// not the time for that is cut with the old root. It takes long since the peer of an
// encrypted one is first asked for its newer certificate after a minute or so.
func TestRootRotationUnderTraffic(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Server)
	w.apply(strings.Replace(basePolicy, "protection: encrypted", "protection: authenticated", 1) + allow("client-echo", "client", "echo", "") + `---
kind: Policy
namespace: /acme/prod
name: encrypt-most
subject: any
verb: encrypt
object: {app: echo}
ports: [tcp/7001, tcp/7002]
`)
	const echo, encrypted, authenticated = "10.2.0.2:7001", "10.2.0.2:7002", "10.2.0.2:7011"
	kept, plain := w.talk(encrypted), w.talk(authenticated)
	time.Sleep(time.Second) // certificates have seconds: a newer one ends in a later one
	steadily := func(what string, do func()) {
		t.Helper()
		stop := w.workers(w.Client, 4, echo)
		do()
		for _, counts := range stop() {
			t.Log(what, counts)
			if !strings.HasPrefix(counts, "map[ok:") || strings.Contains(counts, " ") {
				t.Errorf("%s: a worker's connections: %s, want only ok", what, counts)
			}
		}
	}
	steadily("publish and sign", func() {
		w.rotateRoot()
		began := time.Now()
		w.eventually("both hosts have acknowledged the next root", func() bool { return len(w.rootBehind()) == 0 })
		t.Logf("acknowledged %v after the answer, the CLI's own time included", time.Since(began))
		w.rotateRoot("--sign")
		began = time.Now()
		w.eventually("nothing of the old root is left", func() bool { return len(w.rootBehind()) == 0 })
		t.Logf("all SVIDs are new %v after the answer, the CLI's own time included", time.Since(began))
	})
	kept.alive("signed")
	plain.alive("signed")
	young := w.talk(authenticated)
	began := time.Now()
	for _, p := range []*fleet.Proxy{w.client, w.server} {
		// One each for the two that began under the old root.
		for n := 0.0; n < 2; n, _ = w.counted(p, `symbolon_certificate_renewals_total{result="renewed"}`) {
			if time.Since(began) > 3*time.Minute {
				t.Fatal("the connection's certificates are not renewed")
			}
			kept.alive("until its renewal")
			time.Sleep(200 * time.Millisecond)
		}
	}
	steadily("finish", func() {
		w.rotateRoot("--finish")
		for _, p := range []*fleet.Proxy{w.client, w.server} {
			w.eventually("the old root is believed no more", func() bool { n, _ := w.ownRoots(p); return n == 1 })
		}
	})
	time.Sleep(2 * time.Second) // what is cut, is cut within that
	kept.end("the encrypted connection that began under the old root")
	plain.end("the authenticated connection that began under the old root")
	young.end("the connection that began under the new root")

	hasty := w.talk(encrypted)
	began = time.Now()
	w.rotateRoot()
	w.eventually("both hosts have acknowledged the next root", func() bool { return len(w.rootBehind()) == 0 })
	w.rotateRoot("--sign")
	w.eventually("nothing of the old root is left", func() bool { return len(w.rootBehind()) == 0 })
	w.rotateRoot("--finish")
	if took := time.Since(began); took > 25*time.Second {
		t.Logf("not looked at: the connection may have been renewed in the %v that three steps took", took)
		return
	}
	w.expect("the connection that stands on the old root", within(t, hasty.said), "reset")
}

// A host that is away holds the next root up and is named, whether it knew of the rotation
// or not; a proxy that is restarted in the midst of it, in whatever manner and with the
// controller away, believes what it had acknowledged.
func TestRootRotationWithHostsAway(t *testing.T) {
	w := newWorld(t)
	w.echo(w.Server)
	w.apply(allow("client-echo", "client", "echo", ""))
	const addr = "10.2.0.2:7001"
	m := w.newManager(w.client)
	id, _ := w.hostSVID(w.client)
	refused := func(step string) {
		t.Helper()
		r, err := w.fleet.CLI(w.ctx(), "ca", "rotate", "--root", step)
		if err != nil {
			t.Fatal(err)
		}
		if r.ExitCode != 1 || !strings.Contains(r.Stderr, id) || !strings.Contains(r.Stderr, "away") {
			t.Errorf("%s: exit code %d, %s", step, r.ExitCode, r.Stderr)
		}
	}
	waits := func() {
		t.Helper()
		w.eventually("only the host that is away is behind", func() bool { return slices.Equal(w.rootBehind(), []string{id + " away"}) })
	}
	works := func(when string) {
		t.Helper()
		w.expect(when, w.try(w.Client, "echo", addr, "hello"), "hello")
	}
	works("at first")
	m.end(syscall.SIGTERM)
	w.rotateRoot()
	waits()
	refused("--sign")
	m.start()
	w.eventually("it has acknowledged", func() bool { return len(w.rootBehind()) == 0 })
	works("published")

	if err := w.fleet.ControllerDaemon().Stop(); err != nil {
		t.Fatal(err)
	}
	_, version := w.ownRoots(w.client)
	for name, way := range map[string]func(){
		"restart": m.restart, "reload": m.reload, "crash": func() { m.end(syscall.SIGKILL); m.start() },
	} {
		way()
		if n, v := w.ownRoots(w.client); n != 2 || v != version || v == 0 {
			t.Errorf("%s: %d roots, version %d, was %d", name, n, v, version)
		}
		works(name + " with the controller away")
	}
	if err := w.fleet.StartController(w.ctx()); err != nil {
		t.Fatal(err)
	}
	m.end(syscall.SIGTERM) // it has acknowledged: it does not hold up this step
	w.rotateRoot("--sign")
	waits()
	refused("--finish")
	m.start()
	works("signed, and it was away")
	w.eventually("nothing of the old root is left", func() bool { return len(w.rootBehind()) == 0 })
	w.rotateRoot("--finish")
	for _, p := range []*fleet.Proxy{w.client, w.server} {
		w.eventually("the old root is believed no more", func() bool { n, _ := w.ownRoots(p); return n == 1 })
	}
	m.restart()
	works("at the end")
}
