package identity

// Known is Resolve where nothing has to be found out, nor waited for: of callers that
// were seen before, and listeners that are still their owner's. Not ok: Resolve knows
// more.
func (r *Resolver) Known(s Socket) (w *Workload, ok bool) {
	if len(r.asks) > 0 {
		return nil, false // of the process itself, whose memory may let one wait
	}
	var f facts
	var err error
	if s.Caller != nil {
		f, ok = r.knownCaller(s)
	} else {
		f, ok = r.knownListener(s)
	}
	cg := parseCgroup(f.cgroup)
	if !ok || !r.met(cg) {
		return nil, false
	}
	w, err = r.workloadIn(f, cg)
	return w, err == nil
}

func (r *Resolver) knownCaller(s Socket) (facts, bool) {
	c := s.Caller
	if c.check(&s) != nil {
		return facts{}, false
	}
	f := facts{cgroupID: c.CgroupID, cgroup: c.CgroupPath}
	if parseCgroup(c.CgroupPath).container != "" {
		return f, !r.perProcess
	}
	at := c.place()
	x, seen := r.callers.Get(c.key())
	if !seen || !at.placed() {
		return facts{}, false
	}
	f.uid, f.exe, f.exePath, f.sum = c.UID, x.file, x.path, x.sum
	f.process = Process{c.PID, c.key().start}
	return f, true
}

func (r *Resolver) knownListener(s Socket) (facts, bool) {
	if !s.Trusted || s.Inode == 0 {
		return facts{}, false
	}
	if parseCgroup(s.CgroupPath).container != "" && s.CgroupID != 0 && !r.perProcess {
		return facts{cgroupID: s.CgroupID, cgroup: s.CgroupPath}, true
	}
	if at := s.owned(); !at.placed() {
		return facts{}, false // whoever asks for a process's cgroup waits for those who change one
	}
	f, err := r.stillListens(s)
	return f, err == nil
}
