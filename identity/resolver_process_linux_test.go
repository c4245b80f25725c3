package identity

import (
	"errors"
	"os"
	"strings"
	"testing"
)

func newProcessResolver(t *testing.T) *Resolver {
	t.Helper()
	r, err := NewProcessResolver()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Two processes of one program and one user are two workloads, each with the process
// that its socket is of, whichever way they are found.
func TestProcessesAreToldApart(t *testing.T) {
	needRoot(t)
	r := newProcessResolver(t)
	exe := program(t, publicDir(t), "client")
	l := listen(t)
	a, b := start(t, exe, "dial "+l.Addr().String(), as(nobody)), start(t, exe, "dial "+l.Addr().String(), as(nobody))
	for range 2 { // found, then remembered
		for _, c := range []*child{a, b} {
			pid := c.cmd.Process.Pid
			found, called := mustResolve(t, r, inRoot(nobody, c.inode)), mustResolve(t, r, callerOf(t, r, pid, nobody, ""))
			if found.Key != called.Key || found.Key.Process.PID != pid || found.Key.Process.Start == 0 {
				t.Errorf("process %d is %+v by its socket and %+v by its record", pid, found.Key, called.Key)
			}
			if _, err := PinProcess(found); err != nil {
				t.Errorf("it cannot be pinned: %v", err)
			}
			expect(t, found, map[string]string{"proc.exe": exe, "os.user": "nobody"})
		}
	}
	one, two := mustResolve(t, r, inRoot(nobody, a.inode)).Key, mustResolve(t, r, inRoot(nobody, b.inode)).Key
	if one == two || one.Program() != two.Program() {
		t.Errorf("%+v and %+v", one, two)
	}
	if w := mustResolve(t, newResolver(t), inRoot(nobody, a.inode)); w.Key.Process != (Process{}) {
		t.Errorf("told apart where that is not asked for: %+v", w.Key)
	}
}

// A listener's process is its workload, also when it is remembered.
func TestListenerOfAProcess(t *testing.T) {
	needRoot(t)
	r := newProcessResolver(t)
	c := start(t, program(t, publicDir(t), "server"), "listen", as(nobody))
	s := inRoot(nobody, c.inode)
	s.Listener = 4711
	for range 3 {
		if w := mustResolve(t, r, s); w.Key.Process.PID != c.cmd.Process.Pid {
			t.Errorf("%+v", w.Key)
		}
	}
	c.end()
	if w, err := r.Resolve(t.Context(), s); !errors.Is(err, ErrUnknownOwner) {
		t.Errorf("its end: %v, %v", w, err)
	}
}

// Who has ended cannot be attested: what else is known of it does not help. Nor who
// runs another program by now, whose number and place would be attested instead.
func TestNoAttestationOfTheDead(t *testing.T) {
	needRoot(t)
	r := newProcessResolver(t)
	exe := program(t, publicDir(t), "client")
	c := start(t, exe, "hold", as(nobody))
	alive := callerOf(t, r, c.cmd.Process.Pid, nobody, "")
	contained := alive
	path := "/system.slice/docker-" + strings.Repeat("ab", 32) + ".scope"
	of := *alive.Caller
	contained.CgroupID, contained.CgroupPath, contained.Caller = 99, path, &of
	of.CgroupID, of.CgroupPath = 99, path
	w := mustResolve(t, r, contained)
	expect(t, w, map[string]string{"container.id": strings.Repeat("ab", 32), "proc.exe": "", "proc.uid": ""})
	if w.Key.Process.PID != c.cmd.Process.Pid || w.Key.Exe == (FileID{}) || w.Key.UID != 0 {
		t.Errorf("%+v", w.Key)
	}
	if _, err := PinProcess(w); err != nil {
		t.Errorf("it cannot be pinned: %v", err)
	}

	for name, change := range map[string]func(*Caller){
		"another program": func(c *Caller) { c.Exe.Ctime++ },
		"another start":   func(c *Caller) { c.Start -= 5 * clockTick },
		"none any more":   func(c *Caller) { c.PID = 1<<22 + 1 },
	} {
		for _, s := range []Socket{alive, contained} {
			was := *s.Caller
			s.Caller = &was
			change(s.Caller)
			if w, err := newProcessResolver(t).Resolve(t.Context(), s); !errors.Is(err, ErrUnknownOwner) {
				t.Errorf("%s in %s: %v, %v", name, s.CgroupPath, w, err)
			}
		}
	}
	here, inode := dial(t, listen(t))
	closed := inRoot(uint32(os.Geteuid()), inode)
	closed.CgroupPath = "/system.slice/x.service"
	here.Close()
	if w, err := r.Resolve(t.Context(), closed); err == nil {
		t.Errorf("a socket of nobody's: %+v", w.Key)
	}
}
