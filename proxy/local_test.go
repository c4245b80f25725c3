package proxy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/symbolon/symbolon/identity"
)

// asUser runs nc as a user of this host, which makes it a workload of its own: it
// sends text, and returns what comes back before the end.
func asUser(t *testing.T, uid uint32, to netip.AddrPort, text string) (string, error) {
	t.Helper()
	c := exec.CommandContext(t.Context(), "nc", "-N", "-w", fmt.Sprint(int(patience/time.Second)), to.Addr().String(), fmt.Sprint(to.Port()))
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	c.Stdin = strings.NewReader(text)
	c.Dir = "/"
	out, err := c.Output()
	return string(out), err
}

// Both ends here: each is identified by its own socket, both sides decide, and
// there is no TLS.
func TestLocal(t *testing.T) {
	const webUser, stranger = 23001, 23002
	w := newWorld(t)
	w.creds.set(fmt.Sprint(webUser), w.web())
	for _, address := range []string{protected4, protected6, "127.0.0.1", "::1"} {
		to := netip.AddrPortFrom(netip.MustParseAddr(address), appPort)
		if got, err := asUser(t, webUser, to, "are you there?"); err != nil || got != "are you there?" {
			t.Errorf("%s: %q, %v", to, got, err)
		}
		r := w.records.next()
		if !r.Local || r.Reporter != "local" || r.Outcome != "allow" || r.Protection != "none" || r.Source.SPIFFEID != webID ||
			r.Destination.SPIFFEID != "spiffe://acme.example/prod/db" || r.ClientPolicy != "/prod/web-calls-db" || r.ServerPolicy != "/prod/web-calls-db" ||
			r.BytesSent != 14 || r.BytesReceived != 14 {
			t.Errorf("%s: recorded %+v", to, r)
		}
	}
	reached := w.app.accepts.Load()
	for _, tc := range []struct {
		name    string
		prepare func()
		uid     uint32
		reason  string
	}{
		{"a user without an identity", func() {}, stranger, "no-identity"},
		{"policy denies", func() { w.policy(denied) }, webUser, "policy"},
		{"a workload that nobody allows", func() {
			w.policy(baseline)
			w.creds.set(fmt.Sprint(webUser), w.ca.workload("/prod/other", map[string][]string{"app": {"other"}}))
		}, webUser, "default"},
	} {
		tc.prepare()
		if got, _ := asUser(t, tc.uid, w.app.addr, "secret"); got != "" {
			t.Errorf("%s: the client reads %q", tc.name, got)
		}
		if r := w.records.next(); r.Reason != tc.reason || r.Outcome != "deny" || !r.Local && tc.reason != "no-identity" {
			t.Errorf("%s: recorded %+v", tc.name, r)
		}
	}
	if got, _ := asUser(t, webUser, netip.AddrPortFrom(netip.MustParseAddr(protected4), 7999), "x"); got != "" { // nc says nothing of a reset
		t.Errorf("a port where nobody listens: the client reads %q", got)
	}
	if r := w.records.next(); r.Reason != "refused" || r.Outcome != "error" {
		t.Errorf("a port where nobody listens: recorded %s %s", r.Outcome, r.Reason)
	}
	if w.app.accepts.Load() != reached || strings.Contains(w.app.received(), "secret") {
		t.Error("the application was reached")
	}
}

// An application that speaks first is not kept waiting for the last ACK of its handshake,
// which the client's first bytes would bring: TCP sends it by itself after 200 ms.
func TestLocalServerSpeaksFirst(t *testing.T) {
	w := newWorld(t)
	w.policy(strings.Replace(baseline, "subject: {app: web}", "subject: {app: db}", 1)) // this process is both
	w.app.handle(func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "hello")
		_, _ = io.Copy(io.Discard, c)
	})
	fastest := time.Hour // a busy machine may keep some waiting, but not all
	for range 20 {
		began := time.Now()
		c := w.connect(w.app.addr)
		if _, err := io.ReadFull(c, make([]byte, len("hello"))); err != nil {
			t.Fatal(err)
		}
		fastest = min(fastest, time.Since(began))
		_ = c.Close()
		w.records.next()
		if fastest < 100*time.Millisecond {
			return
		}
	}
	t.Errorf("its first word took %v or longer", fastest)
}

// A local connection shows no certificate; what counts is that both ends still have
// one that is valid.
func TestLocalExpiry(t *testing.T) {
	w := newWorld(t)
	w.policy(strings.Replace(baseline, "subject: {app: web}", "subject: {app: db}", 1)) // this process is both
	c := w.connect(w.app.addr)
	speaks(t, c)
	fresh := w.ca.leaf("/prod/db", map[string][]string{"app": {"db"}})
	fresh.NotAfter = time.Now().Add(24 * time.Hour)
	cred := w.ca.credential(fresh, identity.NewSVID)
	w.p.CredentialChanged(w.creds.set("0", cred), cred)
	w.clock.advance(2 * time.Hour)
	w.p.table.sweep(w.p.now())
	speaks(t, c) // it was renewed in time
	w.clock.advance(24 * time.Hour)
	if _, err := ended(t, c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the application sees %v", err)
	}
	if r := w.records.next(); r.Reason != "svid-expired" || r.Outcome != "deny" {
		t.Errorf("recorded %s %s (%s)", r.Outcome, r.Reason, r.Detail)
	}
}
