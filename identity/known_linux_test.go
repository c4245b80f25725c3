package identity

import (
	"strings"
	"testing"
)

// What was found out once is known from then on, without asking for anything that could
// let the asker wait. That it is never something else than Resolve says, mustResolve
// looks at in all tests.
func TestKnown(t *testing.T) {
	cg := cgroups(t, "web.service")[0]
	r := newResolver(t)
	exe := program(t, publicDir(t), "server")
	p := start(t, exe, "listen", within(t, r, cg, nil))
	listener := socketIn(t, r, cg, 0, p.inode)
	listener.Listener = 4711
	caller := callerOf(t, r, p.cmd.Process.Pid, 0, cg)
	for name, s := range map[string]Socket{"a listener": listener, "a caller": caller} {
		if w, ok := r.Known(s); ok {
			t.Errorf("%s is known before it was looked at: %v", name, w)
		}
		w := mustResolve(t, r, s)
		if known, ok := r.Known(s); !ok || known != w {
			t.Errorf("%s: known %v, %t, want %v", name, known, ok, w)
		}
	}
	foreign := caller
	foreign.Caller = &Caller{}
	*foreign.Caller = *caller.Caller
	foreign.Caller.ActingUID = nobody
	if w, ok := r.Known(foreign); ok {
		t.Errorf("a caller that acts for somebody else: %v", w)
	}
	closing := listener
	closing.Trusted = false
	if w, ok := r.Known(closing); ok {
		t.Errorf("a socket that is closing: %v", w)
	}
	p.end()
	if w, ok := r.Known(listener); ok {
		t.Errorf("a listener without a process: %v", w)
	}
	path := "/system.slice/docker-" + strings.Repeat("ab", 32) + ".scope"
	contained := Socket{Inode: 1, CgroupID: 7, CgroupPath: path, Trusted: true}
	if w, ok := r.Known(contained); !ok || w != mustResolve(t, r, contained) {
		t.Errorf("a container's socket: %v, %t", w, ok)
	}
	asks := asking(t, AttrArgs)
	mustResolve(t, asks, callerOf(t, asks, start(t, exe, "hold", within(t, r, cg, nil)).cmd.Process.Pid, 0, cg))
	if w, ok := asks.Known(contained); ok {
		t.Errorf("where processes are asked: %v", w)
	}
}
