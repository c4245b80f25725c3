package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"sync"
)

// The backend's protocol. A connection's first byte says what it is for. Sizes are
// big endian.
const (
	// opEcho: what arrives goes back.
	opEcho = 'e'
	// opSink: blocks of a 4-byte length and as many bytes are thrown away. Length 0
	// asks how many bytes have arrived since the last such question, lengths not
	// counted: 8 bytes come back.
	opSink = 'd'
	// opSource: each 4-byte length asks for as many bytes.
	opSource = 's'
)

const (
	// ioBuffer is what load generator and backend read and write at once.
	ioBuffer = 256 << 10
	// piece is what a bulk download asks for at once; two are under way.
	piece = 8 << 20
	// echoBuffer is more than any request of ours.
	echoBuffer = 16 << 10
)

// backendMain is the server of all workloads.
func backendMain(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("backend", flag.ContinueOnError)
	listen := f.String("listen", "", "address and port")
	if err := f.Parse(args); err != nil {
		return err
	}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	err = serveBackend(ctx, l)
	if ctx.Err() != nil {
		return nil // told to end
	}
	return err
}

// serveBackend serves until ctx ends, and then ends the connections.
func serveBackend(ctx context.Context, l net.Listener) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		wg.Go(func() {
			defer c.Close()
			defer context.AfterFunc(ctx, func() { c.Close() })()
			_ = serveConn(c) // the load generator sees what failed
		})
	}
}

func serveConn(c net.Conn) error {
	var op [1]byte
	if _, err := io.ReadFull(c, op[:]); err != nil {
		return err
	}
	switch op[0] {
	case opEcho:
		return echo(c)
	case opSink:
		return sink(c)
	case opSource:
		return source(c)
	}
	return fmt.Errorf("no such operation: %q", op[0])
}

// echo does not use io.Copy, which would splice: an application would not.
func echo(c net.Conn) error {
	// Nothing is allocated before the first request, and little: thousands of
	// these are idle at once.
	buf := make([]byte, 1<<10)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return ignoreEOF(err)
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return err
		}
		if n == len(buf) && n < echoBuffer {
			buf = make([]byte, echoBuffer)
		}
	}
}

func sink(c net.Conn) error {
	r := bufio.NewReaderSize(c, ioBuffer)
	var length [4]byte
	total := uint64(0)
	for {
		if _, err := io.ReadFull(r, length[:]); err != nil {
			return ignoreEOF(err)
		}
		n := binary.BigEndian.Uint32(length[:])
		if n == 0 {
			if _, err := c.Write(binary.BigEndian.AppendUint64(nil, total)); err != nil {
				return err
			}
			total = 0
			continue
		}
		if _, err := r.Discard(int(n)); err != nil {
			return err
		}
		total += uint64(n)
	}
}

func source(c net.Conn) error {
	r := bufio.NewReader(c)
	buf := make([]byte, ioBuffer)
	var length [4]byte
	for {
		if _, err := io.ReadFull(r, length[:]); err != nil {
			return ignoreEOF(err)
		}
		for left := int(binary.BigEndian.Uint32(length[:])); left > 0; {
			n, err := c.Write(buf[:min(left, len(buf))])
			if err != nil {
				return err
			}
			left -= n
		}
	}
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}
