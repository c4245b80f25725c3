package proxy

import (
	"errors"
	"io"
	"net"
	"sync/atomic"
	"time"

	"github.com/symbolon/symbolon/mtls"
)

// far is the side away from the accepted connection: a tunnel, or plain TCP.
// Reset ends both directions with an RST; Close and Reset may be called more than
// once and from any goroutine.
type far interface {
	io.Reader
	io.Writer
	CloseWrite() error
	Close() error
	Reset() error
	// Raw is the socket to splice with, or nil.
	Raw() *net.TCPConn
}

// tunnelled is a tunnel as far: a clean end gives it back instead of closing it.
type tunnelled struct {
	*mtls.Conn
	back func(kept)
}

func (t tunnelled) Close() error {
	if t.back != nil && t.Reusable() {
		t.back(kept{Conn: t.Conn})
		return nil
	}
	return t.Conn.Close()
}

// plain is TCP without a tunnel, as far.
type plain struct{ *net.TCPConn }

func (p plain) Raw() *net.TCPConn { return p.TCPConn }
func (p plain) Reset() error      { return reset(p.TCPConn) }

// copier carries bytes between near and far by a goroutine a direction, until both
// have ended. A clean end of one is passed on as such (half-close);
// anything else resets both sides at once.
type copier struct {
	near *net.TCPConn
	far  far
	// started is when the connection was accepted.
	started time.Time
	// serverIsNear tells which side the first byte is measured from.
	serverIsNear bool
	// toFar and toNear count bytes by direction, firstByte the microseconds until
	// the server's first byte.
	toFar, toNear, firstByte atomic.Uint64
	half                     atomic.Bool // one of the two directions has ended

	uplink chan error
}

// start begins the direction away from near. It may run before the far side has
// given its verdict, where what is written cannot reach an application before.
func (r *copier) start() {
	inlineUrgent(r.near)
	inlineUrgent(r.far.Raw())
	r.uplink = make(chan error, 1)
	go func() {
		err := pump(r.far, r.far.Raw(), r.near, r.near, &r.toFar, r.firstIf(r.serverIsNear))
		if err != nil {
			r.abort()
		}
		r.half.Store(true)
		r.uplink <- err
	}()
}

// finish runs the other direction, waits for both, and closes everything. The
// error is the first that cut a direction short; nil: both ended cleanly.
func (r *copier) finish() error {
	if r.uplink == nil {
		r.start()
	}
	down := pump(plain{r.near}, r.near, r.far, r.far.Raw(), &r.toNear, r.firstIf(!r.serverIsNear))
	if down != nil {
		r.abort()
	}
	r.half.Store(true)
	up := <-r.uplink
	if up == nil && down == nil {
		r.far.Close()
		return r.near.Close()
	}
	if up != nil && !errors.Is(up, net.ErrClosed) {
		return up
	}
	if down != nil {
		return down
	}
	return up
}

// wait is finish for a connection that was refused after start. The error is how
// the direction away from near had ended; nil: it had not.
func (r *copier) wait() error {
	if r.uplink == nil {
		r.abort()
		return nil
	}
	select {
	case err := <-r.uplink:
		r.abort()
		return err
	default:
	}
	r.abort()
	if err := <-r.uplink; !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// abort resets both sides, which ends both directions.
func (r *copier) abort() {
	_ = r.far.Reset()
	_ = reset(r.near)
}

// firstIf is what a pump does at its first byte: note the time, if it is the
// server's.
func (r *copier) firstIf(server bool) func() {
	if !server {
		return nil
	}
	return func() { r.firstByte.Store(uint64(max(time.Since(r.started).Microseconds(), 1))) }
}

type writeCloser interface {
	io.Writer
	CloseWrite() error
}

// pump copies one direction and passes its clean end on. first is called at the
// first byte. rawDst and rawSrc, where both are given, let the kernel splice.
func pump(dst writeCloser, rawDst *net.TCPConn, src io.Reader, rawSrc *net.TCPConn, count *atomic.Uint64, first func()) error {
	for {
		err := pumpUser(dst, src, rawDst != nil && rawSrc != nil, count, first)
		if errors.Is(err, io.EOF) {
			return dst.CloseWrite()
		}
		if err != nil {
			return err
		}
		first = nil
		if err := splice(rawDst, rawSrc, count); err != nil {
			return err
		}
	}
}

// pumpUser copies by way of user space until src ends, io.EOF, or, where the kernel
// can splice, until there is so much at once that it is worth a pipe.
func pumpUser(dst io.Writer, src io.Reader, canSplice bool, count *atomic.Uint64, first func()) error {
	b := buffers.Get().(*[]byte)
	defer buffers.Put(b)
	for {
		n, err := src.Read(*b)
		if n > 0 {
			if first != nil {
				first()
				first = nil
			}
			if _, werr := dst.Write((*b)[:n]); werr != nil {
				return werr
			}
			count.Add(uint64(n))
		}
		if err != nil || canSplice && n == len(*b) {
			return err
		}
	}
}
