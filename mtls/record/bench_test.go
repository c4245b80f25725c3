package record

import (
	"errors"
	"io"
	"net"
	"runtime"
	"syscall"
	"testing"
	"time"
)

const benchChunk = 64 << 10

// benchEnds are a connection under crypto/tls, and one under this package, both
// with AES-256-GCM over loopback TCP.
func benchEnds(b *testing.B, own bool) (client, server stream) {
	x, y := newParties().handshake(b)
	for _, e := range []*end{x, y} {
		if err := e.tcp.SetDeadline(time.Time{}); err != nil {
			b.Fatal(err)
		}
	}
	if own {
		return x.take(b), y.take(b)
	}
	x.tap.Loosen()
	y.tap.Loosen()
	return x.tls, y.tls
}

// cpu is what the process has used, both ends of the connection together.
func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func reportCPU(b *testing.B, before time.Duration, bytes int) {
	b.ReportMetric((cpu(b)-before).Seconds()/(float64(bytes)/1e9), "cpu-s/GB")
}

// BenchmarkBulk is one direction: a write of 64 KiB an op, read as fast as it comes.
func BenchmarkBulk(b *testing.B) {
	for _, own := range []bool{false, true} {
		b.Run(map[bool]string{false: "cryptotls", true: "record"}[own], func(b *testing.B) {
			client, server := benchEnds(b, own)
			chunk := make([]byte, benchChunk)
			done := make(chan error, 1)
			b.SetBytes(benchChunk)
			b.ReportAllocs()
			before := cpu(b)
			b.ResetTimer()
			go func() {
				var err error
				for range b.N {
					if _, err = client.Write(chunk); err != nil {
						break
					}
				}
				done <- errors.Join(err, client.CloseWrite())
			}()
			var err error
			if c, ok := server.(*Conn); ok {
				for err == nil {
					_, err = c.Batch()
				}
			} else {
				buf := make([]byte, benchChunk)
				for err == nil {
					_, err = server.Read(buf)
				}
			}
			b.StopTimer()
			reportCPU(b, before, b.N*benchChunk)
			if err != io.EOF { //nolint:errorlint // exactly this
				b.Fatal(err)
			}
			if err := <-done; err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkRelay is what two proxies do: TCP, TLS, TCP, with the application's two
// ends in the process too.
func BenchmarkRelay(b *testing.B) {
	for _, own := range []bool{false, true} {
		b.Run(map[bool]string{false: "cryptotls", true: "record"}[own], func(b *testing.B) {
			client, server := benchEnds(b, own)
			app, near := tcpPair(b)
			far, sink := tcpPair(b)
			for _, c := range []net.Conn{app, near, far, sink} {
				if err := c.SetDeadline(time.Time{}); err != nil {
					b.Fatal(err)
				}
			}
			chunk := make([]byte, benchChunk)
			done := make(chan error, 3)
			b.SetBytes(benchChunk)
			b.ReportAllocs()
			before := cpu(b)
			b.ResetTimer()
			go func() {
				var err error
				for range b.N {
					if _, err = app.Write(chunk); err != nil {
						break
					}
				}
				done <- errors.Join(err, app.CloseWrite())
			}()
			go func() {
				_, err := pipe(client, near)
				done <- errors.Join(err, client.CloseWrite())
			}()
			go func() {
				_, err := pipe(far, server)
				done <- errors.Join(err, far.CloseWrite())
			}()
			buf := make([]byte, 4*benchChunk)
			var err error
			for err == nil {
				_, err = sink.Read(buf)
			}
			b.StopTimer()
			reportCPU(b, before, b.N*benchChunk)
			if err != io.EOF { //nolint:errorlint // exactly this
				b.Fatal(err)
			}
			for range 3 {
				if err := <-done; err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// pipe copies with this package's ways where a side has them, and else as the relay
// does over crypto/tls.
func pipe(dst io.Writer, src io.Reader) (int64, error) {
	if w, ok := dst.(*Conn); ok {
		return w.ReadFrom(src)
	}
	if r, ok := src.(*Conn); ok {
		return r.WriteTo(dst)
	}
	return io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, make([]byte, benchChunk))
}

// BenchmarkEcho is a request and response of 1 KiB an op.
func BenchmarkEcho(b *testing.B) {
	for _, own := range []bool{false, true} {
		b.Run(map[bool]string{false: "cryptotls", true: "record"}[own], func(b *testing.B) {
			client, server := benchEnds(b, own)
			done := make(chan error, 1)
			go func() {
				buf := make([]byte, 4096)
				for {
					n, err := server.Read(buf)
					if err == io.EOF { //nolint:errorlint // exactly this
						err = server.CloseWrite()
						done <- err
						return
					}
					if err == nil {
						_, err = server.Write(buf[:n])
					}
					if err != nil {
						done <- err
						return
					}
				}
			}()
			chunk := make([]byte, 1024)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := client.Write(chunk); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(client, chunk); err != nil {
					b.Fatal(err)
				}
			}
			if err := client.CloseWrite(); err != nil {
				b.Fatal(err)
			}
			if err := <-done; err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkIdle is the memory of a connection at rest, both ends, their readers
// waiting, without what the kernel has.
func BenchmarkIdle(b *testing.B) {
	for _, own := range []bool{false, true} {
		b.Run(map[bool]string{false: "cryptotls", true: "record"}[own], func(b *testing.B) {
			const connections = 200
			var ends []stream
			var m0, m1 runtime.MemStats
			p := newParties()
			runtime.GC()
			runtime.ReadMemStats(&m0)
			for range b.N {
				ends = ends[:0]
				for range connections {
					x, y := p.handshake(b)
					var client, server stream = x.tls, y.tls
					if own {
						client, server = x.take(b), y.take(b)
					}
					for _, s := range []stream{client, server} {
						if _, err := s.Write([]byte("hello")); err != nil {
							b.Fatal(err)
						}
					}
					for _, s := range []stream{client, server} {
						if _, err := io.ReadFull(s, make([]byte, 5)); err != nil {
							b.Fatal(err)
						}
						go func() { _, _ = s.Read(make([]byte, 1)) }()
					}
					ends = append(ends, client, server)
				}
				runtime.GC()
				runtime.GC()
				runtime.ReadMemStats(&m1)
				b.ReportMetric(float64(m1.HeapAlloc+m1.StackInuse-m0.HeapAlloc-m0.StackInuse)/float64(2*connections), "B/end")
			}
			runtime.KeepAlive(ends)
		})
	}
}
