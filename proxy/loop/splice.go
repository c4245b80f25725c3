package loop

import "golang.org/x/sys/unix"

const (
	// pipeSize is how much one splice(2) moves at most, bytes: what it moves are pages, and
	// the larger it is, the fewer wake-ups and half empty packets there are. It is what the
	// kernel allows those without privileges (fs.pipe-max-size).
	pipeSize = 1 << 20
	// heldMost is how much a loop's pipes may hold together, bytes, before each gets
	// heldLittle only. The kernel counts what is in a pipe to nobody.
	heldMost   = 64 << 20
	heldLittle = 64 << 10
	// keepPipes is how many empty ones a loop keeps.
	keepPipes = 16
)

// pipe is where bytes are between two splices; a direction has one only while it
// holds any.
type pipe struct {
	r, w, held int
}

func (p *pipe) close() {
	_ = unix.Close(p.r)
	_ = unix.Close(p.w)
}

// pipe is an empty one; nil: out of descriptors, and the buffer must do.
func (l *Loop) pipe() *pipe {
	if n := len(l.pipes); n > 0 {
		p := l.pipes[n-1]
		l.pipes = l.pipes[:n-1]
		return p
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil
	}
	_, _ = unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize) // or the default
	return &pipe{r: fds[0], w: fds[1]}
}

// unpipe takes an empty pipe back.
func (l *Loop) unpipe(p *pipe) {
	if len(l.pipes) < keepPipes {
		l.pipes = append(l.pipes, p)
	} else {
		p.close()
	}
}

// splice moves bytes into p, from where flush takes them on.
func (l *Loop) splice(d *direction, p *pipe) (int, error) {
	most := pipeSize
	if l.held >= heldMost {
		most = heldLittle
	}
	n, err := splice(d.src.fd, p.w, most)
	if n > 0 {
		p.held, d.pipe = n, p
		l.held += n
		d.spent += n
		d.bulk = n >= smallRead
		return n, nil
	}
	l.unpipe(p)
	if err != nil && err != errAgain { //nolint:errorlint // one value, made for this
		return 0, err
	}
	// Nothing there, the end, or urgent data, which splice(2) does not move and waits
	// behind. A read knows.
	return 0, d.stuck()
}

// spill is for the end of a relay: what d's pipe holds is lost.
func (l *Loop) spill(d *direction) {
	if d.pipe != nil {
		l.held -= d.pipe.held
		d.pipe.close()
		d.pipe = nil
	}
}

// stuck looks why splice(2) has moved nothing. Errors: the socket's, which are told
// once: a read behind one would take a reset for an end.
func (d *direction) stuck() error {
	_, err := peek(d.src.fd)
	if err == errAgain { //nolint:errorlint // one value, made for this
		d.src.readable = false
		return nil
	}
	d.bulk = false
	return err
}

// drain empties d's pipe. False: dst does not take all of it now, or the relay is
// over.
func (l *Loop) drain(d *direction) bool {
	p := d.pipe
	for p.held > 0 {
		n, err := splice(p.r, d.dst.fd, p.held)
		if err == errAgain { //nolint:errorlint // one value, made for this
			return false
		}
		if err != nil {
			l.finish(d.relay, err)
			return false
		}
		p.held -= n
		l.held -= n
	}
	d.pipe = nil
	l.unpipe(p)
	return true
}
