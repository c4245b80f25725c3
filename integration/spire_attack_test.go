package integration

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/symbolon/symbolon/internal/spirelab"
)

// cloneAs runs a program with a process ID of the caller's choice, as only root can:
// clone3(2), whose number is the same on all architectures, with set_tid. 75: it is taken.
const cloneAs = `my ($pid, @command) = @ARGV;
my $tid = pack("l", $pid);
my $args = pack("Q11", 0, 0, 0, 0, 17, 0, 0, 0, unpack("Q", pack("P", $tid)), 1, 0);
my $child = syscall(435, $args, 88);
if ($child < 0) { print STDERR "clone3: $!\n"; exit 75 }
if ($child == 0) { exec @command; exit 127 }
waitpid($child, 0);
exit($? >> 8);`

// SPIRE attests processes, and no trick with processes gives one the SVID of another: not
// the number of one that has ended, not its program, user and unit, not the execution of
// its program in the moment of attestation.
func TestSPIREAttestation(t *testing.T) {
	w := newSpireWorld(t, []string{"prod.example"}, "perl")
	// Of all that runs this program, those of one group.
	const member, addr = "0:4242", "10.2.0.2:7001"
	w.entry(w.clients, spirelab.Entry{Path: "/acme/prod/client", Selectors: []string{"unix:path:" + self(t), "unix:gid:4242"}})
	w.entry(w.servers, byPath("/acme/prod/echo", self(t)))
	w.apply(profileID("client", "spiffe://prod.example/acme/prod/client") + profileID("echo", "spiffe://prod.example/acme/prod/echo") +
		allow("client-echo", "client", "echo", ""))
	w.enrolSPIRE()
	w.echo(w.Server)
	w.eventually("SPIRE's entries are known to its agents", func() bool {
		return w.begin(w.Client, member, "echo", addr, "hello").wait() == "hello"
	})

	t.Run("the same program, user and unit", func(t *testing.T) {
		held := w.begin(w.Client, member, "hold", "10.2.0.2:7002")
		w.eventually("the member's connection is open", func() bool { return held.said() == "open" })
		w.expect("who is not of the group", w.begin(w.Client, "0:0", "echo", addr, "x").wait(), "reset")
		w.expect("the member's connection", held.said(), "open")
		held.cancel()
	})
	t.Run("the number of a process that has ended", func(t *testing.T) {
		reused := 0
		for range 10 {
			member := w.begin(w.Client, member, "echo", addr, "member")
			w.expect("the member", member.wait(), "member")
			c := w.Client.Command(w.ctx(), "perl", "-e", cloneAs, fmt.Sprint(member.cmd.ProcessState.Pid()), self(t))
			c.Env = append(os.Environ(), programEnv+"=echo "+addr+" x", "GORACE=atexit_sleep_ms=0")
			c.Unit = "client.service"
			r, err := c.Result()
			w.must(err)
			if r.ExitCode == 75 {
				continue // somebody was faster
			}
			reused++
			w.expect("its successor", strings.TrimSpace(r.Stdout), "reset")
			if reused == 3 {
				return
			}
		}
		t.Errorf("a number was reused %d times, which proves nothing", reused)
	})
	other := w.copyOfSelf()
	t.Run("another program, executed by a member", func(t *testing.T) {
		w.expect("before and after", w.begin(w.Client, member, "become", addr, other).wait(), "before\nreset")
	})
	t.Run("the member's program, executed by another right after connecting", func(t *testing.T) {
		for range 10 {
			said := w.tryFileAs(w.Client, member, other, "client.service", "switch", addr, self(t))
			if strings.Contains(said, "stolen") {
				t.Fatal("another program's bytes passed as the member's")
			}
			w.expect("what the member's program inherits", said, "reset")
		}
	})
	t.Run("the member itself, all the while", func(t *testing.T) {
		w.expect("echo", w.begin(w.Client, member, "echo", addr, "hello").wait(), "hello")
	})
}
