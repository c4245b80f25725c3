package main

import "golang.org/x/sys/unix"

// A frame is its kind, the length of its bytes (3 bytes, big endian), and they.
const (
	frameHeader = 4

	frameOpen = 'O' // an application's connection begins; its first bytes, if any
	frameData = 'D'
	frameEnd  = 'E' // of a direction; no bytes. After both the next Open may come.
)

// carrier is a connection between the hosts, which serves one connection of an application
// after the other. Events only say that something is to be tried: any of them may come too
// often, or be of an earlier application's.
type carrier struct {
	l       *bareLoop
	slot    int32
	fd, app int // sockets; app -1: it waits for the next
	to      unix.RawSockaddrInet4
	dead    bool
	queued  bool // in l.ready
	fdEnds  bool // an end or error of fd is to be read

	// What follows is of one application's connection.
	opened    bool // of the client's: the Open is sent
	connected bool // app has taken something, or could
	armed     bool // app is watched for room
	appEnds   bool // an end or error of app is to be read
	sentEnd   bool
	gotEnd    bool
	stuck     bool   // app takes no more: rest waits for it
	left      int    // of the frame that is coming in, bytes
	up        []byte // frames that fd does not take yet
	rest      []byte // of what fd has brought
	kept      []byte // rest is in there
}

// begin serves an application of the client's host, which mostly has said by now what it
// wants: its first bytes and the Open are one packet.
func (c *carrier) begin(app int) {
	c.app, c.connected = app, true
	c.out()
	if !c.dead && !c.opened {
		c.frame(0)
	}
	if !c.dead {
		c.watchApp(unix.EPOLL_CTL_ADD, watchApp)
	}
}

// happened handles an event of the application's socket, or of the carrier's.
func (c *carrier) happened(events uint32, app bool) {
	if !app {
		c.fdEnds = c.fdEnds || events&eventEnds != 0
		if events&(unix.EPOLLIN|eventEnds) != 0 && !c.stuck {
			c.in()
		}
		if events&unix.EPOLLOUT != 0 && len(c.up) > 0 {
			c.out()
		}
		return
	}
	if c.app < 0 {
		return
	}
	c.appEnds = c.appEnds || events&eventEnds != 0
	if events&(unix.EPOLLOUT|eventEnds) != 0 {
		c.connected = true
		if c.stuck {
			c.in()
		}
	}
	if events&(unix.EPOLLIN|eventEnds) != 0 {
		c.out()
	}
}

// out carries what the application says.
func (c *carrier) out() {
	for carried := 0; !c.dead; {
		if len(c.up) > 0 && !c.flush() || c.app < 0 || c.sentEnd {
			return
		}
		if carried >= bareTurn {
			c.later()
			return
		}
		n, errno := receive(c.app, c.l.buf[frameHeader:])
		if errno == unix.EAGAIN {
			return
		}
		if errno != 0 {
			c.abort()
			return
		}
		if n == 0 {
			if !c.opened && c.l.client {
				c.frame(0)
			}
			c.sentEnd = true
			c.write(append(c.l.buf[:0], frameEnd, 0, 0, 0))
			if c.gotEnd && !c.dead {
				c.finish()
			}
			return
		}
		c.frame(n)
		carried += n
		if n < bareBuffer && !c.appEnds {
			return // an event tells of more
		}
	}
}

// frame sends n bytes that are in the loop's buffer, and the Open if it is due.
func (c *carrier) frame(n int) {
	kind := byte(frameData)
	if !c.opened && c.l.client {
		kind, c.opened = frameOpen, true
	}
	c.write(append(c.l.buf[:0], kind, byte(n>>16), byte(n>>8), byte(n))[:frameHeader+n])
}

// write writes to the carrier now or, what it does not take, later.
func (c *carrier) write(b []byte) {
	if len(c.up) == 0 && !c.dead {
		n, errno := send(c.fd, b)
		if errno != 0 && errno != unix.EAGAIN {
			c.abort()
		}
		b = b[n:]
	}
	c.up = append(c.up, b...)
}

// flush writes what is left. False: there still is some.
func (c *carrier) flush() bool {
	n, errno := send(c.fd, c.up)
	if errno != 0 && errno != unix.EAGAIN {
		c.abort()
		return false
	}
	c.up = c.up[:copy(c.up, c.up[n:])]
	return len(c.up) == 0
}

// in carries what comes for the application.
func (c *carrier) in() {
	for carried := 0; !c.dead; {
		if carried >= bareTurn {
			c.later()
			return
		}
		b, more := c.rest, true
		retried := c.stuck
		if retried {
			c.stuck = false
		} else {
			k := copy(c.l.buf[:], c.rest) // part of a header
			n, errno := receive(c.fd, c.l.buf[k:])
			if errno == unix.EAGAIN {
				return
			}
			if errno != 0 || n == 0 { // it ends between two frames and connections only
				c.abort()
				return
			}
			carried += n
			b, more = c.l.buf[:k+n], k+n == len(c.l.buf) || c.fdEnds
		}
		if b = c.deliver(b); retried {
			c.rest = b
		} else {
			c.kept = append(c.kept[:0], b...)
			c.rest = c.kept
		}
		if c.stuck || !more {
			return
		}
	}
}

// deliver gives frames to the application, and returns what it does not take, or what is not
// complete yet.
func (c *carrier) deliver(b []byte) []byte {
	fresh := false
	for !c.dead {
		if c.left == 0 {
			if len(b) < frameHeader || b[0] == frameEnd && !c.connected {
				c.stuck = len(b) >= frameHeader
				break
			}
			kind := b[0]
			if (c.app < 0) != (kind == frameOpen) {
				c.abort()
				return nil
			}
			c.left = int(b[1])<<16 | int(b[2])<<8 | int(b[3])
			b = b[frameHeader:]
			switch kind {
			case frameOpen:
				var errno unix.Errno
				if c.app, errno = dial(c.to); errno != 0 {
					c.abort()
					return nil
				}
				fresh = true
			case frameEnd:
				c.gotEnd = true
				if c.sentEnd {
					c.finish()
				} else {
					_, _, _ = unix.RawSyscall(unix.SYS_SHUTDOWN, uintptr(c.app), unix.SHUT_WR, 0)
				}
			}
		}
		if c.left == 0 || len(b) == 0 {
			if len(b) == 0 {
				break
			}
			continue
		}
		part := b[:min(c.left, len(b))]
		n, errno := send(c.app, part)
		if errno != 0 && errno != unix.EAGAIN {
			c.abort()
			return nil
		}
		c.connected = c.connected || errno == 0
		c.left -= n
		b = b[n:]
		if c.stuck = n < len(part); c.stuck {
			break
		}
	}
	switch {
	case c.dead || c.app < 0:
	case fresh:
		// Its ACKs are not to be held back any longer, or an answer in pieces would wait.
		setOption(c.app, unix.IPPROTO_TCP, unix.TCP_QUICKACK, 1)
		c.armed = !c.connected || c.stuck
		c.watchApp(unix.EPOLL_CTL_ADD, watchApp)
	case c.stuck && !c.armed:
		c.armed = true
		c.watchApp(unix.EPOLL_CTL_MOD, watchApp)
	}
	return b
}

// watchApp watches the application, for room only where it had none: most never need it, and
// each would have an event to begin with.
func (c *carrier) watchApp(op int, events uint32) {
	if c.armed {
		events |= unix.EPOLLOUT
	}
	if c.l.watch(op, c.app, c.slot<<1|1, events) != 0 {
		c.abort()
	}
}

// later has the loop come back after all others.
func (c *carrier) later() {
	if !c.queued {
		c.queued = true
		c.l.ready = append(c.l.ready, c)
	}
}

// finish ends an application's connection of which both directions have ended.
func (c *carrier) finish() {
	closeFD(c.app)
	c.app = -1
	c.opened, c.connected, c.armed, c.appEnds, c.sentEnd, c.gotEnd = false, false, false, false, false, false
	if c.l.client {
		c.l.idle[c.to] = append(c.l.idle[c.to], c)
	}
}

// abort ends everything: whoever is at either end sees a reset.
func (c *carrier) abort() {
	if c.dead {
		return
	}
	c.dead = true
	reset(c.fd)
	if c.app >= 0 {
		reset(c.app)
		c.app = -1
	}
	c.l.carriers[c.slot] = nil
	c.l.free = append(c.l.free, c.slot)
}
